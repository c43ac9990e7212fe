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
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma_wait

from .primitives import unpack
from .pull_decays import from_start, kept, later, load_decays, sum_decays, sum_slopes, sum_tokens, to_end
from .pull_products import (
    early_rows,
    fetch_values,
    finish,
    late_rows,
    met,
    overlap_of,
    through,
    through_state,
)
from .rows import ring


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
def row_offsets(row, column, R: gl.constexpr, PLACES: gl.constexpr, HV: gl.constexpr, K: gl.constexpr):
    """Where a tile's rows lie in ``[tokens, R, HV, K]``, from its first token, own head and first channel on."""
    return (row // PLACES * R + row % PLACES)[:, None] * (HV * K) + column[None, :]


@gluon.jit(do_not_specialize=["time", "per_sequence", "tokens"])
def rows_pull_kernel(
    query, read, coefficients, write, lone_write, d_output, d_source, solution, given, entry_states, exit_gradients,
    read_coefficient, lone_rows, log_decay, floors, d_query, d_read, d_read_coefficient, d_write, d_lone, d_log_decay,
    table, time, per_sequence, tokens, scale,
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
    SCALAR: gl.constexpr = DECAY == 1
    # Pairs of one token: no decay comes between, so that they are added last; in tiles where there are several.
    APART: gl.constexpr = SCALAR and R > 1
    ALONE: gl.constexpr = DECAY > 0 and R == 1
    BEFORE: gl.constexpr = RAW and R > 0 and DECAY == 2
    # Readers are formed last, where dU was; reads that are no writes come there when dU is done with.
    LAST: gl.constexpr = R > 0 and (TIED or L == 0)
    FETCHED: gl.constexpr = R > 0 and L == 0 and not TIED
    tile = gl.program_id(0) % TILES
    flat = gl.program_id(0) // TILES
    if VECTOR:  # noqa: SIM102 - settled while compiling
        if gl.load(floors + flat) != WHOLE:
            return
    head = flat % HV
    first, length = locate_rows(flat // HV, table, time, per_sequence, C, PACKED)
    here = (first.to(gl.int64) * HV + head) * K + tile * 64  # of one row a token
    if VECTOR:
        decays = load_decays(log_decay + here, length, HV, K)
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
    read_tile = ring(read, 1) if R > 0 and not LAST else query_tile
    lone_tile = ring(lone_write, 1) if L > 0 else query_tile
    exponent_tile = gl.allocate_shared_memory(gl.float32, [64, 64], spread) if VECTOR else query_tile
    before_tile = gl.allocate_shared_memory(gl.float32, [64, 64], spread) if BEFORE else exponent_tile
    # Of vector decays e^m, in its place later what reaches the exit state.
    half_line = gl.allocate_shared_memory(gl.float32, [64], line) if VECTOR else query_tile
    # Of a scalar decay: sums up to queries, reads, writes and lone rows; later these rows' slopes.
    lines = gl.allocate_shared_memory(gl.float32, [8, 64], line) if SCALAR else half_line
    own_scores_tile = entry_tiles.index(PARTS - 1)
    own_gram_tile = exit_tiles.index(PARTS - 1)
    if APART and PARTS == 1:
        own_scores_tile = gl.allocate_shared_memory(dtype, [64, 64], entry_states.layout)
        own_gram_tile = gl.allocate_shared_memory(dtype, [64, 64], entry_states.layout)
    ready = gl.allocate_shared_memory(gl.int64, [3, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(3):
        mbarrier.init(ready.index(i), count=1)
    SIZE: gl.constexpr = 64 * 64 * 2
    # What is needed first comes first.
    query_column = head // (HV // H) * K + tile * 64
    read_column = head // (HV // READ_HEADS) * K + tile * 64
    write_column = head // (HV // WRITE_HEADS) * K + tile * 64
    lone_column = head // (HV // LONE_HEADS) * K + tile * 64
    mbarrier.expect(ready.index(0), SIZE * (1 + (R > 0) * (1 if LAST else 2) + (L > 0)))
    fetch_values(query, query_tile, ready.index(0), first, length, query_column, C, 1, 1)
    if R > 0:
        fetch_values(write, write_tile, ready.index(0), first, length, write_column, C, R, 1)
        if not LAST:
            fetch_values(read, read_tile, ready.index(0), first, length, read_column, C, R, 1)
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
    coefficient_column = head // (HV // READ_COEFFICIENT_HEADS) * K + tile * 64
    if VECTOR:
        sum_decays(decays, (exponent_tile, before_tile), half_line, BEFORE)
    if SCALAR:
        end = sum_tokens(log_decay, first, length, head, lines, 0, C, 1, HV, False)
        if R > 0:
            end = sum_tokens(log_decay, first, length, head, lines, 2, C, PLACES, HV, RAW)
            end = sum_tokens(log_decay, first, length, head, lines, 4, C, PLACES, HV, False)
        if L > 0:
            end = sum_tokens(log_decay, first, length, head, lines, 6, C, LONE_PLACES, HV, False)

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
    reads = (source_tiles if LAST else read_tile).index(0).reshape([64, 64])
    factors = solution_tiles.index(0).reshape([64, 64])
    lone = lone_tile.index(0).reshape([64, 64])
    weight = gl.zeros([64], gl.float32, by_row)
    if R > 0 and READ_KIND == 1:
        own = first.to(gl.int64) * (R * READ_COEFFICIENT_HEADS) + head // (HV // READ_COEFFICIENT_HEADS)
        at = (n_token * R + n_place) * READ_COEFFICIENT_HEADS
        weight = gl.load(read_coefficient + own + at, mask=n_there, other=0.0).to(gl.float32) * READ_SIGN
    mbarrier.wait(ready.index(0), 0)
    scales = gl.zeros([64], gl.float32, by_row) + scale
    late_rows(queries, queries, scales, factors, exponent_tile, layout, 1, 1, VECTOR)
    if R > 0 and not LAST:
        if VECTOR or READ_KIND == 1 or READ_SIGN == -1:
            late_rows(reads, reads, weight, factors, before_tile, layout, READ_KIND, READ_SIGN, VECTOR)
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
    if DECAY > 0:
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
        if L > 0:  # there are registers for one at a time
            scores = warpgroup_mma_wait(0, deps=(scores,))
        else:
            gram = met(source_tiles, solution_tiles, zero, PARTS)
            scores, gram = warpgroup_mma_wait(0, deps=(scores, gram))
        own = row[:, None] == early_token
        if ALONE:
            own_score = gl.sum(gl.where(own, scores, 0.0), 1)
        if APART:
            own_scores_tile.store(gl.where(own, scores, 0.0).to(dtype))
        keep = row[:, None] > early_token if DECAY > 0 else row[:, None] >= early_token
        scores_tile.store(kept(scores, keep, lines, 0, 4, by_row, by_column, SCALAR).to(dtype))
        if L > 0:
            gram = met(source_tiles, solution_tiles, zero, PARTS)
            gram = warpgroup_mma_wait(0, deps=(gram,))
        if APART and SEQUENTIAL:
            own = (n_token[:, None] == early_token) & (row[:, None] > column[None, :])
            own_gram_tile.store(gl.where(own, gram, 0.0).to(dtype))
        keep = row[:, None] > column[None, :] if SEQUENTIAL and not APART else n_token[:, None] > early_token
        gram_tile.store(kept(gram, keep, lines, 2, 4, by_row, by_column, SCALAR).to(dtype))
    if L > 0:
        late_token = (column // LONE_PLACES)[None, :]
        scores = met(output_tiles, given_tiles, zero, PARTS)
        scores = warpgroup_mma_wait(0, deps=(scores,))
        gl.thread_barrier()  # all warps are done with dO
        if R > 0:
            lone_scores_tile = output_tiles.index(0).reshape([64, 64])
        if DECAY > 0:
            own_lone_score = gl.sum(gl.where(row[:, None] == late_token, scores, 0.0), 1)
        keep = row[:, None] > late_token if DECAY > 0 else row[:, None] >= late_token
        lone_scores_tile.store(kept(scores, keep, lines, 0, 6, by_row, by_column, SCALAR).to(dtype))
        if R > 0:
            gram = met(source_tiles, given_tiles, zero, PARTS)
            gram = warpgroup_mma_wait(0, deps=(gram,))
            gl.thread_barrier()  # and with all rows of values
            lone_gram_tile = given_tiles.index(0).reshape([64, 64])
            keep = n_token[:, None] > late_token
            lone_gram_tile.store(kept(gram, keep, lines, 2, 6, by_row, by_column, SCALAR).to(dtype))
    else:
        gl.thread_barrier()
    if FETCHED:
        mbarrier.expect(ready.index(0), SIZE * (2 if READ_KIND == 2 else 1))
        fetch_values(read, source_tiles, ready.index(0), first, length, read_column, C, R, 1)
        if READ_KIND == 2:
            fetch_values(coefficients, solution_tiles, ready.index(0), first, length, coefficient_column, C, R, 1)
        mbarrier.wait(ready.index(0), 1)
    if LAST:
        if TIED:
            late_rows(writes, reads, weight, factors, before_tile, layout, READ_KIND, READ_SIGN, VECTOR)
        elif VECTOR or READ_KIND > 0 or READ_SIGN == -1:
            late_rows(reads, reads, weight, factors, before_tile, layout, READ_KIND, READ_SIGN, VECTOR)
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
        ends = gl.sum(ends, 0)
        half = half_line.load(by_column)
        half_line.store(gl.sum(overlap, 0))
        half_line.store(half_line.load(by_column) * (half * half) + ends)
    if SCALAR:
        dq = dq * from_start(lines, 0, by_row)
        ends = gl.sum(overlap, 0) * gl.exp2(end.to(gl.float32))
        reached = zero
        if R > 0:
            da = da * from_start(lines, 2, by_row)
            db = db * to_end(end, lines, 4, by_row)
            reached = unpack(writes.load(layout)) * db
        if L > 0:
            dl = dl * to_end(end, lines, 6, by_row)
            reached += unpack(lone.load(layout)) * dl
        ends = gl.sum(ends, 0) + gl.sum(gl.sum(reached, 1), 0)
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

    if SCALAR:
        lines.index(0).store(gl.sum(unpack(queries.load(layout)) * dq, 1))
        if R > 0:
            lines.index(2).store(gl.sum(unpack(reads.load(layout)) * da, 1))
            lines.index(4).store(gl.sum(unpack(writes.load(layout)) * db, 1))
        if L > 0:
            lines.index(6).store(gl.sum(unpack(lone.load(layout)) * dl, 1))
    if APART:
        dq = through(own_scores_tile, writes, dq)
        db = through(own_scores_tile.permute((1, 0)), queries, db)
        if SEQUENTIAL:
            da = through(own_gram_tile, writes, da)
            db = through(own_gram_tile.permute((1, 0)), reads, db)
            dq, da, db = warpgroup_mma_wait(0, deps=(dq, da, db))
        else:
            dq, db = warpgroup_mma_wait(0, deps=(dq, db))

    # results, of queries
    inside = (row < length)[:, None] & (column < 64)[None, :]
    m_inside = ((m_token < length) & (m_place < L))[:, None] & (column < 64)[None, :]
    n_inside = n_there[:, None] & (column < 64)[None, :]
    if VECTOR:
        if R > 0 and L > 0:  # there was no place left for these rows
            own = (first.to(gl.int64) * LONE_HEADS + head // (HV // LONE_HEADS)) * K + tile * 64
            at = row[:, None] * (LONE_HEADS * K) + column[None, :]
            lone_again = gl.load(lone_rows + own + at, mask=inside, other=0.0)
        slope = unpack(queries.load(layout)) * dq
        dq = dq * gl.exp2(exponent_tile.load(layout))
        mbarrier.wait(ready.index(0), 0 if FETCHED else 1)
    if ALONE:
        rows = (rows_again if VECTOR else write_tile).index(0).reshape([64, 64])
        dq += own_score[:, None] * unpack(rows.load(layout))
    if DECAY > 0 and L > 0:
        if SCALAR:
            rows = unpack(lone.load(layout))
        elif R > 0:
            rows = lone_again.to(gl.float32)
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
        if ALONE:
            if VECTOR:
                rows = unpack(queries_again.index(0).reshape([64, 64]).load(layout)) * scale
            else:
                rows = unpack(queries.load(layout))
            db += own_score[:, None] * rows
        if TIED:
            db += weight[:, None] * da
        gl.store(d_write + n_here + n_at, db.to(d_write.dtype.element_ty), mask=n_inside)
    if L > 0:
        if VECTOR:
            slope = slope - unpack(lone.load(layout)) * dl
            dl = dl * gl.exp2(0.0 - exponent_tile.load(layout))
        if DECAY > 0:
            if VECTOR:
                rows = unpack(queries_again.index(0).reshape([64, 64]).load(layout)) * scale
            else:
                rows = unpack(queries.load(layout))
            dl += own_lone_score[:, None] * rows
        at = row_offsets(row, column, L, LONE_PLACES, HV, K)
        m_here = ((first.to(gl.int64) * L) * HV + head) * K + tile * 64
        gl.store(d_lone + m_here + at, dl.to(d_lone.dtype.element_ty), mask=m_inside)
    if VECTOR:
        exponent_tile.store(slope)
        sum_slopes(d_log_decay + here, length, (exponent_tile, before_tile), half_line, HV, K, BEFORE)
    if SCALAR:
        sums = later(zero, lines, 0, row, column, by_column)
        if R > 0:
            n_column = column // PLACES
            sums = later(sums, lines, 2, row, n_column - 1 if RAW else n_column, by_column)
            sums = sums - later(zero, lines, 4, row, n_column, by_column)
        if L > 0:
            sums = sums - later(zero, lines, 6, row, column // LONE_PLACES, by_column)
        at = (tile.to(gl.int64) * tokens + first) * HV + head
        gl.store(d_log_decay + at + row * HV, gl.sum(sums, 1) + ends, mask=row < length)
