// What is asked: the arrays and sizes of one call, as Python fills them in (delta.py has the same fields).
#pragma once

#include "numbers.h"

struct Problem {
    // [B, T, H, K], [B, T, H, K], [B, T, HV, V]; coefficients and decays [B, T, HV] in float32, contiguous, or null.
    Tokens query, key, value;
    const float *beta, *log_decay;
    Tokens output;  // or its gradient
    // [N, HV, K, V] in float32, contiguous, or null: the first states, the last ones, and those that enter each window
    // of a sequence, [windows, HV, K, V]. In the backward pass `final` is the gradient of the last states.
    const float *initial;
    float *final, *entries;
    // Gradients: [parts, B, T, H, K] twice in float32, [B, T, HV, V], [B, T, HV] twice in float32, [N, HV, K, V]; the
    // value heads of a key head are summed part by part.
    float *d_query, *d_key;
    Tokens d_value;
    float *d_beta, *d_log_decay, *d_initial;
    // Packed sequences: their first tokens, and T; null for a batch. Their first windows.
    const int64_t *starts, *first_window;
    long batch, time, sequences, heads, value_heads, key_dim, value_dim;
    long tied, parts, threads;
    float scale;

    long group() const { return value_heads / heads; }
    long state() const { return key_dim * value_dim; }
};

constexpr int CHUNK = 32;   // tokens
constexpr int WINDOW = 8;   // chunks between the states that the backward pass starts again from

// One value head of one sequence.
struct Lane {
    const Problem& of;
    long sequence, head, batch, first, length;

    Lane(const Problem& of, long sequence, long head)
        : of(of), sequence(sequence), head(head), batch(of.starts ? 0 : sequence),
          first(of.starts ? of.starts[sequence] : 0),
          length((of.starts ? of.starts[sequence + 1] : of.time) - first) {}

    long key_head() const { return head / of.group(); }
    long chunks() const { return (length + CHUNK - 1) / CHUNK; }
    long windows() const { return (chunks() + WINDOW - 1) / WINDOW; }
    int rows(long chunk) const { return length - chunk * CHUNK < CHUNK ? length - chunk * CHUNK : CHUNK; }
    // Where a number a token and value head stands.
    long place(long token) const { return (batch * of.time + first + token) * of.value_heads + head; }
    long state_at(long number) const { return (number * of.value_heads + head) * of.state(); }
    float* entry(long window) const { return of.entries + state_at(of.first_window[sequence] + window); }

    void read(const Tokens& tokens, long token, int rows, long heads_at, int count, float* to, long to_row) const {
        for (int row = 0; row < rows; row++)
            read_row(tokens.row(batch, first + token + row, heads_at), tokens.dtype(), count, to + row * to_row);
    }

    void write(const float* from, long from_row, long token, int rows, int count, const Tokens& tokens) const {
        for (int row = 0; row < rows; row++)
            write_row(from + row * from_row, tokens.dtype(), count, tokens.row(batch, first + token + row, head));
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
