"""The arrays of ``kernels/rows/prepare.py`` in one launch, the inverse among them, for bfloat16 and float16.

One program serves one chunk and value head. Its rows come to shared memory by asynchronous copies, 64 channels at a
time. There a thread has two channels of a stretch of tokens, so that sums of decays along time are its own additions;
it scales the rows where they lie, for the products, and sends what meets the states straight to memory, whole lines at
a time. G goes from the products through shared memory into the inverse, which every warp computes alike.

Decays a channel are taken to the chunk's middle (factors.py), whatever they are; ``floors`` says where they are too
strong for it, and the portable kernels do those chunks over.
"""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from ..chunks import Chunks
from ..launch import ALIGNMENT, bind
from ..rows.layout import MIDDLE, VECTOR_DECAY, WHOLE, Factor, Layout, centred, heads_of
from ..rows.prepare import Prepared, of_factor, sizes, writes_are_given
from .prepare import add, power_of_two
from .rows_tiles import (
    LOG2_E,
    WARPS,
    allocate_tile,
    copy_tile,
    decayed,
    locate_chunk,
    of_product,
    own_rows,
    places,
    products,
    store_matrix,
    sums_of_families,
)
from .triangular import accumulators, allocate_diagonal, invert, right_transposed, store_diagonal, warps_along


@gluon.constexpr_function
def by_channel(rows):
    """[rows, 64]: two channels a lane, a stretch of rows a warp."""
    return gl.BlockedLayout([rows // WARPS, 2], [1, 32], [WARPS, 1], [1, 0])


@gluon.constexpr_function
def every_warp():
    """One block [1, 1, 16, 16] in every warp, as ``accumulators`` hold [1, 16, 16]."""
    return gl.DistributedLinearLayout(
        [[0, 0, 0, 1], [0, 0, 8, 0], [0, 0, 0, 8]],
        [[0, 0, 0, 2], [0, 0, 0, 4], [0, 0, 1, 0], [0, 0, 2, 0], [0, 0, 4, 0]],
        warps_along(0, 4, 1, WARPS), [], [1, 1, 16, 16],
    )  # fmt: skip


@gluon.jit
def store_tile(array, rows, first, length, head, start, COUNT: gl.constexpr, HV: gl.constexpr, K: gl.constexpr):
    """64 channels of rows to [tokens, COUNT, HV, K]."""
    layout: gl.constexpr = rows.type.layout
    base, offset, inside = own_rows(first, length, head, rows.shape[0], COUNT, HV, HV, gl.SliceLayout(1, layout))
    channel = gl.arange(0, rows.shape[1], gl.SliceLayout(0, layout))
    gl.store(array + base * K + start + offset[:, None] * K + channel[None, :], rows.to(array.dtype.element_ty),
             mask=inside[:, None] & (channel < K)[None, :])  # fmt: skip


@gluon.jit
def load_weights(coefficient, first, length, head, ROWS: gl.constexpr, COUNT: gl.constexpr, HV: gl.constexpr,
                 HEADS: gl.constexpr, layout: gl.constexpr):  # fmt: skip
    """One number a row, in float32."""
    base, offset, inside = own_rows(first, length, head, ROWS, COUNT, HV, HEADS, layout)
    return gl.load(coefficient + base + offset, mask=inside, other=0.0).to(gl.float32)


@gluon.jit
def to_end(end, sums, layout: gl.constexpr):
    """e^{end - sum} of each row."""
    high, low = sums
    end_high = end.to(gl.float32)
    end_low = (end - end_high.to(gl.float64)).to(gl.float32)
    return power_of_two((end_high - high.load(layout)) + (end_low - low.load(layout)))


@gluon.jit
def store_inverse(inverse, flat, g):
    """(I - G)^-1 of a strictly lower triangular G [64, 64]."""
    layout: gl.constexpr = accumulators(gl.num_warps())
    four: gl.constexpr = gl.SwizzledSharedLayout(8, 2, 2, [3, 2, 1, 0])
    blocks = gl.allocate_shared_memory(gl.float32, [4, 4, 16, 16], four)
    blocks.store(gl.permute(gl.reshape(g, [4, 16, 4, 16]), (0, 2, 1, 3)))
    diagonal = allocate_diagonal(1)
    below: gl.tuple = ()
    for r in gl.static_range(4):
        for c in gl.static_range(r + 1):
            block = blocks.slice(r, 1, 0).slice(c, 1, 1).load(every_warp())
            block = gl.convert_layout(gl.reshape(block, [1, 16, 16]), layout, assert_trivial=True)
            if c == r:
                store_diagonal(diagonal, -block, r, 1)
            else:
                below += (right_transposed(block, 1),)
    found = invert(diagonal, below, 1)
    whole = gl.allocate_shared_memory(inverse.dtype.element_ty, [4, 4, 16, 16],
                                      gl.SwizzledSharedLayout(1, 1, 1, [3, 2, 1, 0]))  # fmt: skip
    for r in gl.static_range(4):
        for c in gl.static_range(r + 1):
            block = gl.reshape(found[r * (r + 1) // 2 + c].to(inverse.dtype.element_ty), [1, 1, 16, 16])
            whole.slice(r, 1, 0).slice(c, 1, 1).store(block)
    lines: gl.constexpr = gl.BlockedLayout([1, 1, 1, 8], [1, 4, 4, 2], [gl.num_warps(), 1, 1, 1], [3, 1, 2, 0])
    r = gl.arange(0, 4, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, lines))))[:, None, None, None]
    c = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, lines))))[None, :, None, None]
    i = gl.arange(0, 16, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, lines))))[None, None, :, None]
    j = gl.arange(0, 16, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, lines))))[None, None, None, :]
    entries = whole.load(lines)
    entries = gl.where(c <= r, entries, gl.zeros_like(entries))
    gl.store(inverse + flat * 4096 + r * 1024 + c * 16 + i * 64 + j, entries)


@gluon.jit(do_not_specialize=["time", "per_sequence"])
def rows_gram_kernel(query, read, read_coefficient, write, lone_write, log_decay,
                     queries, reads, writes, lone, inverse, scores, lone_gram, lone_scores, total, floors,
                     table, time, per_sequence, scale,
                     C: gl.constexpr, R: gl.constexpr, L: gl.constexpr, N: gl.constexpr, M: gl.constexpr,
                     Q: gl.constexpr, H: gl.constexpr, HV: gl.constexpr, K: gl.constexpr, DECAY: gl.constexpr,
                     DECAY_BYTES: gl.constexpr, CENTRED: gl.constexpr, LOWER: gl.constexpr, RAW: gl.constexpr,
                     SEQUENTIAL: gl.constexpr, READ_HEADS: gl.constexpr, READ_KIND: gl.constexpr,
                     READ_COEFFICIENT_HEADS: gl.constexpr, READ_SIGN: gl.constexpr, WRITE_HEADS: gl.constexpr,
                     LONE_HEADS: gl.constexpr,
                     TIED: gl.constexpr, COPY: gl.constexpr, PACKED: gl.constexpr):  # fmt: skip
    """Readers, writers, pairs, inverse and total of one chunk and value head. TIED: reads are the write's vectors times
    a number a row. COPY: whether writes are stored; without decay they are the input."""
    KEY_TILES: gl.constexpr = K // 64
    dtype: gl.constexpr = query.dtype.element_ty
    flat = gl.program_id(0)
    chunk = flat // HV
    head = flat % HV
    first, length = locate_chunk(chunk, table, time, per_sequence, C, PACKED)
    flat = flat.to(gl.int64)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    q_tiles: gl.tuple = ()
    a_tiles: gl.tuple = ()
    b_tiles: gl.tuple = ()
    w_tiles: gl.tuple = ()
    d_tiles: gl.tuple = ()
    for i in gl.static_range(KEY_TILES):  # all on their way before the first is needed
        if DECAY == 2:
            d_tiles += (gl.allocate_shared_memory(log_decay.dtype.element_ty, [Q, 64], plain),)
            copy_tile(d_tiles[i], log_decay, first, length, head, 64 * i, 1, HV, HV, K, DECAY_BYTES)
        q_tiles += (allocate_tile(dtype, Q),)
        copy_tile(q_tiles[i], query, first, length, head, 64 * i, 1, HV, H, K, 2)
        if R > 0:
            b_tiles += (allocate_tile(dtype, N),)
            copy_tile(b_tiles[i], write, first, length, head, 64 * i, R, HV, WRITE_HEADS, K, 2)
            if not TIED:
                a_tiles += (allocate_tile(dtype, N),)
                copy_tile(a_tiles[i], read, first, length, head, 64 * i, R, HV, READ_HEADS, K, 2)
        if L > 0:
            w_tiles += (allocate_tile(dtype, M),)
            copy_tile(w_tiles[i], lone_write, first, length, head, 64 * i, L, HV, LONE_HEADS, K, 2)
        async_copy.commit_group()
    q_layout: gl.constexpr = by_channel(Q)
    if R > 0:
        n_layout: gl.constexpr = by_channel(N)
        n_rows: gl.constexpr = gl.SliceLayout(1, n_layout)
        if READ_KIND == 1:
            weights = load_weights(read_coefficient, first, length, head, N, R, HV, READ_COEFFICIENT_HEADS,
                                   gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))  # fmt: skip
            weight_table = gl.allocate_shared_memory(gl.float32, [N], gl.SwizzledSharedLayout(1, 1, 1, [0]))
            weight_table.store(weights * READ_SIGN)
    if L > 0:
        m_layout: gl.constexpr = by_channel(M)
    sums: gl.tuple = (None, None, None, None, None)
    if DECAY == 1:
        sums = sums_of_families(log_decay, first, length, head, R, L, N, M, Q, RAW, HV)
        gl.store(total + flat, power_of_two(sums[4].to(gl.float32)))
    if DECAY == 2:
        widest = gl.zeros([64], gl.float32, gl.SliceLayout(0, q_layout))
    for i in gl.static_range(KEY_TILES):
        async_copy.wait_group(KEY_TILES - 1 - i)
        gl.thread_barrier()
        if DECAY == 2:
            decays = d_tiles[i].load(q_layout).to(gl.float32)
            decays = gl.where(decays < -800.0, -800.0, decays) * LOG2_E
            grown = gl.associative_scan(decays, 0, add)
            whole = gl.sum(decays, 0)
            widest = gl.maximum(widest, -whole)  # NaN would be lost here, and stays in the sums
            channel = gl.arange(0, 64, gl.SliceLayout(0, q_layout))
            gl.store(total + flat * K + 64 * i + channel, power_of_two(whole))
            middle = 0.5 * whole[None, :]
            half = power_of_two(middle)
            exponent = grown - middle
            late = power_of_two(exponent)
        q = q_tiles[i].load(q_layout).to(gl.float32) * scale
        if DECAY == 2:
            q = q * late
            store_tile(queries, q * half, first, length, head, 64 * i, 1, HV, K)
        elif DECAY == 1:
            grown = power_of_two(sums[0][0].load(gl.SliceLayout(1, q_layout)))
            store_tile(queries, q * grown[:, None], first, length, head, 64 * i, 1, HV, K)
        else:
            store_tile(queries, q, first, length, head, 64 * i, 1, HV, K)
        q_tiles[i].store(q.to(dtype))
        if R > 0:
            b = b_tiles[i].load(n_layout).to(gl.float32)
            if TIED:
                a_tiles += (allocate_tile(dtype, N),)
                a = b
            else:
                a = a_tiles[i].load(n_layout).to(gl.float32)
            if READ_KIND == 1:
                a = a * weight_table.load(n_rows)[:, None]
            elif READ_KIND == 2:
                base, offset, inside = own_rows(first, length, head, N, R, HV, READ_COEFFICIENT_HEADS, n_rows)
                channel = gl.arange(0, 64, gl.SliceLayout(0, n_layout))
                place = read_coefficient + base * K + 64 * i + offset[:, None] * K + channel[None, :]
                inside = inside[:, None] & (channel < K)[None, :]
                a = a * (READ_SIGN * gl.load(place, mask=inside, other=0.0).to(gl.float32))
            elif READ_SIGN == -1:
                a = -a
            if DECAY == 2:
                a = a * power_of_two(exponent - decays) if RAW else a * late
                store_tile(reads, a * half, first, length, head, 64 * i, R, HV, K)
                b = b * power_of_two(-exponent)
                store_tile(writes, b * half, first, length, head, 64 * i, R, HV, K)
                b_tiles[i].store(b.to(dtype))
            elif DECAY == 1:
                grown = power_of_two(sums[1][0].load(n_rows))
                store_tile(reads, a * grown[:, None], first, length, head, 64 * i, R, HV, K)
                store_tile(writes, b * to_end(sums[4], sums[2], n_rows)[:, None], first, length, head, 64 * i, R, HV, K)
            else:
                store_tile(reads, a, first, length, head, 64 * i, R, HV, K)
                if COPY:
                    store_tile(writes, b, first, length, head, 64 * i, R, HV, K)
            a_tiles[i].store(a.to(dtype))
        if L > 0:
            w = w_tiles[i].load(m_layout).to(gl.float32)
            if DECAY == 2:
                w = w * power_of_two(-exponent)
                store_tile(lone, w * half, first, length, head, 64 * i, L, HV, K)
                w_tiles[i].store(w.to(dtype))
            elif DECAY == 1:
                w = w * to_end(sums[4], sums[3], gl.SliceLayout(1, m_layout))[:, None]
                store_tile(lone, w, first, length, head, 64 * i, L, HV, K)
            else:
                store_tile(lone, w, first, length, head, 64 * i, L, HV, K)
    if DECAY == 2:
        gl.store(floors + flat, gl.where(gl.max(widest, 0) <= CENTRED, C, LOWER))
    gl.thread_barrier()
    p_layout: gl.constexpr = of_product(Q)
    q_token, q_place = places(Q, 1, gl.SliceLayout(1, p_layout))
    if R > 0:
        column, column_place = places(N, R, gl.SliceLayout(0, p_layout))
        p = decayed(products(q_tiles, b_tiles, KEY_TILES), sums[0], sums[2], q_token[:, None] >= column[None, :], DECAY)
        store_matrix(scores, flat, p)
    if L > 0:
        column, column_place = places(M, L, gl.SliceLayout(0, p_layout))
        p = decayed(products(q_tiles, w_tiles, KEY_TILES), sums[0], sums[3], q_token[:, None] >= column[None, :], DECAY)
        store_matrix(lone_scores, flat, p)
    if R > 0:
        g_layout: gl.constexpr = of_product(N)
        row, row_place = places(N, R, gl.SliceLayout(1, g_layout))
        if L > 0:
            column, column_place = places(M, L, gl.SliceLayout(0, g_layout))
            g = decayed(products(a_tiles, w_tiles, KEY_TILES), sums[1], sums[3], row[:, None] > column[None, :], DECAY)
            store_matrix(lone_gram, flat, g)
        column, column_place = places(N, R, gl.SliceLayout(0, g_layout))
        keep = row[:, None] > column[None, :]
        if SEQUENTIAL:
            keep = keep | ((row[:, None] == column[None, :]) & (row_place[:, None] > column_place[None, :]))
        g = decayed(products(a_tiles, b_tiles, KEY_TILES), sums[1], sums[2], keep, DECAY)
        store_inverse(inverse, flat, g)


def fits(layout: Layout, query: Tensor, read: Factor | None, write: Tensor | None, lone_write: Tensor | None,
         log_decay: Tensor | None) -> bool:  # fmt: skip
    """Whether this kernel serves these rows, of a problem that Hopper's scans serve."""
    copied = [query, None if read is None else read.vector, write, lone_write]
    if layout.decay == VECTOR_DECAY:
        copied.append(log_decay)
    return (
        layout.N in (0, WHOLE)
        and (layout.decay != VECTOR_DECAY or max(layout.R, layout.L) == 1)
        and all(tensor is None or tensor.data_ptr() % ALIGNMENT == 0 for tensor in copied)
    )


def launch(query: Tensor, read: Factor | None, write: Tensor | None, lone_write: Tensor | None,
           log_decay: Tensor | None, found: Prepared, layout: Layout, chunks: Chunks,
           scale: float) -> None:  # fmt: skip
    """Fills the arrays of ``found``, and says in ``floors`` which chunks have decays too strong for it."""
    tied = read is not None and read.vector is write and read.kind == 1
    vector, coefficient = (None, None) if read is None else (read.vector, read.coefficient)
    bound = bind(
        rows_gram_kernel, **sizes(layout), H=layout.heads, HV=layout.value_heads, K=layout.K, DECAY=layout.decay,
        DECAY_BYTES=4 if log_decay is None else log_decay.element_size(), CENTRED=centred(query.dtype), LOWER=MIDDLE,
        RAW=layout.raw, SEQUENTIAL=layout.sequential, **of_factor("READ", read), WRITE_HEADS=heads_of(write),
        LONE_HEADS=heads_of(lone_write), TIED=tied, COPY=not writes_are_given(layout, write), PACKED=chunks.packed,
        num_warps=WARPS)  # fmt: skip
    bound(chunks.count * layout.value_heads, query, vector, coefficient, write, lone_write, log_decay, *found,
          chunks.table, chunks.time, chunks.per_sequence, scale)  # fmt: skip
