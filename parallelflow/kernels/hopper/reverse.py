"""The reverse scan on Hopper: the gradient of the state, carried from the last chunk of each sequence to the first.

With dS₁ the gradient of a chunk's exit state, dO the outputs' gradient and the arrays of ``prepare``:

    Z   = scoresᵀ dO + to_end ⊙ K dS₁                                 the gradient of R
    W   = inverseᵀ Z = d_value                                        (Z itself for rows that only write)
    dS₀ = total dS₁ + scale · (from_start ⊙ Q)ᵀ dO − (from_start ⊙ K)ᵀ W      (the last term for rows that read)

Only what depends on dS₁ stays on the chain from chunk to chunk.  One program carries 64 value columns of one head of
one sequence:

    state    (4 warps)  keeps dS transposed, [64 values × K keys], in its accumulators; hands dS₁ and W out in shared
                        memory
    adjoint  (4 warps)  forms scoresᵀ dO and scale · from_start ⊙ dO, a chunk or two ahead of the chain
    load     (1 warp)   fetches the tiles of the chunks ahead (TMA)
    store    (1 warp)   sends the exit gradients and W to memory (TMA)
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .primitives import chunk_window, locate_sequence, state_offsets, unpack


@gluon.jit
def load_role(
    descriptors, tiles, ready, free, first_token, end_token, chunk, key_head, head, column, heads, count,
    K: gl.constexpr, STAGES: gl.constexpr, SOLVE: gl.constexpr,
):  # fmt: skip
    query, key, gradient, inverse, scores, from_start, to_end = descriptors
    query_tiles, key_tiles, gradient_tiles, inverse_tiles, scores_tiles, from_start_tiles, to_end_tiles = tiles
    for j in range(count):
        slot = j % STAGES
        i = count - 1 - j
        window, skip = chunk_window(first_token, end_token, i)
        matrix = (chunk + i) * heads + head
        mbarrier.wait(free.index(slot), ((j // STAGES) & 1) ^ 1)
        full = ready.index(slot)
        mbarrier.expect(full, 64 * 2 * (2 * K + 64 + 64 + SOLVE * 64) + 512)
        tma.async_copy_global_to_shared(gradient, [window, skip, column], full, gradient_tiles.index(slot))
        tma.async_copy_global_to_shared(scores, [matrix * 64, 0], full, scores_tiles.index(slot))
        tma.async_copy_global_to_shared(from_start, [matrix * 64], full, from_start_tiles.index(slot))
        tma.async_copy_global_to_shared(key, [window, skip, key_head * K], full, key_tiles.index(slot))
        tma.async_copy_global_to_shared(to_end, [matrix * 64], full, to_end_tiles.index(slot))
        if SOLVE:
            tma.async_copy_global_to_shared(inverse, [matrix * 64, 0], full, inverse_tiles.index(slot))
        tma.async_copy_global_to_shared(query, [window, skip, key_head * K], full, query_tiles.index(slot))


@gluon.jit
def adjoint_role(tiles, ready, inward, scale, count, STAGES: gl.constexpr):
    query_tiles, key_tiles, gradient_tiles, inverse_tiles, scores_tiles, from_start_tiles, to_end_tiles = tiles
    spread_tiles, spread_ready, spread_free = inward
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    zero = gl.zeros([64, 64], gl.float32, layout)
    for j in range(count):
        slot = j % STAGES
        pair = j % 2
        mbarrier.wait(ready.index(slot), (j // STAGES) & 1)
        gradient = gradient_tiles.index(slot).reshape([64, 64])
        spread = warpgroup_mma(gradient.permute((1, 0)), scores_tiles.index(slot), zero, use_acc=False, is_async=True)
        from_start = from_start_tiles.index(slot).load(gl.SliceLayout(1, layout)) * scale
        raw = gradient.load(layout)
        mbarrier.wait(spread_free.index(pair), ((j // 2) & 1) ^ 1)
        decayed = (unpack(raw) * from_start[:, None]).to(raw.dtype)
        spread = warpgroup_mma_wait(0, deps=(spread,))
        spread_tiles.index(pair).store(spread)
        gradient.store(decayed)
        fence_async_shared()
        mbarrier.arrive(spread_ready.index(pair), count=1)


@gluon.jit
def state_role(
    tiles, ready, free, handover, final_pointer, initial_pointer, ended, owner, count, value_dim,
    K: gl.constexpr, STAGES: gl.constexpr, SOLVE: gl.constexpr, FINAL: gl.constexpr, INITIAL: gl.constexpr,
    FLOW: gl.constexpr,
):  # fmt: skip
    query_tiles, key_tiles, gradient_tiles, inverse_tiles, scores_tiles, from_start_tiles, to_end_tiles = tiles
    inward, outward = handover
    spread_tiles, spread_ready, spread_free = inward
    exit_tile, exit_ready, exit_free, solution_tile, solution_ready, solution_free = outward
    dtype: gl.constexpr = key_tiles.dtype
    token_layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16]
    )
    state_layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, K, 16]
    )
    token_operand: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=token_layout, k_width=2)
    state_operand: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=state_layout, k_width=2)
    zero = gl.zeros([64, 64], gl.float32, token_layout)
    if FINAL:
        if FLOW:
            known = gl.full([64, K], True, gl.int1, state_layout) & (ended >= 0)
            state = gl.load(final_pointer + state_offsets(value_dim, state_layout, K), mask=known, other=0.0)
        else:
            state = gl.load(final_pointer + state_offsets(value_dim, state_layout, K))
    else:
        state = gl.zeros([64, K], gl.float32, state_layout)
    mbarrier.wait(ready.index(0), 0, pred=count > 0)
    from_start = from_start_tiles.index(0).load(gl.SliceLayout(0, token_layout))
    to_end = to_end_tiles.index(0).load(gl.SliceLayout(0, token_layout))
    mbarrier.wait(spread_ready.index(0), 0, pred=count > 0)
    spread = spread_tiles.index(0).load(token_layout)
    mbarrier.arrive(spread_free.index(0), count=1)
    total = from_start_tiles.index(0).slice(63, 1).load(gl.SliceLayout(1, state_layout))
    for j in range(count):
        slot = j % STAGES
        rounded = state.to(dtype)
        key = key_tiles.index(slot).reshape([64, K])
        operand = gl.convert_layout(rounded, token_operand, assert_trivial=True)
        seen = warpgroup_mma(operand, key.permute((1, 0)), zero, use_acc=False, is_async=True)
        if not FLOW:
            mbarrier.wait(exit_free, (j & 1) ^ 1)
            exit_tile.store(rounded)
            mbarrier.arrive(exit_ready, count=1)
        state = state * total[:, None]
        gradient = gradient_tiles.index(slot).reshape([64, 64]).permute((1, 0))
        query = query_tiles.index(slot).reshape([64, K])
        seen = warpgroup_mma_wait(0, deps=(seen,))
        solution = spread + seen * to_end[None, :]
        if SOLVE:
            operand = gl.convert_layout(solution.to(dtype), token_operand, assert_trivial=True)
            solution = warpgroup_mma(operand, inverse_tiles.index(slot), zero, use_acc=False, is_async=True)
            update = warpgroup_mma(gradient, query, state, is_async=True)
            solution = warpgroup_mma_wait(1, deps=(solution,))
            weighted = gl.convert_layout(
                (solution * -from_start[None, :]).to(dtype), state_operand, assert_trivial=True
            )
            update = warpgroup_mma(weighted, key, update, is_async=True)
        else:
            update = warpgroup_mma(gradient, query, state, is_async=True)
        if not FLOW:
            mbarrier.wait(solution_free, (j & 1) ^ 1)
            solution_tile.reshape([64, 64]).permute((1, 0)).store(solution.to(dtype))
            mbarrier.arrive(solution_ready, count=1)
        # In the shadow of the update: what the next chunk needs before its first product is done.
        following = j + 1
        more = following < count
        mbarrier.wait(ready.index(following % STAGES), (following // STAGES) & 1, pred=more)
        mbarrier.wait(spread_ready.index(following % 2), (following // 2) & 1, pred=more)
        from_start = from_start_tiles.index(following % STAGES).load(gl.SliceLayout(0, token_layout))
        to_end = to_end_tiles.index(following % STAGES).load(gl.SliceLayout(0, token_layout))
        spread = spread_tiles.index(following % 2).load(token_layout)
        total = from_start_tiles.index(following % STAGES).slice(63, 1).load(gl.SliceLayout(1, state_layout))
        state = warpgroup_mma_wait(0, deps=(update,))
        mbarrier.arrive(free.index(slot), count=1)
        mbarrier.arrive(spread_free.index(following % 2), count=1, pred=more)
    if INITIAL:  # noqa: SIM102 - settled while compiling
        if owner >= 0:
            gl.store(initial_pointer + state_offsets(value_dim, state_layout, K), state)


@gluon.jit
def store_role(
    descriptors, outward, first_token, end_token, own, head, column, heads, value_dim, first_column, count,
):  # fmt: skip
    exit, solution = descriptors
    exit_tile, exit_ready, exit_free, solution_tile, solution_ready, solution_free = outward
    for j in range(count):
        i = count - 1 - j
        window, skip = chunk_window(first_token, end_token, i)
        mbarrier.wait(exit_ready, j & 1)
        fence_async_shared()
        tma.async_copy_shared_to_global(exit, [((own + i) * heads + head) * value_dim + first_column, 0], exit_tile)
        tma.store_wait(1)
        mbarrier.arrive(solution_free, count=1, pred=j > 0)
        mbarrier.wait(solution_ready, j & 1)
        fence_async_shared()
        tma.async_copy_shared_to_global(solution, [window, skip, column], solution_tile)
        tma.store_wait(1)
        mbarrier.arrive(exit_free, count=1)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["tokens", "length", "per_sequence", "key_heads", "heads", "value_dim"])
def reverse_kernel(
    query, key, gradient, inverse, scores, from_start, to_end, exit, solution, final_gradient, initial_gradient,
    cu_seqlens, offsets, flows, scale, tokens, length, per_sequence, key_heads, heads, value_dim,
    K: gl.constexpr, STAGES: gl.constexpr, SOLVE: gl.constexpr, FINAL: gl.constexpr, INITIAL: gl.constexpr,
    FLOW: gl.constexpr, OWNED: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    """FLOW: only what leaves the segments in ``flows``, from zero or, where a sequence ends, from its final one.
    OWNED: only segments that begin a sequence, which ``flows`` then names, store its initial gradient."""
    program = gl.program_id(0)
    parts = value_dim // 64
    part = program % parts
    head = (program // parts) % heads
    sequence = program // parts // heads
    carried = sequence
    ended = sequence
    if FLOW:
        ended = gl.load(flows + 2 * carried + 1)  # the sequence that ends here, else -1
        sequence = gl.load(flows + 2 * carried)
    owner = carried
    if OWNED:
        owner = gl.load(flows + carried)
    key_head = head // (heads // key_heads)
    first_token, end_token, chunk, own = locate_sequence(
        sequence, tokens, length, per_sequence, cu_seqlens, offsets, PACKED
    )
    count = (end_token - first_token + 63) // 64
    first_column = part * 64
    column = head * value_dim + first_column

    dtype: gl.constexpr = key.dtype
    square: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    spread_layout: gl.constexpr = gl.SwizzledSharedLayout(vec=8, per_phase=1, max_phase=8, order=[1, 0])
    query_tiles = gl.allocate_shared_memory(dtype, [STAGES, 1, 64, K], key.layout)
    key_tiles = gl.allocate_shared_memory(dtype, [STAGES, 1, 64, K], key.layout)
    gradient_tiles = gl.allocate_shared_memory(dtype, [STAGES, 1, 64, 64], gradient.layout)
    inverse_tiles = gl.allocate_shared_memory(dtype, [STAGES if SOLVE else 1, 64, 64], square)
    scores_tiles = gl.allocate_shared_memory(dtype, [STAGES, 64, 64], square)
    from_start_tiles = gl.allocate_shared_memory(gl.float32, [STAGES, 64], to_end.layout)
    to_end_tiles = gl.allocate_shared_memory(gl.float32, [STAGES, 64], to_end.layout)
    spread_tiles = gl.allocate_shared_memory(gl.float32, [2, 64, 64], spread_layout)
    exit_tile = gl.allocate_shared_memory(dtype, [8 if FLOW else 64, K], square)
    solution_tile = gl.allocate_shared_memory(dtype, [1, 8 if FLOW else 64, 64], gradient.layout)

    barrier_layout: gl.constexpr = mbarrier.MBarrierLayout()
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier_layout)
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier_layout)
    spread_ready = gl.allocate_shared_memory(gl.int64, [2, 1], barrier_layout)
    spread_free = gl.allocate_shared_memory(gl.int64, [2, 1], barrier_layout)
    exit_ready = gl.allocate_shared_memory(gl.int64, [1], barrier_layout)
    exit_free = gl.allocate_shared_memory(gl.int64, [1], barrier_layout)
    solution_ready = gl.allocate_shared_memory(gl.int64, [1], barrier_layout)
    solution_free = gl.allocate_shared_memory(gl.int64, [1], barrier_layout)
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(free.index(i), count=1)
    for i in gl.static_range(2):
        mbarrier.init(spread_ready.index(i), count=1)
        mbarrier.init(spread_free.index(i), count=1)
    mbarrier.init(exit_ready, count=1)
    mbarrier.init(exit_free, count=1)
    mbarrier.init(solution_ready, count=1)
    mbarrier.init(solution_free, count=1)

    sources = (query, key, gradient, inverse, scores, from_start, to_end)
    targets = (exit, solution)
    tiles = (query_tiles, key_tiles, gradient_tiles, inverse_tiles, scores_tiles, from_start_tiles, to_end_tiles)
    inward = (spread_tiles, spread_ready, spread_free)
    outward = (exit_tile, exit_ready, exit_free, solution_tile, solution_ready, solution_free)
    handover = (inward, outward)
    ends = final_gradient + (gl.maximum(ended, 0) * heads + head).to(gl.int64) * K * value_dim + first_column
    begins = initial_gradient + (gl.maximum(owner, 0) * heads + head).to(gl.int64) * K * value_dim + first_column
    if FLOW:
        gl.warp_specialize([
            (state_role, (tiles, ready, free, handover, ends, begins, ended, owner, count, value_dim, K, STAGES, SOLVE,
                          FINAL, INITIAL, FLOW)),
            (adjoint_role, (tiles, ready, inward, scale, count, STAGES)),
            (load_role, (sources, tiles, ready, free, first_token, end_token, chunk, key_head, head, column, heads,
                         count, K, STAGES, SOLVE)),
        ], [4, 1], [120, 40])  # fmt: skip
    else:
        gl.warp_specialize([
            (state_role, (tiles, ready, free, handover, ends, begins, ended, owner, count, value_dim, K, STAGES, SOLVE,
                          FINAL, INITIAL, FLOW)),
            (adjoint_role, (tiles, ready, inward, scale, count, STAGES)),
            (load_role, (sources, tiles, ready, free, first_token, end_token, chunk, key_head, head, column, heads,
                         count, K, STAGES, SOLVE)),
            (store_role, (targets, outward, first_token, end_token, own, head, column, heads, value_dim,
                          first_column, count)),
        ], [4, 1, 1], [120, 40, 40])  # fmt: skip
