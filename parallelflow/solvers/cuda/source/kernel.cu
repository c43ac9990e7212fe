// A solver as a kernel, for what is defined before: SOLVER, with its template arguments; NUMBER, of G and of all
// arithmetic; ELEMENT, of the right side and the solution; BLOCK_WARPS. A block solves one system in a tile of columns.
#include "sigdelta.h"
#include "substitution.h"

using namespace parallelflow;
using Solver = SOLVER;

struct Block {
    static constexpr int warps = BLOCK_WARPS;
    Solver::Thread thread;

    template <class Work>
    DEVICE void phase(Work work) {
        work(thread, static_cast<int>(threadIdx.x) / LANES, static_cast<int>(threadIdx.x) % LANES);
        __syncthreads();
    }
};

extern "C" __global__ void __launch_bounds__(BLOCK_WARPS * LANES)
    solve(const NUMBER* gram, const ELEMENT* right, ELEMENT* solution, int tokens, int rows, int columns, int tiles,
          int transposed) {
    extern __shared__ double memory[];
    const int tile = blockIdx.x % tiles;
    const long long number = blockIdx.x / tiles, place = number * rows * columns;
    const System<NUMBER, ELEMENT> system = {
        gram + number * rows * rows, right + place, solution + place, tokens, rows, columns, tile * Solver::COLUMNS,
        transposed != 0};
    Block block;
    Solver::run(block, system, reinterpret_cast<NUMBER*>(memory));
}
