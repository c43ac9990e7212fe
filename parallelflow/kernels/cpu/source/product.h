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

// Which products are not zero, or not wanted, in order of tokens: LOWER: A[i, k] = 0 where k's token is after i's.
// UPPER: where it is before. LOWER_RESULT: only C[i, j] with j's token not after i's is wanted (what stands beyond may be
// overwritten).
enum Form { FULL, LOWER, UPPER, LOWER_RESULT };

// How many of the result's rows, and how many along the other axis, belong to a token.
struct Tokens {
    int of, to;

    int before(int row) const { return of == 1 ? row * to : row / of * to; }       // up to the row's token
    int through(int row) const { return before(row) + to; }  // and with it
};

// Products added one after another before they join the sum: the rounding grows with the longest run.
constexpr int RUN = 128;

template <int R, int N>
static inline void tile(int begin, int end, Left a, const float* b, long b_row, float* c, long c_row,
                        const float* keep, bool add) {
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
            if (!add) store(to, sums[r][n]);
            else if (keep) store(to, keep[r] * load(to) + sums[r][n]);
            else store(to, load(to) + sums[r][n]);
        }
}

template <int R>
static inline void some_rows(int rows, int vectors, int begin, int end, Left a, const float* b, long b_row, float* c,
                             long c_row, const float* keep, bool add) {
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

// C [rows, columns] = diag(keep) C + A [rows, depth] B [depth, columns], with `add` (keep null: 1); else A B. `columns`
// is rounded up to whole vectors.
template <Form form = FULL>
static void product(int rows, int columns, int depth, Left a, const float* b, long b_row, float* c, long c_row,
                    bool add = false, const float* keep = nullptr, Tokens tokens = {1, 1}) {
    const int wide = padded(columns);
    for (int j = 0; j < wide; j += TILE_VECTORS * LANES) {
        for (int i = 0; i < rows; i += TILE_ROWS) {
            const int count = rows - i < TILE_ROWS ? rows - i : TILE_ROWS;
            if (form == LOWER_RESULT && j >= tokens.through(i + count - 1)) continue;
            const int begin = form == UPPER ? tokens.before(i) : 0;
            const int through = form == LOWER ? tokens.through(i + count - 1) : depth;
            const int end = through < depth ? through : depth;
            const Left part{a.at + i * a.row, a.row, a.column};
            for (int first = begin; first == begin || first < end; first += RUN) {
                const int last = end - first < RUN ? end : first + RUN;
                some_rows<TILE_ROWS>(count, (wide - j) / LANES, first, last, part, b + j, b_row, c + i * c_row + j,
                                     c_row, first == begin && keep ? keep + i : nullptr, add || first > begin);
            }
        }
    }
}

// The same where only tokens before or not after one another count.
template <Form form>
static void product(Tokens tokens, int rows, int columns, int depth, Left a, const float* b, long b_row, float* c,
                    long c_row, bool add = false) {
    product<form>(rows, columns, depth, a, b, b_row, c, c_row, add, nullptr, tokens);
}
