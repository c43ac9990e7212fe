// One system (I - G) X = Z, or its transpose, and a tile of its columns.
#pragma once

#include "number.h"

namespace parallelflow {

constexpr int LANES = 32;  // threads of a warp, one column each (WIDTH columns, LANES apart)

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

    // visit(p, q, G[p, q]) of all pairs of rows of which q's token is the earlier, neighbours in memory side by side.
    template <int RANK, class Visit>
    DEVICE void each_pair(int warp, int warps, int lane, Visit visit) const {
        for (int major = warp; major < rows; major += warps) {
            for (int minor = lane; minor < rows; minor += LANES) {
                const int p = transposed ? row(minor) : major, q = transposed ? row(major) : minor;
                if (q / RANK < p / RANK) visit(p, q);
            }
        }
    }
};

DEVICE int smaller(int a, int b) { return a < b ? a : b; }
DEVICE int larger(int a, int b) { return a > b ? a : b; }

}  // namespace parallelflow
