// One token of the recurrence: the state is read twice, from cache the second time, and written once.
//
//     x = beta (v - kᵀ (e^g S))       S' = e^g S + k xᵀ       o = scale S'ᵀ q
#pragma once

#include <cmath>

#include "problem.h"

constexpr int MOST = 512;  // K, V

static void step(const Problem& of, long batch, long head) {
    constexpr int WIDTH = 4 * LANES;
    const int depth = of.key_dim, width = of.value_dim;
    const long place = batch * of.value_heads + head, at = place * of.state(), key_head = head / of.group();
    float query[MOST], key[MOST], value[MOST], output[MOST];
    read_row(of.query.row(batch, 0, key_head), of.query.dtype(), depth, query);
    read_row(of.key.row(batch, 0, key_head), of.key.dtype(), depth, key);
    read_row(of.value.row(batch, 0, head), of.value.dtype(), width, value);
    const float beta = of.beta ? of.beta[place] : 1;
    const float decay = of.log_decay ? std::exp(of.log_decay[place]) : 1;
    const float* before = of.initial ? of.initial + at : nullptr;
    float* after = of.final + at;
    for (int j = 0; j < width; j += WIDTH) {
        const int columns = width - j < WIDTH ? width - j : WIDTH;
        float written[WIDTH] = {}, said[WIDTH] = {};
        if (before && of.tied)
            for (int k = 0; k < depth; k++)
                for (int n = 0; n < columns; n++) written[n] += key[k] * before[k * width + j + n];
        for (int n = 0; n < columns; n++) written[n] = beta * (value[j + n] - decay * written[n]);
        for (int k = 0; k < depth; k++) {
            for (int n = 0; n < columns; n++) {
                const float old = before ? decay * before[k * width + j + n] : 0;
                const float fresh = old + key[k] * written[n];
                after[k * width + j + n] = fresh;
                said[n] += query[k] * fresh;
            }
        }
        for (int n = 0; n < columns; n++) output[j + n] = of.scale * said[n];
    }
    write_row(output, of.output.dtype(), width, of.output.row(batch, 0, head));
}
