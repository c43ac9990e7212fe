"""The gradients of beta and the decay from partial sums, by one warp of the gradient kernel, in a fixed order."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from .gradient_steps import locate_chunk


@gluon.jit
def add(x, y):
    return x + y


@gluon.jit
def sums_role(
    targets, tokens, vectors, sums, outward, place, steps, parts, heads, scale, K: gl.constexpr,
    PACKED: gl.constexpr, TIED: gl.constexpr, HAS_BETA: gl.constexpr, HAS_DECAY: gl.constexpr,
    DIVISIBLE: gl.constexpr,
):  # fmt: skip
    """d(beta) and d(log_decay) of every value head from the partial sums; dQ and dK to memory."""
    d_query, d_key, d_beta, d_log_decay = targets
    query_tiles, key_tiles, tokens_ready, tokens_free = tokens
    vector_tiles, vectors_ready = vectors
    (exit_sums, query_sums, key_sums, pair_row_sums, pair_column_sums, early_column_sums, late_row_sums, aligned_sums,
     overlap_sums, sums_ready, sums_free) = sums  # fmt: skip
    items, key_heads, extent = place
    layout: gl.constexpr = gl.BlockedLayout([2], [32], [1], [0])
    pairs: gl.constexpr = gl.BlockedLayout([2, 2], [32, 1], [1, 1], [1, 0])
    columns: gl.constexpr = gl.BlockedLayout([16, 2], [1, 32], [1, 1], [1, 0])
    row = gl.arange(0, 64, layout)
    turn = 0
    count = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        key_head = item % key_heads
        first, length, _ = locate_chunk(item // key_heads, extent, PACKED)
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
                exit_sum = gl.convert_layout(gl.sum(exit_sums.load(pairs), 1), layout)
                slope_sum = exit_sum * 0.0
                pair_sum = slope_sum
                if HAS_BETA:
                    slope_sum = gl.convert_layout(gl.sum(early_column_sums.load(columns), 0), layout)
                if TIED:
                    slope_sum -= gl.convert_layout(gl.sum(late_row_sums.load(pairs), 1), layout)
                    aligned_sum = gl.convert_layout(gl.sum(aligned_sums.load(pairs), 1), layout)
                if HAS_DECAY:
                    entries = gl.sum(query_sums.load(pairs), 1) * scale
                    if TIED:
                        entries -= gl.sum(key_sums.load(pairs), 1)
                    pair_sum = gl.convert_layout(gl.sum(pair_row_sums.load(pairs), 1), layout)
                    pair_sum -= gl.convert_layout(gl.sum(pair_column_sums.load(columns), 0), layout)
                    pair_sum += gl.convert_layout(entries, layout) * from_start
                    overlap_sum = gl.sum(gl.sum(overlap_sums.load(pairs), 1), 0)
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
