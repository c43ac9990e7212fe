// The walk along one head of one sequence, chunk by chunk, the state in cache.
//
//     X  = T (beta v - beta e^c k S)        or, where rows only write, beta v
//     O  = scale e^c q S + P X
//     S <- e^{c_C} S + (e^{c_C - c} k)ᵀ X
#pragma once

#include "chunk.h"

// The rows of the chunk at hand.
struct Rows {
    long key_row, value_row;
    float *query, *key, *value, *key_turned;
    float *query_from_start, *read, *write;  // scale e^c q, -beta e^c k, e^{c_C - c} k
    float *right, *output;

    void arrange(Workspace& memory, const Problem& problem) {
        key_row = row_distance(problem.key_dim);
        value_row = row_distance(problem.value_dim);
        for (float** array : {&query, &key, &query_from_start, &read, &write})
            memory.take(*array, CHUNK * key_row);
        for (float** array : {&value, &right, &output}) memory.take(*array, CHUNK * value_row);
        memory.take(key_turned, padded(problem.key_dim) * Chunk::ROW);
    }

    // Everything of the tokens that does not need the state; query too with `speaking`.
    void read_tokens(const Lane& lane, const Chunk& chunk) {
        const Problem& of = lane.of;
        lane.read(of.query, chunk.token, chunk.rows, lane.key_head(), of.key_dim, query, key_row);
        lane.read(of.key, chunk.token, chunk.rows, lane.key_head(), of.key_dim, key, key_row);
        lane.read(of.value, chunk.token, chunk.rows, lane.head, of.value_dim, value, value_row);
    }

    void see_each_other(const Lane& lane, Chunk& chunk) {
        const int n = chunk.rows, depth = lane.of.key_dim;
        transpose(n, depth, key, key_row, key_turned, Chunk::ROW);
        product<LOWER_RESULT>(n, n, depth, rows_of(query, key_row), key_turned, Chunk::ROW, chunk.scores, Chunk::ROW);
        if (lane.of.tied)
            product<LOWER_RESULT>(n, n, depth, rows_of(key, key_row), key_turned, Chunk::ROW, chunk.pairs, Chunk::ROW);
        chunk.weigh(lane);
        if (lane.of.tied) chunk.invert(lane, key, key_row);
    }

    void decay(const Lane& lane, const Chunk& chunk) {
        const int n = chunk.rows, depth = lane.of.key_dim;
        const float scale = lane.of.scale;
        scale_rows(n, depth, [&](int i) { return scale * chunk.from_start[i]; }, query, key_row, query_from_start,
                   key_row);
        scale_rows(n, depth, [&](int i) { return chunk.to_end[i]; }, key, key_row, write, key_row);
        if (lane.of.tied)
            scale_rows(n, depth, [&](int i) { return -chunk.beta[i] * chunk.from_start[i]; }, key, key_row, read,
                       key_row);
    }

    // X from the state [K, value_row].
    void innovate(const Lane& lane, const Chunk& chunk, const float* state, float* innovation) {
        const int n = chunk.rows, depth = lane.of.key_dim, width = lane.of.value_dim;
        float* to = lane.of.tied ? right : innovation;
        scale_rows(n, width, [&](int i) { return chunk.beta[i]; }, value, value_row, to, value_row);
        if (!lane.of.tied) return;
        product(n, width, depth, rows_of(read, key_row), state, value_row, right, value_row, true);
        chunk.solve(width, right, innovation, value_row, false);
    }

    void advance(const Lane& lane, const Chunk& chunk, const float* innovation, float* state) const {
        product(lane.of.key_dim, lane.of.value_dim, chunk.rows, transposed(write, key_row), innovation, value_row,
                state, value_row, true, chunk.total);
    }
};

static inline void copy_state(const Problem& of, const float* from, long from_row, float* to, long to_row) {
    for (int k = 0; k < of.key_dim; k++) {
        if (from) {
            memcpy(to + k * to_row, from + k * from_row, of.value_dim * sizeof(float));
        } else {
            memset(to + k * to_row, 0, of.value_dim * sizeof(float));
        }
    }
}

class Forward {
  public:
    void arrange(Workspace& memory, const Problem& problem) {
        chunk.arrange(memory, problem.tied);
        rows.arrange(memory, problem);
        memory.take(innovation, CHUNK * rows.value_row);
        memory.take(state, problem.key_dim * rows.value_row);
    }

    void run(const Lane& lane) {
        const Problem& of = lane.of;
        const long row = rows.value_row, at = lane.state_at(lane.sequence);
        copy_state(of, of.initial ? of.initial + at : nullptr, of.value_dim, state, row);
        for (long number = 0; number < lane.chunks(); number++) {
            if (of.entries && number % WINDOW == 0)
                copy_state(of, state, row, lane.entry(number / WINDOW), of.value_dim);
            chunk.read_coefficients(lane, number);
            rows.read_tokens(lane, chunk);
            rows.see_each_other(lane, chunk);
            rows.decay(lane, chunk);
            rows.innovate(lane, chunk, state, innovation);
            speak(lane);
            rows.advance(lane, chunk, innovation, state);
        }
        if (of.final) copy_state(of, state, row, of.final + at, of.value_dim);
    }

  private:
    void speak(const Lane& lane) {
        const int n = chunk.rows, width = lane.of.value_dim;
        const long row = rows.value_row;
        product(n, width, lane.of.key_dim, rows_of(rows.query_from_start, rows.key_row), state, row, rows.output, row);
        product<LOWER>(n, width, n, rows_of(chunk.scores, Chunk::ROW), innovation, row, rows.output, row, true);
        lane.write(rows.output, row, chunk.token, n, width, lane.of.output);
    }

    Chunk chunk;
    Rows rows;
    float *innovation, *state;
};
