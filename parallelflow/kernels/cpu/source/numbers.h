// Rows of float32, bfloat16 or float16 in memory, as float32 in the workspace.
#pragma once

#include "lanes.h"

enum Type { FLOAT32, BFLOAT16, FLOAT16 };

static inline int bytes_of(Type type) { return type == FLOAT32 ? 4 : 2; }

static inline void read_row(const char* from, Type type, int count, float* to) {
    if (type == FLOAT32) {
        memcpy(to, from, count * sizeof(float));
    } else if (type == BFLOAT16) {
        for (int n = 0; n < count; n++) {
            uint16_t upper;
            memcpy(&upper, from + 2 * n, 2);
            const uint32_t bits = (uint32_t)upper << 16;
            memcpy(to + n, &bits, 4);
        }
    } else {
        for (int n = 0; n < count; n++) {
            _Float16 number;
            memcpy(&number, from + 2 * n, 2);
            to[n] = (float)number;
        }
    }
}

static inline void write_row(const float* from, Type type, int count, char* to) {
    if (type == FLOAT32) {
        memcpy(to, from, count * sizeof(float));
    } else if (type == BFLOAT16) {
        for (int n = 0; n < count; n++) {
            uint32_t bits;
            memcpy(&bits, from + n, 4);
            const uint32_t even = ((bits >> 16) & 1) + 0x7fff;  // to nearest, ties to even
            const bool is_nan = (bits & 0x7fffffff) > 0x7f800000;
            const uint16_t upper = is_nan ? 0x7fc0 : (uint16_t)((bits + even) >> 16);
            memcpy(to + 2 * n, &upper, 2);
        }
    } else {
        for (int n = 0; n < count; n++) {
            const _Float16 number = (_Float16)from[n];
            memcpy(to + 2 * n, &number, 2);
        }
    }
}

// [B, T, heads, D] at any strides but the last, which is 1.
struct Tokens {
    char* at;
    long batch, time, head;  // strides in elements
    int type;

    Type dtype() const { return (Type)type; }
    char* row(long b, long t, long h) const { return at + (b * batch + t * time + h * head) * bytes_of(dtype()); }
};
