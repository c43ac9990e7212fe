// Right-looking substitution, a token a stage:
//
//     X_m is known;     X_k += Γ_{k,m} X_m     for all k > m at once
//
// A thread keeps every warps-th token's rows in a tile of columns, which spreads what is left to do evenly to the end.
// The warp of token m + 1 finds it first in its stage and sends it through shared memory. tokens - 1 stages.
#pragma once

#include "system.h"

namespace parallelflow {

template <class Number, int RANK, int OWN, int WIDTH, bool RESIDENT>
struct Substitution {
    static constexpr int COLUMNS = LANES * WIDTH;
    static constexpr int COEFFICIENTS = RANK * RANK;

    struct Thread {
        Number value[OWN][RANK][WIDTH];
    };

    // Where the entries of G lie that token m sends to the tokens of a warp, from number m / warps of them on.
    static DEVICE int sent(int m, int warp, int warps) {
        const int turn = m / warps;
        const int earlier = warps * (turn * OWN - turn * (turn - 1) / 2);  // entries of one warp
        return warps * earlier + (m % warps * warps + warp) * (OWN - turn);
    }

    template <class Block, class System>
    static DEVICE void run(Block& block, const System& system, Number* memory) {
        const int tokens = system.tokens, warps = block.warps, first_column = system.first_column;
        Number* gram = memory;
        // [2, RANK, COLUMNS]: the token that is sent, and the next one.
        Number* known = gram + (RESIDENT ? COEFFICIENTS * (warps * warps * (OWN * (OWN + 1) / 2)) : 0);

        block.phase([&](Thread& thread, int warp, int lane) {
            if (RESIDENT) {
                system.template each_pair<RANK>(
                    warp, warps, lane, [&](int p, int q) { return system.entry(p, q); },
                    [&](int p, int q, Number entry) {
                        const int k = p / RANK, m = q / RANK;
                        const int pair = sent(m, k % warps, warps) + k / warps - m / warps;
                        gram[pair * COEFFICIENTS + p % RANK * RANK + q % RANK] = entry;
                    });
            }
            UNROLL for (int i = 0; i < OWN; ++i) {
                const int k = i * warps + warp;
                UNROLL for (int r = 0; r < RANK; ++r) {
                    UNROLL for (int j = 0; j < WIDTH; ++j) {
                        const int column = lane + LANES * j;
                        const Number z = k < tokens ? system.load(k * RANK + r, first_column + column) : Number(0);
                        thread.value[i][r][j] = z;
                        if (k == 0) known[r * COLUMNS + column] = z;
                    }
                }
            }
        });

        UNROLL for (int turn = 0; turn < OWN; ++turn) {
            const int steps = smaller(warps, tokens - 1 - turn * warps);
            ROLLED for (int step = 0; step < steps; ++step) {
                const int m = turn * warps + step;
                block.phase([&](Thread& thread, int warp, int lane) {
                    Number x[RANK][WIDTH];
                    UNROLL for (int r = 0; r < RANK; ++r) {
                        UNROLL for (int j = 0; j < WIDTH; ++j) {
                            x[r][j] = known[((m & 1) * RANK + r) * COLUMNS + lane + LANES * j];
                        }
                    }
                    const Number* own = gram + sent(m, warp, warps) * COEFFICIENTS;
                    UNROLL for (int i = 0; i < OWN; ++i) {
                        const int k = i * warps + warp;
                        if (i < turn || (i == turn && warp <= step)) continue;
                        if (!RESIDENT && k >= tokens) continue;
                        UNROLL for (int r = 0; r < RANK; ++r) {
                            UNROLL for (int c = 0; c < RANK; ++c) {
                                const Number entry = RESIDENT ? own[(i - turn) * COEFFICIENTS + r * RANK + c]
                                                              : system.entry(k * RANK + r, m * RANK + c);
                                UNROLL for (int j = 0; j < WIDTH; ++j) {
                                    thread.value[i][r][j] = thread.value[i][r][j] + entry * x[c][j];
                                }
                            }
                        }
                        if (i > turn + 1 || k != m + 1) continue;
                        UNROLL for (int r = 0; r < RANK; ++r) {
                            UNROLL for (int j = 0; j < WIDTH; ++j) {
                                known[((k & 1) * RANK + r) * COLUMNS + lane + LANES * j] = thread.value[i][r][j];
                            }
                        }
                    }
                });
            }
        }

        block.phase([&](Thread& thread, int warp, int lane) {
            UNROLL for (int i = 0; i < OWN; ++i) {
                const int k = i * warps + warp;
                if (k >= tokens) continue;
                UNROLL for (int r = 0; r < RANK; ++r) {
                    UNROLL for (int j = 0; j < WIDTH; ++j) {
                        system.store(k * RANK + r, first_column + lane + LANES * j, thread.value[i][r][j]);
                    }
                }
            }
        });
    }
};

}  // namespace parallelflow
