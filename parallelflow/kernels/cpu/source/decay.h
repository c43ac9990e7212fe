// The decay inside a chunk, c_t = g_1 + … + g_t with c_0 = 0, as factors none of which is above 1.
//
// One a head: exponents are summed in float64. One a channel: factors are products of their own tokens' e^g, as in the
// recurrence itself: no difference of sums, so that a reset (-inf) or a small decay beside a large one loses nothing.
#pragma once

#include <cmath>
#include <cstdlib>

#include "problem.h"

// A place is a number of decays from the chunk's start: a row reads at its token + 1 places, a raw one at its token.
struct Decay {
    enum Kind { NONE, HEAD, CHANNEL } kind;
    int depth;
    long row;
    double* since;             // HEAD: c of each place
    float *from_start;         // HEAD: e^c of each place; CHANNEL: [places, row]
    float *to_end;             // HEAD: e^{c_C - c_t} of each token; CHANNEL: [tokens, row]
    float *steps;              // of each token, HEAD: g; CHANNEL: e^g, [tokens, row], and 1 beyond the last
    float *total;              // e^{c_C} of each channel
    static constexpr int SPARE = 4;  // tokens that a walk may take beyond the last

    void arrange(Workspace& memory, const Problem& of) {
        kind = !of.of.log_decay ? NONE : of.channels() ? CHANNEL : HEAD;
        depth = of.key_dim;
        row = row_distance(depth);
        const long each = kind == CHANNEL ? row : 1;
        memory.take(since, ROWS + 1 + LANES);
        memory.take(from_start, (ROWS + 1) * each + LANES);
        memory.take(to_end, ROWS * each + LANES);
        memory.take(steps, (ROWS + SPARE) * each);
        memory.take(total, padded(depth));
    }

    void read(const Lane& lane, long token, int tokens) {
        if (kind == CHANNEL) {
            read_channels(lane, token, tokens);
        } else {
            read_heads(lane, token, tokens);
        }
    }

    // to = scalar · e^c ⊙ from, rows [.., row], `each` a token, the first token's at a place.
    void see(int place, int tokens, int each, const float* scalars, const float* from, float* to) const {
        for (int t = 0; t < tokens; t++)
            for (int j = 0; j < each; j++, from += row, to += row)
                scale(scalars ? *scalars++ : 1, from_start, place + t, from, to);
    }

    // to = e^{c_C - c_t} ⊙ from.
    void keep(int tokens, int each, const float* from, float* to) const {
        for (int t = 0; t < tokens; t++)
            for (int j = 0; j < each; j++, from += row, to += row) scale(1, to_end, t, from, to);
    }

  private:
    void scale(float factor, const float* by, int at, const float* from, float* to) const {
        if (kind == CHANNEL) {
            for (int k = 0; k < depth; k += LANES)
                store(to + k, factor * (load(by + at * row + k) * load(from + k)));
        } else {
            factor *= by[at];
            for (int k = 0; k < depth; k += LANES) store(to + k, factor * load(from + k));
        }
    }

    void read_heads(const Lane& lane, long token, int tokens) {
        double so_far = 0;
        since[0] = 0;
        if (kind == HEAD) lane.read(lane.of.of.log_decay, token, tokens, 1, steps, 1);
        for (int t = 0; t < tokens; t++) {
            if (kind == HEAD) so_far += steps[t] < -1000 ? -1000 : (double)steps[t];  // -inf is a reset; e^-1000 is 0 too
            since[t + 1] = so_far;
        }
        for (int place = tokens + 1; place < tokens + 1 + LANES; place++) since[place] = so_far;
        for (int place = 0; place <= tokens; place += LANES)
            store(from_start + place, exponential(__builtin_convertvector(load(since + place), Floats)));
        for (int t = 0; t < tokens; t += LANES)
            store(to_end + t, exponential(__builtin_convertvector(so_far - load(since + 1 + t), Floats)));
        const Floats all = exponential(fill((float)so_far));
        for (int k = 0; k < depth; k += LANES) store(total + k, all);
    }

    void read_channels(const Lane& lane, long token, int tokens) {
        lane.read(lane.of.of.log_decay, token, tokens, 1, steps, row);
        for (int k = 0; k < depth; k += LANES) {
            Floats factor = fill(1);
            store(from_start + k, factor);
            for (int t = 0; t < tokens; t++) {
                const Floats decay = load(steps + t * row + k);
                const Floats step = exponential(counting() + k < depth ? decay : Floats{});
                store(steps + t * row + k, step);
                store(from_start + (t + 1) * row + k, factor = normal(factor * step));
            }
            store(total + k, factor);
            for (int t = tokens; t < tokens + SPARE; t++) store(steps + t * row + k, fill(1));
            factor = fill(1);
            for (int t = tokens - 1; t >= 0; t--) {
                store(to_end + t * row + k, factor);
                factor = normal(factor * load(steps + t * row + k));
            }
        }
    }
};
