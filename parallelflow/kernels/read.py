"""What a state adds to outputs that were made from zero: ``o_t + S^T y_t``, one product a head."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import bind
from .products import float32_precision


@triton.jit(do_not_specialize=["time"])
def read_kernel(output, queries, state, result, dense, output_batch, output_token, output_head, query_batch,
                query_token, query_head, time,
                HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
                C: tl.constexpr, STEPS: tl.constexpr, STAGES: tl.constexpr, DENSE: tl.constexpr,
                PRECISION: tl.constexpr):  # fmt: skip
    """STEPS tiles of tokens, one of value channels of a head.  DENSE: write the queries one after another as well."""
    tiles: tl.constexpr = (V + BV - 1) // BV
    tile = tl.program_id(0) % tiles
    head = tl.program_id(0) // tiles % HV
    spans = tl.cdiv(time, STEPS * C)
    span = tl.program_id(0) // tiles // HV
    batch = (span // spans).to(tl.int64)
    first = (span % spans).to(tl.int64) * (STEPS * C)
    row = tl.arange(0, BK)
    column = tile * BV + tl.arange(0, BV)
    known = (row < K)[None, :]
    inside = (column < V)[None, :]
    s = tl.load(state + ((batch * HV + head) * K + row[:, None]) * V + column[None, :],
                mask=(row < K)[:, None] & inside, other=0.0)  # fmt: skip
    queries += batch * query_batch + head * query_head
    output += batch * output_batch + head * output_head
    for step in tl.range(0, STEPS, num_stages=STAGES):
        token = first + step * C + tl.arange(0, C)
        valid = (token < time)[:, None]
        y = tl.load(queries + token[:, None] * query_token + row[None, :], mask=valid & known, other=0.0)
        o = tl.load(output + token[:, None] * output_token + column[None, :], mask=valid & inside, other=0.0)
        read = tl.dot(y.to(tl.float32), s, o.to(tl.float32), input_precision=PRECISION)
        place = (batch * time + token[:, None]) * HV + head
        tl.store(result + place * V + column[None, :], read.to(result.dtype.element_ty), mask=valid & inside)
        if DENSE and tile == 0:
            tl.store(dense + place * K + row[None, :], y, mask=valid & known)


def configuration(key_dim: int, value_dim: int) -> dict[str, int]:
    """Tile sizes and warps: the operands take at most 96 KB of shared memory."""
    width = max(16, triton.next_power_of_2(key_dim))
    values = max(16, min(triton.next_power_of_2(value_dim), 64 if width <= 256 else 32))
    return {"C": 64 if width <= 128 else 16, "BK": width, "BV": values, "STEPS": 8, "STAGES": 2, "num_warps": 4}


def add_read(output: Tensor, queries: Tensor, state: Tensor, need_queries: bool) -> tuple[Tensor, Tensor | None]:
    """``output [B, T, HV, V] + S^T y_t``, summed in float32 and rounded once to the output's dtype, and, if needed, the
    queries y ``[B, T, HV, K]`` without what lies between them; ``state [B, HV, K, V]`` in float32. In 16 bits the
    product is one of TF32, to which y is exact."""
    batch, time, heads, value_dim = output.shape
    key_dim = queries.shape[3]
    result = torch.empty(output.shape, dtype=output.dtype, device=output.device)
    dense = torch.empty(queries.shape, dtype=queries.dtype, device=output.device) if need_queries else None
    tiles = configuration(key_dim, value_dim)
    launch = bind(
        read_kernel, HV=heads, K=key_dim, V=value_dim, DENSE=need_queries,
        PRECISION="tf32" if output.element_size() == 2 else float32_precision(output.device), **tiles)  # fmt: skip
    programs = batch * triton.cdiv(time, tiles["C"] * tiles["STEPS"]) * heads * triton.cdiv(value_dim, tiles["BV"])
    launch(programs, output, queries, state.contiguous(), result, dense, *output.stride()[:3], *queries.stride()[:3],
           time)  # fmt: skip
    return result, dense
