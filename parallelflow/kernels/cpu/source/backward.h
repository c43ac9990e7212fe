// The gradients of one head of one sequence, from its last chunk to its first; a window's states are made again from
// the one that entered it.
//
// With D the gradient of the state after a chunk, S the state before it, X and u what its rows write:
//
//     dX = Pᵀ dO + (e^{c_C - c} b) D        Y = Tᵀ dX        dU = Y        du = Pᵀ dO + (e^{c_C - c} b) D + Mᵀ s Y
//     dM = s Y [X; u]ᵀ     dP = scale dO [X; u]ᵀ     where a row sees, times e^{…}
//     dq = scale e^c (dO Sᵀ) + dP b
//     dr = s e^c (Y Sᵀ) + dM b
//     db = e^{c_C - c} ([X; u] Dᵀ) + dMᵀ r + dPᵀ q
//     ds_p = r_p·(dr_p / s_p)
//     D <- e^{c_C} D + (scale e^c q)ᵀ dO + (s e^c r)ᵀ Y
//
// and every exponent c_t collects factor times gradient of what it stands in; dg_t is the sum of dc from t on.
#pragma once

#include "forward.h"

class Backward {
  public:
    void arrange(Workspace& memory, const Problem& problem) {
        rows.arrange(memory, problem);
        const long wide = rows.wide, deep = rows.deep;
        channels = problem.channels();
        for (Kept& each : kept) {
            each.chunk.arrange(memory, problem);
            for (int kind : {SOLVED, LONE})
                if (rows.writers[kind].each) memory.take(each.written[kind], ROWS * wide);
            memory.take(each.entry, padded(problem.key_dim) * wide);
        }
        for (float** array : {&d_output, &d_source, &scaled}) memory.take(*array, ROWS * wide);
        for (int kind = 0; kind < 2; kind++) {
            memory.take(d_written[kind], ROWS * wide);
            memory.take(d_readers[kind], (ROWS + SPARE_ROWS) * deep);
            memory.take(d_writers[kind], (ROWS + SPARE_ROWS) * deep);
            memory.take(d_matrix[kind], (ROWS + SPARE_ROWS) * ROW);
        }
        for (float** array : {&moved, &moved_queries, &room}) memory.take(*array, (ROWS + SPARE_ROWS) * deep);
        memory.take(written_turned, padded(problem.value_dim) * ROW);
        memory.take(state_turned, padded(problem.value_dim) * deep);
        for (float** array : {&d_state, &state}) memory.take(*array, padded(problem.key_dim) * wide);
        memory.take(d_since, ROWS + 1 + LANES);
        memory.take(d_places, channels ? (ROWS + 1) * deep : 1);
        for (float** array : {&d_read_scalars, &d_value_scalars}) memory.take(*array, ROWS + LANES);
        memory.take(d_coefficients, ROWS * (wide > deep ? wide : deep));
        memory.take(d_others, ROWS * wide);
    }

    void run(const Lane& lane) {
        const Problem& of = lane.of;
        const long row = rows.wide, at = lane.state_at(lane.sequence);
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
        float *written[2], *entry;
    };

    void again(const Lane& lane, Kept& of, long number) {
        of.chunk.token = number * lane.chunk;
        of.chunk.tokens = lane.tokens(number);
        rows.read_tokens(lane, of.chunk.token, of.chunk.tokens);
        of.chunk.see_each_other(lane, rows);
        answer(lane.of, rows, of.chunk, state, of.written);
        rows.advance(lane.of, of.chunk.tokens, of.written, state);
    }

    // `there`: the chunk's rows are in the workspace still.
    void pull(const Lane& lane, Kept& of, bool there) {
        const Problem& problem = lane.of;
        const Chunk& chunk = of.chunk;
        if (!there) rows.read_tokens(lane, chunk.token, chunk.tokens);
        lane.read(problem.output, chunk.token, chunk.tokens, 1, d_output, rows.wide);
        pull_written(problem, chunk);
        begin_exponents(chunk.tokens);
        pull_seeing(problem, chunk, of.entry);
        pull_lasting(problem, chunk, of);
        for (int kind : {SOLVED, LONE})
            if (rows.writers[kind].each) pull_views(problem, chunk, of.written[kind], kind);
        pull_state(problem, chunk.tokens);
        write(lane, chunk);
    }

    // dX and du; Y, which is dU.
    void pull_written(const Problem& problem, const Chunk& chunk) {
        const int width = problem.value_dim, n = chunk.tokens * problem.reads;
        const long row = rows.wide;
        for (int kind : {SOLVED, LONE}) {
            const Writers& writers = rows.writers[kind];
            if (!writers.each) continue;
            const int count = chunk.count(writers);
            product<UPPER>(Tokens{writers.each, 1}, count, width, chunk.tokens,
                           transposed(chunk.seen[QUERIES][kind], ROW), d_output, row, d_written[kind], row);
            product(count, width, problem.key_dim, rows_of(writers.lasting, rows.deep), d_state, row, d_written[kind],
                    row, true);
        }
        if (!n) return;
        chunk.solve(n, width, d_written[SOLVED], d_source, row, true);
        const int m = chunk.tokens * problem.lone;
        if (!m) return;
        scale_rows(n, width, [&](int p) { return rows.read.scalars[p]; }, d_source, row, scaled, row);
        product<UPPER>(Tokens{(int)problem.lone, (int)problem.reads}, m, width, n,
                       transposed(chunk.seen[READS][LONE], ROW), scaled, row, d_written[LONE], row, true);
    }

    void begin_exponents(int tokens) {
        for (int place = 0; place <= tokens; place++) d_since[place] = 0;
        if (channels) memset(d_places, 0, (tokens + 1) * rows.deep * sizeof(float));
    }

    // Rows as they see the chunk's first state.
    void pull_seeing(const Problem& problem, const Chunk& chunk, const float* entry) {
        const int depth = problem.key_dim, width = problem.value_dim;
        const long deep = rows.deep;
        transpose(depth, width, entry, rows.wide, state_turned, deep);
        for (int kind : {READS, QUERIES}) {
            const Readers& by = rows.readers[kind];
            if (!by.each) continue;
            float* d_rows = d_readers[kind];
            product(chunk.count(by), depth, width, rows_of(kind == READS ? d_source : d_output, rows.wide),
                    state_turned, deep, d_rows, deep);
            if (channels) rows.decay.see(by.place(0), chunk.tokens, by.each, nullptr, d_rows, d_rows);
            const float* row = by.rows;
            for (int t = 0, p = 0; t < chunk.tokens; t++)
                for (int j = 0; j < by.each; j++, p++, row += deep, d_rows += deep) {
                    const int place = by.place(t);
                    const float scalar = by.scalars[p], factor = channels ? 1 : rows.decay.from_start[place];
                    if (kind == READS || !channels) {
                        const float seen_by = factor * dot(depth, row, d_rows);
                        if (kind == READS) d_read_scalars[p] = seen_by;
                        d_since[place] += scalar * seen_by;
                    }
                    scale_rows(1, depth, [&](int) { return scalar * factor; }, d_rows, deep, d_rows, deep);
                    if (channels) gather(place, row, d_rows, 1);
                }
        }
    }

    // Rows as the chunk's last state has them, and what it keeps of the first one.
    void pull_lasting(const Problem& problem, const Chunk& chunk, const Kept& of) {
        const int depth = problem.key_dim, width = problem.value_dim, tokens = chunk.tokens;
        const long deep = rows.deep;
        transpose(depth, width, d_state, rows.wide, state_turned, deep);
        for (int kind : {SOLVED, LONE}) {
            const Writers& writers = rows.writers[kind];
            if (!writers.each) continue;
            float* d_rows = d_writers[kind];
            product(chunk.count(writers), depth, width, rows_of(of.written[kind], rows.wide), state_turned, deep, d_rows,
                    deep);
            rows.decay.keep(tokens, writers.each, d_rows, d_rows);
            if (!problem.of.log_decay) continue;
            const float* row = writers.rows;
            for (int t = 0; t < tokens; t++)
                for (int j = 0; j < writers.each; j++, row += deep, d_rows += deep) {
                    if (channels) {
                        gather(t + 1, row, d_rows, -1);
                        gather(tokens, row, d_rows, 1);
                    } else {
                        const double lasting = dot(depth, row, d_rows);
                        d_since[t + 1] -= lasting;
                        d_since[tokens] += lasting;
                    }
                }
        }
        if (!problem.of.log_decay) return;
        for (int k = 0; k < depth; k++) {
            const float stays = rows.decay.total[k] * dot(width, d_state + k * rows.wide, of.entry + k * rows.wide);
            if (channels) d_places[tokens * deep + k] += stays;
            else d_since[tokens] += stays;
        }
    }

    // Rows as they see one kind of the chunk's writers.
    void pull_views(const Problem& problem, const Chunk& chunk, const float* written, int writer) {
        const Writers& to = rows.writers[writer];
        const int count = chunk.count(to), depth = problem.key_dim, width = problem.value_dim;
        const long deep = rows.deep;
        transpose(count, width, written, rows.wide, written_turned, ROW);
        for (int reader : {READS, QUERIES}) {
            const Readers& by = rows.readers[reader];
            if (!by.each) continue;
            const Tokens order{by.each, to.each}, back{to.each, by.each};
            float* matrix = d_matrix[reader];
            product<LOWER_RESULT>(order, chunk.count(by), count, width,
                                  rows_of(reader == READS ? d_source : d_output, rows.wide), written_turned, ROW,
                                  matrix, ROW);
            if (channels) {
                unweigh<true>(problem, chunk, reader, writer);
                continue;
            }
            unweigh<false>(problem, chunk, reader, writer);
            product<LOWER>(order, chunk.count(by), depth, count, rows_of(matrix, ROW), to.rows, deep, d_readers[reader],
                           deep, true);
            product<UPPER>(back, count, depth, chunk.count(by), transposed(matrix, ROW), by.rows, deep,
                           d_writers[writer], deep, true);
        }
        if (channels) walk_back(problem, chunk, writer);
    }

    // The products Y·X become dM, those dO·X dP; the scalars' gradients, and the exponents' of decays a head.
    template <bool CHANNELS>
    void unweigh(const Problem& problem, const Chunk& chunk, int reader, int writer) {
        const Readers& by = rows.readers[reader];
        const int each = rows.writers[writer].each, wide = padded(chunk.tokens * each);
        const bool reads = reader == READS;
        const float *seen = chunk.seen[reader][writer], *weights = chunk.weights[reader][writer];
        float* d = d_matrix[reader];
        Doubles columns[ROWS / LANES] = {};
        for (int t = 0, p = 0; t < chunk.tokens; t++) {
            for (int j = 0; j < by.each; j++, p++, d += ROW, seen += ROW, weights += CHANNELS ? 0 : ROW) {
                const int end = Chunk::visible(problem, reader, writer, each, t, j);
                const float factor = reads ? by.scalars[p] : problem.scale, scalar = reads ? by.scalars[p] : 1;
                Doubles all{};
                Floats seen_by{};
                for (int q = 0; q < wide; q += LANES) {
                    if (q >= end) {
                        store(d + q, Floats{});
                        continue;
                    }
                    const Floats weight = CHANNELS ? fill(1) : load(weights + q);
                    const Floats within = (counting() + q < end) & (weight != 0) ? load(d + q) : Floats{};
                    const Floats product_of = within * load(seen + q);
                    seen_by += product_of;
                    store(d + q, factor * weight * within);
                    if (CHANNELS) continue;
                    const Doubles exact = __builtin_convertvector(scalar * product_of, Doubles);
                    all += exact;
                    columns[q / LANES] += exact;
                }
                if (reads) d_read_scalars[p] += sum(seen_by);
                if (!CHANNELS) d_since[by.place(t)] += sum(all);
            }
        }
        if (CHANNELS) return;
        for (int t = 0, q = 0; t < chunk.tokens; t++)
            for (int j = 0; j < each; j++, q++) d_since[t + 1] -= columns[q / LANES][q % LANES];
    }

    // dr and db from dM and dP with decays a channel: between tokens, which the exponents hear of, and within them.
    void walk_back(const Problem& problem, const Chunk& chunk, int writer) {
        const Writers& to = rows.writers[writer];
        const long deep = rows.deep;
        const Walk walk = chunk.walk(rows, to.each, d_matrix[READS], d_matrix[QUERIES]);
        for (int reader : {READS, QUERIES}) {
            const int count = chunk.count(rows.readers[reader]);
            if (count) memset(moved_of(reader), 0, count * deep * sizeof(float));
        }
        walk.pull_readers(to.rows, room, moved_of(READS), moved_of(QUERIES));
        for (int reader : {READS, QUERIES}) {
            const Readers& by = rows.readers[reader];
            for (int p = 0; p < chunk.count(by); p++) {
                gather(by.place(p / by.each), by.rows + p * deep, moved_of(reader) + p * deep, 1);
                add(moved_of(reader) + p * deep, d_readers[reader] + p * deep);
            }
        }
        walk.pull_writers(moved, room);
        for (int q = 0; q < chunk.count(to); q++) {
            gather(q / to.each + 1, to.rows + q * deep, moved + q * deep, -1);
            add(moved + q * deep, d_writers[writer] + q * deep);
        }
        for (int reader : {READS, QUERIES}) {
            const Readers& by = rows.readers[reader];
            for (int p = 0; p < chunk.count(by); p++) {
                const int t = p / by.each, end = Chunk::visible(problem, reader, writer, to.each, t, p % by.each);
                for (int q = t * to.each; q < end; q++) {
                    const float d = d_matrix[reader][p * ROW + q];
                    for (int k = 0; k < rows.decay.depth; k += LANES) {
                        float *d_row = d_readers[reader] + p * deep + k, *d_write = d_writers[writer] + q * deep + k;
                        store(d_row, load(d_row) + d * load(to.rows + q * deep + k));
                        store(d_write, load(d_write) + d * load(by.rows + p * deep + k));
                    }
                }
            }
        }
    }

    float* moved_of(int reader) const { return reader == READS ? moved : moved_queries; }

    // d_places[place] += sign row ⊙ d_row.
    void gather(int place, const float* row, const float* d_row, float sign) {
        float* to = d_places + place * rows.deep;
        for (int k = 0; k < rows.decay.depth; k += LANES)
            store(to + k, load(to + k) + sign * (load(row + k) * load(d_row + k)));
    }

    void add(const float* from, float* to) const {
        for (int k = 0; k < rows.decay.depth; k += LANES) store(to + k, load(to + k) + load(from + k));
    }

    void pull_state(const Problem& problem, int tokens) {
        const int depth = problem.key_dim, width = problem.value_dim, n = tokens * problem.reads;
        const long row = rows.wide;
        product(depth, width, tokens, transposed(rows.readers[QUERIES].seeing, rows.deep), d_output, row, d_state,
                row, true, rows.decay.total);
        if (n)
            product(depth, width, n, transposed(rows.readers[READS].seeing, rows.deep), d_source, row, d_state, row,
                    true);
    }

    void write(const Lane& lane, const Chunk& chunk) {
        const Problem& of = lane.of;
        const long token = chunk.token, deep = rows.deep;
        const int tokens = chunk.tokens, n = tokens * of.reads;
        lane.write(d_readers[QUERIES], deep, token, tokens, 1, of.d.query);
        write_decay(lane, chunk);
        if (of.lone) {
            lane.write(d_writers[LONE], deep, token, tokens, of.lone, of.d.lone_write);
            write_value(lane, chunk, rows.lone_value, d_written[LONE], of.d.lone_value, of.d.lone_coefficient, false);
        }
        if (!n) return;
        const bool shared = of.shared && rows.value.present();
        for (int p = 0; p < n; p++) d_read_scalars[p] *= rows.read.sign;
        rows.read.pull(n, d_readers[READS], d_coefficients);
        if (of.tied) {
            for (int p = 0; p < n; p++) add(d_readers[READS] + p * deep, d_writers[SOLVED] + p * deep);
        } else {
            lane.write(d_readers[READS], deep, token, tokens, of.reads, of.d.read);
        }
        lane.write(d_writers[SOLVED], deep, token, tokens, of.reads, of.d.write);
        if (rows.value.present())
            write_value(lane, chunk, rows.value, d_source, of.d.value, of.d.value_coefficient, shared);
        if (!of.of.read_coefficient) return;
        if (rows.read.by_channel()) {
            lane.write(d_coefficients, deep, token, tokens, of.reads, of.d.read_coefficient);
        } else {
            lane.write(d_read_scalars, 1, token, tokens, of.reads, of.d.read_coefficient);
        }
    }

    // Of a value's factors, given the gradient of all multiplied in; `shared`: its coefficients are the reads'.
    void write_value(const Lane& lane, const Chunk& chunk, const Factor& value, float* d_rows, const Array& d_vector,
                     const Array& d_coefficient, bool shared) {
        const int width = value.width, count = chunk.tokens * value.each;
        const long row = rows.wide;
        if (*value.coefficient && !value.by_channel())
            for (int p = 0; p < count; p++) {
                d_value_scalars[p] = value.sign * dot(width, d_rows + p * row, value.rows + p * row);
                if (shared) d_read_scalars[p] += d_value_scalars[p];
            }
        scale_rows(count, width, [&](int p) { return value.scalars[p]; }, d_rows, row, scaled, row);
        value.pull(count, scaled, d_others);
        lane.write(scaled, row, chunk.token, chunk.tokens, value.each, d_vector);
        if (!*value.coefficient) return;
        if (value.by_channel()) {
            if (shared) {
                for (int p = 0; p < count; p++)
                    for (int k = 0; k < width; k++) d_coefficients[p * rows.deep + k] += d_others[p * row + k];
            } else {
                lane.write(d_others, row, chunk.token, chunk.tokens, value.each, d_coefficient);
            }
        } else if (!shared) {
            lane.write(d_value_scalars, 1, chunk.token, chunk.tokens, value.each, d_coefficient);
        }
    }

    void write_decay(const Lane& lane, const Chunk& chunk) {
        const Array& to = lane.of.d.log_decay;
        if (!to) return;
        if (!channels) {
            double from_here = 0;
            for (int t = chunk.tokens - 1; t >= 0; t--) {
                from_here += d_since[t + 1];
                const float rounded = from_here;
                lane.write(&rounded, 1, chunk.token + t, 1, 1, to);
            }
            return;
        }
        for (int k = 0; k < rows.decay.depth; k += LANES) {
            Doubles from_here{};
            for (int t = chunk.tokens; t > 0; t--) {
                float* place = d_places + t * rows.deep + k;
                from_here += __builtin_convertvector(load(place), Doubles);
                store(place, __builtin_convertvector(from_here, Floats));
            }
        }
        lane.write(d_places + rows.deep, rows.deep, chunk.token, chunk.tokens, 1, to);
    }

    bool channels;
    Rows rows;
    Kept kept[WINDOW];
    float *state, *d_state, *d_output, *d_source, *scaled, *d_written[2], *d_readers[2], *d_writers[2], *d_matrix[2];
    float *moved, *moved_queries, *room, *written_turned, *state_turned, *d_places, *d_read_scalars, *d_value_scalars;
    float *d_coefficients, *d_others;
    double* d_since;
};
