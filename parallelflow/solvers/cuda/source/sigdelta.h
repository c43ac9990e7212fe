// The paper's recursion (Muca Cirone and Salvi, arXiv 2504.00492, section 4) as a wavefront over a thread block:
//
//     F(0, k) = Z_k
//     F(m, k) = (F(m-1, k) - F(m-1, k-1)) + F(m, k-1) + (Γ_{k,m-1} - Γ_{k-1,m-1}) F(m-1, m-1),     k > m ≥ 1
//     F(m, m) = F(m-1, m) + Γ_{m,m-1} F(m-1, m-1)
//
// Stage s computes the cells of the anti-diagonal m + k = s. A thread owns OWN rows m of the grid in a tile of columns
// and goes along them, one cell a stage: F(m, k-1) and F(m-1, k-1) are what it had the stage before, F(m-1, m-1) stays
// the same all along the row, and F(m-1, k) is what the row above found the stage before: in the same thread, or, at
// the first of its rows, in the warp before, whence it comes through shared memory. 2 tokens - 3 stages.
#pragma once

#include "system.h"

namespace parallelflow {

template <class Number, int RANK, int OWN, int WIDTH, bool RESIDENT>
struct SigDelta {
    static constexpr int COLUMNS = LANES * WIDTH;
    static constexpr int COEFFICIENTS = RANK * RANK;

    struct Thread {
        Number value[OWN][RANK][WIDTH];   // F(m, k-1)
        Number corner[OWN][RANK][WIDTH];  // F(m-1, k-1)
        Number solved[OWN][RANK][WIDTH];  // F(m-1, m-1)
    };

    // Cells of the anti-diagonals before stage s: the differences of Γ lie stage by stage, in the order of m.
    static DEVICE int before(int s, int tokens) {
        const int past = larger(0, s - 1 - tokens);
        return (s - 1) / 2 * (s / 2) - past * (past + 1) / 2;
    }

    static DEVICE int lowest(int s, int tokens) { return larger(1, s - tokens + 1); }

    template <class System>
    static DEVICE Number coefficient(const System& system, int p, int q) {
        if (p >= system.rows) return Number(0);
        const Number own = system.entry(p, q);
        return q / RANK + 1 < p / RANK ? own - system.entry(p - RANK, q) : own;
    }

    // A token's rows to shared memory, or from there.
    static DEVICE void exchange(Number (&rows)[RANK][WIDTH], Number* place, bool out) {
        UNROLL for (int r = 0; r < RANK; ++r) {
            UNROLL for (int j = 0; j < WIDTH; ++j) {
                if (out) place[r * COLUMNS + LANES * j] = rows[r][j];
                else rows[r][j] = place[r * COLUMNS + LANES * j];
            }
        }
    }

    template <class Block, class System>
    static DEVICE void run(Block& block, const System& system, Number* memory) {
        const int tokens = system.tokens, first_column = system.first_column;
        // Differences of Γ; Z [rows, COLUMNS], then X; what a warp's last row found [2, warps, RANK, COLUMNS].
        Number* jumps = memory;
        Number* tile = jumps + (RESIDENT ? COEFFICIENTS * (tokens * (tokens - 1) / 2) : 0);
        Number* edges = tile + system.rows * COLUMNS;

        block.phase([&](Thread& thread, int warp, int lane) {
            for (int first = warp; first < system.rows; first += block.warps * BATCH) {
                Number z[BATCH][WIDTH];
                UNROLL for (int b = 0; b < BATCH; ++b) {
                    const int p = first + block.warps * b;
                    UNROLL for (int j = 0; j < WIDTH; ++j) {
                        z[b][j] = p < system.rows ? system.load(p, first_column + lane + LANES * j) : Number(0);
                    }
                }
                UNROLL for (int b = 0; b < BATCH; ++b) {
                    const int p = first + block.warps * b;
                    UNROLL for (int j = 0; j < WIDTH; ++j) {
                        if (p < system.rows) tile[p * COLUMNS + lane + LANES * j] = z[b][j];
                    }
                }
            }
            if (RESIDENT) {
                system.template each_pair<RANK>(
                    warp, block.warps, lane, [&](int p, int q) { return coefficient(system, p, q); },
                    [&](int p, int q, Number jump) {
                        const int k = p / RANK, m = q / RANK + 1;
                        const int cell = before(k + m, tokens) + m - lowest(k + m, tokens);
                        jumps[cell * COEFFICIENTS + p % RANK * RANK + q % RANK] = jump;
                    });
            }
            UNROLL for (int i = 0; i < OWN; ++i) {
                UNROLL for (int r = 0; r < RANK; ++r) {
                    UNROLL for (int j = 0; j < WIDTH; ++j) {
                        thread.value[i][r][j] = thread.corner[i][r][j] = thread.solved[i][r][j] = Number(0);
                    }
                }
            }
        });

        for (int s = 2; s <= 2 * tokens - 2; ++s) {
            block.phase([&](Thread& thread, int warp, int lane) {
                const int first = 1 + warp * OWN, last = first + OWN - 1, low = lowest(s, tokens), high = s / 2;
                if (first > high || last < low) return;
                // Found anew in every stage: carried along, they would make a stage wait for the one before.
                const Number* own = jumps + (before(s, tokens) + first - low) * COEFFICIENTS;
                const Number* arriving = edges + (((s - 1) & 1) * block.warps + warp - 1) * RANK * COLUMNS + lane;
                Number* leaving = edges + ((s & 1) * block.warps + warp) * RANK * COLUMNS + lane;
                // F(m-1, k) for the first row; behind the row's end anything will do, as all that is found there.
                const Number* outside = warp ? arriving : tile + smaller(s - 1, tokens - 1) * RANK * COLUMNS + lane;
                const auto cell = [&](int i, bool begun) {
                    Number above[RANK][WIDTH], found[RANK][WIDTH];
                    const int p = (s - first - i) * RANK, q = (first + i - 1) * RANK;
                    UNROLL for (int r = 0; r < RANK; ++r) {
                        UNROLL for (int j = 0; j < WIDTH; ++j) {
                            above[r][j] = i ? thread.value[i ? i - 1 : 0][r][j] : outside[r * COLUMNS + LANES * j];
                            found[r][j] = (above[r][j] - thread.corner[i][r][j]) + thread.value[i][r][j];
                        }
                        UNROLL for (int c = 0; c < RANK; ++c) {
                            const Number jump = RESIDENT ? own[i * COEFFICIENTS + r * RANK + c]
                                                         : coefficient(system, p + r, q + c);
                            UNROLL for (int j = 0; j < WIDTH; ++j) {
                                found[r][j] = found[r][j] + jump * thread.solved[i][c][j];
                            }
                        }
                    }
                    UNROLL for (int r = 0; r < RANK; ++r) {
                        UNROLL for (int j = 0; j < WIDTH; ++j) {  // before the row's first cell, both are 0
                            thread.value[i][r][j] = begun ? found[r][j] : thread.value[i][r][j];
                            thread.corner[i][r][j] = begun ? above[r][j] : thread.corner[i][r][j];
                        }
                    }
                };
                if (s == 2 * first) exchange(thread.solved[0], tile + (first - 1) * RANK * COLUMNS + lane, false);
                // Downwards: the row above still has its last cell. With one row a token, cells that nobody needs are
                // computed too: they cost less than branches, at which every row would wait for its own reads.
                if (s > 2 * last && (RANK == 1 || s - first < tokens)) {
                    UNROLL for (int i = OWN - 1; i >= 0; --i) cell(i, true);
                } else {
                    UNROLL for (int i = OWN - 1; i >= 0; --i) {
                        const bool begun = first + i <= high;
                        if (RANK == 1) cell(i, begun);
                        else if (begun && first + i >= low) cell(i, true);
                    }
                }
                if (s == 2 * high && high <= last) {  // F(high, high) is solved
                    UNROLL for (int i = 0; i < OWN; ++i) {
                        if (first + i != high) continue;
                        exchange(thread.value[i], tile + high * RANK * COLUMNS + lane, true);
                        UNROLL for (int r = 0; r < RANK && i + 1 < OWN; ++r) {
                            UNROLL for (int j = 0; j < WIDTH; ++j) {
                                thread.solved[i + 1 < OWN ? i + 1 : 0][r][j] = thread.value[i][r][j];
                            }
                        }
                    }
                }
                if (last <= high) exchange(thread.value[OWN - 1], leaving, true);
            });
        }

        block.phase([&](Thread&, int warp, int lane) {
            for (int p = warp; p < system.rows; p += block.warps) {
                UNROLL for (int j = 0; j < WIDTH; ++j) {
                    const int column = lane + LANES * j;
                    system.store(p, first_column + column, tile[p * COLUMNS + column]);
                }
            }
        });
    }
};

}  // namespace parallelflow
