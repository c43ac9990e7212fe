// Vectors of the machine's width, and what is done to each of their lanes.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX512F__)
constexpr int LANES = 16, TILE_ROWS = 8, TILE_VECTORS = 2;  // of 32 registers
#elif defined(__AVX2__)
constexpr int LANES = 8, TILE_ROWS = 6, TILE_VECTORS = 2;  // of 16 registers
#else
constexpr int LANES = 4, TILE_ROWS = 8, TILE_VECTORS = 2;
#endif

typedef float Floats __attribute__((vector_size(LANES * 4)));
typedef double Doubles __attribute__((vector_size(LANES * 8)));
typedef int32_t Integers __attribute__((vector_size(LANES * 4)));

static inline Floats load(const float* from) {
    Floats lanes;
    memcpy(&lanes, from, sizeof lanes);
    return lanes;
}

static inline Doubles load(const double* from) {
    Doubles lanes;
    memcpy(&lanes, from, sizeof lanes);
    return lanes;
}

template <typename Lanes, typename Number>
static inline void store(Number* to, Lanes lanes) {
    memcpy(to, &lanes, sizeof lanes);
}

static inline Floats fill(float number) { return number - Floats{}; }

// All lanes, halves added to each other: one lane after another would wait for each sum.
template <typename Number, int COUNT>
static inline Number sum_of(const Number* numbers) {
    if constexpr (COUNT == 1) {
        return *numbers;
    } else {
        typedef Number Half __attribute__((vector_size(COUNT / 2 * sizeof(Number))));
        Half low, high;
        memcpy(&low, numbers, sizeof low);
        memcpy(&high, numbers + COUNT / 2, sizeof high);
        low += high;
        Number halves[COUNT / 2];
        memcpy(halves, &low, sizeof low);
        return sum_of<Number, COUNT / 2>(halves);
    }
}

static inline float sum(Floats lanes) { return sum_of<float, LANES>((const float*)&lanes); }
static inline double sum(Doubles lanes) { return sum_of<double, LANES>((const double*)&lanes); }

static inline Integers counting() {
    Integers numbers;
    for (int lane = 0; lane < LANES; lane++) numbers[lane] = lane;
    return numbers;
}

// e^x for x <= 0 (and a little above), about one unit in the last place; 0 below -87.3; a NaN stays one.
// x = n ln 2 + r with |r| <= ln 2 / 2, and a polynomial for e^r: its Taylor series to r^7.
static inline Floats exponential(Floats x) {
    const Floats lowest = fill(-87.3f);
    const Integers vanishes = x < lowest;
    x = vanishes ? lowest : x;
    const Floats shifter = fill(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    Floats n = x * 1.44269504f + shifter;
    const Integers exponent = (Integers)n << 23;
    n -= shifter;
    Floats r = x - n * 0.693359375f;
    r -= n * -2.12194440e-4f;
    Floats p = fill(1.0f / 5040);
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    const Floats power = (Floats)((Integers)p + exponent);
    return vanishes ? Floats{} : x == x ? power : x;
}

// LANES rows of LANES numbers, turned.
#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define PARALLELFLOW_SHUFFLES
#endif
#endif

#ifdef PARALLELFLOW_SHUFFLES
template <int step, int half, int... lane>
static inline Floats exchanged(Floats a, Floats b, std::integer_sequence<int, lane...>) {
    return __builtin_shufflevector(
        a, b, ((lane & step) ? ((lane - step) + LANES + half * step) : (lane + half * step))...);
}

template <int step>
static inline void exchange(Floats* rows) {
    using Every = std::make_integer_sequence<int, LANES>;
#pragma GCC unroll 16
    for (int row = 0; row < LANES; row++) {
        if (row & step) continue;
        const Floats a = rows[row], b = rows[row + step];
        rows[row] = exchanged<step, 0>(a, b, Every{});
        rows[row + step] = exchanged<step, 1>(a, b, Every{});
    }
    if constexpr (step > 1) exchange<step / 2>(rows);
}

static inline void transpose_square(const float* from, long from_row, float* to, long to_row) {
    Floats rows[LANES];
#pragma GCC unroll 16
    for (int row = 0; row < LANES; row++) rows[row] = load(from + row * from_row);
    exchange<LANES / 2>(rows);
#pragma GCC unroll 16
    for (int row = 0; row < LANES; row++) store(to + row * to_row, rows[row]);
}
#else
static inline void transpose_square(const float* from, long from_row, float* to, long to_row) {
    for (int row = 0; row < LANES; row++)
        for (int lane = 0; lane < LANES; lane++) to[lane * to_row + row] = from[row * from_row + lane];
}
#endif

constexpr int padded(int count) { return (count + LANES - 1) / LANES * LANES; }

// Distance of rows of `count` numbers: whole vectors, and an odd number of cache lines, so that rows do not all fall
// into the same few sets of the cache.
constexpr int row_distance(int count) {
    const int line = LANES > 16 ? LANES : 16, lines = (count + line - 1) / line;
    return (lines | 1) * line;
}

// [rows, columns] -> [columns, rows]; both arrays have room for whole vectors.
static inline void transpose(int rows, int columns, const float* from, long from_row, float* to, long to_row) {
    for (int row = 0; row < rows; row += LANES)
        for (int column = 0; column < columns; column += LANES)
            transpose_square(from + row * from_row + column, from_row, to + column * to_row + row, to_row);
}

// Numbers too small to be normal are 0, as `exponential` has it: they are slow, and lose their digits.
static inline Floats normal(Floats positive) { return positive < 1.17549435e-38f ? Floats{} : positive; }
