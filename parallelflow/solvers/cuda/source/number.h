// Numbers as they are stored and as they are computed with. The same source is CUDA C++ and plain C++.
#pragma once

#ifdef __CUDACC__
#define DEVICE __device__ __forceinline__
#define UNROLL _Pragma("unroll")
#define ROLLED _Pragma("unroll 1")
#else
#define DEVICE inline
#define UNROLL
#define ROLLED
#endif

namespace parallelflow {

struct BFloat16 {
    unsigned short bits;
};

struct Float16 {
    unsigned short bits;
};

union Word {
    float number;
    unsigned int bits;
};

DEVICE float widened(BFloat16 x) {
    Word word;
    word.bits = static_cast<unsigned int>(x.bits) << 16;
    return word.number;
}

DEVICE float widened(float x) { return x; }
DEVICE double widened(double x) { return x; }

// To the nearest, ties to even; NaN stays NaN.
DEVICE void narrow(float x, BFloat16& result) {
    Word word;
    word.number = x;
    const unsigned int rounded = word.bits + 0x7fffu + ((word.bits >> 16) & 1u);
    result.bits = static_cast<unsigned short>(x == x ? rounded >> 16 : 0x7fc0u);
}

#ifdef __CUDACC__
DEVICE float widened(Float16 x) {
    float result;
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(x.bits));
    return result;
}

DEVICE void narrow(float x, Float16& result) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(x)); }
#endif

DEVICE void narrow(float x, float& result) { result = x; }
DEVICE void narrow(double x, double& result) { result = x; }
DEVICE void narrow(float x, double& result) { result = x; }
DEVICE void narrow(double x, float& result) { result = static_cast<float>(x); }

}  // namespace parallelflow
