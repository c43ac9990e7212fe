"""What the gradient kernel reads, fetched ahead by three warps, each as soon as what held its place is done with."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from .gradient_steps import await_step, locate_chunk, window_of


@gluon.jit
def fetch_rows(source, tiles, ready, slot, window, skip, column, PARTS: gl.constexpr):
    """Fetch one chunk's rows, 64 * PARTS columns, into a slot."""
    full = ready.index(slot)
    mbarrier.expect(full, 64 * 64 * 2 * PARTS)
    for p in gl.static_range(PARTS):
        tma.async_copy_global_to_shared(source, [window, skip, column + p * 64], full, tiles.index(slot * PARTS + p))


@gluon.jit
def rows_role(sources, ring, consumed, place, steps, PARTS: gl.constexpr, TIED: gl.constexpr, PACKED: gl.constexpr):
    """Fetch R, dO and W of every step: two slots for R; without W two for dO, else one for each."""
    d_output, d_value, innovation = sources
    tiles, ready = ring
    items, key_heads, extent = place
    count = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        first, length, _ = locate_chunk(item // key_heads, extent, PACKED)
        window, skip = window_of(first, length)
        column = item % key_heads * steps * (64 * PARTS)
        for _ in range(steps):
            slot = count % 2
            await_step(consumed, count - 2)
            fetch_rows(innovation, tiles, ready, slot, window, skip, column, PARTS)
            if TIED:
                await_step(consumed, count - 1)
                fetch_rows(d_output, tiles, ready, 2, window, skip, column, PARTS)
                fetch_rows(d_value, tiles, ready, 3, window, skip, column, PARTS)
            else:
                fetch_rows(d_output, tiles, ready, 2 + slot, window, skip, column, PARTS)
            count += 1
            column += 64 * PARTS


@gluon.jit
def states_role(sources, states, consumed, place, steps, K: gl.constexpr, PARTS: gl.constexpr):
    """Fetch E and S of every step, each into the one place it has."""
    entry_states, exit_gradients = sources
    entry_tiles, exit_tiles, entry_ready, exit_ready, exit_free = states
    items, key_heads, extent = place
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
    """Fetch Q and K of every key head; make every step's vectors: beta, e^c, e^{c_C - c} and the two halves of c."""
    query, key, beta, cumulative = sources
    query_tiles, key_tiles, tokens_ready, tokens_free = tokens
    vector_tiles, vectors_ready = vectors
    items, key_heads, extent = place
    layout: gl.constexpr = gl.BlockedLayout([2], [32], [1], [0])
    row = gl.arange(0, 64, layout)
    turn = 0
    count = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        key_head = item % key_heads
        first, length, chunk = locate_chunk(item // key_heads, extent, PACKED)
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
