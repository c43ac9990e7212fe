"""Matrix products with a stated precision.

Operands in bfloat16 or float16 are multiplied as they are and summed in float32.  Float32 operands take three TF32
passes (relative error near 1e-6) or an IEEE product, never plain TF32.
"""

from functools import cache

import torch
import triton
import triton.language as tl


@cache
def float32_precision(device: torch.device) -> str:
    """The name of the float32 product to use on `device`: TF32x3 where the tensor cores have TF32, else IEEE."""
    if torch.version.hip is None and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0):
        return "tf32x3"
    return "ieee"


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory a program may take on `device` (a Hopper's where there is no GPU)."""
    if device.type != "cuda":
        return 232448
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin  # type: ignore[attr-defined]


@triton.jit
def product(a, b, PRECISION: tl.constexpr):
    """`a @ b` in float32; `a` is rounded to the dtype of `b`."""
    return tl.dot(a.to(b.dtype), b, input_precision=PRECISION)


@triton.jit
def halves(x):
    """Two bfloat16 numbers whose sum is `x` to 2**-16: its leading bits, cut off without rounding, and the rest."""
    high = (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
    return high.to(tl.bfloat16), (x - high).to(tl.bfloat16)


@triton.jit
def precise_product(a, b, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """`a @ b` of float32 operands: three bfloat16 passes (relative error near 2**-16) if SPLIT, else by PRECISION."""
    if SPLIT:
        a_high, a_low = halves(a)
        b_high, b_low = halves(b)
        return tl.dot(a_high, b_low, tl.dot(a_low, b_high, tl.dot(a_high, b_high)))
    else:
        return tl.dot(a, b, input_precision=PRECISION)
