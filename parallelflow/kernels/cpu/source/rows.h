// The rows of a chunk as its matrices take them: read from the tokens, and gradients pulled back to the tokens.
#pragma once

#include "product.h"
#include "walk.h"

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

// to = a ⊙ b, arrays of the same shape.
static inline void multiply(int rows, int columns, const float* a, const float* b, long row, float* to) {
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < columns; j += LANES) store(to + i * row + j, load(a + i * row + j) * load(b + i * row + j));
}

static inline float dot(int count, const float* a, const float* b) {
    Floats sums{};
    int k = 0;
    for (; k + LANES <= count; k += LANES) sums += load(a + k) * load(b + k);
    float total = sum(sums);
    for (; k < count; k++) total += a[k] * b[k];
    return total;
}

// A factor sign · coefficient · vector of each row, as scalar · row: a coefficient a channel is multiplied into the row.
struct Factor {
    const Array *vector, *coefficient;
    int each, width;
    float sign;
    long row;
    float *vectors, *channels, *rows, *scalars;

    bool present() const { return (bool)*vector; }
    bool by_channel() const { return coefficient->width > 1 && *coefficient; }

    // `tied`: the rows of the write, which are this factor's vectors too.
    void arrange(Workspace& memory, const Array& of, const Array& times, long rows_a_token, long sign_of, float* tied) {
        vector = &of, coefficient = &times, each = rows_a_token, sign = sign_of;
        if (!of) return;
        width = of.width, row = row_distance(width);
        vectors = tied;
        if (!tied) memory.take(vectors, (ROWS + SPARE_ROWS) * row);
        rows = vectors;
        if (by_channel()) {
            memory.take(channels, ROWS * row);
            memory.take(rows, (ROWS + SPARE_ROWS) * row);
        }
        memory.take(scalars, ROWS + SPARE_ROWS + LANES);
    }

    void read(const Lane& lane, long token, int tokens, bool tied) {
        const int count = tokens * each;
        if (!tied) lane.read(*vector, token, tokens, each, vectors, row);
        if (by_channel()) {
            lane.read(*coefficient, token, tokens, each, channels, row);
            multiply(count, width, channels, vectors, row, rows);
        }
        if (*coefficient && !by_channel()) {
            lane.read(*coefficient, token, tokens, each, scalars, 1);
            for (int i = 0; i < count; i++) scalars[i] *= sign;
        } else {
            for (int i = 0; i < count; i++) scalars[i] = sign;
        }
    }

    // The gradient of the rows becomes that of the vectors; of the coefficients, sign · d_scalars or one a channel.
    void pull(int count, float* d_rows, float* d_channels) const {
        if (!by_channel()) return;
        multiply(count, width, d_rows, vectors, row, d_channels);
        multiply(count, width, d_rows, channels, row, d_rows);
    }
};

// Rows that see the state: those that read, or the queries.
struct Readers {
    int each;
    bool raw;
    float *rows, *scalars;  // r, s
    float* seeing;          // s e^{…} r: as they see the chunk's first state

    int place(int token) const { return token + !raw; }
};

// Rows that write: those that read, too, or those that only write.
struct Writers {
    int each;
    float *rows, *turned;  // b
    float* lasting;        // e^{c_C - c_t} b: as the chunk's last state has them
};

enum { READS, QUERIES };  // kinds of readers
enum { SOLVED, LONE };    // kinds of writers

struct Rows {
    long deep, wide;
    Decay decay;
    Factor read, value, lone_value;
    Readers readers[2];  // reads, queries
    Writers writers[2];  // solved, lone
    float *output, *right;

    void arrange(Workspace& memory, const Problem& of) {
        deep = row_distance(of.key_dim), wide = row_distance(of.value_dim);
        decay.arrange(memory, of);
        for (int kind : {SOLVED, LONE}) {
            Writers& each = writers[kind];
            each.each = kind == SOLVED ? of.reads : of.lone;
            if (!each.each) continue;
            for (float** array : {&each.rows, &each.lasting}) memory.take(*array, (ROWS + SPARE_ROWS) * deep);
            memory.take(each.turned, padded(of.key_dim) * ROW);
        }
        read.arrange(memory, of.of.read, of.of.read_coefficient, of.reads, of.read_sign,
                     of.tied ? writers[SOLVED].rows : nullptr);
        value.arrange(memory, of.of.value, of.of.value_coefficient, of.reads, of.value_sign, nullptr);
        lone_value.arrange(memory, of.of.lone_value, of.of.lone_coefficient, of.lone, of.lone_sign, nullptr);
        readers[READS] = {(int)of.reads, of.raw != 0, read.rows, read.scalars, nullptr};
        readers[QUERIES] = {1, false, nullptr, nullptr, nullptr};
        memory.take(readers[QUERIES].rows, (ROWS + SPARE_ROWS) * deep);
        memory.take(readers[QUERIES].scalars, ROWS + LANES);
        for (Readers& each : readers)
            if (each.each) memory.take(each.seeing, ROWS * deep);
        for (float** array : {&right, &output}) memory.take(*array, ROWS * wide);
    }

    // Everything of the tokens that does not need the state.
    void read_tokens(const Lane& lane, long token, int tokens) {
        const Problem& of = lane.of;
        decay.read(lane, token, tokens);
        lane.read(of.of.query, token, tokens, 1, readers[QUERIES].rows, deep);
        for (int t = 0; t < tokens; t++) readers[QUERIES].scalars[t] = of.scale;
        if (of.reads) {
            lane.read(of.of.write, token, tokens, of.reads, writers[SOLVED].rows, deep);
            read.read(lane, token, tokens, of.tied);
            if (value.present()) value.read(lane, token, tokens, false);
        }
        if (of.lone) {
            lane.read(of.of.lone_write, token, tokens, of.lone, writers[LONE].rows, deep);
            lone_value.read(lane, token, tokens, false);
        }
        for (const Readers& kind : readers)
            if (kind.each) decay.see(kind.place(0), tokens, kind.each, kind.scalars, kind.rows, kind.seeing);
        for (const Writers& kind : writers)
            if (kind.each) decay.keep(tokens, kind.each, kind.rows, kind.lasting);
    }

    // S <- e^{c_C} S + Bᵀ [X; u].
    void advance(const Problem& of, int tokens, float* const* written, float* state) const {
        bool first = true;
        for (int kind : {SOLVED, LONE}) {
            const int count = tokens * writers[kind].each;
            if (!count) continue;
            product(of.key_dim, of.value_dim, count, transposed(writers[kind].lasting, deep), written[kind], wide,
                    state, wide, true, first ? decay.total : nullptr);
            first = false;
        }
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
