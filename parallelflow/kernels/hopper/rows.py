"""The scan of rows of every kind on Hopper, forward and, turned around in time, of the adjoint.

The equations are those of ``kernels/rows/scan.py``. For a chunk with entry state S, and what ``rows/prepare.py`` made,

    X = T (U + reads S + couple given)            said = says S + own X + through given
    S <- total S + writes^T X + gives^T given

One program carries 64 value columns of one value head of one sequence. Everything it multiplies is transposed, so that
its 64 columns are the 64 rows that a warpgroup's product has: S^T [64, K], X^T [64, N], said^T [64, S]. Its roles:

    state   (4 warps)  keeps S^T in its accumulators, so that the products on the chain from chunk to chunk take their
                       left operand from registers; hands S and X out in shared memory
    output  (4 warps)  forms what is said, about one chunk behind, off the chain
    load    (1 warp)   fetches the tiles of the chunks ahead (TMA), in two rings: the state's and the output's
    store   (1 warp)   sends what is said and, on request, X and the entry states to memory (TMA)

U + couple given does not depend on the state: it is formed under the update of the chunk before.

The flows of segments (``kernels/segments.py``) are the same scan without the output and store roles. P is that of K
more value columns, from the identity and without values: the tiles of U and of what is given are cleared once, and no
copy fills them.
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
def ring(descriptor, COUNT: gl.constexpr):
    """Shared memory for COUNT blocks of a descriptor."""
    return gl.allocate_shared_memory(descriptor.dtype, [COUNT] + descriptor.block_type.shape, descriptor.layout)  # noqa: RUF005


@gluon.jit
def fetch_rows(
    descriptor, tile, full, first_token, end_token, i, column, wanted,
    C: gl.constexpr, COUNT: gl.constexpr, HEIGHT: gl.constexpr,
):  # fmt: skip
    """A chunk's rows, COUNT a token, into a tile of HEIGHT of them, if wanted."""
    if COUNT & (COUNT - 1) == 0:
        window, skip = chunk_window(first_token, end_token, i, C, COUNT, HEIGHT)
        tma.async_copy_global_to_shared(descriptor, [window, skip, column], full, tile, pred=wanted)
    else:  # places are an axis of their own: those beyond the count are beyond its end
        window, skip = chunk_window(first_token, end_token, i, C, 1, C)
        tma.async_copy_global_to_shared(descriptor, [window, skip, 0, column], full, tile, pred=wanted)


@gluon.jit
def send_rows(
    descriptor, tile, first_token, end_token, i, column,
    C: gl.constexpr, COUNT: gl.constexpr, HEIGHT: gl.constexpr,
):  # fmt: skip
    """The other way."""
    if COUNT & (COUNT - 1) == 0:
        window, skip = chunk_window(first_token, end_token, i, C, COUNT, HEIGHT)
        tma.async_copy_shared_to_global(descriptor, [window, skip, column], tile)
    else:
        window, skip = chunk_window(first_token, end_token, i, C, 1, C)
        tma.async_copy_shared_to_global(descriptor, [window, skip, 0, column], tile)


@gluon.jit
def fetch_for_state(
    descriptors, tiles, ready, free, first_token, end_token, i, j, matrix, source_column, given_column, head, unit,
    C: gl.constexpr, N: gl.constexpr, G: gl.constexpr, R: gl.constexpr, GIVING: gl.constexpr, K: gl.constexpr,
    DECAY: gl.constexpr, SOURCE: gl.constexpr, UNIT: gl.constexpr, STAGES: gl.constexpr, REVERSE: gl.constexpr,
):  # fmt: skip
    reads, writes, says, gives, inverse, couple, own, through, source, given, vectors = descriptors
    reads_tiles, writes_tiles, gives_tiles, inverse_tiles, couple_tiles, source_tiles, given_tiles, vector_tiles = tiles
    weight_tiles, total_tiles = vector_tiles
    weights, totals = vectors
    slot = j % STAGES
    full = ready.index(slot)
    COUPLED: gl.constexpr = (R > 0) and (GIVING > 0)
    valued = unit < 0 if UNIT else True
    mbarrier.wait(free.index(slot), ((j // STAGES) & 1) ^ 1)
    ROWS: gl.constexpr = 2 * ((R > 0) * N * (2 * K + N) + (GIVING > 0) * G * K + COUPLED * N * G) + 4 * (
        (SOURCE == 2) * N + (DECAY == 2) * K
    )
    mbarrier.expect(full, ROWS + 2 * 64 * ((SOURCE > 0) * N + (GIVING > 0) * G), pred=valued)
    if UNIT:
        mbarrier.expect(full, ROWS, pred=unit >= 0)
    if GIVING > 0:
        fetch_rows(given, given_tiles.index(slot), full, first_token, end_token, i, given_column, valued, C, GIVING, G)
        if R > 0:
            tma.async_copy_global_to_shared(couple, [matrix * (G if REVERSE else N), 0], full, couple_tiles.index(slot))
    if SOURCE:
        fetch_rows(source, source_tiles.index(slot), full, first_token, end_token, i, source_column, valued, C, R, N)
    if SOURCE == 2:
        tma.async_copy_global_to_shared(weights, [matrix * N], full, weight_tiles.index(slot))
    if R > 0:
        fetch_rows(reads, reads_tiles.index(slot), full, first_token, end_token, i, head * K, True, C, R, N)
    if DECAY == 2:
        tma.async_copy_global_to_shared(totals, [matrix * K], full, total_tiles.index(slot))
    if R > 0:
        tma.async_copy_global_to_shared(inverse, [matrix * N, 0], full, inverse_tiles.index(slot))
        fetch_rows(writes, writes_tiles.index(slot), full, first_token, end_token, i, head * K, True, C, R, N)
    if GIVING > 0:
        fetch_rows(gives, gives_tiles.index(slot), full, first_token, end_token, i, head * K, True, C, GIVING, G)


@gluon.jit
def load_role(
    descriptors, inner, outer, ready, free, heard, answered, first_token, end_token, chunk, source_column, given_column,
    head, heads, unit, count,
    C: gl.constexpr, N: gl.constexpr, S: gl.constexpr, G: gl.constexpr, R: gl.constexpr, SAYING: gl.constexpr,
    GIVING: gl.constexpr, K: gl.constexpr, DECAY: gl.constexpr, SOURCE: gl.constexpr, SAY: gl.constexpr,
    UNIT: gl.constexpr, STAGES: gl.constexpr, DEPTH: gl.constexpr, REVERSE: gl.constexpr,
):  # fmt: skip
    reads, writes, says, gives, inverse, couple, own, through, source, given, vectors = descriptors
    says_tiles, own_tiles, through_tiles = outer
    # The output is a chunk behind: its tiles come after the state's of the chunk that follows.
    for step in range(count + SAY):
        if step < count:
            i = count - 1 - step if REVERSE else step
            fetch_for_state(
                descriptors, inner, ready, free, first_token, end_token, i, step, (chunk + i) * heads + head,
                source_column, given_column, head, unit, C, N, G, R, GIVING, K, DECAY, SOURCE, UNIT, STAGES, REVERSE,
            )  # fmt: skip
        if SAY:  # noqa: SIM102 - settled while compiling
            if step > 0:
                j = step - 1
                i = count - 1 - j if REVERSE else j
                matrix = (chunk + i) * heads + head
                slot = j % DEPTH
                full = heard.index(slot)
                mbarrier.wait(answered.index(slot), ((j // DEPTH) & 1) ^ 1)
                mbarrier.expect(full, 2 * S * (K + (R > 0) * N + (GIVING > 0) * G))
                fetch_rows(says, says_tiles.index(slot), full, first_token, end_token, i, head * K, True, C, SAYING, S)
                if R > 0:
                    row = matrix * (N if REVERSE else S)
                    tma.async_copy_global_to_shared(own, [row, 0], full, own_tiles.index(slot))
                if GIVING > 0:
                    row = matrix * (G if REVERSE else S)
                    tma.async_copy_global_to_shared(through, [row, 0], full, through_tiles.index(slot))


@gluon.jit
def state_role(
    tiles, ready, free, handover, total_pointer, initial_pointer, final_pointer, chunk, head, heads, starting, owner,
    unit, count, value_dim, width,
    N: gl.constexpr, G: gl.constexpr, R: gl.constexpr, GIVING: gl.constexpr, K: gl.constexpr, DECAY: gl.constexpr,
    SOURCE: gl.constexpr, HAND: gl.constexpr, INITIAL: gl.constexpr, FINAL: gl.constexpr, FLOW: gl.constexpr,
    UNIT: gl.constexpr, STAGES: gl.constexpr, PAIRS: gl.constexpr, REVERSE: gl.constexpr,
):  # fmt: skip
    reads_tiles, writes_tiles, gives_tiles, inverse_tiles, couple_tiles, source_tiles, given_tiles, vector_tiles = tiles
    weight_tiles, total_tiles = vector_tiles
    entry_tiles, solution_tiles, handed, taken = handover
    dtype: gl.constexpr = entry_tiles.dtype
    rows_layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, N if R > 0 else 64, 16]
    )
    state_layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, K, 16]
    )
    rows_operand: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=rows_layout, k_width=2)
    state_operand: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=state_layout, k_width=2)
    along_rows: gl.constexpr = gl.SliceLayout(0, rows_layout)
    along_keys: gl.constexpr = gl.SliceLayout(0, state_layout)
    KNOWN: gl.constexpr = (SOURCE > 0) or (GIVING > 0)  # whether a part of X does not depend on the state
    zero = gl.zeros([64, N if R > 0 else 64], gl.float32, rows_layout)
    if FLOW:
        row = gl.arange(0, 64, gl.SliceLayout(1, state_layout))[:, None]
        column = gl.arange(0, K, gl.SliceLayout(0, state_layout))[None, :]
    if INITIAL and FLOW:
        there = (starting >= 0) & (unit < 0) & (row + column >= 0)
        state = gl.load(initial_pointer + state_offsets(value_dim, state_layout, K), mask=there, other=0.0)
    elif INITIAL:
        state = gl.load(initial_pointer + state_offsets(value_dim, state_layout, K))
    else:
        state = gl.zeros([64, K], gl.float32, state_layout)
    if UNIT:
        state = gl.where((unit >= 0) & (row + unit == column), 1.0, state)
    mbarrier.wait(ready.index(0), 0, pred=count > 0)
    known = zero
    if R > 0:
        if SOURCE:
            known = unpack(source_tiles.index(0).reshape([N, 64]).permute((1, 0)).load(rows_layout))
        if SOURCE == 2:
            known = known * weight_tiles.index(0).load(along_rows)[None, :]
        if GIVING > 0:
            given = given_tiles.index(0).reshape([G, 64]).permute((1, 0))
            couple = couple_tiles.index(0) if REVERSE else couple_tiles.index(0).permute((1, 0))
            known = warpgroup_mma(given, couple, known, use_acc=SOURCE > 0, is_async=True)
            known = warpgroup_mma_wait(0, deps=(known,))
    if DECAY == 1:
        i = count - 1 if REVERSE else 0
        total = gl.load(total_pointer + (chunk + i) * heads + head, mask=count > 0, other=0.0)
    if DECAY == 2:
        total = total_tiles.index(0).load(along_keys)
    for j in range(count):
        slot = j % STAGES
        pair = j % PAIRS
        following = (j + 1) % STAGES
        more = j + 1 < count
        rounded = state.to(dtype)
        if R > 0:
            operand = gl.convert_layout(rounded, rows_operand, assert_trivial=True)
            reads = reads_tiles.index(slot).reshape([N, K]).permute((1, 0))
            residual = warpgroup_mma(operand, reads, known, use_acc=KNOWN, is_async=True)
        if HAND:
            mbarrier.wait(taken.index(pair), ((j // PAIRS) & 1) ^ 1)
            entry_tiles.index(pair).store(rounded)
        if DECAY == 1:
            state = state * total
            i = count - 2 - j if REVERSE else j + 1
            total = gl.load(total_pointer + (chunk + i) * heads + head, mask=more, other=0.0)
        if DECAY == 2:
            state = state * total[None, :]
        if R > 0:
            residual = warpgroup_mma_wait(0, deps=(residual,))
            operand = gl.convert_layout(residual.to(dtype), rows_operand, assert_trivial=True)
            inverse = inverse_tiles.index(slot) if REVERSE else inverse_tiles.index(slot).permute((1, 0))
            solution = warpgroup_mma(operand, inverse, zero, use_acc=False, is_async=True)
        if GIVING > 0:
            given = given_tiles.index(slot).reshape([G, 64]).permute((1, 0))
            update = warpgroup_mma(given, gives_tiles.index(slot).reshape([G, K]), state, is_async=True)
            if R > 0:
                solution = warpgroup_mma_wait(1, deps=(solution,))
        elif R > 0:
            solution = warpgroup_mma_wait(0, deps=(solution,))
            update = state
        if R > 0:
            solved = solution.to(dtype)
            operand = gl.convert_layout(solved, state_operand, assert_trivial=True)
            update = warpgroup_mma(operand, writes_tiles.index(slot).reshape([N, K]), update, is_async=True)
        if HAND:
            if R > 0:
                solution_tiles.index(pair).reshape([N, 64]).permute((1, 0)).store(solved)
            mbarrier.arrive(handed.index(pair), count=1)
        # In the shadow of the update: what the next chunk needs soon.
        mbarrier.wait(ready.index(following), ((j + 1) // STAGES) & 1, pred=more)
        if DECAY == 2:
            total = total_tiles.index(following).load(along_keys)
        if R > 0:
            if SOURCE:
                known = unpack(source_tiles.index(following).reshape([N, 64]).permute((1, 0)).load(rows_layout))
            if SOURCE == 2:
                known = known * weight_tiles.index(following).load(along_rows)[None, :]
            if GIVING > 0:
                given = given_tiles.index(following).reshape([G, 64]).permute((1, 0))
                couple = couple_tiles.index(following) if REVERSE else couple_tiles.index(following).permute((1, 0))
                known = warpgroup_mma(given, couple, known, use_acc=SOURCE > 0, is_async=True)
        if (R > 0) and (GIVING > 0):
            state, known = warpgroup_mma_wait(0, deps=(update, known))
        else:
            state = warpgroup_mma_wait(0, deps=(update,))
        mbarrier.arrive(free.index(slot), count=1)
    if FINAL:  # noqa: SIM102 - settled while compiling
        if owner >= 0:
            gl.store(final_pointer + state_offsets(width, state_layout, K), state)


@gluon.jit
def output_role(
    inner, outer, ready, free, heard, answered, handover, outward, count,
    N: gl.constexpr, S: gl.constexpr, G: gl.constexpr, R: gl.constexpr, GIVING: gl.constexpr, K: gl.constexpr,
    STAGES: gl.constexpr, DEPTH: gl.constexpr, PAIRS: gl.constexpr, REVERSE: gl.constexpr,
):  # fmt: skip
    reads_tiles, writes_tiles, gives_tiles, inverse_tiles, couple_tiles, source_tiles, given_tiles, vector_tiles = inner
    says_tiles, own_tiles, through_tiles = outer
    entry_tiles, solution_tiles, handed, taken = handover
    said_tile, said_ready, said_free = outward
    dtype: gl.constexpr = entry_tiles.dtype
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, S, 16])
    zero = gl.zeros([64, S], gl.float32, layout)
    for j in range(count):
        slot = j % STAGES
        place = j % DEPTH
        pair = j % PAIRS
        mbarrier.wait(heard.index(place), (j // DEPTH) & 1)
        if GIVING > 0:
            mbarrier.wait(ready.index(slot), (j // STAGES) & 1)
        mbarrier.wait(handed.index(pair), (j // PAIRS) & 1)
        fence_async_shared()
        says = says_tiles.index(place).reshape([S, K]).permute((1, 0))
        said = warpgroup_mma(entry_tiles.index(pair), says, zero, use_acc=False, is_async=True)
        if R > 0:
            own = own_tiles.index(place) if REVERSE else own_tiles.index(place).permute((1, 0))
            solution = solution_tiles.index(pair).reshape([N, 64]).permute((1, 0))
            said = warpgroup_mma(solution, own, said, is_async=True)
        if GIVING > 0:
            through = through_tiles.index(place) if REVERSE else through_tiles.index(place).permute((1, 0))
            given = given_tiles.index(slot).reshape([G, 64]).permute((1, 0))
            said = warpgroup_mma(given, through, said, is_async=True)
        mbarrier.wait(said_free, (j & 1) ^ 1)
        said = warpgroup_mma_wait(0, deps=(said,))
        mbarrier.arrive(taken.index(pair), count=1)
        mbarrier.arrive(answered.index(place), count=1)
        if GIVING > 0:
            mbarrier.arrive(free.index(slot), count=1)
        said_tile.reshape([S, 64]).permute((1, 0)).store(said.to(dtype))
        mbarrier.arrive(said_ready, count=1)


@gluon.jit
def store_role(
    descriptors, handover, outward, first_token, end_token, chunk, head, heads, value_dim, first_column, count,
    C: gl.constexpr, N: gl.constexpr, S: gl.constexpr, R: gl.constexpr, SAYING: gl.constexpr, SAY: gl.constexpr,
    SAVE: gl.constexpr, PAIRS: gl.constexpr, REVERSE: gl.constexpr,
):  # fmt: skip
    solution, said, states = descriptors
    entry_tiles, solution_tiles, handed, taken = handover
    said_tile, said_ready, said_free = outward
    SOLVED: gl.constexpr = 1 if R > 0 else 0
    column = head * value_dim + first_column
    for j in range(count):
        i = count - 1 - j if REVERSE else j
        pair = j % PAIRS
        if SAVE:
            mbarrier.wait(handed.index(pair), (j // PAIRS) & 1)
            fence_async_shared()
            row = ((chunk + i) * heads + head) * value_dim + first_column
            tma.async_copy_shared_to_global(states, [row, 0], entry_tiles.index(pair))
            if R > 0:
                send_rows(solution, solution_tiles.index(pair), first_token, end_token, i, column, C, R, N)
            # All but this chunk's copies have been read from shared memory: hand back the buffers of the chunk before.
            tma.store_wait(1 + SOLVED)
            if SAY:
                mbarrier.arrive(said_free, count=1, pred=j > 0)
            else:
                mbarrier.arrive(taken.index(pair ^ 1), count=1, pred=j > 0)
        if SAY:
            mbarrier.wait(said_ready, j & 1)
            fence_async_shared()
            send_rows(said, said_tile, first_token, end_token, i, column, C, SAYING, S)
            if SAVE:
                tma.store_wait(1)
                mbarrier.arrive(taken.index(pair), count=1)
            else:
                tma.store_wait(0)
                mbarrier.arrive(said_free, count=1)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["time", "per_sequence", "heads", "source_heads", "given_heads", "value_dim"])
def rows_kernel(
    reads, writes, says, gives, inverse, couple, own, through, source, weights, given, totals, solution, said, states,
    total, initial, final, cu_seqlens, offsets, table, time, per_sequence, heads, source_heads, given_heads, value_dim,
    C: gl.constexpr, N: gl.constexpr, S: gl.constexpr, G: gl.constexpr, R: gl.constexpr, SAYING: gl.constexpr,
    GIVING: gl.constexpr, K: gl.constexpr, DECAY: gl.constexpr, REVERSE: gl.constexpr, PACKED: gl.constexpr,
    SOURCE: gl.constexpr, SAY: gl.constexpr, SAVE: gl.constexpr, INITIAL: gl.constexpr, FINAL: gl.constexpr,
    FLOW: gl.constexpr, OWNED: gl.constexpr, STAGES: gl.constexpr, DEPTH: gl.constexpr, PAIRS: gl.constexpr,
):  # fmt: skip
    """Rows a token: R solved for (tile N), SAYING that say (tile S), GIVING that are given (tile G).  SOURCE: no U (0),
    U as it is (1), or times a weight a row (2).  STAGES and DEPTH are the chunks that the state's and the output's ring
    hold, PAIRS the buffers for handing S and X over. FLOW, OWNED and ``table`` are those of ``rows/scan.py``."""
    UNIT: gl.constexpr = FLOW and (R > 0) and not REVERSE
    program = gl.program_id(0)
    parts = value_dim // 64
    width = value_dim
    if UNIT:
        parts += K // 64
        width += K
    first_column = program % parts * 64
    head = (program // parts) % heads
    number = program // parts // heads
    sequence = number
    starting = number
    owner = number
    if FLOW:
        sequence = gl.load(table + 2 * number)
        starting = gl.load(table + 2 * number + 1)
    if OWNED:
        owner = gl.load(table + number)
    first_token, end_token, chunk, _ = locate_sequence(sequence, time, time, per_sequence, cu_seqlens, offsets, PACKED)
    count = (end_token - first_token + C - 1) // C
    source_column = head // (heads // source_heads) * value_dim + first_column
    given_column = head // (heads // given_heads) * value_dim + first_column
    unit = first_column - value_dim  # the column of the identity that this program begins with, if it is one
    if UNIT:
        count = gl.where((unit >= 0) & (starting >= 0), 0, count)

    HAND: gl.constexpr = SAY or SAVE
    SOLVED: gl.constexpr = R > 0
    GIVEN: gl.constexpr = GIVING > 0
    gl.static_assert((PAIRS == 2) or not SAVE)
    dtype: gl.constexpr = states.dtype
    if HAND:
        entry_tiles = ring(states, PAIRS)
    else:
        entry_tiles = gl.allocate_shared_memory(dtype, [1, 8, 64], states.layout)
    # What is not there has another's place, and is not looked at.
    solution_tiles = ring(solution, PAIRS) if SOLVED and HAND else entry_tiles
    reads_tiles = ring(reads, STAGES) if SOLVED else entry_tiles
    writes_tiles = ring(writes, STAGES) if SOLVED else entry_tiles
    inverse_tiles = ring(inverse, STAGES) if SOLVED else entry_tiles
    source_tiles = ring(source, STAGES) if SOURCE else entry_tiles
    gives_tiles = ring(gives, STAGES) if GIVEN else entry_tiles
    given_tiles = ring(given, STAGES) if GIVEN else entry_tiles
    couple_tiles = ring(couple, STAGES) if SOLVED and GIVEN else entry_tiles
    weight_tiles = ring(weights, STAGES) if SOURCE == 2 else entry_tiles
    total_tiles = ring(totals, STAGES) if DECAY == 2 else entry_tiles
    says_tiles = ring(says, DEPTH) if SAY else entry_tiles
    own_tiles = ring(own, DEPTH) if SAY and SOLVED else entry_tiles
    through_tiles = ring(through, DEPTH) if SAY and GIVEN else entry_tiles
    said_tile = gl.allocate_shared_memory(dtype, said.block_type.shape, said.layout) if SAY else entry_tiles

    if UNIT and (SOURCE or GIVEN):  # noqa: SIM102 - settled while compiling
        if unit >= 0:
            clear: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
            for i in gl.static_range(STAGES):
                if SOURCE:
                    source_tiles.index(i).reshape([N, 64]).store(gl.zeros([N, 64], dtype, clear))
                if GIVEN:
                    given_tiles.index(i).reshape([G, 64]).store(gl.zeros([G, 64], dtype, clear))
            fence_async_shared()

    barrier_layout: gl.constexpr = mbarrier.MBarrierLayout()
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier_layout)
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier_layout)
    heard = gl.allocate_shared_memory(gl.int64, [DEPTH, 1], barrier_layout)
    answered = gl.allocate_shared_memory(gl.int64, [DEPTH, 1], barrier_layout)
    handed = gl.allocate_shared_memory(gl.int64, [PAIRS, 1], barrier_layout)
    taken = gl.allocate_shared_memory(gl.int64, [PAIRS, 1], barrier_layout)
    said_ready = gl.allocate_shared_memory(gl.int64, [1], barrier_layout)
    said_free = gl.allocate_shared_memory(gl.int64, [1], barrier_layout)
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(free.index(i), count=2 if SAY and GIVEN else 1)
    for i in gl.static_range(DEPTH):
        mbarrier.init(heard.index(i), count=1)
        mbarrier.init(answered.index(i), count=1)
    for i in gl.static_range(PAIRS):
        mbarrier.init(handed.index(i), count=1)
        mbarrier.init(taken.index(i), count=2 if SAY and SAVE else 1)
    mbarrier.init(said_ready, count=1)
    mbarrier.init(said_free, count=1)

    sources = (reads, writes, says, gives, inverse, couple, own, through, source, given, (weights, totals))
    targets = (solution, said, states)
    inner = (
        reads_tiles, writes_tiles, gives_tiles, inverse_tiles, couple_tiles, source_tiles, given_tiles,
        (weight_tiles, total_tiles),
    )  # fmt: skip
    outer = (says_tiles, own_tiles, through_tiles)
    handover = (entry_tiles, solution_tiles, handed, taken)
    outward = (said_tile, said_ready, said_free)
    begins = initial + (gl.maximum(starting, 0) * heads + head).to(gl.int64) * K * value_dim + first_column
    ends = final + (gl.maximum(owner, 0) * heads + head).to(gl.int64) * K * width + first_column
    if SAY:
        gl.warp_specialize([
            (state_role, (inner, ready, free, handover, total, begins, ends, chunk, head, heads, starting, owner, unit,
                          count, value_dim, width, N, G, R, GIVING, K, DECAY, SOURCE, HAND, INITIAL, FINAL, FLOW, UNIT,
                          STAGES, PAIRS, REVERSE)),
            (output_role, (inner, outer, ready, free, heard, answered, handover, outward, count, N, S, G, R, GIVING, K,
                           STAGES, DEPTH, PAIRS, REVERSE)),
            (load_role, (sources, inner, outer, ready, free, heard, answered, first_token, end_token, chunk,
                         source_column, given_column, head, heads, unit, count, C, N, S, G, R, SAYING, GIVING, K, DECAY,
                         SOURCE, SAY, UNIT, STAGES, DEPTH, REVERSE)),
            (store_role, (targets, handover, outward, first_token, end_token, chunk, head, heads, value_dim,
                          first_column, count, C, N, S, R, SAYING, SAY, SAVE, PAIRS, REVERSE)),
        ], [4, 1, 1], [120, 40, 40])  # fmt: skip
    elif SAVE:
        gl.warp_specialize([
            (state_role, (inner, ready, free, handover, total, begins, ends, chunk, head, heads, starting, owner, unit,
                          count, value_dim, width, N, G, R, GIVING, K, DECAY, SOURCE, HAND, INITIAL, FINAL, FLOW, UNIT,
                          STAGES, PAIRS, REVERSE)),
            (load_role, (sources, inner, outer, ready, free, heard, answered, first_token, end_token, chunk,
                         source_column, given_column, head, heads, unit, count, C, N, S, G, R, SAYING, GIVING, K, DECAY,
                         SOURCE, SAY, UNIT, STAGES, DEPTH, REVERSE)),
            (store_role, (targets, handover, outward, first_token, end_token, chunk, head, heads, value_dim,
                          first_column, count, C, N, S, R, SAYING, SAY, SAVE, PAIRS, REVERSE)),
        ], [1, 1], [40, 40])  # fmt: skip
    else:
        gl.warp_specialize([
            (state_role, (inner, ready, free, handover, total, begins, ends, chunk, head, heads, starting, owner, unit,
                          count, value_dim, width, N, G, R, GIVING, K, DECAY, SOURCE, HAND, INITIAL, FINAL, FLOW, UNIT,
                          STAGES, PAIRS, REVERSE)),
            (load_role, (sources, inner, outer, ready, free, heard, answered, first_token, end_token, chunk,
                         source_column, given_column, head, heads, unit, count, C, N, S, G, R, SAYING, GIVING, K, DECAY,
                         SOURCE, SAY, UNIT, STAGES, DEPTH, REVERSE)),
        ], [1], [40])  # fmt: skip
