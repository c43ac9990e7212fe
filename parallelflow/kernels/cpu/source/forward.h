// The walk along one head of one sequence, chunk by chunk, the state in cache.
//
//     X  = T (U + s (e^c r S + M u))        u: the values of rows that only write; M: how rows that read see those
//     O  = scale e^c q S + P [X; u]
//     S <- e^{c_C} S + (e^{c_C - c} b)ᵀ [X; u]
#pragma once

#include "chunk.h"

// What a chunk's rows write, X and u: [.., wide].
static inline void answer(const Problem& of, Rows& rows, const Chunk& chunk, const float* state, float* const* written) {
    const int n = chunk.tokens * of.reads, m = chunk.tokens * of.lone, width = of.value_dim;
    const long wide = rows.wide;
    if (m) {
        const Factor& given = rows.lone_value;
        scale_rows(m, width, [&](int i) { return given.scalars[i]; }, given.rows, wide, written[LONE], wide);
    }
    if (!n) return;
    float* right = rows.right;
    const bool given = rows.value.present();
    if (m) {
        product<LOWER>(Tokens{(int)of.reads, (int)of.lone}, n, width, m,
                       rows_of(chunk.seen[READS][LONE], ROW), written[LONE], wide, right, wide);
        scale_rows(n, width, [&](int i) { return rows.read.scalars[i]; }, right, wide, right, wide);
    }
    if (given)
        scale_rows(n, width, [&](int i) { return rows.value.scalars[i]; }, rows.value.rows, wide, right, wide, m > 0);
    product(n, width, of.key_dim, rows_of(rows.readers[READS].seeing, rows.deep), state, wide, right, wide,
            m > 0 || given);
    chunk.solve(n, width, right, written[SOLVED], wide, false);
}

class Forward {
  public:
    void arrange(Workspace& memory, const Problem& problem) {
        rows.arrange(memory, problem);
        chunk.arrange(memory, problem);
        for (float*& array : written) memory.take(array, ROWS * rows.wide);
        memory.take(state, problem.key_dim * rows.wide);
    }

    void run(const Lane& lane) {
        const Problem& of = lane.of;
        const long row = rows.wide, at = lane.state_at(lane.sequence);
        copy_state(of, of.initial ? of.initial + at : nullptr, of.value_dim, state, row);
        for (long number = 0; number < lane.chunks(); number++) {
            if (of.entries && number % WINDOW == 0)
                copy_state(of, state, row, lane.entry(number / WINDOW), of.value_dim);
            chunk.token = number * lane.chunk;
            chunk.tokens = lane.tokens(number);
            rows.read_tokens(lane, chunk.token, chunk.tokens);
            chunk.see_each_other(lane, rows);
            answer(of, rows, chunk, state, written);
            speak(lane);
            rows.advance(of, chunk.tokens, written, state);
        }
        if (of.final) copy_state(of, state, row, of.final + at, of.value_dim);
    }

  private:
    void speak(const Lane& lane) {
        const Problem& of = lane.of;
        const int count = chunk.tokens, width = of.value_dim;
        const long row = rows.wide;
        product(count, width, of.key_dim, rows_of(rows.readers[QUERIES].seeing, rows.deep), state, row,
                rows.output, row);
        for (int kind : {SOLVED, LONE}) {
            const int each = rows.writers[kind].each;
            if (each)
                product<LOWER>(Tokens{1, each}, count, width, count * each,
                               rows_of(chunk.seen[QUERIES][kind], ROW), written[kind], row, rows.output, row, true);
        }
        lane.write(rows.output, row, chunk.token, count, 1, of.output);
    }

    Chunk chunk;
    Rows rows;
    float *written[2], *state;
};
