// The flow of every kind of rows and decay: forward, backward, and one token.

#include "backward.h"
#include "convolution.h"
#include "pages.h"
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
#pragma omp for schedule(dynamic, 1)
        for (long task = 0; task < tasks; task++) {
            const long heads = problem.value_heads / heads_together;
            for (long number = 0; number < heads_together && !failed; number++)
                walk.run(Lane(problem, task / heads, task % heads * heads_together + number));
        }
    }
    return failed;
}

// The results are fresh memory: [B, ..] or, of what value heads share, [parts, B, ..].
static void prepare(const Problem& of, const Array& result) {
    if (!result) return;
    const long numbers = result.part ? of.parts * result.part : of.batch * result.batch;
    in_large_pages(result.at, numbers * bytes_of(result.dtype()));
}

static void prepare(const Problem& of, float* states, long count) {
    in_large_pages(states, count * of.value_heads * of.state() * sizeof(float));
}

// These return 0, or 1 where memory is lacking.

extern "C" int parallelflow_forward(const Problem* problem) {
    prepare(*problem, problem->output);
    prepare(*problem, problem->final, problem->sequences);
    if (problem->entries) prepare(*problem, problem->entries, problem->first_window[problem->sequences]);
    return each_lane<Forward>(*problem, 1);
}

extern "C" int parallelflow_backward(const Problem* problem) {
    const Inputs& d = problem->d;
    for (const Array* result : {&d.query, &d.read, &d.read_coefficient, &d.write, &d.value, &d.value_coefficient,
                                &d.lone_write, &d.lone_value, &d.lone_coefficient, &d.log_decay})
        prepare(*problem, *result);
    return each_lane<Backward>(*problem, problem->value_heads / problem->heads / problem->parts);
}

extern "C" int parallelflow_step(const Problem* problem) {
    prepare(*problem, problem->final, problem->sequences);
    return each_lane<Step>(*problem, 1);
}

// Whether all log-decays are at most 0; a NaN is not.
static bool are_log_decays(const Problem& of) {
    const Array& decay = of.of.log_decay;
    if (!decay) return true;
    for (long b = 0; b < of.batch; b++)
        for (long t = 0; t < of.time; t++)
            for (long h = 0; h < decay.heads; h++)
                for (long k = 0; k < decay.width; k++) {
                    float number;
                    read_row(decay.place(b, t, 0, h) + k * bytes_of(decay.dtype()), decay.dtype(), 1, &number);
                    if (!(number <= 0)) return false;
                }
    return true;
}

// A pass as before, with its tensors at other addresses: those of the inputs, of the initial states, the output, the
// final states. Returns 2, and does nothing, if `checking` finds a positive log-decay or a NaN.
template <typename Pass>
static int again(Pass pass, const Problem& before, char* const* addresses, int threads, int checking) {
    Problem problem = before;
    Inputs& of = problem.of;
    for (Array* array : {&of.query, &of.read, &of.read_coefficient, &of.write, &of.value, &of.value_coefficient,
                         &of.lone_write, &of.lone_value, &of.lone_coefficient, &of.log_decay})
        array->at = *addresses++;
    problem.initial = (const float*)*addresses++;
    problem.output.at = *addresses++;
    problem.final = (float*)*addresses;
    problem.threads = threads;
    return checking && !are_log_decays(problem) ? 2 : pass(&problem);
}

extern "C" int parallelflow_forward_again(const Problem* before, char* const* addresses, int threads, int checking) {
    return again(parallelflow_forward, *before, addresses, threads, checking);
}

extern "C" int parallelflow_step_again(const Problem* before, char* const* addresses, int threads, int checking) {
    return again(parallelflow_step, *before, addresses, threads, checking);
}

extern "C" int parallelflow_window(long reads, long lone) { return WINDOW * chunk_of(reads, lone); }
