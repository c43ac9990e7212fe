// One system (I - G) X = Z, or its transpose, and a tile of its columns.
#pragma once

#include "number.h"

namespace parallelflow {

constexpr int LANES = 32;  // threads of a warp, one column each (WIDTH columns, LANES apart)
constexpr int BATCH = 8;   // reads of a thread under way at once

// The transposed system, its rows taken backwards, is again strictly lower triangular: it is solved as that one.
template <class Number, class Element>
struct System {
    const Number* gram;    // [n, n], strictly lower triangular by tokens
    const Element* right;  // [n, columns]
    Element* solution;     // [n, columns]
    int tokens, rows, columns, first_column;
    bool transposed;

    DEVICE int row(int p) const { return transposed ? rows - 1 - p : p; }

    DEVICE Number entry(int p, int q) const { return transposed ? gram[row(q) * rows + row(p)] : gram[p * rows + q]; }

    DEVICE Number load(int p, int column) const {
        if (column >= columns) return Number(0);
        return Number(widened(right[static_cast<long long>(row(p)) * columns + column]));
    }

    DEVICE void store(int p, int column, Number x) const {
        if (column < columns) narrow(x, solution[static_cast<long long>(row(p)) * columns + column]);
    }

    // visit(p, q, read(p, q)) of all pairs of rows of which q's token is the earlier, neighbours in memory side by
    // side, and BATCH reads under way at once.
    template <int RANK, class Read, class Visit>
    DEVICE void each_pair(int warp, int warps, int lane, Read read, Visit visit) const {
        for (int first = warp; first < rows; first += warps * BATCH) {
            for (int minor = lane; minor < rows; minor += LANES) {
                Number found[BATCH];
                UNROLL for (int b = 0; b < BATCH; ++b) {
                    const int major = first + warps * b;
                    const int p = transposed ? row(minor) : major, q = transposed ? row(major) : minor;
                    found[b] = major < rows && q / RANK < p / RANK ? read(p, q) : Number(0);
                }
                UNROLL for (int b = 0; b < BATCH; ++b) {
                    const int major = first + warps * b;
                    const int p = transposed ? row(minor) : major, q = transposed ? row(major) : minor;
                    if (major < rows && q / RANK < p / RANK) visit(p, q, found[b]);
                }
            }
        }
    }
};

DEVICE int smaller(int a, int b) { return a < b ? a : b; }
DEVICE int larger(int a, int b) { return a > b ? a : b; }

}  // namespace parallelflow
