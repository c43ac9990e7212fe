"""The forward scan on Hopper: o_t = scale · S_tᵀ q_t along the chunks of each sequence.

For a chunk with entry state S₀ and the arrays of ``prepare`` (rows are tokens, ⊙ scales rows):

    R  = inverse (V − from_start ⊙ K S₀)             rows that read and write; R = V for rows that only write
    O  = scale · from_start ⊙ Q S₀ + scores R
    S₁ = total S₀ + (to_end ⊙ K)ᵀ R

One program carries 64 value columns of one head of one sequence.  Its roles share a ring of chunk tiles in shared
memory:

    state   (4 warps)  keeps S transposed, [64 values × K keys], in its accumulators, so that every product on the chain
                       from chunk to chunk takes its left operand from registers; hands S₀ and R out in shared memory
    output  (4 warps)  forms O, about one chunk behind, off the chain
    load    (1 warp)   fetches the tiles of the chunks ahead (TMA)
    store   (1 warp)   sends O, and on request R and the entry states, to memory (TMA)

The flows of segments (``kernels/segments.py``) are the same scan without the output role.  P is that of K more value
channels, without values (the copy engine fills columns past the last with zeros) and from the identity.

Where the backward pass is to begin again (``kernels/pieces.py``) the state role also stores its state as it is.
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
    tiles, ready, free, handover, initial_pointer, final_pointer, halt_pointer, halt_stride, halt, begun, owner, unit,
    count, value_dim, width,
    K: gl.constexpr, STAGES: gl.constexpr, SOLVE: gl.constexpr, HAND: gl.constexpr,
    INITIAL: gl.constexpr, FINAL: gl.constexpr, FLOW: gl.constexpr, HALT: gl.constexpr,
):  # fmt: skip
    query_tiles, key_tiles, value_tiles, inverse_tiles, scores_tiles, from_start_tiles, to_end_tiles = tiles
    entry_tiles, solution_tiles, handed, taken = handover
    dtype: gl.constexpr = key_tiles.dtype
    token_layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16]
    )
    state_layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, K, 16]
    )
    token_operand: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=token_layout, k_width=2)
    state_operand: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=state_layout, k_width=2)
    along_tokens: gl.constexpr = gl.SliceLayout(0, token_layout)
    zero = gl.zeros([64, 64], gl.float32, token_layout)
    if FLOW:
        row = gl.arange(0, 64, gl.SliceLayout(1, state_layout))[:, None]
        column = gl.arange(0, K, gl.SliceLayout(0, state_layout))[None, :]
        if INITIAL:
            known = (begun >= 0) & (unit < 0) & (row + column >= 0)
            state = gl.load(initial_pointer + state_offsets(value_dim, state_layout, K), mask=known, other=0.0)
        else:
            state = gl.zeros([64, K], gl.float32, state_layout)
        if SOLVE:
            state = gl.where((unit >= 0) & (row + unit == column), 1.0, state)
    elif INITIAL:
        state = gl.load(initial_pointer + state_offsets(value_dim, state_layout, K))
    else:
        state = gl.zeros([64, K], gl.float32, state_layout)
    mbarrier.wait(ready.index(0), 0, pred=count > 0)
    value = unpack(value_tiles.index(0).reshape([64, 64]).permute((1, 0)).load(token_layout))
    if FLOW and SOLVE:
        valued = gl.arange(0, 64, gl.SliceLayout(0, token_layout))[None, :] + unit < 0
        value = gl.where(valued, value, 0.0)
    from_start = from_start_tiles.index(0).load(along_tokens)
    to_end = to_end_tiles.index(0).load(along_tokens)
    total = from_start_tiles.index(0).slice(63, 1).load(gl.SliceLayout(1, state_layout))
    for i in range(count):
        slot = i % STAGES
        pair = i % 2
        if HALT:  # noqa: SIM102 - settled while compiling
            if i % halt == 0:  # no product is in flight here
                place = halt_pointer + (i // halt) * halt_stride
                gl.store(place + state_offsets(value_dim, state_layout, K), state)
        rounded = state.to(dtype)
        key = key_tiles.index(slot).reshape([64, K])
        if SOLVE:
            operand = gl.convert_layout(rounded, token_operand, assert_trivial=True)
            seen = warpgroup_mma(operand, key.permute((1, 0)), zero, use_acc=False, is_async=True)
        if HAND:
            mbarrier.wait(taken.index(pair), ((i // 2) & 1) ^ 1)
            entry_tiles.index(pair).store(rounded)
        state = state * total[:, None]
        solution = value
        if SOLVE:
            seen = warpgroup_mma_wait(0, deps=(seen,))
            residual = (value - seen * from_start[None, :]).to(dtype)
            operand = gl.convert_layout(residual, token_operand, assert_trivial=True)
            inverse = inverse_tiles.index(slot).permute((1, 0))
            solution = warpgroup_mma(operand, inverse, zero, use_acc=False, is_async=True)
            solution = warpgroup_mma_wait(0, deps=(solution,))
        weighted = gl.convert_layout((solution * to_end[None, :]).to(dtype), state_operand, assert_trivial=True)
        update = warpgroup_mma(weighted, key, state, is_async=True)
        if HAND:
            if SOLVE:
                solution_tiles.index(pair).permute((1, 0)).store(solution.to(dtype))
            mbarrier.arrive(handed.index(pair), count=1)
        # In the shadow of the update: what the next chunk needs soon after its first product.
        following = (i + 1) % STAGES
        mbarrier.wait(ready.index(following), ((i + 1) // STAGES) & 1, pred=i + 1 < count)
        value = unpack(value_tiles.index(following).reshape([64, 64]).permute((1, 0)).load(token_layout))
        if FLOW and SOLVE:
            value = gl.where(valued, value, 0.0)
        from_start = from_start_tiles.index(following).load(along_tokens)
        to_end = to_end_tiles.index(following).load(along_tokens)
        total = from_start_tiles.index(following).slice(63, 1).load(gl.SliceLayout(1, state_layout))
        state = warpgroup_mma_wait(0, deps=(update,))
        mbarrier.arrive(free.index(slot), count=1)
    if FINAL:  # noqa: SIM102 - settled while compiling
        if owner >= 0:
            gl.store(final_pointer + state_offsets(width, state_layout, K), state)


@gluon.jit
def output_role(
    tiles, ready, free, handover, outward, scale, count, K: gl.constexpr, STAGES: gl.constexpr, SOLVE: gl.constexpr
):
    query_tiles, key_tiles, value_tiles, inverse_tiles, scores_tiles, from_start_tiles, to_end_tiles = tiles
    entry_tiles, solution_tiles, handed, taken = handover
    output_tile, output_ready, output_free = outward
    dtype: gl.constexpr = key_tiles.dtype
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    zero = gl.zeros([64, 64], gl.float32, layout)
    for i in range(count):
        slot = i % STAGES
        pair = i % 2
        mbarrier.wait(ready.index(slot), (i // STAGES) & 1)
        mbarrier.wait(handed.index(pair), (i // 2) & 1)
        fence_async_shared()
        query = query_tiles.index(slot).reshape([64, K])
        read = warpgroup_mma(query, entry_tiles.index(pair).permute((1, 0)), zero, use_acc=False, is_async=True)
        from_start = from_start_tiles.index(slot).load(gl.SliceLayout(1, layout)) * scale
        read = warpgroup_mma_wait(0, deps=(read,))
        read = read * from_start[:, None]
        if SOLVE:
            solution = solution_tiles.index(pair)
        else:
            solution = value_tiles.index(slot).reshape([64, 64])
        output = warpgroup_mma(scores_tiles.index(slot), solution, read, is_async=True)
        mbarrier.wait(output_free, (i & 1) ^ 1)
        output = warpgroup_mma_wait(0, deps=(output,))
        mbarrier.arrive(taken.index(pair), count=1)
        mbarrier.arrive(free.index(slot), count=1)
        output_tile.reshape([64, 64]).store(output.to(dtype))
        mbarrier.arrive(output_ready, count=1)


@gluon.jit
def store_role(
    descriptors, handover, outward, first_token, end_token, own, head, column, heads, value_dim, first_column, count,
    SOLVE: gl.constexpr, OUTPUT: gl.constexpr, SAVE: gl.constexpr,
):  # fmt: skip
    output, solution, entry = descriptors
    entry_tiles, solution_tiles, handed, taken = handover
    output_tile, output_ready, output_free = outward
    for i in range(count):
        pair = i % 2
        window, skip = chunk_window(first_token, end_token, i)
        if SAVE:
            mbarrier.wait(handed.index(pair), (i // 2) & 1)
            fence_async_shared()
            tma.async_copy_shared_to_global(
                entry, [((own + i) * heads + head) * value_dim + first_column, 0], entry_tiles.index(pair)
            )
            if SOLVE:
                tma.async_copy_shared_to_global(
                    solution, [window, skip, column], solution_tiles.index(pair).reshape([1, 64, 64])
                )
            # All but this chunk's copies have been read from shared memory: hand back the buffers of the chunk before.
            tma.store_wait(1 + SOLVE)
            if OUTPUT:
                mbarrier.arrive(output_free, count=1, pred=i > 0)
            else:
                mbarrier.arrive(taken.index(pair ^ 1), count=1, pred=i > 0)
        if OUTPUT:
            mbarrier.wait(output_ready, i & 1)
            fence_async_shared()
            tma.async_copy_shared_to_global(output, [window, skip, column], output_tile)
            if SAVE:
                tma.store_wait(1)
                mbarrier.arrive(taken.index(pair), count=1)
            else:
                tma.store_wait(0)
                mbarrier.arrive(output_free, count=1)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["tokens", "length", "per_sequence", "halt", "key_heads", "heads", "value_dim"])
def forward_kernel(
    query, key, value, inverse, scores, from_start, to_end, output, solution, entry, initial_state, final_state,
    halts, cu_seqlens, offsets, flows, scale, tokens, length, per_sequence, halt, key_heads, heads, value_dim,
    K: gl.constexpr, STAGES: gl.constexpr, SOLVE: gl.constexpr, OUTPUT: gl.constexpr, SAVE: gl.constexpr,
    INITIAL: gl.constexpr, FINAL: gl.constexpr, FLOW: gl.constexpr, HALT: gl.constexpr, OWNED: gl.constexpr,
    PACKED: gl.constexpr,
):  # fmt: skip
    """HALT: the state at the entry of every chunk whose number in its sequence ``halt`` divides goes to ``halts``.
    FLOW: the final states are [H | P] of the segments in ``flows``, but where a sequence begins it is what its
    initial state becomes, without P.  OWNED: only segments that end a sequence, which ``flows`` then names, store its
    state."""
    program = gl.program_id(0)
    parts = value_dim // 64
    width = value_dim
    if FLOW and SOLVE:
        parts += K // 64
        width += K
    part = program % parts
    head = (program // parts) % heads
    sequence = program // parts // heads
    carried = sequence
    begun = sequence
    if FLOW:
        begun = gl.load(flows + 2 * carried + 1)  # the sequence that begins here, else -1
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
    unit = first_column - value_dim  # the column of the identity that this program begins with, if it is one
    if FLOW and SOLVE:
        # A program of the identity has no values: it loads its head's first, and leaves them out. (A copy from beyond
        # the last column would give zeros, but touches memory that need not be mapped.)
        column = gl.where(unit >= 0, head * value_dim, column)
        count = gl.where((unit >= 0) & (begun >= 0), 0, count)

    HAND: gl.constexpr = OUTPUT or SAVE
    dtype: gl.constexpr = key.dtype
    square: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    query_tiles = gl.allocate_shared_memory(dtype, [STAGES if OUTPUT else 1, 1, 64, K if OUTPUT else 64], key.layout)
    key_tiles = gl.allocate_shared_memory(dtype, [STAGES, 1, 64, K], key.layout)
    value_tiles = gl.allocate_shared_memory(dtype, [STAGES, 1, 64, 64], value.layout)
    inverse_tiles = gl.allocate_shared_memory(dtype, [STAGES if SOLVE else 1, 64, 64], square)
    scores_tiles = gl.allocate_shared_memory(dtype, [STAGES if OUTPUT else 1, 64, 64], square)
    from_start_tiles = gl.allocate_shared_memory(gl.float32, [STAGES, 64], to_end.layout)
    to_end_tiles = gl.allocate_shared_memory(gl.float32, [STAGES, 64], to_end.layout)
    entry_tiles = gl.allocate_shared_memory(dtype, [2 if HAND else 1, 64 if HAND else 8, K if HAND else 64], square)
    solution_tiles = gl.allocate_shared_memory(dtype, [2 if HAND else 1, 64 if HAND else 8, 64], square)
    output_tile = gl.allocate_shared_memory(dtype, [1, 64 if OUTPUT else 8, 64], value.layout)

    barrier_layout: gl.constexpr = mbarrier.MBarrierLayout()
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier_layout)
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier_layout)
    handed = gl.allocate_shared_memory(gl.int64, [2, 1], barrier_layout)
    taken = gl.allocate_shared_memory(gl.int64, [2, 1], barrier_layout)
    output_ready = gl.allocate_shared_memory(gl.int64, [1], barrier_layout)
    output_free = gl.allocate_shared_memory(gl.int64, [1], barrier_layout)
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(free.index(i), count=1 + OUTPUT)
    for i in gl.static_range(2):
        mbarrier.init(handed.index(i), count=1)
        mbarrier.init(taken.index(i), count=max(OUTPUT + SAVE, 1))
    mbarrier.init(output_ready, count=1)
    mbarrier.init(output_free, count=1)

    sources = (query, key, value, inverse, scores, from_start, to_end)
    targets = (output, solution, entry)
    tiles = (query_tiles, key_tiles, value_tiles, inverse_tiles, scores_tiles, from_start_tiles, to_end_tiles)
    handover = (entry_tiles, solution_tiles, handed, taken)
    outward = (output_tile, output_ready, output_free)
    begins = initial_state + (gl.maximum(begun, 0) * heads + head).to(gl.int64) * K * value_dim + first_column
    ends = final_state + (gl.maximum(owner, 0) * heads + head).to(gl.int64) * K * width + first_column
    halt_stride = (gl.num_programs(0) // parts).to(gl.int64) * K * value_dim
    halt_pointer = halts + (sequence * heads + head).to(gl.int64) * K * value_dim + first_column
    if OUTPUT:
        gl.warp_specialize([
            (state_role, (tiles, ready, free, handover, begins, ends, halt_pointer, halt_stride, halt, begun, owner,
                          unit, count, value_dim, width, K, STAGES, SOLVE, HAND, INITIAL, FINAL, FLOW, HALT)),
            (output_role, (tiles, ready, free, handover, outward, scale, count, K, STAGES, SOLVE)),
            (load_role, (sources, tiles, ready, free, first_token, end_token, chunk, key_head, head, column, heads,
                         count, K, STAGES, SOLVE, OUTPUT)),
            (store_role, (targets, handover, outward, first_token, end_token, own, head, column, heads, value_dim,
                          first_column, count, SOLVE, OUTPUT, SAVE)),
        ], [4, 1, 1], [120, 40, 40])  # fmt: skip
    else:
        gl.warp_specialize([
            (state_role, (tiles, ready, free, handover, begins, ends, halt_pointer, halt_stride, halt, begun, owner,
                          unit, count, value_dim, width, K, STAGES, SOLVE, HAND, INITIAL, FINAL, FLOW, HALT)),
            (load_role, (sources, tiles, ready, free, first_token, end_token, chunk, key_head, head, column, heads,
                         count, K, STAGES, SOLVE, OUTPUT)),
            (store_role, (targets, handover, outward, first_token, end_token, own, head, column, heads, value_dim,
                          first_column, count, SOLVE, OUTPUT, SAVE)),
        ], [1, 1], [40, 40])  # fmt: skip
