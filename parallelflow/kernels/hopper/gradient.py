"""The gradient stage on Hopper: ``gradient`` of ``kernels/gradient.py`` in one launch that reads every input once.

The formulas are those of ``kernels/gradient.py``.  A program takes (chunk, key head) pairs one after another and, for
each, walks over the value heads of the key head, BV value channels a step.  Everything but the closing products with
Q and K is linear in the value channels.  Per step, with dO, W, R [64 x BV] the rows and S, E [BV x K] the transposed
states, the roles of a program are:

    compute  (8 warps)  the five products with their decays, in the order in which that lets buffers go early: R E, the
                        inner product of S and E, then dO S and dO R^T, then W S and W R^T.  The two warpgroups share
                        the columns.  dQ, dK, dA and dB stay in registers until the key head is done
    rows     (1 warp)   fetches R, dO and W into a ring (TMA)
    exits    (1 warp)   fetches E and S into a ring (TMA)
    vectors  (1 warp)   fetches Q and K (TMA); the decay sums, beta and what is made of them
    sums     (1 warp)   finishes beta and the decay of a value head; sends dQ and dK to memory (TMA)

No sum crosses warps in the compute role: it leaves partial sums in shared memory for the sums role.
"""

from functools import lru_cache

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..chunks import Chunks
from ..gradient import Gradients, vacant_gradients
from ..launch import bind
from ..prepare import Prepared
from .descriptors import blocks, rows
from .primitives import unpack
from .scan import fits as scans_fit

REGISTERS = 168  # a thread, before the roles trade: 12 warps fill a multiprocessor


@gluon.jit
def locate_chunk(chunk, table, time, per_sequence, PACKED: gl.constexpr):
    """First token of a chunk, counted from the start of the batch, and its number of tokens."""
    if PACKED:
        first = gl.load(table + 2 * chunk)
        length = gl.load(table + 2 * chunk + 1)
    else:
        sequence = chunk // per_sequence
        step = (chunk - sequence * per_sequence) * 64
        first = sequence * time + step
        length = gl.minimum(time - step, 64)
    return first, length


@gluon.jit
def add(x, y):
    return x + y


@gluon.jit
def window_of(first, length):
    """Coordinates of a chunk for a descriptor made by ``rows`` (descriptors.py).  A spare chunk reads one token."""
    spare = length == 0
    return gl.where(spare, 1, first + length), gl.where(spare, 63, 64 - length)


@gluon.jit
def await_step(barriers, step):
    """Wait until `step`, counted over all items, has arrived at its one of two barriers; steps before 0 have."""
    mbarrier.wait(barriers.index((step + 2) % 2), (((step + 2) // 2) & 1) ^ 1)


@gluon.jit
def fetch_rows(source, tiles, ready, unit, window, skip, column, PARTS: gl.constexpr):
    """Fetch one chunk's rows, 64 * PARTS columns, into the slot of `unit`."""
    slot = unit % 4
    full = ready.index(slot)
    mbarrier.expect(full, 64 * 64 * 2 * PARTS)
    for p in gl.static_range(PARTS):
        tma.async_copy_global_to_shared(source, [window, skip, column + p * 64], full, tiles.index(slot * PARTS + p))


@gluon.jit
def rows_role(sources, ring, consumed, place, steps, PARTS: gl.constexpr, TIED: gl.constexpr, PACKED: gl.constexpr):
    d_output, d_value, innovation = sources
    tiles, ready = ring
    items, key_heads, table, time, per_sequence = place
    count = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        first, length = locate_chunk(item // key_heads, table, time, per_sequence, PACKED)
        window, skip = window_of(first, length)
        column = item % key_heads * steps * (64 * PARTS)
        for _ in range(steps):
            unit = count * (2 + TIED)
            await_step(consumed, count - 2)
            fetch_rows(innovation, tiles, ready, unit, window, skip, column, PARTS)
            if TIED:
                await_step(consumed, count - 1)
            fetch_rows(d_output, tiles, ready, unit + 1, window, skip, column, PARTS)
            if TIED:
                fetch_rows(d_value, tiles, ready, unit + 2, window, skip, column, PARTS)
            count += 1
            column += 64 * PARTS


@gluon.jit
def states_role(sources, states, consumed, place, steps, K: gl.constexpr, PARTS: gl.constexpr):
    entry_states, exit_gradients = sources
    entry_tiles, exit_tiles, entry_ready, exit_ready, exit_free = states
    items, key_heads, table, time, per_sequence = place
    count = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        row = item * steps * (64 * PARTS)
        for _ in range(steps):
            mbarrier.wait(exit_free, (count & 1) ^ 1)
            mbarrier.expect(exit_ready, 64 * K * 2 * PARTS)
            for p in gl.static_range(PARTS):
                tma.async_copy_global_to_shared(exit_gradients, [row + p * 64, 0], exit_ready, exit_tiles.index(p))
            await_step(consumed, count - 1)
            mbarrier.expect(entry_ready, 64 * K * 2 * PARTS)
            for p in gl.static_range(PARTS):
                tma.async_copy_global_to_shared(entry_states, [row + p * 64, 0], entry_ready, entry_tiles.index(p))
            count += 1
            row += 64 * PARTS


@gluon.jit
def vectors_role(
    sources, tokens, vectors, sums_free, place, steps, parts, heads, K: gl.constexpr, PACKED: gl.constexpr,
    HAS_BETA: gl.constexpr, HAS_DECAY: gl.constexpr,
):  # fmt: skip
    query, key, beta, cumulative = sources
    query_tiles, key_tiles, tokens_ready, tokens_free = tokens
    vector_tiles, vectors_ready = vectors
    items, key_heads, table, time, per_sequence = place
    layout: gl.constexpr = gl.BlockedLayout([2], [32], [1], [0])
    row = gl.arange(0, 64, layout)
    turn = 0
    count = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        chunk = item // key_heads
        key_head = item % key_heads
        first, length = locate_chunk(chunk, table, time, per_sequence, PACKED)
        window, skip = window_of(first, length)
        stage = turn % 2
        await_step(tokens_free, turn - 2)
        full = tokens_ready.index(stage)
        mbarrier.expect(full, 64 * 2 * 2 * K)
        tma.async_copy_global_to_shared(key, [window, skip, key_head * K], full, key_tiles.index(stage))
        tma.async_copy_global_to_shared(query, [window, skip, key_head * K], full, query_tiles.index(stage))
        turn += 1  # noqa: SIM113
        for step in range(steps):
            head = key_head * (steps // parts) + step // parts
            weight = gl.where(row < length, 1.0, 0.0)
            if HAS_BETA:
                weight = gl.load(beta + (first + row) * heads + head, mask=row < length, other=0.0).to(gl.float32)
            from_start = gl.full([64], 1.0, gl.float32, layout)
            to_end = from_start
            if HAS_DECAY:
                sums = cumulative + (chunk * heads + head).to(gl.int64) * 128
                high = gl.load(sums + row)
                low = gl.load(sums + 64 + row)
                end_high = gl.load(sums + 63)
                end_low = gl.load(sums + 127)
                from_start = gl.exp2(high)
                to_end = gl.exp2((end_high - high) + (end_low - low))
            await_step(sums_free, count - 2)
            slot = count % 2
            vector_tiles.index(slot * 5).store(weight)
            vector_tiles.index(slot * 5 + 1).store(from_start)
            vector_tiles.index(slot * 5 + 2).store(to_end)
            if HAS_DECAY:
                vector_tiles.index(slot * 5 + 3).store(high)
                vector_tiles.index(slot * 5 + 4).store(low)
            mbarrier.arrive(vectors_ready.index(slot), count=1)
            count += 1


@gluon.jit
def exponential(x):
    """2^x, computed where it is written (is_pure=False): a compiler that moves it keeps its operands in registers."""
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=False, pack=1)


@gluon.jit
def multiply_add(x, y, z):
    """x y + z, computed where it is written: put off, it would keep all three in registers."""
    return gl.inline_asm_elementwise(
        "fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f", [x, y, z], dtype=gl.float32, is_pure=False, pack=1
    )


@gluon.jit
def opaque(x):
    """x, of which the compiler knows nothing: addresses that follow from it are not kept from one item to the next."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def times_state(row_tiles, slot, state_tiles, zero, PARTS: gl.constexpr):
    """Begin rows [64, 64 * PARTS] times a transposed state [64 * PARTS, K]."""
    total = zero
    for p in gl.static_range(PARTS):
        rows = row_tiles.index(slot * PARTS + p).reshape([64, 64])
        total = warpgroup_mma(rows, state_tiles.index(p), total, use_acc=p > 0, is_async=True)
    return total


@gluon.jit
def times_rows(row_tiles, left, right, zero, PARTS: gl.constexpr):
    """Begin rows [64, 64 * PARTS] times the transpose of other rows."""
    total = zero
    for p in gl.static_range(PARTS):
        rows = row_tiles.index(left * PARTS + p).reshape([64, 64])
        columns = row_tiles.index(right * PARTS + p).reshape([64, 64]).permute((1, 0))
        total = warpgroup_mma(rows, columns, total, use_acc=p > 0, is_async=True)
    return total


@gluon.jit
def row_sums(x):
    """Sums along rows [64, 2]: each warpgroup's columns apart."""
    return gl.sum(gl.reshape(x, [64, 2, x.shape[1] // 2]), 2)


@gluon.jit
def column_sums(x):
    """Sums along columns [4, 64]: each warp's rows apart."""
    return gl.sum(gl.reshape(x, [4, 16, 64]), 1)


@gluon.jit
def compute_role(
    row_ring, states, consumed, tokens, vectors, gram_tile, sums, outward, items, steps, scale,
    K: gl.constexpr, PARTS: gl.constexpr, TIED: gl.constexpr, HAS_BETA: gl.constexpr, HAS_DECAY: gl.constexpr,
):  # fmt: skip
    row_tiles, rows_ready = row_ring
    entry_tiles, exit_tiles, entry_ready, exit_ready, exit_free = states
    query_tiles, key_tiles, tokens_ready, tokens_free = tokens
    vector_tiles, vectors_ready = vectors
    (
        exit_tile,
        query_tile,
        key_tile,
        pair_tile,
        down_tile,
        up_tile,
        owed_tile,
        aligned_tile,
        overlap_tile,
        sums_ready,
        sums_free,
    ) = sums
    dtype: gl.constexpr = key_tiles.dtype
    square: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 2], instr_shape=[16, 32, 16])
    wide: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 2], instr_shape=[16, K // 2, 16])
    by_row: gl.constexpr = gl.SliceLayout(1, square)
    by_column: gl.constexpr = gl.SliceLayout(0, square)
    along: gl.constexpr = gl.SliceLayout(1, wide)
    flat: gl.constexpr = gl.BlockedLayout([1, 8], [256 // K, K // 8], [8, 1], [1, 0])
    swizzled: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    SUMS: gl.constexpr = HAS_BETA or HAS_DECAY
    blank = gl.zeros([64, 64], gl.float32, square)
    zero = gl.zeros([64, K], gl.float32, wide)
    row = gl.arange(0, 64, by_row)[:, None]
    column = gl.arange(0, 64, by_column)[None, :]
    turn = 0
    count = 0
    for _ in range(gl.program_id(0), items, gl.num_programs(0)):
        stage = turn % 2
        query = query_tiles.index(stage).reshape([64, K])
        key = key_tiles.index(stage).reshape([64, K])
        d_pairs = gl.zeros([64, 64], gl.float32, square)
        dq = gl.zeros([64, K], gl.float32, wide)
        dk = gl.zeros([64, K], gl.float32, wide)
        mbarrier.wait(tokens_ready.index(stage), (turn // 2) & 1)
        if SUMS:
            gram = warpgroup_mma(query, key.permute((1, 0)), blank, use_acc=False, is_async=True)
            if TIED:
                own = warpgroup_mma(key, key.permute((1, 0)), blank, use_acc=False, is_async=True)
                gram, own = warpgroup_mma_wait(0, deps=(gram, own))
                gram_tile.store(gl.where(row >= column, gram * scale, own))
            else:
                gram = warpgroup_mma_wait(0, deps=(gram,))
                gram_tile.store(gl.where(row >= column, gram * scale, 0.0))
        for _ in range(steps):
            slot = count % 2
            unit = count * (2 + TIED)
            innovation_slot = unit % 4
            output_slot = (unit + 1) % 4
            value_slot = (unit + 2) % 4
            # R E
            mbarrier.wait(vectors_ready.index(slot), (count // 2) & 1)
            mbarrier.wait(rows_ready.index(innovation_slot), (unit // 4) & 1)
            mbarrier.wait(exit_ready, count & 1)
            part = times_state(row_tiles, innovation_slot, exit_tiles, zero, PARTS)
            if SUMS:
                factor = key.load(wide)
            from_start = vector_tiles.index(slot * 5 + 1).load(along)[:, None]
            to_end = (vector_tiles.index(slot * 5).load(along) * vector_tiles.index(slot * 5 + 2).load(along))[:, None]
            part = warpgroup_mma_wait(0, deps=(part,))
            if SUMS:
                exit_sum = row_sums(part * unpack(factor))
            dk = multiply_add(part, to_end, dk)
            # S . E
            mbarrier.wait(entry_ready, count & 1)
            if HAS_DECAY:
                overlap = gl.zeros([64, K], gl.float32, flat)
                for p in gl.static_range(PARTS):
                    overlap = multiply_add(
                        unpack(entry_tiles.index(p).load(flat)), unpack(exit_tiles.index(p).load(flat)), overlap
                    )
                    mbarrier.wait(entry_ready, count & 1)
                overlap = gl.sum(gl.sum(gl.reshape(overlap, [K // 32, 2048 // K, K // 8, 8]), 3), 0)
            mbarrier.arrive(exit_free, count=1)
            # dO S, W S and the pairs: dO R^T on and under the diagonal, (W R^T)^T above it
            mbarrier.wait(rows_ready.index(output_slot), ((unit + 1) // 4) & 1)
            if TIED:
                mbarrier.wait(rows_ready.index(value_slot), ((unit + 2) // 4) & 1)
            part = times_state(row_tiles, output_slot, entry_tiles, zero, PARTS)
            if TIED:
                part_of_keys = times_state(row_tiles, value_slot, entry_tiles, zero, PARTS)
                if HAS_DECAY:
                    factor = query.load(wide)
                part = warpgroup_mma_wait(PARTS, deps=(part,))
            else:
                if HAS_DECAY:
                    factor = query.load(wide)
                part = warpgroup_mma_wait(0, deps=(part,))
            if HAS_DECAY:
                query_sum = row_sums(part * unpack(factor))
            dq = multiply_add(part, from_start * scale, dq)
            pairs = times_rows(row_tiles, output_slot, innovation_slot, blank, PARTS)
            if TIED:
                owns = times_rows(row_tiles, innovation_slot, value_slot, blank, PARTS)
                if HAS_DECAY:
                    factor = key.load(wide)
                part = warpgroup_mma_wait(2 * PARTS, deps=(part_of_keys,))
                if HAS_DECAY:
                    key_sum = row_sums(part * unpack(factor))
                dk = multiply_add(part, -from_start, dk)
            await_step(sums_free, count - 1)
            if HAS_DECAY:
                row_high = vector_tiles.index(slot * 5 + 3).load(by_row)[:, None]
                row_low = vector_tiles.index(slot * 5 + 4).load(by_row)[:, None]
                column_high = vector_tiles.index(slot * 5 + 3).load(by_column)[None, :]
                column_low = vector_tiles.index(slot * 5 + 4).load(by_column)[None, :]
                exponent = (row_high - column_high) + (row_low - column_low)
                decay = exponential(gl.where(row >= column, exponent, -exponent))
            if TIED:
                pairs, owns = warpgroup_mma_wait(0, deps=(pairs, owns))
                aligned = row_sums(gl.where(row == column, owns, 0.0))
                pairs = gl.where(row >= column, pairs, owns)
            else:
                pairs = warpgroup_mma_wait(0, deps=(pairs,))
            if HAS_DECAY:
                pairs *= decay
            mbarrier.arrive(consumed.index(slot), count=1)
            weight = vector_tiles.index(slot * 5).load(by_column)[None, :]
            if TIED:
                weight = gl.where(row >= column, weight, vector_tiles.index(slot * 5).load(by_row)[:, None])
            d_pairs = multiply_add(pairs, weight, d_pairs)
            if SUMS:
                pairs *= gram_tile.load(square)
                exit_tile.store(exit_sum)
                if HAS_DECAY:
                    query_tile.store(query_sum)
                    overlap_tile.store(overlap)
                    pair_tile.store(row_sums(pairs * weight))
                    down_tile.store(column_sums(pairs * weight))
                if HAS_BETA:
                    up_tile.store(column_sums(gl.where(row >= column, pairs, 0.0)))
                if TIED:
                    aligned_tile.store(aligned)
                    owed_tile.store(row_sums(gl.where(row >= column, 0.0, pairs)))
                    if HAS_DECAY:
                        key_tile.store(key_sum)
            mbarrier.arrive(sums_ready, count=1)
            count += 1
        d_pair_tiles = gram_tile._reinterpret(dtype, [2, 64, 64], swizzled)
        fixed = opaque(turn) - turn
        reads = d_pair_tiles.index(fixed)
        reads.store((gl.where(row >= column, d_pairs, 0.0) * scale).to(dtype))
        if TIED:
            owns_tile = d_pair_tiles.index(fixed + 1)
            owns_tile.store(gl.where(row >= column, 0.0, -d_pairs).to(dtype))
        fence_async_shared()
        gl.thread_barrier()
        dq = warpgroup_mma(reads, key, dq, is_async=True)
        dk = warpgroup_mma(reads.permute((1, 0)), query, dk, is_async=True)
        if TIED:
            dk = warpgroup_mma(owns_tile, key, dk, is_async=True)
            dk = warpgroup_mma(owns_tile.permute((1, 0)), key, dk, is_async=True)
        dq, dk = warpgroup_mma_wait(0, deps=(dq, dk))
        query.store(dq.to(dtype))
        key.store(dk.to(dtype))
        fence_async_shared()
        mbarrier.arrive(outward.index(stage), count=1)
        turn += 1  # noqa: SIM113


@gluon.jit
def sums_role(
    targets, tokens, vectors, sums, outward, place, steps, parts, heads, scale, K: gl.constexpr,
    PACKED: gl.constexpr, TIED: gl.constexpr, HAS_BETA: gl.constexpr, HAS_DECAY: gl.constexpr,
    DIVISIBLE: gl.constexpr,
):  # fmt: skip
    d_query, d_key, d_beta, d_log_decay = targets
    query_tiles, key_tiles, tokens_ready, tokens_free = tokens
    vector_tiles, vectors_ready = vectors
    (
        exit_tile,
        query_tile,
        key_tile,
        pair_tile,
        down_tile,
        up_tile,
        owed_tile,
        aligned_tile,
        overlap_tile,
        sums_ready,
        sums_free,
    ) = sums
    items, key_heads, table, time, per_sequence = place
    layout: gl.constexpr = gl.BlockedLayout([2], [32], [1], [0])
    pairs: gl.constexpr = gl.BlockedLayout([2, 2], [32, 1], [1, 1], [1, 0])
    columns: gl.constexpr = gl.BlockedLayout([4, 2], [1, 32], [1, 1], [1, 0])
    square: gl.constexpr = gl.BlockedLayout([1, 8], [16, 2], [1, 1], [1, 0])
    row = gl.arange(0, 64, layout)
    turn = 0
    count = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        chunk = item // key_heads
        key_head = item % key_heads
        first, length = locate_chunk(chunk, table, time, per_sequence, PACKED)
        exits = gl.zeros([64], gl.float32, layout)
        slope = exits
        d_sum = exits
        overlap = exits
        aligned = exits
        for step in range(steps):
            slot = count % 2
            mbarrier.wait(sums_ready, count & 1)
            if HAS_BETA or HAS_DECAY:
                weight = vector_tiles.index(slot * 5).load(layout)
                from_start = vector_tiles.index(slot * 5 + 1).load(layout)
                to_end = vector_tiles.index(slot * 5 + 2).load(layout)
                total = vector_tiles.index(slot * 5 + 1).slice(63, 1).load(layout)
                exit_sum = gl.convert_layout(gl.sum(exit_tile.load(pairs), 1), layout)
                slope_sum = exit_sum * 0.0
                pair_sum = slope_sum
                if HAS_BETA:
                    slope_sum = gl.convert_layout(gl.sum(up_tile.load(columns), 0), layout)
                if TIED:
                    slope_sum -= gl.convert_layout(gl.sum(owed_tile.load(pairs), 1), layout)
                    aligned_sum = gl.convert_layout(gl.sum(aligned_tile.load(pairs), 1), layout)
                if HAS_DECAY:
                    entries = gl.sum(query_tile.load(pairs), 1) * scale
                    if TIED:
                        entries -= gl.sum(key_tile.load(pairs), 1)
                    pair_sum = gl.convert_layout(gl.sum(pair_tile.load(pairs), 1), layout)
                    pair_sum -= gl.convert_layout(gl.sum(down_tile.load(columns), 0), layout)
                    pair_sum += gl.convert_layout(entries, layout) * from_start
                    overlap_sum = gl.sum(gl.sum(overlap_tile.load(square), 1), 0)
                mbarrier.arrive(sums_free.index(slot), count=1)
                begin = step % parts == 0
                exits = gl.where(begin, 0.0, exits) + exit_sum * to_end
                slope = gl.where(begin, 0.0, slope) + slope_sum
                d_sum = gl.where(begin, 0.0, d_sum) + pair_sum
                if HAS_DECAY:
                    overlap = gl.where(begin, 0.0, overlap) + overlap_sum
                if TIED:
                    aligned = gl.where(begin, 0.0, aligned) + aligned_sum
                if step % parts == parts - 1:
                    target = (first + row) * heads + key_head * (steps // parts) + step // parts
                    if HAS_BETA:
                        d_weight = slope + exits
                        if TIED:
                            divisible = gl.abs(weight) > DIVISIBLE
                            d_weight = gl.where(divisible, aligned / gl.where(divisible, weight, 1.0), d_weight)
                        gl.store(d_beta + target, d_weight.to(d_beta.dtype.element_ty), mask=row < length)
                    if HAS_DECAY:
                        ends = exits * weight
                        before = gl.associative_scan(ends, 0, add) - ends
                        d_decay = gl.associative_scan(d_sum, 0, add, reverse=True) + before + overlap * total
                        gl.store(d_log_decay + target, d_decay.to(d_log_decay.dtype.element_ty), mask=row < length)
            else:
                mbarrier.arrive(sums_free.index(slot), count=1)
            count += 1
        stage = turn % 2
        mbarrier.wait(outward.index(stage), (turn // 2) & 1)
        fence_async_shared()
        if length > 0:
            coordinates = [first + length, 64 - length, key_head * K]
            tma.async_copy_shared_to_global(d_query, coordinates, query_tiles.index(stage))
            tma.async_copy_shared_to_global(d_key, coordinates, key_tiles.index(stage))
            tma.store_wait(0)
        mbarrier.arrive(tokens_free.index(stage), count=1)
        turn += 1  # noqa: SIM113


@gluon.jit(do_not_specialize=["items", "time", "per_sequence", "key_heads", "heads", "steps", "parts"])
def gradient_kernel(
    query, key, d_output, d_value, innovation, entry_states, exit_gradients, d_query, d_key,
    beta, cumulative, d_beta, d_log_decay, table, scale, items, time, per_sequence, key_heads, heads, steps, parts,
    K: gl.constexpr, PARTS: gl.constexpr, PACKED: gl.constexpr, TIED: gl.constexpr, HAS_BETA: gl.constexpr,
    HAS_DECAY: gl.constexpr, DIVISIBLE: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = key.dtype
    spread: gl.constexpr = gl.SwizzledSharedLayout(vec=8, per_phase=1, max_phase=8, order=[1, 0])
    plain: gl.constexpr = gl.SwizzledSharedLayout(vec=1, per_phase=1, max_phase=1, order=[1, 0])
    line: gl.constexpr = gl.SwizzledSharedLayout(vec=1, per_phase=1, max_phase=1, order=[0])
    row_tiles = gl.allocate_shared_memory(dtype, [4 * PARTS, 1, 64, 64], d_output.layout)
    entry_tiles = gl.allocate_shared_memory(dtype, [PARTS, 64, K], entry_states.layout)
    exit_tiles = gl.allocate_shared_memory(dtype, [PARTS, 64, K], entry_states.layout)
    query_tiles = gl.allocate_shared_memory(dtype, [2, 1, 64, K], query.layout)
    key_tiles = gl.allocate_shared_memory(dtype, [2, 1, 64, K], query.layout)
    gram_tile = gl.allocate_shared_memory(gl.float32, [64, 64], spread)
    vector_tiles = gl.allocate_shared_memory(gl.float32, [10, 64], line)
    exit_tile = gl.allocate_shared_memory(gl.float32, [64, 2], plain)
    query_tile = gl.allocate_shared_memory(gl.float32, [64, 2], plain)
    key_tile = gl.allocate_shared_memory(gl.float32, [64, 2], plain)
    pair_tile = gl.allocate_shared_memory(gl.float32, [64, 2], plain)
    down_tile = gl.allocate_shared_memory(gl.float32, [4, 64], plain)
    up_tile = gl.allocate_shared_memory(gl.float32, [4, 64], plain)
    owed_tile = gl.allocate_shared_memory(gl.float32, [64, 2], plain)
    aligned_tile = gl.allocate_shared_memory(gl.float32, [64, 2], plain)
    overlap_tile = gl.allocate_shared_memory(gl.float32, [2048 // K, K // 8], plain)

    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    rows_ready = gl.allocate_shared_memory(gl.int64, [4, 1], barrier)
    consumed = gl.allocate_shared_memory(gl.int64, [2, 1], barrier)
    vectors_ready = gl.allocate_shared_memory(gl.int64, [2, 1], barrier)
    sums_free = gl.allocate_shared_memory(gl.int64, [2, 1], barrier)
    tokens_ready = gl.allocate_shared_memory(gl.int64, [2, 1], barrier)
    tokens_free = gl.allocate_shared_memory(gl.int64, [2, 1], barrier)
    outward = gl.allocate_shared_memory(gl.int64, [2, 1], barrier)
    entry_ready = gl.allocate_shared_memory(gl.int64, [1], barrier)
    exit_ready = gl.allocate_shared_memory(gl.int64, [1], barrier)
    exit_free = gl.allocate_shared_memory(gl.int64, [1], barrier)
    sums_ready = gl.allocate_shared_memory(gl.int64, [1], barrier)
    for i in gl.static_range(4):
        mbarrier.init(rows_ready.index(i), count=1)
    for i in gl.static_range(2):
        mbarrier.init(consumed.index(i), count=1)
        mbarrier.init(vectors_ready.index(i), count=1)
        mbarrier.init(sums_free.index(i), count=1)
        mbarrier.init(tokens_ready.index(i), count=1)
        mbarrier.init(tokens_free.index(i), count=1)
        mbarrier.init(outward.index(i), count=1)
    mbarrier.init(entry_ready, count=1)
    mbarrier.init(exit_ready, count=1)
    mbarrier.init(exit_free, count=1)
    mbarrier.init(sums_ready, count=1)

    row_ring = (row_tiles, rows_ready)
    states = (entry_tiles, exit_tiles, entry_ready, exit_ready, exit_free)
    tokens = (query_tiles, key_tiles, tokens_ready, tokens_free)
    vectors = (vector_tiles, vectors_ready)
    sums = (
        exit_tile,
        query_tile,
        key_tile,
        pair_tile,
        down_tile,
        up_tile,
        owed_tile,
        aligned_tile,
        overlap_tile,
        sums_ready,
        sums_free,
    )
    place = (items, key_heads, table, time, per_sequence)
    gl.warp_specialize([
        (compute_role, (row_ring, states, consumed, tokens, vectors, gram_tile, sums, outward, items, steps, scale,
                        K, PARTS, TIED, HAS_BETA, HAS_DECAY)),
        (rows_role, ((d_output, d_value, innovation), row_ring, consumed, place, steps, PARTS, TIED, PACKED)),
        (states_role, ((entry_states, exit_gradients), states, consumed, place, steps, K, PARTS)),
        (vectors_role, ((query, key, beta, cumulative), tokens, vectors, sums_free, place, steps, parts, heads,
                        K, PACKED, HAS_BETA, HAS_DECAY)),
        (sums_role, ((d_query, d_key, d_beta, d_log_decay), tokens, vectors, sums, outward, place,
                     steps, parts, heads, scale, K, PACKED, TIED, HAS_BETA, HAS_DECAY, DIVISIBLE)),
    ], [1, 1, 1, 1], [40, 40, 40, 40])  # fmt: skip


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """How many programs run at once: one on each multiprocessor."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def fits(query: Tensor, value: Tensor, chunks: Chunks) -> bool:
    """Whether the Hopper gradient serves these shapes, dtype and device."""
    return scans_fit(query, value, chunks)


def gradient(query: Tensor, key: Tensor, beta: Tensor | None, log_decay: Tensor | None, d_output: Tensor,
             innovation: Tensor, d_value: Tensor, entry_states: Tensor, exit_gradients: Tensor, prepared: Prepared,
             chunks: Chunks, *, scale: float,
             into: Gradients | None = None) -> Gradients:  # fmt: skip
    """Gradients of query, key [B, T, H, K], beta and log_decay [B, T, HV], each in its input's dtype: new tensors, or
    those of `into`."""
    key_heads, k = key.shape[2:]
    heads, v = d_output.shape[2:]
    gradients = vacant_gradients(query, key, beta, log_decay) if into is None else into
    d_query, d_key, d_beta, d_log_decay = gradients
    parts = 2 if v % 128 == 0 else 1
    per_head = v // (64 * parts)
    items = chunks.count * key_heads
    vacant = prepared.total  # stands in for pointers that are not read
    launch = bind(
        gradient_kernel, K=k, PARTS=parts, PACKED=int(chunks.packed), TIED=int(prepared.inverse is not None),
        HAS_BETA=int(beta is not None), HAS_DECAY=int(log_decay is not None),
        DIVISIBLE=2.0**-6 if key.dtype == torch.float16 else 2.0**-40, num_warps=8, maxnreg=REGISTERS,
    )  # fmt: skip
    launch(
        min(items, multiprocessors(query.device)),
        rows(query, k), rows(key, k), rows(d_output, 64), rows(d_value, 64), rows(innovation, 64),
        blocks(entry_states), blocks(exit_gradients), rows(d_query, k), rows(d_key, k),
        vacant if beta is None else beta, prepared.cumulative, vacant if d_beta is None else d_beta,
        vacant if d_log_decay is None else d_log_decay, chunks.table if chunks.packed else vacant,
        scale, items, chunks.time, chunks.per_sequence, key_heads, heads, heads // key_heads * per_head, per_head,
    )  # fmt: skip
    return gradients
