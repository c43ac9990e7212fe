// What is asked: the arrays and sizes of one call, as Python fills them in (flow.py has the same fields, 8 bytes each).
#pragma once

#include "numbers.h"

// A token's factors: of the rows that read, of those that only write, and the decay, a number a head or a key channel.
// A factor's vectors have the key heads or the value heads; its coefficients are a number a row or a channel, or null.
struct Inputs {
    Array query, read, read_coefficient, write, value, value_coefficient, lone_write, lone_value, lone_coefficient,
        log_decay;
};

struct Problem {
    Inputs of;
    Array output;  // or its gradient
    Inputs d;      // the gradients; where two slots hold the same tensor, the later one's is null and added to the other
    // [N, HV, K, V] in float32, contiguous, or null: the first states, the last ones (in the backward pass, their
    // gradient), the gradient of the first ones, and those that enter each window of a sequence, [windows, HV, K, V].
    const float* initial;
    float *final, *d_initial, *entries;
    // Packed sequences: their first tokens, and T; null for a batch. Their first windows.
    const int64_t *starts, *first_window;
    // Of each row that reads, how many of the token's write-only rows come before it; sequential rows only.
    const int64_t* lone_before;
    long batch, time, sequences, heads, value_heads, key_dim, value_dim;
    long reads, lone;  // rows a token that read, and that only write
    long read_sign, value_sign, lone_sign;
    long raw, sequential;  // reads see the state before the token's decay; rows see the token's earlier ones
    long tied, shared;     // the read's vector is the write; the value's coefficient is the read's
    long parts, threads;
    double scale;

    long state() const { return key_dim * value_dim; }
    bool channels() const { return of.log_decay && of.log_decay.width > 1; }
    int chunk() const;
};

constexpr int ROWS = 32;         // most rows of one kind in a chunk
constexpr int SOLVED_ROWS = 16;  // and in one whose rows read: what they cost together grows with their number
constexpr int WINDOW = 8;        // chunks between the states that the backward pass starts again from

// Tokens a chunk.
inline int chunk_of(long reads, long lone) {
    return reads ? SOLVED_ROWS / (reads > lone ? reads : lone) : ROWS / lone;
}

inline int Problem::chunk() const { return chunk_of(reads, lone); }

// One value head of one sequence.
struct Lane {
    const Problem& of;
    long sequence, head, batch, first, length, chunk;

    Lane(const Problem& of, long sequence, long head)
        : of(of), sequence(sequence), head(head), batch(of.starts ? 0 : sequence),
          first(of.starts ? of.starts[sequence] : 0),
          length((of.starts ? of.starts[sequence + 1] : of.time) - first), chunk(of.chunk()) {}

    long chunks() const { return (length + chunk - 1) / chunk; }
    long windows() const { return (chunks() + WINDOW - 1) / WINDOW; }
    int tokens(long number) const { return length - number * chunk < chunk ? length - number * chunk : chunk; }
    long state_at(long number) const { return (number * of.value_heads + head) * of.state(); }
    float* entry(long window) const { return of.entries + state_at(of.first_window[sequence] + window); }
    long group(const Array& array) const { return of.value_heads / array.heads; }

    // Rows [tokens · each, width], `each` a token.
    void read(const Array& array, long token, int tokens, int each, float* to, long to_row) const {
        const char* row = array.place(batch, first + token, 0, head / group(array));
        const long bytes = bytes_of(array.dtype()), next = array.row * bytes, later = array.time * bytes - each * next;
        for (int t = 0; t < tokens; t++, row += later)
            for (int j = 0; j < each; j++, row += next, to += to_row) read_row(row, array.dtype(), array.width, to);
    }

    // Gradients too: what value heads share is added, in their order.
    void write(const float* from, long from_row, long token, int tokens, int each, const Array& array) const {
        const long group_of = group(array), bytes = bytes_of(array.dtype());
        const long next = array.row * bytes, later = array.time * bytes - each * next;
        char* row = array.place(batch, first + token, 0, head / group_of);
        bool add = false;
        if (group_of > 1) {
            const long heads_of_part = group_of / of.parts, within = head % group_of;
            row += within / heads_of_part * array.part * bytes;
            add = within % heads_of_part;
        }
        for (int t = 0; t < tokens; t++, row += later)
            for (int j = 0; j < each; j++, row += next, from += from_row) {
                if (add) add_row(from, array.width, (float*)row);
                else write_row(from, array.dtype(), array.width, row);
            }
    }

  private:
    static void add_row(const float* from, int count, float* to) {
        for (int n = 0; n < count; n++) to[n] += from[n];
    }
};

// A thread's memory, taken piece by piece.
class Workspace {
  public:
    Workspace() : base(nullptr), taken(0), room(0) {}
    ~Workspace() { free(base); }
    Workspace(const Workspace&) = delete;

    // Calls `plan` twice: to count, and to hand out memory, zeroed.
    template <typename Plan>
    bool arrange(Plan plan) {
        plan(*this);
        room = taken;
        base = (char*)aligned_alloc(ALIGNMENT, room);
        if (!base) return false;
        memset(base, 0, room);
        taken = 0;
        plan(*this);
        return true;
    }

    template <typename Number>
    void take(Number*& array, long count) {
        array = (Number*)(base + taken);
        taken += (count * sizeof(Number) + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    }

  private:
    static constexpr long ALIGNMENT = 128;
    char* base;
    long taken, room;
};
