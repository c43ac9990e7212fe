"""Products of a factor's vectors and coefficients, sign · coefficient · vector once a value head, and their gradients.

Forward in one pass, rounded once to the vectors' dtype. Backward from the gradient of the product, also in one pass:
that of the vector, and that of the coefficient, a sum over the channels where there is one a row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from parallelflow.kernels.chunks import Chunks, locate_chunk
from parallelflow.kernels.launch import bind
from parallelflow.kernels.rows.factors import places
from parallelflow.kernels.rows.layout import Factor, Layout
from parallelflow.kernels.rows.sums import summed

ROWS = 16  # of a program


@triton.jit
def own_head(row, HV: tl.constexpr, HEADS: tl.constexpr):
    """The row of ``[…, HEADS]`` that belongs to one of ``[…, HV]``."""
    return row // HV * HEADS + row % HV // (HV // HEADS)


@triton.jit
def product_kernel(vector, coefficient, result, rows, HV: tl.constexpr, HEADS: tl.constexpr, KIND: tl.constexpr,
                   COEFFICIENT_HEADS: tl.constexpr, SIGN: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
                   ROWS: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BD)
    inside = (row < rows)[:, None] & (column < D)[None, :]
    product = tl.load(vector + own_head(row, HV, HEADS)[:, None] * D + column[None, :], mask=inside,
                      other=0.0).to(tl.float32)  # fmt: skip
    own = own_head(row, HV, COEFFICIENT_HEADS)
    if KIND == 1:
        product *= tl.load(coefficient + own, mask=row < rows, other=0.0).to(tl.float32)[:, None]
    if KIND == 2:
        product *= tl.load(coefficient + own[:, None] * D + column[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(result + row[:, None] * D + column[None, :], (SIGN * product).to(result.dtype.element_ty), mask=inside)


@triton.jit
def pull_product_kernel(gradient, vector, coefficient, d_vector, d_coefficient, rows,
                        HV: tl.constexpr, HEADS: tl.constexpr, KIND: tl.constexpr, COEFFICIENT_HEADS: tl.constexpr,
                        SIGN: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BD)
    inside = (row < rows)[:, None] & (column < D)[None, :]
    at = row[:, None] * D + column[None, :]
    pulled = SIGN * tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32)
    own = own_head(row, HV, COEFFICIENT_HEADS)
    if KIND > 0:
        own_vector = tl.load(vector + own_head(row, HV, HEADS)[:, None] * D + column[None, :], mask=inside, other=0.0)
        slope = pulled * own_vector.to(tl.float32)
        if KIND == 1:
            tl.store(d_coefficient + row, tl.sum(slope, 1).to(d_coefficient.dtype.element_ty), mask=row < rows)
            pulled *= tl.load(coefficient + own, mask=row < rows, other=0.0).to(tl.float32)[:, None]
        else:
            tl.store(d_coefficient + at, slope.to(d_coefficient.dtype.element_ty), mask=inside)
            pulled *= tl.load(coefficient + own[:, None] * D + column[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(d_vector + at, pulled.to(d_vector.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["time", "per_sequence"])
def weights_kernel(coefficient, weights, table, time, per_sequence, C: tl.constexpr, N: tl.constexpr, R: tl.constexpr,
                   HV: tl.constexpr, HEADS: tl.constexpr, SIGN: tl.constexpr, BH: tl.constexpr,
                   PACKED: tl.constexpr):  # fmt: skip
    """The weights of one chunk, BH value heads at a time."""
    chunk = tl.program_id(0)
    first, length = locate_chunk(chunk, table, time, per_sequence, C, PACKED)
    token, place = places(N, R)
    row = (first + token) * R + place
    there = (token < length) & (place < R)
    for start in range(0, HV, BH):
        head = start + tl.arange(0, BH)
        inside = there[None, :] & (head < HV)[:, None]
        at = row[None, :] * HEADS + (head // (HV // HEADS))[:, None]
        found = SIGN * tl.load(coefficient + at, mask=inside, other=0.0).to(tl.float32)
        to = (chunk.to(tl.int64) * HV + head)[:, None] * N + tl.arange(0, N)[None, :]
        tl.store(weights + to, found, mask=(head < HV)[:, None])


def weights_of(factor: Factor, layout: Layout, chunks: Chunks) -> Tensor | None:
    """A factor's sign and coefficients, one a row, as the rows lie in each chunk, ``[chunks, HV, N]`` in float32; None
    without coefficients."""
    coefficient = factor.coefficient
    if coefficient is None:
        return None
    weights = coefficient.new_empty(chunks.count, layout.value_heads, layout.N, dtype=torch.float32)
    if chunks.count:
        launch = bind(
            weights_kernel, C=layout.C, N=layout.N, R=layout.R, HV=layout.value_heads,
            HEADS=factor.coefficient_heads, SIGN=factor.sign, BH=min(triton.next_power_of_2(layout.value_heads), 16),
            PACKED=chunks.packed, num_warps=4)  # fmt: skip
        launch(chunks.count, coefficient, weights, chunks.table, chunks.time, chunks.per_sequence)
    return weights


def _sizes(factor: Factor, value_heads: int) -> dict[str, int]:
    width = factor.vector.shape[-1]
    return {"HV": value_heads, "HEADS": factor.heads, "KIND": factor.kind, "SIGN": factor.sign, "D": width,
            "COEFFICIENT_HEADS": factor.coefficient_heads, "BD": triton.next_power_of_2(width), "ROWS": ROWS,
            "num_warps": 4}  # fmt: skip


def product(factor: Factor, value_heads: int) -> Tensor:
    """``[B, T, R, HV, D]`` in the vectors' dtype; the vectors themselves where there is nothing to multiply."""
    vector = factor.vector
    if factor.kind == 0 and factor.sign == 1:
        return vector
    result = vector.new_empty(*vector.shape[:3], value_heads, vector.shape[4])
    rows = result.numel() // max(result.shape[-1], 1)
    if rows:
        launch = bind(product_kernel, **_sizes(factor, value_heads))
        launch(-(-rows // ROWS), vector, factor.coefficient, result, rows)
    return result


def gathered(gradient: Tensor, heads: int) -> Tensor:
    """``[B, T, R, HV(, D)]`` summed over the value heads that share a head, in their order."""
    if gradient.shape[3] == heads:
        return gradient
    return summed(gradient.unflatten(3, (heads, -1)), 4, gradient.dtype)


def pull_product(gradient: Tensor, factor: Factor) -> tuple[Tensor, Tensor | None]:
    """Gradients of vector and coefficient from that of the product, ``[B, T, R, HV, D]``, in float32 where sums may
    follow, summed over the value heads that share a head."""
    vector, coefficient, heads = factor.vector, factor.coefficient, gradient.shape[3]
    if factor.kind == 0 and factor.sign == 1:
        return gathered(gradient, factor.heads), None
    d_vector = torch.empty_like(gradient, dtype=vector.dtype if factor.heads == heads else torch.float32)
    d_coefficient = None
    if coefficient is not None:
        shape = gradient.shape[:4] if factor.kind == 1 else gradient.shape
        d_coefficient = gradient.new_empty(shape, dtype=torch.float32)
    rows = gradient.numel() // max(gradient.shape[-1], 1)
    if rows:
        launch = bind(pull_product_kernel, **_sizes(factor, heads))
        launch(-(-rows // ROWS), gradient, vector, coefficient, d_vector, d_coefficient, rows)
    if d_coefficient is not None:
        d_coefficient = gathered(d_coefficient, factor.coefficient_heads)
    return gathered(d_vector, factor.heads), d_coefficient
