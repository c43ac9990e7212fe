"""The gradients of the rows and of the decays on Hopper: ``kernels/rows/pull.py`` and ``pairs.py`` in one launch.

A program takes 64 key channels of one chunk and value head. All that it reads is on its way (TMA) before it does
anything, and another program on the same multiprocessor computes meanwhile; so there are no roles. Every family's rows
lie in a tile of 64, those that a chunk lacks are zero. In order:

    decays     sums from the chunk's middle, in shared memory, while the copies arrive
    operands   readers e^{c - m}, writers e^{m - c}, rounded, to where the rows were
    states     dO S, dU S, X E, u E, each into the accumulators of what it is part of; the sum of S E
    pairs      dO X^T, dU X^T, dO u^T, dU u^T, masked and rounded, to where S, E and rows of values were
    products   pairs times operands, onto the accumulators
    results    slopes, the rows' own factors, pairs of one token; then sums of slopes over later tokens
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

from .primitives import opaque, unpack
from .rows import fetch_rows, ring


@gluon.jit
def add(x, y):
    return x + y


@gluon.jit
def locate_rows(chunk, table, time, per_sequence, C: gl.constexpr, PACKED: gl.constexpr):
    """First token, counted from the start of the batch, and number of tokens of a chunk."""
    if PACKED:
        first = gl.load(table + 2 * chunk)
        length = gl.load(table + 2 * chunk + 1)
    else:
        sequence = chunk // per_sequence
        step = (chunk - sequence * per_sequence) * C
        first = sequence * time + step
        length = gl.minimum(time - step, C)
    return first, length


@gluon.jit
def fetch_values(descriptor, tiles, ready, first, length, column, C: gl.constexpr, COUNT: gl.constexpr,
                 PARTS: gl.constexpr):  # fmt: skip
    """A chunk's rows, 64 columns a tile."""
    for p in gl.static_range(PARTS):
        fetch_rows(descriptor, tiles.index(p), ready, first, first + length, 0, column + p * 64, C, COUNT, 64)


@gluon.jit
def through_state(rows, state, zero, PARTS: gl.constexpr):
    """Begin rows of values times a transposed state."""
    total = zero
    for p in gl.static_range(PARTS):
        total = warpgroup_mma(rows.index(p).reshape([64, 64]), state.index(p), total, use_acc=p > 0, is_async=True)
    return total


@gluon.jit
def met(late, early, zero, PARTS: gl.constexpr):
    """Begin rows of values times the transpose of others."""
    total = zero
    for p in gl.static_range(PARTS):
        others = early.index(p).reshape([64, 64]).permute((1, 0))
        total = warpgroup_mma(late.index(p).reshape([64, 64]), others, total, use_acc=p > 0, is_async=True)
    return total


@gluon.jit
def through(pairs, operand, total):
    """Begin ``total + pairs operand``."""
    return warpgroup_mma(pairs, operand, total, is_async=True)


@gluon.jit
def finish(dq, da, db, dl, R: gl.constexpr, L: gl.constexpr):
    """Wait for all products; of a family that there is none of, what is given."""
    if R > 0 and L > 0:
        dq, da, db, dl = warpgroup_mma_wait(0, deps=(dq, da, db, dl))
    elif R > 0:
        dq, da, db = warpgroup_mma_wait(0, deps=(dq, da, db))
    else:
        dq, dl = warpgroup_mma_wait(0, deps=(dq, dl))
    return dq, da, db, dl


@gluon.jit
def early_rows(tile, exponents, layout: gl.constexpr):
    """Writers at the chunk's middle take the rows' place."""
    factor = gl.exp2(0.0 - exponents.load(layout))
    tile.store((unpack(tile.load(layout)) * factor).to(tile.dtype))


@gluon.jit
def late_rows(tile, target, weight, exponents, layout: gl.constexpr, KIND: gl.constexpr, SIGN: gl.constexpr,
              VECTOR: gl.constexpr):  # fmt: skip
    """Readers at the chunk's middle, with their sign and weight."""
    rows = unpack(tile.load(layout))
    if KIND == 1:
        rows = rows * weight[:, None]
    elif SIGN == -1:
        rows = rows * -1.0
    if VECTOR:
        rows = rows * gl.exp2(exponents.load(layout))
    target.store(rows.to(target.dtype))


@gluon.jit
def overlap_of(entry_tiles, exit_tiles, PARTS: gl.constexpr):
    """The sum over the values of S E, once a channel, 16 rows still to be added."""
    flat: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    total = gl.zeros([64, 64], gl.float32, flat)
    for p in gl.static_range(PARTS):
        total += unpack(entry_tiles.index(p).load(flat)) * unpack(exit_tiles.index(p).load(flat))
    return gl.sum(gl.reshape(total, [4, 16, 64]), 0)  # in each thread


@gluon.jit
def row_offsets(row, column, R: gl.constexpr, PLACES: gl.constexpr, HV: gl.constexpr, K: gl.constexpr):
    """Where a tile's rows lie in ``[tokens, R, HV, K]``, from its first token, own head and first channel on."""
    return (row // PLACES * R + row % PLACES)[:, None] * (HV * K) + column[None, :]


@gluon.jit
def sum_decays(log_decay, length, tiles, half_line, HV: gl.constexpr, K: gl.constexpr, RAW: gl.constexpr):
    """c_t - m of every token and channel, with m half the chunk's sum, in units of log 2; RAW: also c_{t-1} - m. ``half_line``
    gets e^m. The sums are at most 144 in bfloat16 and 6 in float16 here (``layout.centred``), so that a
    difference loses less than a rounding to 16 bits."""
    down: gl.constexpr = gl.BlockedLayout([32, 1], [1, 32], [2, 2], [1, 0])
    token = gl.arange(0, 64, gl.SliceLayout(1, down))
    channel = gl.arange(0, 64, gl.SliceLayout(0, down))
    inside = (token < length)[:, None] & (channel < 64)[None, :]
    at = token[:, None] * (HV * K) + channel[None, :]
    decays = gl.load(log_decay + at, mask=inside, other=0.0).to(gl.float32)
    decays = gl.where(decays < -800.0, -800.0, decays) * 1.4426950408889634
    middle = gl.sum(decays, 0) * 0.5
    sums = gl.associative_scan(decays, 0, add) - middle[None, :]
    exponents, before = tiles
    exponents.store(sums)
    if RAW:
        before.store(sums - decays)
    half_line.store(gl.exp2(middle))


@gluon.jit
def sum_slopes(d_log_decay, length, tiles, ends_line, HV: gl.constexpr, K: gl.constexpr, RAW: gl.constexpr):
    """A token's log-decay gets the slopes of those from it on, of raw reads from the next one on, and what reaches the
    exit state."""
    down: gl.constexpr = gl.BlockedLayout([32, 1], [1, 32], [2, 2], [1, 0])
    across: gl.constexpr = gl.SliceLayout(0, down)
    token = gl.arange(0, 64, gl.SliceLayout(1, down))
    channel = gl.arange(0, 64, across)
    slopes, late = tiles
    found = slopes.load(down)
    sums = (ends_line.load(across) + gl.sum(found, 0))[None, :] + (found - gl.associative_scan(found, 0, add))
    if RAW:
        sums = sums - late.load(down)
    length = opaque(length)
    inside = (token < length)[:, None] & (channel < 64)[None, :]
    at = token[:, None] * opaque(length * 0 + HV * K) + channel[None, :]
    gl.store(d_log_decay + at, sums, mask=inside)


@gluon.jit(do_not_specialize=["time", "per_sequence", "tokens"])
def pull_kernel(
    query, read, write, lone_write, d_output, d_source, solution, given, entry_states, exit_gradients,
    read_coefficient, lone_rows, log_decay, floors, d_query, d_read, d_read_coefficient,
    d_write, d_lone, d_log_decay, table, time, per_sequence, tokens, scale,
    C: gl.constexpr, R: gl.constexpr, L: gl.constexpr, H: gl.constexpr, HV: gl.constexpr, K: gl.constexpr,
    V: gl.constexpr, DECAY: gl.constexpr, RAW: gl.constexpr, SEQUENTIAL: gl.constexpr, READ_HEADS: gl.constexpr,
    READ_KIND: gl.constexpr, READ_COEFFICIENT_HEADS: gl.constexpr, READ_SIGN: gl.constexpr, WRITE_HEADS: gl.constexpr,
    LONE_HEADS: gl.constexpr, GIVEN_HEADS: gl.constexpr, TIED: gl.constexpr, PACKED: gl.constexpr,
    WHOLE: gl.constexpr, PLACES: gl.constexpr, LONE_PLACES: gl.constexpr,
):  # fmt: skip
    """Gradients of 64 key channels; of a tied coefficient that tile's part.  PLACES: a token has in a tile; R or L of
    them are there."""
    TILES: gl.constexpr = K // 64
    PARTS: gl.constexpr = V // 64
    VECTOR: gl.constexpr = DECAY == 2
    BEFORE: gl.constexpr = RAW and R > 0 and DECAY == 2
    tile = gl.program_id(0) % TILES
    flat = gl.program_id(0) // TILES
    if VECTOR:  # noqa: SIM102 - settled while compiling
        if gl.load(floors + flat) != WHOLE:
            return
    head = flat % HV
    first, length = locate_rows(flat // HV, table, time, per_sequence, C, PACKED)
    dtype: gl.constexpr = query.dtype
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    by_row: gl.constexpr = gl.SliceLayout(1, layout)
    by_column: gl.constexpr = gl.SliceLayout(0, layout)
    spread: gl.constexpr = gl.SwizzledSharedLayout(vec=8, per_phase=1, max_phase=8, order=[1, 0])
    line: gl.constexpr = gl.SwizzledSharedLayout(vec=1, per_phase=1, max_phase=1, order=[0])

    entry_tiles = ring(entry_states, PARTS)
    exit_tiles = ring(exit_gradients, PARTS)
    output_tiles = ring(d_output, PARTS)
    query_tile = ring(query, 1)
    # What is not there has another's place, and is not looked at.
    source_tiles = ring(d_source, PARTS) if R > 0 else output_tiles
    solution_tiles = ring(solution, PARTS) if R > 0 else output_tiles
    given_tiles = ring(given, PARTS) if L > 0 else output_tiles
    write_tile = ring(write, 1) if R > 0 else query_tile
    read_tile = ring(read, 1) if R > 0 and not TIED else query_tile
    lone_tile = ring(lone_write, 1) if L > 0 else query_tile
    exponent_tile = gl.allocate_shared_memory(gl.float32, [64, 64], spread) if VECTOR else query_tile
    before_tile = gl.allocate_shared_memory(gl.float32, [64, 64], spread) if BEFORE else exponent_tile
    half_line = gl.allocate_shared_memory(gl.float32, [64], line) if VECTOR else query_tile
    ready = gl.allocate_shared_memory(gl.int64, [3, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(3):
        mbarrier.init(ready.index(i), count=1)
    SIZE: gl.constexpr = 64 * 64 * 2
    # What is needed first comes first.
    query_column = head // (HV // H) * K + tile * 64
    write_column = head // (HV // WRITE_HEADS) * K + tile * 64
    lone_column = head // (HV // LONE_HEADS) * K + tile * 64
    mbarrier.expect(ready.index(0), SIZE * (1 + (R > 0) * (1 if TIED else 2) + (L > 0)))
    fetch_values(query, query_tile, ready.index(0), first, length, query_column, C, 1, 1)
    if R > 0:
        fetch_values(write, write_tile, ready.index(0), first, length, write_column, C, R, 1)
        if not TIED:
            column = head // (HV // READ_HEADS) * K + tile * 64
            fetch_values(read, read_tile, ready.index(0), first, length, column, C, R, 1)
    if L > 0:
        fetch_values(lone_write, lone_tile, ready.index(0), first, length, lone_column, C, L, 1)
    mbarrier.expect(ready.index(1), SIZE * PARTS * 2)
    for p in gl.static_range(PARTS):
        at = [flat * V + p * 64, tile * 64]
        tma.async_copy_global_to_shared(entry_states, at, ready.index(1), entry_tiles.index(p))
        tma.async_copy_global_to_shared(exit_gradients, at, ready.index(1), exit_tiles.index(p))
    mbarrier.expect(ready.index(2), SIZE * PARTS * (1 + 2 * (R > 0) + (L > 0)))
    fetch_values(d_output, output_tiles, ready.index(2), first, length, head * V, C, 1, PARTS)
    if R > 0:
        fetch_values(d_source, source_tiles, ready.index(2), first, length, head * V, C, R, PARTS)
        fetch_values(solution, solution_tiles, ready.index(2), first, length, head * V, C, R, PARTS)
    if L > 0:
        column = head // (HV // GIVEN_HEADS) * V
        fetch_values(given, given_tiles, ready.index(2), first, length, column, C, L, PARTS)
    here = (first.to(gl.int64) * HV + head) * K + tile * 64  # of one row a token
    if VECTOR:
        sum_decays(log_decay + here, length, (exponent_tile, before_tile), half_line, HV, K, BEFORE)

    # operands
    zero = gl.zeros([64, 64], gl.float32, layout)
    row = gl.arange(0, 64, by_row)
    column = gl.arange(0, 64, by_column)
    n_token = row // PLACES
    n_place = row % PLACES
    m_token = row // LONE_PLACES
    m_place = row % LONE_PLACES
    n_there = (n_token < length) & (n_place < R)
    queries = query_tile.index(0).reshape([64, 64])
    writes = write_tile.index(0).reshape([64, 64])
    reads = (source_tiles if TIED else read_tile).index(0).reshape([64, 64])
    lone = lone_tile.index(0).reshape([64, 64])
    weight = gl.zeros([64], gl.float32, by_row)
    if R > 0 and READ_KIND == 1:
        at = ((first + n_token) * R + n_place) * READ_COEFFICIENT_HEADS + head // (HV // READ_COEFFICIENT_HEADS)
        weight = gl.load(read_coefficient + at, mask=n_there, other=0.0).to(gl.float32) * READ_SIGN
    mbarrier.wait(ready.index(0), 0)
    late_rows(queries, queries, gl.zeros([64], gl.float32, by_row) + scale, exponent_tile, layout, 1, 1, VECTOR)
    if R > 0 and not TIED:
        if VECTOR or READ_KIND == 1 or READ_SIGN == -1:
            late_rows(reads, reads, weight, before_tile, layout, READ_KIND, READ_SIGN, VECTOR)
        if VECTOR:
            early_rows(writes, exponent_tile, layout)
    if L > 0 and VECTOR:
        early_rows(lone, exponent_tile, layout)

    # states
    mbarrier.wait(ready.index(1), 0)
    mbarrier.wait(ready.index(2), 0)
    dq = through_state(output_tiles, entry_tiles, zero, PARTS)
    da = zero
    db = zero
    dl = zero
    if R > 0:
        da = through_state(source_tiles, entry_tiles, zero, PARTS)
        db = through_state(solution_tiles, exit_tiles, zero, PARTS)
    if L > 0:
        dl = through_state(given_tiles, exit_tiles, zero, PARTS)
    if VECTOR:
        overlap = overlap_of(entry_tiles, exit_tiles, PARTS)
    dq, da, db, dl = finish(dq, da, db, dl, R, L)
    gl.thread_barrier()  # all warps are done with S and E

    # pairs
    early_token = (column // PLACES)[None, :]
    scores_tile = entry_tiles.index(0)
    gram_tile = exit_tiles.index(0)
    lone_scores_tile = entry_tiles.index(0)
    lone_gram_tile = exit_tiles.index(0)
    if R > 0:
        scores = met(output_tiles, solution_tiles, zero, PARTS)
        gram = met(source_tiles, solution_tiles, zero, PARTS)
        scores, gram = warpgroup_mma_wait(0, deps=(scores, gram))
        if VECTOR:  # pairs of one token are added last
            own_score = gl.sum(gl.where(row[:, None] == early_token, scores, 0.0), 1)
            scores = gl.where(row[:, None] > early_token, scores, 0.0)
        else:
            scores = gl.where(row[:, None] >= early_token, scores, 0.0)
        if SEQUENTIAL:
            gram = gl.where(row[:, None] > column[None, :], gram, 0.0)
        else:
            gram = gl.where(n_token[:, None] > early_token, gram, 0.0)
        scores_tile.store(scores.to(dtype))
        gram_tile.store(gram.to(dtype))
    if L > 0:
        late_token = (column // LONE_PLACES)[None, :]
        scores = met(output_tiles, given_tiles, zero, PARTS)
        if R > 0:
            gram = met(source_tiles, given_tiles, zero, PARTS)
            scores, gram = warpgroup_mma_wait(0, deps=(scores, gram))
            gram = gl.where(n_token[:, None] > late_token, gram, 0.0)
            gl.thread_barrier()  # all warps are done with the rows of values
            lone_scores_tile = output_tiles.index(0).reshape([64, 64])
            lone_gram_tile = given_tiles.index(0).reshape([64, 64])
            lone_gram_tile.store(gram.to(dtype))
        else:
            scores = warpgroup_mma_wait(0, deps=(scores,))
            gl.thread_barrier()
        if VECTOR:
            own_lone_score = gl.sum(gl.where(row[:, None] == late_token, scores, 0.0), 1)
            scores = gl.where(row[:, None] > late_token, scores, 0.0)
        else:
            scores = gl.where(row[:, None] >= late_token, scores, 0.0)
        lone_scores_tile.store(scores.to(dtype))
    else:
        gl.thread_barrier()
    if TIED:
        late_rows(writes, reads, weight, before_tile, layout, READ_KIND, READ_SIGN, VECTOR)
        if VECTOR:
            early_rows(writes, exponent_tile, layout)
    if VECTOR:
        half = half_line.load(by_column)[None, :]
        dq = dq * half
        ends = zero
        if R > 0:
            da = da * half
            db = db * half
            ends = unpack(writes.load(layout)) * db
        if L > 0:
            dl = dl * half
            ends += unpack(lone.load(layout)) * dl
        ends_line = gl.allocate_shared_memory(gl.float32, [64], line)
        ends_line.store(gl.sum(overlap, 0))
        half = half_line.load(by_column)
        ends_line.store(ends_line.load(by_column) * (half * half) + gl.sum(ends, 0))
    fence_async_shared()
    gl.thread_barrier()
    if VECTOR:  # the rows as they came, to where the rows of values were
        queries_again = ring(query, 1)
        mbarrier.expect(ready.index(0), SIZE * 2)
        fetch_values(query, queries_again, ready.index(0), first, length, query_column, C, 1, 1)
        if R > 0:
            rows_again = ring(write, 1)
            fetch_values(write, rows_again, ready.index(0), first, length, write_column, C, R, 1)
        else:
            rows_again = ring(lone_write, 1)
            fetch_values(lone_write, rows_again, ready.index(0), first, length, lone_column, C, L, 1)

    # products
    if R > 0:
        dq = through(scores_tile, writes, dq)
        da = through(gram_tile, writes, da)
        db = through(scores_tile.permute((1, 0)), queries, db)
        db = through(gram_tile.permute((1, 0)), reads, db)
    if L > 0:
        dq = through(lone_scores_tile, lone, dq)
        dl = through(lone_scores_tile.permute((1, 0)), queries, dl)
        if R > 0:
            da = through(lone_gram_tile, lone, da)
            dl = through(lone_gram_tile.permute((1, 0)), reads, dl)
    dq, da, db, dl = finish(dq, da, db, dl, R, L)

    # results, of queries
    inside = (row < length)[:, None] & (column < 64)[None, :]
    m_inside = ((m_token < length) & (m_place < L))[:, None] & (column < 64)[None, :]
    n_inside = n_there[:, None] & (column < 64)[None, :]
    if VECTOR:
        mbarrier.wait(ready.index(0), 1)
        slope = unpack(queries.load(layout)) * dq
        dq = dq * gl.exp2(exponent_tile.load(layout))
        if R > 0:
            dq += own_score[:, None] * unpack(rows_again.index(0).reshape([64, 64]).load(layout))
        if L > 0:
            if R > 0:
                own = (first.to(gl.int64) * LONE_HEADS + head // (HV // LONE_HEADS)) * K + tile * 64
                at = row[:, None] * (LONE_HEADS * K) + column[None, :]
                rows = gl.load(lone_rows + own + at, mask=inside, other=0.0).to(gl.float32)
            else:
                rows = unpack(rows_again.index(0).reshape([64, 64]).load(layout))
            dq += own_lone_score[:, None] * rows
    at = row[:, None] * (HV * K) + column[None, :]
    gl.store(d_query + here + at, (dq * scale).to(d_query.dtype.element_ty), mask=inside)
    if R > 0:  # of reads, then of writes
        n_at = row_offsets(row, column, R, PLACES, HV, K)
        n_here = ((first.to(gl.int64) * R) * HV + head) * K + tile * 64
        if VECTOR:
            a_slope = unpack(reads.load(layout)) * da
            slope += a_slope
            da = da * gl.exp2(before_tile.load(layout))
            if BEFORE:
                before_tile.store(a_slope)
        if TIED:
            rows = unpack((rows_again if VECTOR else write_tile).index(0).reshape([64, 64]).load(layout))
            at = (n_token * R + n_place) * HV
            base = (tile.to(gl.int64) * tokens + first) * R * HV + head
            gl.store(d_read_coefficient + base + at, READ_SIGN * gl.sum(rows * da, 1), mask=n_there)
        else:
            gl.store(d_read + n_here + n_at, da.to(d_read.dtype.element_ty), mask=n_inside)
        if VECTOR:
            slope = slope - unpack(writes.load(layout)) * db
            db = db * gl.exp2(0.0 - exponent_tile.load(layout))
            rows = unpack(queries_again.index(0).reshape([64, 64]).load(layout))
            db += (own_score * scale)[:, None] * rows
        if TIED:
            db += weight[:, None] * da
        gl.store(d_write + n_here + n_at, db.to(d_write.dtype.element_ty), mask=n_inside)
    if L > 0:
        if VECTOR:
            slope = slope - unpack(lone.load(layout)) * dl
            dl = dl * gl.exp2(0.0 - exponent_tile.load(layout))
            rows = unpack(queries_again.index(0).reshape([64, 64]).load(layout))
            dl += (own_lone_score * scale)[:, None] * rows
        at = row_offsets(row, column, L, LONE_PLACES, HV, K)
        m_here = ((first.to(gl.int64) * L) * HV + head) * K + tile * 64
        gl.store(d_lone + m_here + at, dl.to(d_lone.dtype.element_ty), mask=m_inside)
    if VECTOR:
        exponent_tile.store(slope)
        sum_slopes(d_log_decay + here, length, (exponent_tile, before_tile), ends_line, HV, K, BEFORE)
