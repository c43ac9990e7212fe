// A thread block of the CUDA solvers as loops over its threads between barriers, compiled as plain C++.
//
// Counting: with NUMBER = Counted every addition and multiplication is counted, and each number knows the longest chain
// of operations that it waited for. Shared memory is followed by guards that must not change.
#include <cstddef>
#include <cstring>
#include <vector>

#include "sigdelta.h"
#include "substitution.h"

namespace parallelflow {

long long operations = 0;
int longest = 0;

struct Counted {
    double value = 0;
    int chain = 0;
    Counted() = default;
    Counted(double x) : value(x) {}
};

inline Counted counted(double value, Counted a, Counted b) {
    Counted result(value);
    result.chain = (a.chain > b.chain ? a.chain : b.chain) + 1;
    ++operations;
    return result;
}

inline Counted operator+(Counted a, Counted b) { return counted(a.value + b.value, a, b); }
inline Counted operator-(Counted a, Counted b) { return counted(a.value - b.value, a, b); }
inline Counted operator*(Counted a, Counted b) { return counted(a.value * b.value, a, b); }

inline void narrow(Counted x, double& result) {
    result = x.value;
    if (x.chain > longest) longest = x.chain;
}

}  // namespace parallelflow

using namespace parallelflow;
using Solver = SOLVER;

struct Block {
    int warps, phases = 0;
    std::vector<Solver::Thread> threads;

    explicit Block(int count) : warps(count), threads(count * LANES) {}

    // Threads take turns forwards and backwards: what they find must not hang on who comes first.
    template <class Work>
    void phase(Work work) {
        const int count = warps * LANES;
        for (int turn = 0; turn < count; ++turn) {
            const int thread = phases % 2 ? count - 1 - turn : turn;
            work(threads[thread], thread / LANES, thread % LANES);
        }
        ++phases;
    }
};

constexpr int GUARDS = 64;

// counts: operations, longest chain, barriers of one system and one tile. Returns how many guards have changed.
extern "C" int solve(const double* gram, const ELEMENT* right, ELEMENT* solution, int systems, int tokens, int rows,
                     int columns, int transposed, int warps, int memory, long long* counts) {
    int changed = 0;
    for (int number = 0; number < systems; ++number) {
        std::vector<NUMBER> own(gram + static_cast<size_t>(number) * rows * rows,
                                gram + static_cast<size_t>(number + 1) * rows * rows);
        const size_t place = static_cast<size_t>(number) * rows * columns;
        for (int first = 0; first < columns; first += Solver::COLUMNS) {
            std::vector<NUMBER> shared(memory + GUARDS);
            std::memset(static_cast<void*>(shared.data()), 0xff, shared.size() * sizeof(NUMBER));  // not a number
            const std::vector<NUMBER> before = shared;
            const System<NUMBER, ELEMENT> system = {own.data(), right + place, solution + place, tokens, rows, columns,
                                                    first, transposed != 0};
            Block block(warps);
            operations = longest = 0;
            Solver::run(block, system, shared.data());
            counts[0] = operations;
            counts[1] = longest;
            counts[2] = block.phases;
            for (int guard = memory; guard < memory + GUARDS; ++guard) {
                changed += std::memcmp(&shared[guard], &before[guard], sizeof(NUMBER)) != 0;
            }
        }
    }
    return changed;
}
