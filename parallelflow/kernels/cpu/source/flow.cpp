// The flow of every kind of rows and decay: forward, backward, and one token.

#include "backward.h"
#include "step.h"

// One task: the value heads of a part of a key head, or one value head, of one sequence.
template <typename Walk>
static int each_lane(const Problem& problem, long heads_together) {
    const long tasks = problem.sequences * problem.value_heads / heads_together;
    int failed = 0;
#pragma omp parallel num_threads(problem.threads < tasks ? problem.threads : tasks) if (tasks > 1) reduction(| : failed)
    {
        Workspace memory;
        Walk walk;
        failed = !memory.arrange([&](Workspace& from) { walk.arrange(from, problem); });
#pragma omp barrier
#pragma omp for schedule(dynamic, 1)
        for (long task = 0; task < tasks; task++) {
            const long heads = problem.value_heads / heads_together;
            for (long number = 0; number < heads_together && !failed; number++)
                walk.run(Lane(problem, task / heads, task % heads * heads_together + number));
        }
    }
    return failed;
}

// 0, or 1 where memory is lacking.
extern "C" int parallelflow_forward(const Problem* problem) { return each_lane<Forward>(*problem, 1); }

extern "C" int parallelflow_backward(const Problem* problem) {
    return each_lane<Backward>(*problem, problem->value_heads / problem->heads / problem->parts);
}

extern "C" int parallelflow_step(const Problem* problem) { return each_lane<Step>(*problem, 1); }

extern "C" int parallelflow_window(long reads, long lone) { return WINDOW * chunk_of(reads, lone); }
