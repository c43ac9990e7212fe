"""The forward scan on Hopper: o_t = scale · S_tᵀ q_t along the chunks of each sequence.

For a chunk with entry state S₀ (rows = tokens, c the cumulative log-decay within the chunk):

    X  = A' (V − e^c ⊙ K S₀)                    A' = (I − G)⁻¹ diag(β), from ``prepare``     (tied rows)
    X  = V                                       the coefficient is folded into P and to_end  (write-only rows)
    O  = scale · e^c ⊙ Q S₀ + P X               P = tril(Q Kᵀ ⊙ decay) · scale, from ``prepare``
    S₁ = e^{c_C} S₀ + (K ⊙ e^{c_C − c})ᵀ X

One program carries 64 value columns of one head of one sequence.  Its four roles share a ring of chunk tiles in shared memory:

    state   (4 warps)  keeps S transposed, [64 values × K keys], in its accumulators, so that every product on the chain from
                       chunk to chunk takes its left operand from registers; it hands S₀ and X out through shared memory
    output  (4 warps)  forms O, one chunk behind at most, off the chain
    load    (1 warp)   fetches the tiles of the chunks ahead (TMA)
    store   (1 warp)   sends O, and on request X and the entry states, to memory (TMA)
"""

from typing import NamedTuple

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .descriptors import blocks, rows, vectors
from .primitives import chunk_window, locate_sequence, unpack
from .sequences import Sequences


@gluon.jit
def load_role(
    descriptors, tiles, ready, free, first_token, end_token, chunk, key_head, head, column, heads, count,
    K: gl.constexpr, STAGES: gl.constexpr, SOLVE: gl.constexpr, OUTPUT: gl.constexpr,
):  # fmt: skip
    query, key, value, inverse, scores, from_start, to_end = descriptors
    query_tiles, key_tiles, value_tiles, inverse_tiles, scores_tiles, from_start_tiles, to_end_tiles = tiles
    for i in range(count):
        slot = i % STAGES
        window, skip = chunk_window(first_token, end_token, i)
        matrix = (chunk + i) * heads + head
        mbarrier.wait(free.index(slot), ((i // STAGES) & 1) ^ 1)
        full = ready.index(slot)
        mbarrier.expect(full, 64 * 2 * (K + 64 + SOLVE * 64 + OUTPUT * (K + 64)) + 512)
        tma.async_copy_global_to_shared(key, [window, skip, key_head * K], full, key_tiles.index(slot))
        tma.async_copy_global_to_shared(value, [window, skip, column], full, value_tiles.index(slot))
        tma.async_copy_global_to_shared(to_end, [matrix * 64], full, to_end_tiles.index(slot))
        tma.async_copy_global_to_shared(from_start, [matrix * 64], full, from_start_tiles.index(slot))
        if SOLVE:
            tma.async_copy_global_to_shared(inverse, [matrix * 64, 0], full, inverse_tiles.index(slot))
        if OUTPUT:
            tma.async_copy_global_to_shared(query, [window, skip, key_head * K], full, query_tiles.index(slot))
            tma.async_copy_global_to_shared(scores, [matrix * 64, 0], full, scores_tiles.index(slot))


@gluon.jit
def state_role(
    tiles, ready, free, handover, total_pointer, initial_pointer, final_pointer, heads, count, value_dim,
    K: gl.constexpr, STAGES: gl.constexpr, SOLVE: gl.constexpr, OUTPUT: gl.constexpr,
    SAVE_ENTRY: gl.constexpr, SAVE_SOLUTION: gl.constexpr, INITIAL: gl.constexpr, FINAL: gl.constexpr,
):  # fmt: skip
    query_tiles, key_tiles, value_tiles, inverse_tiles, scores_tiles, from_start_tiles, to_end_tiles = tiles
    entry_tiles, entry_ready, entry_free, solution_tiles, solution_ready, solution_free = handover
    dtype: gl.constexpr = key_tiles.dtype
    token_layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    state_layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, K, 16])
    token_operand: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=token_layout, k_width=2)
    state_operand: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=state_layout, k_width=2)
    row = gl.arange(0, 64, gl.SliceLayout(1, state_layout))
    column = gl.arange(0, K, gl.SliceLayout(0, state_layout))
    offset = column[None, :] * value_dim + row[:, None]
    zero = gl.zeros([64, 64], gl.float32, token_layout)
    if INITIAL:
        state = gl.load(initial_pointer + offset)
    else:
        state = gl.zeros([64, K], gl.float32, state_layout)
    mbarrier.wait(ready.index(0), 0, pred=count > 0)
    value = value_tiles.index(0).reshape([64, 64]).permute((1, 0)).load(token_layout)
    from_start = from_start_tiles.index(0).load(gl.SliceLayout(0, token_layout))
    to_end = to_end_tiles.index(0).load(gl.SliceLayout(0, token_layout))
    total = gl.load(total_pointer, mask=count > 0, other=1.0)
    for i in range(count):
        slot = i % STAGES
        pair = i % 2
        rounded = state.to(dtype)
        key = key_tiles.index(slot).reshape([64, K])
        if SOLVE:
            seen = warpgroup_mma(gl.convert_layout(rounded, token_operand, assert_trivial=True), key.permute((1, 0)), zero,
                                 use_acc=False, is_async=True)  # fmt: skip
        if OUTPUT or SAVE_ENTRY:
            mbarrier.wait(entry_free.index(pair), ((i // 2) & 1) ^ 1)
            entry_tiles.index(pair).permute((1, 0)).store(rounded)
            mbarrier.arrive(entry_ready.index(pair), count=1)
        state = state * total
        solution = unpack(value)
        if SOLVE:
            seen = warpgroup_mma_wait(0, deps=(seen,))
            residual = (solution - seen * from_start[None, :]).to(dtype)
            inverse = inverse_tiles.index(slot).permute((1, 0))
            solution = warpgroup_mma(gl.convert_layout(residual, token_operand, assert_trivial=True), inverse, zero,
                                     use_acc=False, is_async=True)  # fmt: skip
            solution = warpgroup_mma_wait(0, deps=(solution,))
        weighted = gl.convert_layout((solution * to_end[None, :]).to(dtype), state_operand, assert_trivial=True)
        update = warpgroup_mma(weighted, key, state, is_async=True)
        if SOLVE and (OUTPUT or SAVE_SOLUTION):
            solution_tiles.index(pair).permute((1, 0)).store(solution.to(dtype))
            mbarrier.arrive(solution_ready.index(pair), count=1)
        # In the shadow of the update: what the next chunk needs before its first product is done.
        following = i + 1
        more = following < count
        turn = ((following // 2) & 1) ^ 1
        mbarrier.wait(ready.index(following % STAGES), (following // STAGES) & 1, pred=more)
        if SOLVE and (OUTPUT or SAVE_SOLUTION):
            mbarrier.wait(solution_free.index(following % 2), turn, pred=more)
        value = value_tiles.index(following % STAGES).reshape([64, 64]).permute((1, 0)).load(token_layout)
        from_start = from_start_tiles.index(following % STAGES).load(gl.SliceLayout(0, token_layout))
        to_end = to_end_tiles.index(following % STAGES).load(gl.SliceLayout(0, token_layout))
        total = gl.load(total_pointer + following * heads, mask=more, other=1.0)
        state = warpgroup_mma_wait(0, deps=(update,))
        mbarrier.arrive(free.index(slot), count=1)
    if FINAL:
        gl.store(final_pointer + offset, state)


@gluon.jit
def output_role(
    tiles, ready, free, handover, scale, count,
    K: gl.constexpr, STAGES: gl.constexpr, SOLVE: gl.constexpr, ORDER: gl.constexpr,
):  # fmt: skip
    query_tiles, key_tiles, value_tiles, inverse_tiles, scores_tiles, from_start_tiles, to_end_tiles = tiles
    inward, outward = handover
    entry_tiles, entry_ready, entry_free, solution_tiles, solution_ready, solution_free = inward
    output_tile, output_ready, output_free = outward
    dtype: gl.constexpr = key_tiles.dtype
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    zero = gl.zeros([64, 64], gl.float32, layout)
    for i in range(count):
        slot = i % STAGES
        pair = i % 2
        phase = (i // 2) & 1
        mbarrier.wait(ready.index(slot), (i // STAGES) & 1)
        mbarrier.wait(entry_ready.index(pair), phase)
        if SOLVE and ORDER == 1:
            mbarrier.wait(solution_ready.index(pair), phase)
        fence_async_shared()
        query = query_tiles.index(slot).reshape([64, K])
        read = warpgroup_mma(query, entry_tiles.index(pair), zero, use_acc=False, is_async=True)
        from_start = from_start_tiles.index(slot).load(gl.SliceLayout(1, layout)) * scale
        read = warpgroup_mma_wait(0, deps=(read,))
        mbarrier.arrive(entry_free.index(pair), count=1)
        read = read * from_start[:, None]
        if SOLVE:
            if ORDER == 0:
                mbarrier.wait(solution_ready.index(pair), phase)
                fence_async_shared()
            solution = solution_tiles.index(pair)
        else:
            solution = value_tiles.index(slot).reshape([64, 64])
        output = warpgroup_mma(scores_tiles.index(slot), solution, read, is_async=True)
        mbarrier.wait(output_free, (i & 1) ^ 1)
        output = warpgroup_mma_wait(0, deps=(output,))
        if SOLVE:
            mbarrier.arrive(solution_free.index(pair), count=1)
        mbarrier.arrive(free.index(slot), count=1)
        output_tile.reshape([64, 64]).store(output.to(dtype))
        mbarrier.arrive(output_ready, count=1)


@gluon.jit
def store_role(
    descriptors, handover, first_token, end_token, chunk, head, column, heads, first_column, count,
    K: gl.constexpr, SOLVE: gl.constexpr, OUTPUT: gl.constexpr, SAVE_ENTRY: gl.constexpr, SAVE_SOLUTION: gl.constexpr,
):  # fmt: skip
    output, solution, entry = descriptors
    inward, outward = handover
    entry_tiles, entry_ready, entry_free, solution_tiles, solution_ready, solution_free = inward
    output_tile, output_ready, output_free = outward
    for i in range(count):
        pair = i % 2
        phase = (i // 2) & 1
        window, skip = chunk_window(first_token, end_token, i)
        if SAVE_ENTRY:
            mbarrier.wait(entry_ready.index(pair), phase)
            fence_async_shared()
            tma.async_copy_shared_to_global(entry, [((chunk + i) * heads + head) * K, first_column], entry_tiles.index(pair))
        if OUTPUT and (SAVE_ENTRY or SAVE_SOLUTION):
            tma.store_wait(SAVE_ENTRY)
            mbarrier.arrive(output_free, count=1, pred=i > 0)
        if SAVE_SOLUTION:
            mbarrier.wait(solution_ready.index(pair), phase)
            fence_async_shared()
            tma.async_copy_shared_to_global(solution, [window, skip, column],
                                            solution_tiles.index(pair).reshape([1, 64, 64]))  # fmt: skip
        if SAVE_ENTRY:
            tma.store_wait(SAVE_SOLUTION)
            mbarrier.arrive(entry_free.index(pair), count=1)
        if OUTPUT:
            mbarrier.wait(output_ready, i & 1)
            fence_async_shared()
            tma.async_copy_shared_to_global(output, [window, skip, column], output_tile)
        if SAVE_SOLUTION:
            tma.store_wait(OUTPUT)
            mbarrier.arrive(solution_free.index(pair), count=1)
        if OUTPUT and not (SAVE_ENTRY or SAVE_SOLUTION):
            tma.store_wait(0)
            mbarrier.arrive(output_free, count=1)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["tokens", "key_heads", "heads", "value_dim"])
def forward_kernel(
    query, key, value, inverse, scores, from_start, to_end, total, output, solution, entry, initial_state, final_state,
    token_offsets, chunk_offsets, scale, tokens, key_heads, heads, value_dim,
    K: gl.constexpr, STAGES: gl.constexpr, SOLVE: gl.constexpr, OUTPUT: gl.constexpr, SAVE_ENTRY: gl.constexpr,
    SAVE_SOLUTION: gl.constexpr, INITIAL: gl.constexpr, FINAL: gl.constexpr, PACKED: gl.constexpr,
    OUTPUT_REGISTERS: gl.constexpr, ORDER: gl.constexpr,
):  # fmt: skip
    program = gl.program_id(0)
    parts = value_dim // 64
    part = program % parts
    head = (program // parts) % heads
    sequence = program // parts // heads
    key_head = head // (heads // key_heads)
    first_token, end_token, chunk = locate_sequence(sequence, tokens, token_offsets, chunk_offsets, PACKED)
    count = (end_token - first_token + 63) // 64
    column = head * value_dim + part * 64

    dtype: gl.constexpr = key.dtype
    square: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    query_tiles = gl.allocate_shared_memory(dtype, [STAGES if OUTPUT else 1, 1, 64, K if OUTPUT else 64], key.layout)
    key_tiles = gl.allocate_shared_memory(dtype, [STAGES, 1, 64, K], key.layout)
    value_tiles = gl.allocate_shared_memory(dtype, [STAGES, 1, 64, 64], value.layout)
    inverse_tiles = gl.allocate_shared_memory(dtype, [STAGES if SOLVE else 1, 64, 64], square)
    scores_tiles = gl.allocate_shared_memory(dtype, [STAGES if OUTPUT else 1, 64, 64], square)
    from_start_tiles = gl.allocate_shared_memory(gl.float32, [STAGES, 64], to_end.layout)
    to_end_tiles = gl.allocate_shared_memory(gl.float32, [STAGES, 64], to_end.layout)
    entry_tiles = gl.allocate_shared_memory(dtype, [2, K, 64], square)
    solution_tiles = gl.allocate_shared_memory(dtype, [2, 64, 64], square)
    output_tile = gl.allocate_shared_memory(dtype, [1, 64, 64], value.layout)

    barrier_layout: gl.constexpr = mbarrier.MBarrierLayout()
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier_layout)
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier_layout)
    entry_ready = gl.allocate_shared_memory(gl.int64, [2, 1], barrier_layout)
    entry_free = gl.allocate_shared_memory(gl.int64, [2, 1], barrier_layout)
    solution_ready = gl.allocate_shared_memory(gl.int64, [2, 1], barrier_layout)
    solution_free = gl.allocate_shared_memory(gl.int64, [2, 1], barrier_layout)
    output_ready = gl.allocate_shared_memory(gl.int64, [1], barrier_layout)
    output_free = gl.allocate_shared_memory(gl.int64, [1], barrier_layout)
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(free.index(i), count=1 + OUTPUT)
    for i in gl.static_range(2):
        mbarrier.init(entry_ready.index(i), count=1)
        mbarrier.init(entry_free.index(i), count=max(OUTPUT + SAVE_ENTRY, 1))
        mbarrier.init(solution_ready.index(i), count=1)
        mbarrier.init(solution_free.index(i), count=max(OUTPUT + SAVE_SOLUTION, 1))
    mbarrier.init(output_ready, count=1)
    mbarrier.init(output_free, count=1)

    sources = (query, key, value, inverse, scores, from_start, to_end)
    targets = (output, solution, entry)
    tiles = (query_tiles, key_tiles, value_tiles, inverse_tiles, scores_tiles, from_start_tiles, to_end_tiles)
    inward = (entry_tiles, entry_ready, entry_free, solution_tiles, solution_ready, solution_free)
    handover = (inward, (output_tile, output_ready, output_free))
    carried = (sequence * heads + head).to(gl.int64) * K * value_dim + part * 64
    first_total = total + chunk * heads + head
    if OUTPUT:
        gl.warp_specialize([
            (state_role, (tiles, ready, free, inward, first_total, initial_state + carried, final_state + carried, heads, count,
                          value_dim, K, STAGES, SOLVE, OUTPUT, SAVE_ENTRY, SAVE_SOLUTION, INITIAL, FINAL)),
            (output_role, (tiles, ready, free, handover, scale, count, K, STAGES, SOLVE, ORDER)),
            (load_role, (sources, tiles, ready, free, first_token, end_token, chunk, key_head, head, column, heads, count,
                         K, STAGES, SOLVE, OUTPUT)),
            (store_role, (targets, handover, first_token, end_token, chunk, head, column, heads, part * 64, count,
                          K, SOLVE, OUTPUT, SAVE_ENTRY, SAVE_SOLUTION)),
        ], [4, 1, 1], [OUTPUT_REGISTERS, 40, 40])  # fmt: skip
    else:
        gl.warp_specialize([
            (state_role, (tiles, ready, free, inward, first_total, initial_state + carried, final_state + carried, heads, count,
                          value_dim, K, STAGES, SOLVE, OUTPUT, SAVE_ENTRY, SAVE_SOLUTION, INITIAL, FINAL)),
            (load_role, (sources, tiles, ready, free, first_token, end_token, chunk, key_head, head, column, heads, count,
                         K, STAGES, SOLVE, OUTPUT)),
            (store_role, (targets, handover, first_token, end_token, chunk, head, column, heads, part * 64, count,
                          K, SOLVE, OUTPUT, SAVE_ENTRY, SAVE_SOLUTION)),
        ], [1, 1], [40, 40])  # fmt: skip


import os
ORDER = int(os.environ.get('FO', '0'))


class ForwardScan(NamedTuple):
    """What the forward scan gives; None where it was not asked for."""

    output: torch.Tensor | None
    final_state: torch.Tensor | None
    solution: torch.Tensor | None
    entry_states: torch.Tensor | None


def forward_scan(
    query: torch.Tensor | None,
    key: torch.Tensor,
    value: torch.Tensor,
    inverse: torch.Tensor | None,
    scores: torch.Tensor | None,
    from_start: torch.Tensor,
    to_end: torch.Tensor,
    total: torch.Tensor,
    *,
    sequences: Sequences,
    scale: float,
    initial_state: torch.Tensor | None = None,
    need_final_state: bool = False,
    save_solution: bool = False,
    save_entry_states: bool = False,
) -> ForwardScan:
    """Scan every sequence forward; M is the number of chunks of 64 tokens of all sequences together.

    query, key [B,T,H,K], value [B,T,HV,V]: bfloat16 or float16, contiguous, K 64 or 128, V a multiple of 64.
    inverse, scores [M,HV,64,64] in the same dtype, zero in the padding of a partial chunk; from_start, to_end [M,HV,64] and
    total [M,HV] float32: e^c, e^{c_C − c}, e^{c_C}.  `inverse` None: write-only rows, X = V (a coefficient belongs in the columns
    of `scores` and in `to_end`).  `scores` None: no output, only what is saved.  initial_state, final_state [N,HV,K,V] float32.
    solution [B,T,HV,V] and entry_states [M,HV,K,V] in the dtype of `value`.
    """
    key_dim, heads, value_dim = key.shape[-1], value.shape[-2], value.shape[-1]
    solve, need_output = inverse is not None, scores is not None
    save_solution = save_solution and solve
    output = torch.empty_like(value) if need_output else None
    solution = torch.empty_like(value) if save_solution else None
    entries = value.new_empty(sequences.chunks, heads, key_dim, value_dim) if save_entry_states else None
    state_shape = (sequences.count, heads, key_dim, value_dim)
    final = torch.empty(state_shape, dtype=torch.float32, device=value.device) if need_final_state else None
    key_rows, value_rows, weights = rows(key, key_dim), rows(value, 64), vectors(to_end)
    value_square = blocks(value, 64)
    forward_kernel[(sequences.count * heads * (value_dim // 64),)](
        rows(query, key_dim) if need_output else key_rows,
        key_rows,
        value_rows,
        blocks(inverse, 64) if solve else value_square,
        blocks(scores, 64) if need_output else value_square,
        vectors(from_start),
        weights,
        total,
        rows(output, 64) if need_output else value_rows,
        rows(solution, 64) if save_solution else value_rows,
        blocks(entries, key_dim) if save_entry_states else blocks(value, key_dim),
        initial_state if initial_state is not None else total,
        final if need_final_state else total,
        sequences.token_offsets if sequences.packed else total,
        sequences.chunk_offsets if sequences.packed else total,
        scale, sequences.tokens, key.shape[-2], heads, value_dim,
        K=key_dim, STAGES=3, SOLVE=int(solve), OUTPUT=int(need_output), SAVE_ENTRY=int(save_entry_states),
        SAVE_SOLUTION=int(save_solution), INITIAL=int(initial_state is not None), FINAL=int(need_final_state),
        PACKED=int(sequences.packed), OUTPUT_REGISTERS=120, ORDER=ORDER, num_warps=4, maxnreg=168 if need_output else 240,
    )  # fmt: skip
    return ForwardScan(output, final, solution, entries)
