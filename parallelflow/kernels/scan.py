"""The scans: the only stages that pass the state from chunk to chunk.

One program carries the state of one sequence, value head and tile of value channels, transposed, S^T [BV, K], so that
each product of the chain takes its left operand from registers.  Per chunk, with the arrays of `prepare`:

    forward   R = inverse (V - from_start K S),   O = scale from_start Q S + scores R,   S <- total S + (to_end K)^T R
    reverse   Z = scores^T dO + to_end K dS,      W = inverse^T Z = dV,
              dS <- total dS + (scale from_start Q)^T dO - (from_start K)^T W

Rows that only write have no inverse: R = V, dV = Z, and the last term is absent.
"""

from contextlib import AbstractContextManager

import torch
import triton
import triton.language as tl
from torch import Tensor

from .chunks import Chunks, locate_sequence
from .launch import bind
from .prepare import Prepared
from .products import float32_precision, product, shared_memory


@triton.jit(do_not_specialize=["time", "per_sequence"])
def forward_kernel(query, key, value, inverse, scores, from_start, to_end, total, initial_state,
                   output, innovation, entry_states, final_state, cu_seqlens, offsets,
                   time, per_sequence, scale,
                   H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
                   C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PACKED: tl.constexpr, TIED: tl.constexpr,
                   READ: tl.constexpr, SAVE: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_FINAL: tl.constexpr,
                   PRECISION: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """From the first chunk to the last.  READ: write the outputs.  SAVE: write R and the chunks' entry states."""
    tiles = tl.cdiv(V, BV)
    tile = tl.program_id(0) % tiles
    value_head = (tl.program_id(0) // tiles) % HV
    sequence = tl.program_id(0) // tiles // HV
    first, length, chunk = locate_sequence(sequence, cu_seqlens, offsets, time, per_sequence, PACKED)
    row = tl.arange(0, C)
    k_column = tl.arange(0, BK)
    v_column = tile * BV + tl.arange(0, BV)
    k_inside = (k_column < K)[None, :]
    v_inside = (v_column < V)[None, :]
    k_offset = row[:, None] * (H * K) + k_column[None, :]
    v_offset = row[:, None] * (HV * V) + v_column[None, :]
    square = row[:, None] * C + row[None, :]
    head_key = (first * H + value_head // (HV // H)) * K
    head_value = (first * HV + value_head) * V
    flat = chunk.to(tl.int64) * HV + value_head
    whole_state = (sequence.to(tl.int64) * HV + value_head) * K * V
    across = k_column[None, :] * V + v_column[:, None]  # the state in memory is [K, V]
    state_inside = k_inside & (v_column < V)[:, None]
    if HAS_INITIAL:
        state = tl.load(initial_state + whole_state + across, mask=state_inside, other=0.0)
    else:
        state = tl.zeros([BV, BK], tl.float32)
    dtype: tl.constexpr = key.dtype.element_ty
    for step in tl.range(0, tl.cdiv(length, C), num_stages=STAGES):
        valid = (row < length - step * C)[:, None]
        k = tl.load(key + head_key + k_offset, mask=valid & k_inside, other=0.0)
        v = tl.load(value + head_value + v_offset, mask=valid & v_inside, other=0.0)
        entering = state.to(dtype)
        if SAVE:
            saved = v_column[:, None] * K + k_column[None, :]
            tl.store(entry_states + flat * K * V + saved, entering, mask=state_inside)
        decay = tl.load(from_start + flat * C + row)
        if TIED:
            solve = tl.load(inverse + flat * C * C + square)
            known = tl.dot(entering, tl.trans(k), input_precision=PRECISION)
            r = product(tl.trans(v).to(tl.float32) - known * decay[None, :], tl.trans(solve), PRECISION)
            r_rounded = r.to(dtype)
            if SAVE:
                tl.store(innovation + head_value + v_offset, tl.trans(r_rounded), mask=valid & v_inside)
        else:
            r_rounded = tl.trans(v)
            r = r_rounded.to(tl.float32)
        if READ:
            q = tl.load(query + head_key + k_offset, mask=valid & k_inside, other=0.0)
            p = tl.load(scores + flat * C * C + square)
            o = tl.dot(entering, tl.trans(q), input_precision=PRECISION) * (decay * scale)[None, :]
            o += tl.dot(r_rounded, tl.trans(p), input_precision=PRECISION)
            tl.store(output + head_value + v_offset, tl.trans(o.to(dtype)), mask=valid & v_inside)
        weight = tl.load(to_end + flat * C + row)
        state = state * tl.load(total + flat) + product(r * weight[None, :], k, PRECISION)
        head_key += C * H * K
        head_value += C * HV * V
        flat += HV
    if HAS_FINAL:
        tl.store(final_state + whole_state + across, state, mask=state_inside)


@triton.jit(do_not_specialize=["time", "per_sequence"])
def reverse_kernel(query, key, d_output, inverse, scores, from_start, to_end, total, d_final_state,
                   d_value, exit_gradients, d_initial_state, cu_seqlens, offsets,
                   time, per_sequence, scale,
                   H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
                   C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PACKED: tl.constexpr, TIED: tl.constexpr,
                   HAS_FINAL: tl.constexpr, HAS_INITIAL: tl.constexpr,
                   PRECISION: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """From the last chunk to the first: the gradients of the states at the chunks' exits, and of the values."""
    tiles = tl.cdiv(V, BV)
    tile = tl.program_id(0) % tiles
    value_head = (tl.program_id(0) // tiles) % HV
    sequence = tl.program_id(0) // tiles // HV
    first, length, chunk = locate_sequence(sequence, cu_seqlens, offsets, time, per_sequence, PACKED)
    row = tl.arange(0, C)
    k_column = tl.arange(0, BK)
    v_column = tile * BV + tl.arange(0, BV)
    k_inside = (k_column < K)[None, :]
    v_inside = (v_column < V)[None, :]
    k_offset = row[:, None] * (H * K) + k_column[None, :]
    v_offset = row[:, None] * (HV * V) + v_column[None, :]
    square = row[:, None] * C + row[None, :]
    steps = tl.cdiv(length, C)
    last = tl.maximum(steps - 1, 0)
    head_key = ((first + last * C) * H + value_head // (HV // H)) * K
    head_value = ((first + last * C) * HV + value_head) * V
    flat = (chunk + last).to(tl.int64) * HV + value_head
    whole_state = (sequence.to(tl.int64) * HV + value_head) * K * V
    across = k_column[None, :] * V + v_column[:, None]
    state_inside = k_inside & (v_column < V)[:, None]
    if HAS_FINAL:
        state = tl.load(d_final_state + whole_state + across, mask=state_inside, other=0.0)
    else:
        state = tl.zeros([BV, BK], tl.float32)
    dtype: tl.constexpr = key.dtype.element_ty
    for step in tl.range(0, steps, num_stages=STAGES):
        valid = (row < length - (last - step) * C)[:, None]
        k = tl.load(key + head_key + k_offset, mask=valid & k_inside, other=0.0)
        do = tl.load(d_output + head_value + v_offset, mask=valid & v_inside, other=0.0)
        p = tl.load(scores + flat * C * C + square)
        q = tl.load(query + head_key + k_offset, mask=valid & k_inside, other=0.0)
        leaving = state.to(dtype)
        saved = v_column[:, None] * K + k_column[None, :]
        tl.store(exit_gradients + flat * K * V + saved, leaving, mask=state_inside)
        weight = tl.load(to_end + flat * C + row)
        decay = tl.load(from_start + flat * C + row)
        do = tl.trans(do)
        z = tl.dot(leaving, tl.trans(k), input_precision=PRECISION) * weight[None, :]
        z += tl.dot(do, p, input_precision=PRECISION)
        state *= tl.load(total + flat)
        if TIED:
            solve = tl.load(inverse + flat * C * C + square)
            z = product(z, solve, PRECISION)
            state -= product(z * decay[None, :], k, PRECISION)
        tl.store(d_value + head_value + v_offset, tl.trans(z.to(dtype)), mask=valid & v_inside)
        state += product(do.to(tl.float32) * (decay * scale)[None, :], q, PRECISION)
        head_key -= C * H * K
        head_value -= C * HV * V
        flat -= HV
    if HAS_INITIAL:
        tl.store(d_initial_state + whole_state + across, state, mask=state_inside)


def configuration(key: Tensor, value: Tensor, tied: bool) -> dict[str, int]:
    """Tile sizes, warps and pipeline stages of the scans; they depend on head sizes, dtype, ties and card alone."""
    width = max(16, triton.next_power_of_2(key.shape[-1]))
    row = width * key.element_size()
    tile = 64 if row <= 512 else 32 if row <= 1024 else 16
    tile = min(tile, max(16, triton.next_power_of_2(value.shape[-1])))
    if key.element_size() > 2 or row > 512 or shared_memory(key.device) < 160_000:
        stages = 1
    else:
        stages = 2 if tied or row > 256 else 3
    return {"BK": width, "BV": tile, "STAGES": stages, "num_warps": 8 if width > 128 and tile == 64 else 4,
            "num_stages": stages}  # fmt: skip


def _programs(value: Tensor, chunks: Chunks, tile: int) -> int:
    return chunks.sequences * value.shape[2] * triton.cdiv(value.shape[3], tile)


def _sizes(key: Tensor, value: Tensor) -> dict[str, int]:
    return {"H": key.shape[2], "HV": value.shape[2], "K": key.shape[3], "V": value.shape[3]}


def _forward(query, key, value, prepared, chunks, scale, initial_state, output, innovation, entry_states, final_state):
    options = configuration(key, value, prepared.inverse is not None)
    launch = bind(
        forward_kernel, **_sizes(key, value), C=chunks.size, PACKED=chunks.packed, TIED=prepared.inverse is not None,
        READ=output is not None, SAVE=entry_states is not None, HAS_INITIAL=initial_state is not None,
        HAS_FINAL=final_state is not None, PRECISION=float32_precision(key.device), **options)  # fmt: skip
    launch(
        _programs(value, chunks, options["BV"]),
        query, key, value, prepared.inverse, prepared.scores, prepared.from_start, prepared.to_end, prepared.total,
        initial_state, output, innovation, entry_states, final_state, chunks.cu_seqlens, chunks.offsets,
        chunks.time, chunks.per_sequence, scale)  # fmt: skip


def forward_scan(query: Tensor, key: Tensor, value: Tensor, prepared: Prepared, chunks: Chunks, *, scale: float,
                 initial_state: Tensor | None, final_state: bool) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Outputs [B, T, HV, V] in the value's dtype and, if asked, the final state [N, HV, K, V] in float32."""
    output = torch.empty_like(value)
    _, value_heads, k, v = _sizes(key, value).values()
    final = key.new_empty(chunks.sequences, value_heads, k, v, dtype=torch.float32) if final_state else None
    _forward(query, key, value, prepared, chunks, scale, initial_state, output, None, None, final)
    return output, final


def recompute_scan(key: Tensor, value: Tensor, prepared: Prepared, chunks: Chunks, *, initial_state: Tensor | None,
                   launch_in: AbstractContextManager[None]) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Transposed states at the chunks' entries [M, HV, V, K] and R [B, T, HV, V] (the value without an inverse)."""
    _, value_heads, k, v = _sizes(key, value).values()
    states = key.new_empty(chunks.count, value_heads, v, k)
    innovation = value if prepared.inverse is None else torch.empty_like(value)
    with launch_in:
        _forward(None, key, value, prepared, chunks, 1.0, initial_state, None, innovation, states, None)
    return states, innovation


def reverse_scan(
    query: Tensor,
    key: Tensor,
    d_output: Tensor,
    prepared: Prepared,
    chunks: Chunks,
    *,
    scale: float,
    d_final_state: Tensor | None,
    initial_gradient: bool,
    d_value: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """Transposed gradients of the chunks' exit states [M, HV, V, K] and, if asked, of the initial state; those of the
    values go into `d_value`."""
    _, value_heads, k, v = _sizes(key, d_output).values()
    exit_gradients = key.new_empty(chunks.count, value_heads, v, k)
    d_initial = key.new_empty(chunks.sequences, value_heads, k, v, dtype=torch.float32) if initial_gradient else None
    options = configuration(key, d_output, prepared.inverse is not None)
    launch = bind(
        reverse_kernel, **_sizes(key, d_output), C=chunks.size, PACKED=chunks.packed,
        TIED=prepared.inverse is not None, HAS_FINAL=d_final_state is not None, HAS_INITIAL=initial_gradient,
        PRECISION=float32_precision(key.device), **options)  # fmt: skip
    launch(
        _programs(d_output, chunks, options["BV"]),
        query, key, d_output, prepared.inverse, prepared.scores, prepared.from_start, prepared.to_end, prepared.total,
        d_final_state, d_value, exit_gradients, d_initial, chunks.cu_seqlens, chunks.offsets,
        chunks.time, chunks.per_sequence, scale)  # fmt: skip
    return exit_gradients, d_initial
