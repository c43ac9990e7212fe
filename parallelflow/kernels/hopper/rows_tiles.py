"""Tiles of rows on Hopper for the stages of all chunks at once: where rows lie, copies of 64 channels to shared memory,
all pairs of two families' rows, and the decay between their tokens where it is a scalar."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from .prepare import add, power_of_two

WARPS = 4  # of a program
LOG2_E = gl.constexpr(1.4426950408889634)


@gluon.constexpr_function
def padded(count):
    """Places of a token with so many rows: the next power of two."""
    return 1 << (count - 1).bit_length()


@gluon.constexpr_function
def by_line(columns, element):
    """Columns of elements of so many bytes, 16 bytes a lane."""
    lanes = min(columns * element // 16, 32)
    return gl.BlockedLayout([1, 16 // element], [32 // lanes, lanes], [WARPS, 1], [1, 0])


@gluon.constexpr_function
def of_product(rows):
    """Accumulators of a product with so many rows."""
    down = min(rows // 16, WARPS)
    return gl.NVMMADistributedLayout([2, 0], [down, WARPS // down], [16, 8])


@gluon.jit
def locate_chunk(chunk, table, time, per_sequence, C: gl.constexpr, PACKED: gl.constexpr):
    """First token and number of tokens of a chunk."""
    if PACKED:
        first = gl.load(table + 2 * chunk).to(gl.int64)
        length = gl.load(table + 2 * chunk + 1)
    else:
        sequence = chunk // per_sequence
        before = (chunk - sequence * per_sequence) * C
        first = sequence.to(gl.int64) * time + before
        length = gl.minimum(time - before, C)
    return first, length


@gluon.jit
def allocate_tile(dtype: gl.constexpr, ROWS: gl.constexpr):
    """Shared memory for 64 channels of 16-bit rows, as products read them."""
    return gl.allocate_shared_memory(dtype, [ROWS, 64], gl.SwizzledSharedLayout(8, 1, 8, [1, 0]))


@gluon.jit
def places(ROWS: gl.constexpr, COUNT: gl.constexpr, layout: gl.constexpr):
    """Token and place of each row of a tile."""
    row = gl.arange(0, ROWS, layout)
    return row // padded(COUNT), row % padded(COUNT)


@gluon.jit
def own_rows(first, length, head, ROWS: gl.constexpr, COUNT: gl.constexpr, HV: gl.constexpr, HEADS: gl.constexpr,
             layout: gl.constexpr):  # fmt: skip
    """Where in [tokens, COUNT, HEADS] a value head's rows of a chunk lie: a base, offsets, and which there are."""
    token, place = places(ROWS, COUNT, layout)
    base = first * (COUNT * HEADS) + head // (HV // HEADS)
    return base, (token * COUNT + place) * HEADS, (token < length) & (place < COUNT)


@gluon.jit
def copy_tile(tile, array, first, length, head, start, COUNT: gl.constexpr, HV: gl.constexpr, HEADS: gl.constexpr,
              K: gl.constexpr, BYTES: gl.constexpr):  # fmt: skip
    """Begin to copy 64 channels of a value head's rows to shared memory, 0 where there are none."""
    layout: gl.constexpr = by_line(tile.shape[1], BYTES)
    base, offset, inside = own_rows(first, length, head, tile.shape[0], COUNT, HV, HEADS, gl.SliceLayout(1, layout))
    channel = gl.arange(0, tile.shape[1], gl.SliceLayout(0, layout))
    async_copy.async_copy_global_to_shared(
        tile, array + base * K + start + offset[:, None] * K + channel[None, :],
        inside[:, None] & (channel < K)[None, :])  # fmt: skip


@gluon.jit
def store_matrix(array, flat, matrix):
    """A chunk's matrix, in the array's dtype."""
    rows: gl.constexpr = matrix.shape[0]
    columns: gl.constexpr = matrix.shape[1]
    layout: gl.constexpr = by_line(columns, 2)
    matrix = gl.convert_layout(matrix.to(array.dtype.element_ty), layout)
    row = gl.arange(0, rows, gl.SliceLayout(1, layout))
    column = gl.arange(0, columns, gl.SliceLayout(0, layout))
    gl.store(array + flat * (rows * columns) + row[:, None] * columns + column[None, :], matrix)


@gluon.jit
def token_sums(log_decay, first, length, head, ROWS: gl.constexpr, COUNT: gl.constexpr, EXCLUSIVE: gl.constexpr,
               HV: gl.constexpr):  # fmt: skip
    """Sums of scalar decays up to each row's token, in units of log 2, as two float32 numbers in shared memory, and the
    sum of all in float64."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    token, place = places(ROWS, COUNT, layout)
    array = log_decay + first * HV + head
    step = gl.load(array + token * HV, mask=(place == 0) & (token < length), other=0.0).to(gl.float64)
    step = gl.where(step < -800.0, -800.0, step) * LOG2_E
    sums = gl.associative_scan(step, 0, add)
    end = gl.sum(step, 0)
    if EXCLUSIVE:
        own = gl.load(array + token * HV, mask=token < length, other=0.0).to(gl.float64)
        sums = sums - gl.where(own < -800.0, -800.0, own) * LOG2_E
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    high = gl.allocate_shared_memory(gl.float32, [ROWS], flat)
    low = gl.allocate_shared_memory(gl.float32, [ROWS], flat)
    rounded = sums.to(gl.float32)
    high.store(rounded)
    low.store((sums - rounded.to(gl.float64)).to(gl.float32))
    return (high, low), end


@gluon.jit
def sums_of_families(log_decay, first, length, head, R: gl.constexpr, L: gl.constexpr, N: gl.constexpr, M: gl.constexpr,
                     Q: gl.constexpr, RAW: gl.constexpr, HV: gl.constexpr):  # fmt: skip
    """``token_sums`` of queries, reads, writes and lone rows, and the sum of all."""
    q_sums, end = token_sums(log_decay, first, length, head, Q, 1, False, HV)
    a_sums, b_sums, w_sums = q_sums, q_sums, q_sums
    if R > 0:
        b_sums, _ = token_sums(log_decay, first, length, head, N, R, False, HV)
        a_sums = b_sums
        if RAW:
            a_sums, _ = token_sums(log_decay, first, length, head, N, R, True, HV)
    if L > 0:
        w_sums, _ = token_sums(log_decay, first, length, head, M, L, False, HV)
    return q_sums, a_sums, b_sums, w_sums, end


@gluon.jit
def decayed(pairs, late, early, keep, DECAY: gl.constexpr):
    """Pairs where ``keep``, times the decay between their tokens if that is a scalar."""
    if DECAY == 1:
        layout: gl.constexpr = pairs.type.layout
        late_high, late_low = late
        early_high, early_low = early
        exponent = (
            late_high.load(gl.SliceLayout(1, layout))[:, None] - early_high.load(gl.SliceLayout(0, layout))[None, :]
        ) + (late_low.load(gl.SliceLayout(1, layout))[:, None] - early_low.load(gl.SliceLayout(0, layout))[None, :])
        pairs = pairs * power_of_two(gl.where(keep, exponent, 0.0))
    return gl.where(keep, pairs, 0.0)


@gluon.jit
def products(late, early, KEY_TILES: gl.constexpr):
    """All pairs of two families' rows, tiles of 64 channels each."""
    shape: gl.constexpr = [late[0].shape[0], early[0].shape[0]]
    layout: gl.constexpr = of_product(late[0].shape[0])
    sums = gl.zeros(shape, gl.float32, layout)
    for i in gl.static_range(KEY_TILES):
        rows = late[i].load(gl.DotOperandLayout(0, layout, 2))
        columns = early[i].permute((1, 0)).load(gl.DotOperandLayout(1, layout, 2))
        sums = mma_v2(rows, columns, sums)
    return sums
