"""The products of the gradient kernel, by eight warps.

The two warpgroups share the columns of every product.  A step takes a value head's BV channels and goes

    R E  ·  S E^T  ·  dO S and W S  ·  dO R^T on and under the diagonal, R W^T above it

so that E may go after the second, of which only the trace is wanted, the inner product of S and E: the tensor cores
have the time, the other units do not.  The last two make one matrix: dO R^T is wanted where t >= s, W R^T where t > s,
and turned over it fills the other triangle.  So there is one decay matrix, one matrix of Q K^T and K K^T, one
accumulator, and the decay sums get the row sums less the column sums of their product.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .gradient_steps import await_step
from .primitives import opaque, unpack


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
def times_state(row_tiles, slot, state_tiles, none, zero, PARTS: gl.constexpr):
    """Begin rows [64, 64 * PARTS] times a transposed state [64 * PARTS, K]; `none` is 0."""
    total = zero
    for p in gl.static_range(PARTS):
        rows = row_tiles.index(slot * PARTS + p).reshape([64, 64])
        total = warpgroup_mma(rows, state_tiles.index(p + none), total, use_acc=p > 0, is_async=True)
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
def begin_overlap(entry_tiles, exit_tiles, none, zero, PARTS: gl.constexpr):
    """Begin S E^T, 64 rows of each with the same rows of the other: their inner product is its trace."""
    total = zero
    for p in gl.static_range(PARTS):
        columns = exit_tiles.index(p + none).permute((1, 0))
        total = warpgroup_mma(entry_tiles.index(p + none), columns, total, use_acc=p > 0, is_async=True)
    return total


@gluon.jit
def row_sums(x):
    """Sums along rows [64, 2]: each warpgroup's columns apart."""
    return gl.sum(gl.reshape(x, [64, 2, x.shape[1] // 2]), 2)


@gluon.jit
def column_sums(x):
    """Sums along columns [16, 64]: four rows each, which one exchange between lanes brings together."""
    return gl.reshape(gl.sum(gl.sum(gl.reshape(x, [4, 2, 2, 4, 64]), 1), 1), [16, 64])


@gluon.jit
def compute_role(
    row_ring, states, consumed, tokens, vectors, gram_tile, sums, outward, items, steps, scale,
    K: gl.constexpr, PARTS: gl.constexpr, TIED: gl.constexpr, HAS_BETA: gl.constexpr, HAS_DECAY: gl.constexpr,
):  # fmt: skip
    """dQ and dK of every key head, and for every step the partial sums of what beta and the decay need."""
    row_tiles, rows_ready = row_ring
    entry_tiles, exit_tiles, entry_ready, exit_ready, exit_free = states
    query_tiles, key_tiles, tokens_ready, tokens_free = tokens
    vector_tiles, vectors_ready = vectors
    (exit_sums, query_sums, key_sums, pair_row_sums, pair_column_sums, early_column_sums, late_row_sums, aligned_sums,
     overlap_sums, sums_ready, sums_free) = sums  # fmt: skip
    dtype: gl.constexpr = key_tiles.dtype
    square: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 2], instr_shape=[16, 32, 16])
    wide: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 2], instr_shape=[16, K // 2, 16])
    by_row: gl.constexpr = gl.SliceLayout(1, square)
    by_column: gl.constexpr = gl.SliceLayout(0, square)
    along: gl.constexpr = gl.SliceLayout(1, wide)
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
            none = opaque(count) - count  # 0, and the descriptors of fixed tiles are made in each step
            output_slot = 2 + none
            value_slot = 3 + none
            output_turn = count
            if not TIED:
                output_slot = 2 + slot
                output_turn = count // 2
            # R E and S E^T
            mbarrier.wait(vectors_ready.index(slot), (count // 2) & 1)
            mbarrier.wait(rows_ready.index(slot), (count // 2) & 1)
            mbarrier.wait(exit_ready, count & 1)
            mbarrier.wait(entry_ready, count & 1)
            part = times_state(row_tiles, slot, exit_tiles, none, zero, PARTS)
            if HAS_DECAY:
                overlap = begin_overlap(entry_tiles, exit_tiles, none, blank, PARTS)
            if SUMS:
                factor = key.load(wide)
            from_start = vector_tiles.index(slot * 5 + 1).load(along)[:, None]
            to_end = (vector_tiles.index(slot * 5).load(along) * vector_tiles.index(slot * 5 + 2).load(along))[:, None]
            part = warpgroup_mma_wait(HAS_DECAY * PARTS, deps=(part,))
            if SUMS:
                exit_sum = row_sums(part * unpack(factor))
            dk = multiply_add(part, to_end, dk)
            if HAS_DECAY:
                overlap = warpgroup_mma_wait(0, deps=(overlap,))
                overlap = row_sums(gl.where(row == column, overlap, 0.0))
            mbarrier.arrive(exit_free, count=1)
            # dO S, W S and the pairs: dO R^T on and under the diagonal, (W R^T)^T above it
            mbarrier.wait(rows_ready.index(output_slot), output_turn & 1)
            if TIED:
                mbarrier.wait(rows_ready.index(value_slot), count & 1)
            part = times_state(row_tiles, output_slot, entry_tiles, none, zero, PARTS)
            if TIED:
                part_of_keys = times_state(row_tiles, value_slot, entry_tiles, none, zero, PARTS)
            if HAS_DECAY:
                factor = query.load(wide)
            part = warpgroup_mma_wait(TIED * PARTS, deps=(part,))
            if HAS_DECAY:
                query_sum = row_sums(part * unpack(factor))
            dq = multiply_add(part, from_start * scale, dq)
            pairs = times_rows(row_tiles, output_slot, slot, blank, PARTS)
            if TIED:
                owns = times_rows(row_tiles, slot, value_slot, blank, PARTS)
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
                decay = exponential(-gl.abs((row_high - column_high) + (row_low - column_low)))
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
                exit_sums.store(exit_sum)
                if HAS_DECAY:
                    query_sums.store(query_sum)
                    overlap_sums.store(overlap)
                    pair_row_sums.store(row_sums(pairs * weight))
                    pair_column_sums.store(column_sums(pairs * weight))
                if HAS_BETA:
                    early_column_sums.store(column_sums(gl.where(row >= column, pairs, 0.0)))
                if TIED:
                    aligned_sums.store(aligned)
                    late_row_sums.store(row_sums(gl.where(row >= column, 0.0, pairs)))
                    if HAS_DECAY:
                        key_sums.store(key_sum)
            mbarrier.arrive(sums_ready, count=1)
            count += 1
        # dA and -dB^T take the place of the Gram matrix, then meet Q and K
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
