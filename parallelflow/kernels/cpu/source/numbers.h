// Rows of float32, bfloat16 or float16 in memory, as float32 in the workspace.
#pragma once

#include "lanes.h"

enum Type { FLOAT32, BFLOAT16, FLOAT16 };

static inline int bytes_of(Type type) { return type == FLOAT32 ? 4 : 2; }

static inline void read_row(const char* from, Type type, int count, float* to) {
    if (type == FLOAT32) {
        if (count == 1) memcpy(to, from, sizeof(float));  // no call
        else memcpy(to, from, count * sizeof(float));
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

// [B, T, R, heads, D] at any strides but the last, which is 1; a number a head is D = 1. Null where there is none.
// Gradients of what value heads share are summed in float32 and come in several parts, which are added afterwards.
struct Array {
    char* at;
    long batch, time, row, head, part;  // strides in elements
    long type, heads, width;

    explicit operator bool() const { return at; }
    Type dtype() const { return (Type)type; }
    char* place(long b, long t, long j, long h) const {
        return at + (b * batch + t * time + j * row + h * head) * bytes_of(dtype());
    }
};
