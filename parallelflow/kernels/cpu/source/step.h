// One token of the recurrence. What its rows and its query see of the state is found in one pass over it, and what they
// write in another:
//
//     x_p = u_p + a_pᵀ (e^g S) + Σ_{q before p} (a_p·b_q) x_q        q: of sequential rows; raw rows see S
//     o   = scale (qᵀ (e^g S) + Σ_q (q·b_q) x_q)                      S' = e^g S + Σ_q b_q x_qᵀ
#pragma once

#include "rows.h"

class Step {
  public:
    void arrange(Workspace& memory, const Problem& of) {
        deep = row_distance(of.key_dim), wide = row_distance(of.value_dim);
        const long most = of.reads + of.lone + 1;
        for (float** array : {&reads, &writes}) memory.take(*array, most * deep);
        for (float** array : {&seen, &values}) memory.take(*array, most * wide);
        for (float** array : {&decay, &factor}) memory.take(*array, deep > wide ? deep : wide);
        memory.take(pairs, most * most);
    }

    void run(const Lane& lane) {
        const Problem& of = lane.of;
        const int n = of.reads, m = of.lone, width = of.value_dim;
        const long at = lane.state_at(lane.sequence);
        const float* before = of.initial ? of.initial + at : nullptr;
        read(lane);
        meet(of);
        if (before) {
            see(of.key_dim, width, n + 1, reads, before, seen);
        } else {
            memset(seen, 0, (n + 1) * wide * sizeof(float));
        }
        for (int place = 0; place < n; place++) {
            float* value = values + place * wide;
            for (int j = 0; j < width; j++) value[j] += seen[place * wide + j];
            if (!of.sequential) continue;
            for (int q = 0; q < n + m; q++)
                if (precedes(of, q, place)) add(width, pairs[place * (n + m) + q], values + q * wide, value);
        }
        float* output = seen + n * wide;
        for (int q = 0; q < n + m; q++) add(width, pairs[n * (n + m) + q], values + q * wide, output);
        lane.write(output, wide, 0, 1, 1, of.output);
        write(of.key_dim, width, n + m, before, of.final + at);
    }

  private:
    static bool precedes(const Problem& of, int q, int place) {
        return q < of.reads ? q < place : q - of.reads < of.lone_before[place];
    }

    // The rows that see, as they see the state before: those that read, then the query; and all that write.
    void read(const Lane& lane) {
        const Problem& of = lane.of;
        const int depth = of.key_dim, width = of.value_dim, n = of.reads, m = of.lone;
        decay[0] = 0;
        if (of.of.log_decay) lane.read(of.of.log_decay, 0, 1, 1, decay, 0);
        const Floats same = exponential(fill(decay[0]));
        for (int k = 0; k < depth; k += LANES)
            store(decay + k, of.channels() ? exponential(load(decay + k)) : same);
        if (n) {
            lane.read(of.of.write, 0, 1, n, writes, deep);
            if (of.tied) memcpy(reads, writes, n * deep * sizeof(float));
            else lane.read(of.of.read, 0, 1, n, reads, deep);
            multiply(lane, of.of.read_coefficient, of.read_sign, n, depth, reads, deep);
            if (of.of.value) {
                lane.read(of.of.value, 0, 1, n, values, wide);
                multiply(lane, of.of.value_coefficient, of.value_sign, n, width, values, wide);
            } else {
                memset(values, 0, n * wide * sizeof(float));
            }
        }
        if (m) {
            lane.read(of.of.lone_write, 0, 1, m, writes + n * deep, deep);
            lane.read(of.of.lone_value, 0, 1, m, values + n * wide, wide);
            multiply(lane, of.of.lone_coefficient, of.lone_sign, m, width, values + n * wide, wide);
        }
        float* query = reads + n * deep;
        lane.read(of.of.query, 0, 1, 1, query, deep);
        for (int k = 0; k < depth; k++) query[k] *= (float)of.scale;
    }

    void multiply(const Lane& lane, const Array& coefficient, long sign, int rows, int count, float* to, long row) {
        if (!coefficient && sign == 1) return;
        for (int j = 0; j < rows; j++) {
            float one = 1;
            if (coefficient) {
                const char* at = coefficient.place(lane.batch, lane.first, j, lane.head / lane.group(coefficient));
                read_row(at, coefficient.dtype(), coefficient.width, coefficient.width > 1 ? factor : &one);
            }
            for (int k = 0; k < count; k++)
                to[j * row + k] *= coefficient.width > 1 && coefficient ? sign * factor[k] : sign * one;
        }
    }

    // a_p·b_q and scale q·b_q; then the readers take the decay on them.
    void meet(const Problem& of) {
        const int n = of.reads, all = n + of.lone, depth = of.key_dim;
        for (int p = of.sequential ? 0 : n; p <= n; p++)
            for (int q = 0; q < all; q++) pairs[p * all + q] = dot(depth, reads + p * deep, writes + q * deep);
        if (!of.of.log_decay) return;
        for (int p = of.raw ? n : 0; p <= n; p++)
            for (int k = 0; k < depth; k += LANES) {
                float* to = reads + p * deep + k;
                store(to, load(to) * load(decay + k));
            }
    }

    static void add(int count, float factor, const float* from, float* to) {
        for (int j = 0; j < count; j++) to[j] += factor * from[j];
    }

    // to [rows, width] = from [rows, depth] state [depth, width]; two rows share a pass.
    void see(int depth, int width, int rows, const float* from, const float* state, float* to) const {
        int p = 0;
        for (; p + 2 <= rows; p += 2) in_blocks(width, [&](auto block, int j) {
            see_block<block, 2>(depth, width, from + p * deep, state + j, to + p * wide + j);
        });
        if (p < rows) in_blocks(width, [&](auto block, int j) {
            see_block<block, 1>(depth, width, from + p * deep, state + j, to + p * wide + j);
        });
    }

    template <int BLOCK, int COUNT>
    void see_block(int depth, int width, const float* from, const float* state, float* to) const {
        float sums[COUNT][BLOCK] = {};
        for (int k = 0; k < depth; k++)
            for (int r = 0; r < COUNT; r++)
                for (int j = 0; j < BLOCK; j++) sums[r][j] += from[r * deep + k] * state[(long)k * width + j];
        for (int r = 0; r < COUNT; r++) memcpy(to + r * wide, sums[r], sizeof sums[r]);
    }

    void write(int depth, int width, int rows, const float* before, float* after) const {
        for (int q = 0; q < rows; q += 2) in_blocks(width, [&](auto block, int j) {
            const float* from = q ? after + j : before ? before + j : nullptr;
            if (q + 2 <= rows) write_block<block, 2>(depth, width, q, j, from, after + j);
            else write_block<block, 1>(depth, width, q, j, from, after + j);
        });
    }

    template <int BLOCK, int COUNT>
    void write_block(int depth, int width, int q, int at, const float* from, float* to) const {
        float value[COUNT][BLOCK];
        for (int r = 0; r < COUNT; r++) memcpy(value[r], values + (q + r) * wide + at, sizeof value[r]);
        for (int k = 0; k < depth; k++) {
            const float stays = from ? q ? 1 : decay[k] : 0;
            const float *old = from ? from + (long)k * width : value[0];
            for (int j = 0; j < BLOCK; j++) {
                float fresh = from ? stays * old[j] : 0;
                for (int r = 0; r < COUNT; r++) fresh += writes[(q + r) * deep + k] * value[r][j];
                to[(long)k * width + j] = fresh;
            }
        }
    }

    template <typename Use>
    static void in_blocks(int width, Use use) {
        int j = 0;
        for (; j + 8 * LANES <= width; j += 8 * LANES) use(std::integral_constant<int, 8 * LANES>{}, j);
        for (; j + LANES <= width; j += LANES) use(std::integral_constant<int, LANES>{}, j);
        for (; j < width; j++) use(std::integral_constant<int, 1>{}, j);
    }

    long deep, wide;
    float *reads, *writes, *seen, *values, *decay, *factor, *pairs;
};
