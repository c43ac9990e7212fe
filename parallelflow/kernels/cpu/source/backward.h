// The gradients of one head of one sequence, from its last chunk to its first; a window's states are made again from
// the one that entered it.
//
// With D the gradient of the state after a chunk, S the state before it:
//
//     dX = Pᵀ dO + (e^{c_C - c} k) D        R = Tᵀ dX        dv = beta R
//     dM-like G_ij = R_i·X_j (j < i),  dP_ij = dO_i·X_j (j <= i);  A = -beta_i E G,  B = scale E dP
//     dq = scale e^c (dO Sᵀ) + B k
//     dk = -beta e^c (R Sᵀ) + A k + Aᵀ k + Bᵀ q + e^{c_C - c} (X Dᵀ)
//     dbeta_i = R_i·v_i - e^{c_i} k_i·(S R_i) - sum_j M_ij G_ij
//     D <- e^{c_C} D + (scale e^c q)ᵀ dO - (beta e^c k)ᵀ R
//
// and every exponent c_i collects factor times gradient of what it stands in; dg_t is the sum of dc from t on.
#pragma once

#include "forward.h"

class Backward {
  public:
    void arrange(Workspace& memory, const Problem& problem) {
        rows.arrange(memory, problem);
        const long wide = rows.value_row, deep = rows.key_row;
        for (Kept& each : kept) {
            each.chunk.arrange(memory, problem.tied);
            memory.take(each.innovation, CHUNK * wide);
            memory.take(each.entry, padded(problem.key_dim) * wide);
        }
        for (float** array : {&d_output, &d_innovation, &d_right}) memory.take(*array, CHUNK * wide);
        for (float** array : {&d_query, &d_key, &seen}) memory.take(*array, CHUNK * deep);
        for (float** array : {&d_scores, &d_pairs}) memory.take(*array, CHUNK * Chunk::ROW);
        memory.take(innovation_turned, padded(problem.value_dim) * Chunk::ROW);
        memory.take(state_turned, padded(problem.value_dim) * deep);
        for (float** array : {&d_state, &state}) memory.take(*array, padded(problem.key_dim) * wide);
        for (double** array : {&d_since, &columns}) memory.take(*array, CHUNK + LANES);
        memory.take(d_beta, CHUNK + LANES);
    }

    void run(const Lane& lane) {
        const Problem& of = lane.of;
        const long row = rows.value_row, at = lane.state_at(lane.sequence);
        copy_state(of, of.final ? of.final + at : nullptr, of.value_dim, d_state, row);
        for (long window = lane.windows() - 1; window >= 0; window--) {
            const long first = window * WINDOW;
            const int count = lane.chunks() - first < WINDOW ? lane.chunks() - first : WINDOW;
            copy_state(of, lane.entry(window), of.value_dim, state, row);
            for (int number = 0; number < count; number++) {
                copy_state(of, state, row, kept[number].entry, row);
                again(lane, kept[number], first + number);
            }
            for (int number = count - 1; number >= 0; number--) pull(lane, kept[number], number == count - 1);
        }
        if (of.d_initial) copy_state(of, d_state, row, of.d_initial + at, of.value_dim);
    }

  private:
    struct Kept {
        Chunk chunk;
        float *innovation, *entry;
    };

    void again(const Lane& lane, Kept& of, long number) {
        of.chunk.read_coefficients(lane, number);
        rows.read_tokens(lane, of.chunk);
        rows.see_each_other(lane, of.chunk);
        rows.decay(lane, of.chunk);
        rows.innovate(lane, of.chunk, state, of.innovation);
        rows.advance(lane, of.chunk, of.innovation, state);
    }

    // `there`: the chunk's rows are in the workspace still.
    void pull(const Lane& lane, Kept& of, bool there) {
        const Problem& problem = lane.of;
        const Chunk& chunk = of.chunk;
        const int n = chunk.rows, depth = problem.key_dim, width = problem.value_dim;
        const long row = rows.value_row, deep = rows.key_row, square = Chunk::ROW;
        if (!there) {
            rows.read_tokens(lane, chunk);
            rows.decay(lane, chunk);
        }
        lane.read(problem.output, chunk.token, n, lane.head, width, d_output, row);

        product<UPPER>(n, width, n, transposed(chunk.scores, square), d_output, row, d_innovation, row);
        product(n, width, depth, rows_of(rows.write, deep), d_state, row, d_innovation, row, true);
        const float* d_source = d_innovation;  // R
        if (problem.tied) {
            chunk.solve(width, d_innovation, d_right, row, true);
            d_source = d_right;
        }
        transpose(n, width, of.innovation, row, innovation_turned, square);
        product<LOWER_RESULT>(n, n, width, rows_of(d_output, row), innovation_turned, square, d_scores, square);
        if (problem.tied)
            product<LOWER_RESULT>(n, n, width, rows_of(d_source, row), innovation_turned, square, d_pairs, square);
        for (int i = 0; i < n; i++) d_beta[i] = dot(width, d_source + i * row, rows.value + i * row);
        unweigh(problem, chunk);

        transpose(depth, width, of.entry, row, state_turned, deep);
        product(n, depth, width, rows_of(d_output, row), state_turned, deep, d_query, deep);
        for (int i = 0; i < n; i++) {
            const float factor = problem.scale * chunk.from_start[i];
            d_since[i] += factor * dot(depth, rows.query + i * deep, d_query + i * deep);
            scale_row(depth, factor, d_query + i * deep);
        }
        product<LOWER>(n, depth, n, rows_of(d_scores, square), rows.key, deep, d_query, deep, true);

        if (problem.tied) {
            product(n, depth, width, rows_of(d_source, row), state_turned, deep, d_key, deep);
            for (int i = 0; i < n; i++) {
                const float seen_by = chunk.from_start[i] * dot(depth, rows.key + i * deep, d_key + i * deep);
                d_beta[i] -= seen_by;
                d_since[i] -= chunk.beta[i] * seen_by;
                scale_row(depth, -chunk.beta[i] * chunk.from_start[i], d_key + i * deep);
            }
            product<LOWER>(n, depth, n, rows_of(d_pairs, square), rows.key, deep, d_key, deep, true);
            product<UPPER>(n, depth, n, transposed(d_pairs, square), rows.key, deep, d_key, deep, true);
        }
        product<UPPER>(n, depth, n, transposed(d_scores, square), rows.query, deep, d_key, deep, problem.tied);

        transpose(depth, width, d_state, row, state_turned, deep);
        product(n, depth, width, rows_of(of.innovation, row), state_turned, deep, seen, deep);
        double ends = problem.log_decay ? chunk.total * states_dot(problem, of.entry) : 0;
        for (int i = 0; i < n; i++) {
            const double moved = chunk.to_end[i] * dot(depth, rows.key + i * deep, seen + i * deep);
            d_since[i] -= moved;
            ends += moved;
        }
        d_since[n - 1] += ends;
        scale_rows(n, depth, [&](int i) { return chunk.to_end[i]; }, seen, deep, d_key, deep, true);

        product(depth, width, n, transposed(rows.query_from_start, deep), d_output, row, d_state, row, true,
                chunk.total);
        if (problem.tied)
            product(depth, width, n, transposed(rows.read, deep), d_source, row, d_state, row, true);
        write(lane, chunk, d_source);
    }

    // G and dP become A and B; the exponents' gradients begin.
    void unweigh(const Problem& problem, const Chunk& chunk) {
        const int n = chunk.rows;
        for (int i = 0; i < n; i++) columns[i] = 0;
        for (int i = 0; i < n; i++) {
            Doubles all{};
            Floats seen_by{};
            for (int j = 0; j < CHUNK; j += LANES) {
                const long at = i * Chunk::ROW + j;
                if (j > i) {
                    store(d_scores + at, Floats{});
                    if (problem.tied) store(d_pairs + at, Floats{});
                    continue;
                }
                const Floats weight = load(chunk.weights + at);  // zero beyond the diagonal
                const Floats within = weight != 0 ? load(d_scores + at) : Floats{};
                Floats exponents = within * load(chunk.scores + at);
                store(d_scores + at, problem.scale * weight * within);
                if (problem.tied) {
                    const Integers strictly = (counting() + j < i) & (weight != 0);
                    const Floats pair = strictly ? load(d_pairs + at) : Floats{};
                    const Floats product_of = pair * load(chunk.pairs + at);
                    seen_by += product_of;
                    exponents -= chunk.beta[i] * product_of;
                    store(d_pairs + at, -chunk.beta[i] * weight * pair);
                }
                const Doubles exact = __builtin_convertvector(exponents, Doubles);
                all += exact;
                store(columns + j, load(columns + j) + exact);
            }
            d_since[i] = sum(all);
            if (problem.tied) d_beta[i] -= sum(seen_by);
        }
        for (int i = 0; i < n; i++) d_since[i] -= columns[i];
    }

    void write(const Lane& lane, const Chunk& chunk, const float* d_source) {
        const Problem& of = lane.of;
        const int n = chunk.rows, depth = of.key_dim;
        const long heads_of_part = of.group() / of.parts, within = lane.head % of.group();
        const long part = within / heads_of_part;
        const bool add = within % heads_of_part;
        for (int i = 0; i < n; i++) {
            const long token = lane.first + chunk.token + i;
            const long at = (((part * of.batch + lane.batch) * of.time + token) * of.heads + lane.key_head()) * depth;
            put(depth, d_query + i * rows.key_row, of.d_query + at, add);
            put(depth, d_key + i * rows.key_row, of.d_key + at, add);
        }
        if (of.d_beta)
            for (int i = 0; i < n; i++) of.d_beta[lane.place(chunk.token + i)] = d_beta[i];
        if (of.d_log_decay) {
            double from_here = 0;
            for (int i = n - 1; i >= 0; i--) {
                from_here += d_since[i];
                of.d_log_decay[lane.place(chunk.token + i)] = from_here;
            }
        }
        if (of.beta)
            scale_rows(n, of.value_dim, [&](int i) { return chunk.beta[i]; }, d_source, rows.value_row, d_output,
                       rows.value_row);
        lane.write(of.beta ? d_output : d_source, rows.value_row, chunk.token, n, of.value_dim, of.d_value);
    }

    static void put(int count, const float* from, float* to, bool add) {
        if (!add) {
            memcpy(to, from, count * sizeof(float));
        } else {
            for (int k = 0; k < count; k++) to[k] += from[k];
        }
    }

    static void scale_row(int count, float factor, float* row) {
        for (int k = 0; k < count; k += LANES) store(row + k, factor * load(row + k));
    }

    static float dot(int count, const float* a, const float* b) {
        Floats sums{};
        int k = 0;
        for (; k + LANES <= count; k += LANES) sums += load(a + k) * load(b + k);
        float total = sum(sums);
        for (; k < count; k++) total += a[k] * b[k];
        return total;
    }

    // The sum of entries of the state's gradient times the state's.
    double states_dot(const Problem& of, const float* entry) const {
        double total = 0;
        for (int k = 0; k < of.key_dim; k++)
            total += dot(of.value_dim, d_state + k * rows.value_row, entry + k * rows.value_row);
        return total;
    }

    Rows rows;
    Kept kept[WINDOW];
    float *state, *d_state, *d_output, *d_innovation, *d_right, *d_query, *d_key, *seen;
    float *d_scores, *d_pairs, *innovation_turned, *state_turned, *d_beta;
    double *d_since, *columns;
};
