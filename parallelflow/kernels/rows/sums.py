"""Zeros, and sums of a few float32 arrays in their order, rounded once: launches like any other, which a ``Plan`` can
make again, where PyTorch's own take longer on the host than on the card."""

from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from parallelflow.kernels.launch import bind

BLOCK = 1024


@triton.jit
def zeros_kernel(result, count, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(result + place, tl.zeros([BLOCK], tl.float32).to(result.dtype.element_ty), mask=place < count)


@triton.jit
def sums_kernel(parts, other, result, count, PARTS: tl.constexpr, INNER: tl.constexpr, BLOCK: tl.constexpr):
    """Sums over the second axis of ``[count / INNER, PARTS, INNER]``, and ``other``."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = place < count
    first = parts + place // INNER * (PARTS * INNER) + place % INNER
    total = tl.load(first, mask=there, other=0.0).to(tl.float32)
    for part in range(1, PARTS):
        total += tl.load(first + part * INNER, mask=there, other=0.0).to(tl.float32)
    if other is not None:
        total += tl.load(other + place, mask=there, other=0.0).to(tl.float32)
    tl.store(result + place, total.to(result.dtype.element_ty), mask=there)


def zeros(like: Tensor, *shape: int) -> Tensor:
    """Of float32, on the device of ``like``."""
    found = torch.empty(shape, dtype=torch.float32, device=like.device)
    if found.numel():
        bind(zeros_kernel, BLOCK=BLOCK, num_warps=4)(-(-found.numel() // BLOCK), found, found.numel())
    return found


def summed(tensor: Tensor, axis: int, dtype: torch.dtype, other: Tensor | None = None) -> Tensor:
    """A contiguous tensor summed over an axis, plus ``other``, which has the sum's shape, in ``dtype``."""
    shape = tensor.shape[:axis] + tensor.shape[axis + 1 :]
    found = torch.empty(shape, dtype=dtype, device=tensor.device)
    count, inner = found.numel(), prod(tensor.shape[axis + 1 :])
    if count:
        one = bind(sums_kernel, PARTS=tensor.shape[axis], INNER=inner, BLOCK=BLOCK, num_warps=4)
        one(-(-count // BLOCK), tensor, other, found, count)
    return found


def converted(tensor: Tensor, dtype: torch.dtype, other: Tensor | None = None) -> Tensor:
    """A contiguous tensor, plus ``other``, in ``dtype``; itself where nothing is to be done."""
    if tensor.dtype == dtype and other is None:
        return tensor
    return summed(tensor.unsqueeze(0), 0, dtype, other)
