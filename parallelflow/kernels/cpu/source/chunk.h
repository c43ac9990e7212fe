// One chunk of one head: its rows, its decay, how its rows see each other, and the inverse of that.
//
//     c_i = g_1 + … + g_i        E_ij = e^{c_i - c_j}  (j <= i)      no factor above 1
//     M_ij = E_ij k_i·k_j  (j < i)      P_ij = scale E_ij q_i·k_j  (j <= i)      T = (I + diag(beta) M)^-1
#pragma once

#include <cmath>
#include <cstdlib>

#include "problem.h"
#include "product.h"

// Of max(|T|_inf, |T|_1), beyond which a chunk is solved in float64: the rounding of M reaches X magnified by about
// |T|, which the recurrence's own rounding is not. To 30, errors stay those of the recurrence.
constexpr float GROWTH = 24;

struct Chunk {
    int rows;
    long token;
    float *beta, *from_start, *to_end;  // beta_i, e^{c_i}, e^{c_C - c_i}
    float total;                        // e^{c_C}
    double* since;                      // c_i
    float *weights, *pairs, *scores;    // E, M, P: [rows, rows], zero beyond the diagonal
    float* inverse;                     // T
    double* wide_inverse;               // T in float64, where `wide`
    bool wide;

    static constexpr long ROW = row_distance(CHUNK);

    void arrange(Workspace& memory, bool tied) {
        for (float** array : {&beta, &from_start, &to_end}) memory.take(*array, CHUNK + LANES);
        memory.take(since, CHUNK + LANES);
        for (float** array : {&weights, &scores}) memory.take(*array, CHUNK * ROW);
        if (!tied) return;
        for (float** array : {&pairs, &inverse}) memory.take(*array, CHUNK * ROW);
        memory.take(wide_inverse, CHUNK * CHUNK);
    }

    void read_coefficients(const Lane& lane, long number) {
        token = number * CHUNK;
        rows = lane.rows(number);
        double so_far = 0;
        for (int i = 0; i < rows; i++) {
            const long place = lane.place(token + i);
            beta[i] = lane.of.beta ? lane.of.beta[place] : 1;
            if (lane.of.log_decay) {
                const float decay = lane.of.log_decay[place];
                so_far += decay < -1000 ? -1000 : (double)decay;  // -inf is a reset; e^-1000 is 0 too
            }
            since[i] = so_far;
        }
        for (int i = rows; i < CHUNK + LANES; i++) since[i] = so_far;
        for (int i = 0; i < rows; i += LANES) {
            const Doubles before = load(since + i);
            store(from_start + i, exponential(__builtin_convertvector(before, Floats)));
            store(to_end + i, exponential(__builtin_convertvector(so_far - before, Floats)));
        }
        total = exponential(fill((float)so_far))[0];
    }

    // E, M and P from the products k_i·k_j and q_i·k_j, which stand in `pairs` and `scores`.
    void weigh(const Lane& lane) {
        const Integers lanes = counting();
        const bool decays = lane.of.log_decay;
        for (int i = 0; i < rows; i++) {
            for (int j = 0; j < CHUNK; j += LANES) {
                float *weight = weights + i * ROW + j, *score = scores + i * ROW + j;
                float* pair = lane.of.tied ? pairs + i * ROW + j : nullptr;
                Floats factor{};
                if (j <= i) {
                    factor = fill(1);
                    if (decays)
                        factor = exponential(__builtin_convertvector(since[i] - load(since + j), Floats));
                    factor = lanes + j <= i ? factor : Floats{};
                    store(score, lanes + j <= i ? lane.of.scale * factor * load(score) : Floats{});
                    if (pair) store(pair, lanes + j < i ? factor * load(pair) : Floats{});
                } else {
                    store(score, Floats{});
                    if (pair) store(pair, Floats{});
                }
                store(weight, factor);
            }
        }
    }

    // T row by row, T_i = e_i - beta_i sum_{j < i} M_ij T_j; and again in float64 where it is large.
    void invert(const Lane& lane, const float* key, long key_row) {
        constexpr int VECTORS = CHUNK / LANES;
        Floats columns[VECTORS] = {}, largest_row{};
        for (int i = 0; i < rows; i++) {
            const int vectors = i / LANES + 1;
            Floats row[VECTORS] = {}, size{};
            for (int j = 0; j < i; j++) {
                const float entry = -beta[i] * pairs[i * ROW + j];
                for (int n = 0; n < vectors; n++) row[n] += entry * load(inverse + j * ROW + n * LANES);
            }
            row[i / LANES] += counting() == i % LANES ? fill(1) : Floats{};
            for (int n = 0; n < VECTORS; n++) {
                store(inverse + i * ROW + n * LANES, row[n]);
                const Floats magnitude = row[n] < 0 ? -row[n] : row[n];
                columns[n] += magnitude;
                size += magnitude;
            }
            const float growth = sum(size);
            if (!(growth <= largest_row[0])) largest_row[0] = growth;  // a NaN too
        }
        float growth = largest_row[0];
        for (Floats column : columns)
            for (int lane_of = 0; lane_of < LANES; lane_of++)
                if (!(column[lane_of] <= growth)) growth = column[lane_of];
        wide = !(growth <= GROWTH);
        if (wide) invert_widely(lane.of.key_dim, key, key_row);
    }

    // X = T right, or Tᵀ right, [rows, columns].
    void solve(int columns, const float* right, float* solution, long row, bool turned) const {
        if (wide) {
            solve_widely(columns, right, solution, row, turned);
        } else if (turned) {
            product<UPPER>(rows, columns, rows, transposed(inverse, ROW), right, row, solution, row);
        } else {
            product<LOWER>(rows, columns, rows, rows_of(inverse, ROW), right, row, solution, row);
        }
    }

  private:
    void invert_widely(long key_dim, const float* key, long key_row) {
        for (int i = 0; i < rows; i++) {
            double* row = wide_inverse + i * CHUNK;
            for (int j = 0; j < CHUNK; j++) row[j] = i == j;
            for (int j = 0; j < i; j++) {
                double pair = 0;
                for (int k = 0; k < key_dim; k++) pair += (double)key[i * key_row + k] * key[j * key_row + k];
                const double entry = -beta[i] * std::exp(since[i] - since[j]) * pair;
                for (int n = 0; n <= j; n++) row[n] += entry * wide_inverse[j * CHUNK + n];
            }
        }
    }

    void solve_widely(int columns, const float* right, float* solution, long row, bool turned) const {
        for (int j = 0; j < padded(columns); j += LANES) {
            for (int i = 0; i < rows; i++) {
                Doubles sums{};
                for (int k = turned ? i : 0; k < (turned ? rows : i + 1); k++) {
                    const double entry = turned ? wide_inverse[k * CHUNK + i] : wide_inverse[i * CHUNK + k];
                    sums += entry * __builtin_convertvector(load(right + k * row + j), Doubles);
                }
                store(solution + i * row + j, __builtin_convertvector(sums, Floats));
            }
        }
    }
};

// to_i = factor_i from_i, all rows [rows, columns].
template <typename Factor>
static inline void scale_rows(int rows, int columns, Factor factor, const float* from, long from_row, float* to,
                              long to_row, bool add = false) {
    for (int i = 0; i < rows; i++) {
        const float by = factor(i);
        for (int j = 0; j < columns; j += LANES) {
            const Floats scaled = by * load(from + i * from_row + j);
            float* place = to + i * to_row + j;
            store(place, add ? load(place) + scaled : scaled);
        }
    }
}
