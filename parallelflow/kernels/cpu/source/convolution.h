// The short causal convolution of each channel on its own, and SiLU after it: forward and backward.
#pragma once

#include "lanes.h"

// inputs [B, T, C] at any strides but the last; window [B, W - 1, C], weight [W, C], bias [C] (or null), output and
// gradients contiguous. C is a multiple of LANES. Gradients of weight and bias are summed over T for each b.
struct Convolution {
    const float *inputs, *window, *weight, *bias;
    float *output;
    const float *d_output;
    float *d_inputs, *d_weight, *d_bias;  // [B, T, C], [B, W, C], [B, C]
    long batch_stride, time_stride, batch, time, channels, width, silu, threads;

    // The input `t` of a sequence, at a channel; those before it are the window's.
    const float* input(long b, long t, long channel) const {
        if (t >= 0) return inputs + b * batch_stride + t * time_stride + channel;
        return window + (b * (width - 1) + width - 1 + t) * channels + channel;
    }
};

static inline Floats logistic(Floats x) {
    const Floats small = exponential(x > 0.0f ? -x : x);  // e^-|x|
    return (x > 0.0f ? fill(1.0f) : small) / (1.0f + small);
}

constexpr int TOGETHER = 4;  // vectors of channels that one walk over time takes

// One walk over time, of `count` vectors of channels.
template <int WIDTH, int COUNT>
struct Channels {
    const Convolution& of;
    long b, channel;
    Floats taps[WIDTH][COUNT], bias[COUNT];

    Channels(const Convolution& of, long b, long channel) : of(of), b(b), channel(channel) {
        for (int n = 0; n < COUNT; n++) {
            for (int i = 0; i < WIDTH; i++) taps[i][n] = load(of.weight + i * of.channels + channel + n * LANES);
            bias[n] = of.bias ? load(of.bias + channel + n * LANES) : Floats{};
        }
    }

    Floats before_activation(const float* const* rows, int n) const {
        Floats total = bias[n];
        for (int i = 0; i < WIDTH; i++) total += taps[i][n] * load(rows[i] + n * LANES);
        return total;
    }

    void forward() const {
        const float* rows[WIDTH];
        for (int i = 1; i < WIDTH; i++) rows[i] = of.input(b, i - WIDTH, channel);
        for (long t = 0; t < of.time; t++) {
            for (int i = 1; i < WIDTH; i++) rows[i - 1] = rows[i];
            rows[WIDTH - 1] = of.input(b, t, channel);
            float* to = of.output + (b * of.time + t) * of.channels + channel;
            for (int n = 0; n < COUNT; n++) {
                const Floats x = before_activation(rows, n);
                store(to + n * LANES, of.silu ? x * logistic(x) : x);
            }
        }
    }

    // dx_t = sum_i w_i dy_{t + W - 1 - i}: the last W - 1 of dy before the activation are kept. Sums over time are
    // taken in runs, so that rounding does not grow with T.
    void backward() const {
        constexpr long RUN = 128;
        const float* rows[WIDTH];
        Floats recent[WIDTH][COUNT] = {}, sums[WIDTH + 1][COUNT] = {}, totals[WIDTH + 1][COUNT] = {};
        for (int i = 1; i < WIDTH; i++) rows[i] = of.input(b, i - WIDTH, channel);
        for (long t = 0; t < of.time + WIDTH - 1; t++) {
            const bool inside = t < of.time;
            if (inside) {
                for (int i = 1; i < WIDTH; i++) rows[i - 1] = rows[i];
                rows[WIDTH - 1] = of.input(b, t, channel);
            }
            for (int n = 0; n < COUNT; n++) {
                for (int i = 1; i < WIDTH; i++) recent[i - 1][n] = recent[i][n];
                Floats d{};
                if (inside) {
                    d = load(of.d_output + (b * of.time + t) * of.channels + channel + n * LANES);
                    if (of.silu) {
                        const Floats x = before_activation(rows, n), share = logistic(x);
                        d *= share * (1.0f + x * (1.0f - share));
                    }
                    for (int i = 0; i < WIDTH; i++) sums[i][n] += d * load(rows[i] + n * LANES);
                    sums[WIDTH][n] += d;
                }
                recent[WIDTH - 1][n] = d;
                if (t >= WIDTH - 1) {
                    Floats total{};
                    for (int i = 0; i < WIDTH; i++) total += taps[i][n] * recent[WIDTH - 1 - i][n];
                    store(of.d_inputs + (b * of.time + t - WIDTH + 1) * of.channels + channel + n * LANES, total);
                }
            }
            if (t % RUN == RUN - 1 || t == of.time + WIDTH - 2)
                for (int i = 0; i <= WIDTH; i++)
                    for (int n = 0; n < COUNT; n++) {
                        totals[i][n] += sums[i][n];
                        sums[i][n] = Floats{};
                    }
        }
        for (int n = 0; n < COUNT; n++) {
            for (int i = 0; i < WIDTH; i++)
                store(of.d_weight + (b * WIDTH + i) * of.channels + channel + n * LANES, totals[i][n]);
            store(of.d_bias + b * of.channels + channel + n * LANES, totals[WIDTH][n]);
        }
    }
};

template <int WIDTH, int COUNT>
static void convolve_channels(const Convolution& of, long b, long channel) {
    const Channels<WIDTH, COUNT> walk(of, b, channel);
    if (of.d_output) walk.backward();
    else walk.forward();
}

template <int WIDTH>
static void convolve(const Convolution& of) {
    const long vectors = of.channels / LANES, blocks = (vectors + TOGETHER - 1) / TOGETHER, tasks = of.batch * blocks;
#pragma omp parallel for num_threads(of.threads < tasks ? of.threads : tasks) if (tasks > 1)
    for (long task = 0; task < tasks; task++) {
        const long b = task / blocks, first = task % blocks * TOGETHER;
        if (first + TOGETHER <= vectors) convolve_channels<WIDTH, TOGETHER>(of, b, first * LANES);
        else for (long n = first; n < vectors; n++) convolve_channels<WIDTH, 1>(of, b, n * LANES);
    }
}

// 1 for a width that it does not have. With `d_output` it is the backward pass.
extern "C" int parallelflow_convolution(const Convolution* of) {
    if (of->width == 2) convolve<2>(*of);
    else if (of->width == 3) convolve<3>(*of);
    else if (of->width == 4) convolve<4>(*of);
    else return 1;
    return 0;
}

extern "C" int parallelflow_lanes() { return LANES; }
