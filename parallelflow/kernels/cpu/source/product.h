// C (+)= A B for the small matrices of a chunk, in cache: A's entries are broadcast, B's rows are vectors.
#pragma once

#include "lanes.h"

// A matrix to be read at any strides: [i, k] is at[i * row + k * column].
struct Left {
    const float* at;
    long row, column;
};

static inline Left rows_of(const float* at, long row) { return {at, row, 1}; }
static inline Left transposed(const float* at, long row) { return {at, 1, row}; }

// Which products are not zero, or not wanted. LOWER: A[i, k] = 0 for k > i. UPPER: A[i, k] = 0 for k < i.
// LOWER_RESULT: only C[i, j] with j <= i is wanted (what stands beyond may be overwritten).
enum Form { FULL, LOWER, UPPER, LOWER_RESULT };

// Products added one after another before they join the sum: the rounding grows with the longest run.
constexpr int RUN = 128;

template <int R, int N>
static inline void tile(int begin, int end, Left a, const float* b, long b_row, float* c, long c_row, float keep,
                        bool add) {
    Floats sums[R][N];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 2
        for (int n = 0; n < N; n++) sums[r][n] = Floats{};
    const float* right = b + begin * b_row;
    const float* left = a.at + begin * a.column;
    for (int k = begin; k < end; k++, right += b_row, left += a.column) {
        Floats vectors[N];
#pragma GCC unroll 2
        for (int n = 0; n < N; n++) vectors[n] = load(right + n * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            const float entry = left[r * a.row];
#pragma GCC unroll 2
            for (int n = 0; n < N; n++) sums[r][n] += entry * vectors[n];
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 2
        for (int n = 0; n < N; n++) {
            float* to = c + r * c_row + n * LANES;
            store(to, add ? keep * load(to) + sums[r][n] : sums[r][n]);
        }
}

template <int R>
static inline void some_rows(int rows, int vectors, int begin, int end, Left a, const float* b, long b_row, float* c,
                             long c_row, float keep, bool add) {
    if constexpr (R > 0) {
        if (rows < R) {
            some_rows<R - 1>(rows, vectors, begin, end, a, b, b_row, c, c_row, keep, add);
        } else if (vectors >= TILE_VECTORS) {
            tile<R, TILE_VECTORS>(begin, end, a, b, b_row, c, c_row, keep, add);
        } else {
            tile<R, 1>(begin, end, a, b, b_row, c, c_row, keep, add);
        }
    }
}

// C [rows, columns] = keep C + A [rows, depth] B [depth, columns], with `add`; else A B. `columns` is rounded up to
// whole vectors.
template <Form form = FULL>
static void product(int rows, int columns, int depth, Left a, const float* b, long b_row, float* c, long c_row,
                    bool add = false, float keep = 1) {
    const int wide = padded(columns);
    for (int j = 0; j < wide; j += TILE_VECTORS * LANES) {
        for (int i = 0; i < rows; i += TILE_ROWS) {
            const int count = rows - i < TILE_ROWS ? rows - i : TILE_ROWS;
            if (form == LOWER_RESULT && j >= i + count) continue;
            const int begin = form == UPPER ? i : 0;
            const int end = form == LOWER ? (i + count < depth ? i + count : depth) : depth;
            const Left part{a.at + i * a.row, a.row, a.column};
            for (int first = begin; first == begin || first < end; first += RUN) {
                const int last = end - first < RUN ? end : first + RUN;
                some_rows<TILE_ROWS>(count, (wide - j) / LANES, first, last, part, b + j, b_row, c + i * c_row + j,
                                     c_row, first == begin ? keep : 1, add || first > begin);
            }
        }
    }
}
