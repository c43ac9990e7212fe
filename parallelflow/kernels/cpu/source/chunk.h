// How the rows of a chunk see each other, and the inverse of that.
//
//     M_pq = e^{…} r_p·b_q (q before p)     P_tq = scale e^{…} q_t·b_q (q's token not after t)     T = (I - diag(s) M)^-1
//
// for every kind of readers (those that read, the queries) and of writers (those that read, too; those that only write).
#pragma once

#include "rows.h"

// Of max(|T|_inf, |T|_1), beyond which a chunk is solved in float64: the rounding of M reaches X magnified by about
// |T|, which the recurrence's own rounding is not.
constexpr float GROWTH = 6;

struct Chunk {
    long token;
    int tokens;
    float* seen[2][2];     // M, or P: [readers' kind][writers' kind], [.., ROW], zero where a row does not see
    float* weights[2][2];  // their e^{…} where decays are one a head, and 1 where there are none; else null
    float* inverse;        // T
    double* wide_inverse;  // T in float64, where `wide`
    bool wide;

    void arrange(Workspace& memory, const Problem& of) {
        for (int reader : {QUERIES, READS})
            for (int writer : {SOLVED, LONE}) {
                float *&matrix = seen[reader][writer], *&weight = weights[reader][writer];
                matrix = weight = nullptr;
                if ((reader == READS && !of.reads) || !(writer == SOLVED ? of.reads : of.lone)) continue;
                memory.take(matrix, (ROWS + SPARE_ROWS) * ROW);
                if (reader == READS && alike(of, writer)) weight = weights[QUERIES][writer];
                else if (!of.channels()) memory.take(weight, ROWS * ROW);
            }
        if (!of.reads) return;
        memory.take(inverse, SOLVED_ROWS * ROW);
        memory.take(wide_inverse, SOLVED_ROWS * SOLVED_ROWS);
    }

    // Single rows that read after their token's decay see other single rows with the query's factors.
    static bool alike(const Problem& of, int writer) {
        return of.reads == 1 && !of.raw && (writer == SOLVED || of.lone == 1);
    }

    int count(const Writers& kind) const { return tokens * kind.each; }
    int count(const Readers& kind) const { return tokens * kind.each; }

    // Writers that the j-th reader of a token sees.
    static int visible(const Problem& of, int reader, int writer, int each, int token, int j) {
        if (reader == QUERIES) return (token + 1) * each;
        if (!of.sequential) return token * each;
        return token * each + (writer == SOLVED ? j : (int)of.lone_before[j]);
    }

    void see_each_other(const Lane& lane, Rows& rows) {
        const Problem& of = lane.of;
        for (int writer : {SOLVED, LONE}) {
            const Writers& to = rows.writers[writer];
            if (!to.each) continue;
            if (of.channels()) {
                walk(rows, to.each, seen[0][writer], seen[1][writer]).see(to.rows, to.turned);
            } else {
                transpose(count(to), of.key_dim, to.rows, rows.deep, to.turned, ROW);
            }
            for (int reader : {QUERIES, READS}) {
                const Readers& by = rows.readers[reader];
                if (!by.each) continue;
                if (!of.channels())
                    product<LOWER_RESULT>(Tokens{by.each, to.each}, count(by), count(to), of.key_dim,
                                          rows_of(by.rows, rows.deep), to.turned, ROW, seen[reader][writer], ROW);
                weigh(of, rows, reader, writer);
            }
        }
        if (of.reads) invert(of, rows);
    }

    Walk walk(const Rows& rows, int each, float* reads, float* queries) const {
        const Readers &read = rows.readers[READS], &query = rows.readers[QUERIES];
        return {tokens, rows.decay.depth, each, read.each, read.raw, rows.deep, rows.decay.steps,
                {read.rows, reads}, {query.rows, queries}};
    }

    // X = T right, or Tᵀ right, [rows, columns].
    void solve(int rows, int columns, const float* right, float* solution, long row, bool turned) const {
        if (wide) {
            solve_widely(rows, columns, right, solution, row, turned);
        } else if (turned) {
            product<UPPER>(rows, columns, rows, transposed(inverse, ROW), right, row, solution, row);
        } else {
            product<LOWER>(rows, columns, rows, rows_of(inverse, ROW), right, row, solution, row);
        }
    }

  private:
    // Factors with decays a channel are in the products already; without decays they are 1; a single row's that reads
    // after its decay are the query's; the others' are found.
    enum Factors { INSIDE, ONE, QUERYS, FOUND };

    // M or P from the products r_p·b_q, which stand there.
    void weigh(const Problem& of, const Rows& rows, int reader, int writer) {
        if (of.channels()) return weigh<INSIDE>(of, rows, reader, writer);
        if (reader == READS && alike(of, writer)) return weigh<QUERYS>(of, rows, reader, writer);
        if (!of.of.log_decay) return weigh<ONE>(of, rows, reader, writer);
        weigh<FOUND>(of, rows, reader, writer);
    }

    template <Factors factors>
    void weigh(const Problem& of, const Rows& rows, int reader, int writer) {
        const Readers& by = rows.readers[reader];
        const int each = rows.writers[writer].each, wide = padded(tokens * each);
        const float scale = reader == QUERIES ? of.scale : 1;
        double spread[ROWS + LANES] = {};
        const double* columns = each == 1 ? rows.decay.since + 1 : spread;
        for (int t = 0; factors == FOUND && each > 1 && t < tokens; t++)
            for (int j = 0; j < each; j++) spread[t * each + j] = rows.decay.since[t + 1];
        float *place = seen[reader][writer], *weight = weights[reader][writer];
        for (int t = 0; t < tokens; t++) {
            const double since = rows.decay.since[by.place(t)];
            for (int j = 0; j < by.each; j++, place += ROW, weight += factors == INSIDE ? 0 : ROW) {
                const int end = visible(of, reader, writer, each, t, j);
                for (int q = 0; q < wide; q += LANES) {
                    const Integers sees = counting() + q < end;
                    Floats factor = fill(1);
                    if (factors == QUERYS) factor = load(weight + q);
                    if (factors == FOUND && q < end)
                        factor = exponential(__builtin_convertvector(since - load(columns + q), Floats));
                    if (factors == FOUND || factors == ONE) store(weight + q, sees ? factor : Floats{});
                    store(place + q, sees ? scale * factor * load(place + q) : Floats{});
                }
            }
        }
    }

    // T row by row, T_p = e_p + s_p sum_{q < p} M_pq T_q; and again in float64 where it is large.
    void invert(const Problem& of, const Rows& rows) {
        constexpr int VECTORS = SOLVED_ROWS / LANES;
        const float *scalars = rows.read.scalars, *pairs = seen[READS][SOLVED];
        const int count = tokens * of.reads;
        Floats columns[VECTORS] = {}, largest_row{};
        for (int i = 0; i < count; i++) {
            const int vectors = i / LANES + 1;
            Floats row[VECTORS] = {}, size{};
            for (int j = 0; j < i; j++) {
                const float entry = scalars[i] * pairs[i * ROW + j];
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
        if (wide) invert_widely(of, rows);
    }

    void invert_widely(const Problem& of, const Rows& rows) {
        const Readers& by = rows.readers[READS];
        for (int p = 0; p < count(by); p++) {
            const int token = p / by.each;
            double* row = wide_inverse + p * SOLVED_ROWS;
            for (int j = 0; j < SOLVED_ROWS; j++) row[j] = p == j;
            const int end = visible(of, READS, SOLVED, by.each, token, p % by.each);
            for (int q = 0; q < end; q++) {
                const double entry = rows.read.scalars[p] * exact_pair(of, rows, p, q, by.place(token), q / by.each + 1);
                for (int n = 0; n <= q; n++) row[n] += entry * wide_inverse[q * SOLVED_ROWS + n];
            }
        }
    }

    // M_pq in float64, of rows that see and write `late` and `early` places from the start.
    double exact_pair(const Problem& of, const Rows& rows, int p, int q, int late, int early) const {
        const Decay& decay = rows.decay;
        const float *read = rows.read.rows + p * rows.deep, *write = rows.writers[SOLVED].rows + q * rows.deep;
        double pair = 0;
        for (int k = 0; k < of.key_dim; k++) {
            double factor = (double)read[k] * write[k];
            if (decay.kind == Decay::CHANNEL)
                for (int t = early; t < late; t++) factor *= decay.steps[t * decay.row + k];
            pair += factor;
        }
        return decay.kind == Decay::HEAD ? pair * std::exp(decay.since[late] - decay.since[early]) : pair;
    }

    void solve_widely(int rows, int columns, const float* right, float* solution, long row, bool turned) const {
        for (int j = 0; j < padded(columns); j += LANES) {
            for (int i = 0; i < rows; i++) {
                Doubles sums{};
                for (int k = turned ? i : 0; k < (turned ? rows : i + 1); k++) {
                    const double entry = turned ? wide_inverse[k * SOLVED_ROWS + i] : wide_inverse[i * SOLVED_ROWS + k];
                    sums += entry * __builtin_convertvector(load(right + k * row + j), Doubles);
                }
                store(solution + i * row + j, __builtin_convertvector(sums, Floats));
            }
        }
    }
};
