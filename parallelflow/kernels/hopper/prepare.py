"""The arrays of ``kernels/prepare.py`` in one launch, for bfloat16 and float16 and chunks of 64 tokens.

A program serves one chunk and key head.  It forms Q K^T and K K^T once, by blocks of 16 tokens, and goes through the
value heads of that key head, a warp each: decay vectors, scores, inverse.  With c_t the sum of the log-decays from the
chunk's start, D[t, s] = e^{c_t - c_s} is

    on the diagonal blocks     the exponential of the difference of the sums, kept as two float32 numbers,
    below them                 e^{c_t - c_(start of t's block)} e^{(blocks between)} e^{c_(end of s's block) - c_s},

three factors of which none exceeds 1, each the exponential of a sum of its own terms: nothing overflows or cancels, and
64 exponentials take the place of 4096.  Without a second value head Q K^T and K K^T go from the products straight into
use; with one they wait in shared memory for both warps.
"""

import torch
from torch import Tensor
from triton import next_power_of_2
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from ..chunks import Chunks
from ..launch import bind
from ..prepare import Prepared
from .triangular import accumulators, allocate_diagonal, columns_by_lanes, invert, right_transposed, store_diagonal

CHUNK = 64
LARGEST_HEAD = 128  # channels of a key


@gluon.constexpr_function
def shared_block(heads):
    """One block [1, 1, 16, 16] for every warp, as `accumulators` hold a block."""
    return gl.DistributedLinearLayout(
        [[0, 0, 0, 1], [0, 0, 8, 0], [0, 0, 0, 8]],
        [[0, 0, 0, 2], [0, 0, 0, 4], [0, 0, 1, 0], [0, 0, 2, 0], [0, 0, 4, 0]],
        [[0, 0, 0, 0]] * (heads == 2), [], [1, 1, 16, 16],
    )  # fmt: skip


@gluon.jit
def add(a, b):
    return a + b


@gluon.jit
def power_of_two(x):
    """2^x; what is below 2^-126 counts as 0."""
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def copy_rows(tile, array, first, length, H: gl.constexpr, K: gl.constexpr, layout: gl.constexpr):
    """Begin to copy tokens `first` .. of one head of [T, H, K] to shared memory, 0 past `length` and past K."""
    token = first + gl.arange(0, tile.shape[0], gl.SliceLayout(1, layout))
    channel = gl.arange(0, tile.shape[1], gl.SliceLayout(0, layout))
    inside = (token < length)[:, None] & (channel < K)[None, :]
    async_copy.async_copy_global_to_shared(tile, array + token[:, None] * (H * K) + channel[None, :], inside)


@gluon.jit
def load_steps(beta, log_decay, place, length, present, HV: gl.constexpr, HEADS: gl.constexpr, HAS_BETA: gl.constexpr,
               HAS_DECAY: gl.constexpr):  # fmt: skip
    """beta and log-decays of HEADS value heads, [HEADS, 64], in the lanes in which they lie side by side in memory."""
    strided: gl.constexpr = gl.BlockedLayout([1, 1], [HEADS, 32 // HEADS], [1, HEADS], [0, 1])
    head = gl.arange(0, HEADS, gl.SliceLayout(1, strided))
    token = gl.arange(0, 64, gl.SliceLayout(0, strided))
    inside = (token < length)[None, :] & (head < present)[:, None]
    offset = token[None, :] * HV + head[:, None]
    weight = gl.where(inside, 1.0, 0.0)
    step = weight
    if HAS_BETA:
        weight = gl.load(beta + place + offset, mask=inside, other=0.0).to(gl.float32)
    if HAS_DECAY:
        step = gl.load(log_decay + place + offset, mask=inside, other=0.0).to(gl.float32)
    return weight, step


@gluon.jit
def decay_vectors(weight, step, cumulative, from_start, to_end, total, tables, flat, present,
                  HEADS: gl.constexpr, HAS_DECAY: gl.constexpr):  # fmt: skip
    """Store the vectors of HEADS value heads; fill the tables [HEADS, block, token] that the blocks are made from."""
    highs, lows, weights, afters, befores, spans = tables
    flat_layout: gl.constexpr = gl.BlockedLayout([1, 2], [1, 32], [HEADS, 1], [1, 0])
    by_block: gl.constexpr = columns_by_lanes(HEADS)
    weight = gl.convert_layout(weight, flat_layout)
    weight_blocks = gl.convert_layout(gl.reshape(weight, [HEADS, 4, 16]), by_block)
    weights.store(weight_blocks)
    if HAS_DECAY:
        step = gl.convert_layout(step, flat_layout).to(gl.float64)
        step = gl.where(step < -800.0, -800.0, step) * 1.4426950408889634
        c = gl.associative_scan(step, 1, add)
        end = gl.sum(step, 1)
        high = c.to(gl.float32)
        low = (c - high.to(gl.float64)).to(gl.float32)
        entry = power_of_two(high)
        leave = power_of_two((end[:, None] - c).to(gl.float32)) * weight
        whole = power_of_two(end.to(gl.float32))
        blocks = gl.convert_layout(gl.reshape(step, [HEADS, 4, 16]), by_block)
        within = gl.associative_scan(blocks, 2, add)
        span = gl.sum(blocks, 2)
        afters.store(power_of_two(within.to(gl.float32)))
        befores.store(power_of_two((span[:, :, None] - within).to(gl.float32)) * weight_blocks)
        spans.store(gl.expand_dims(power_of_two(span.to(gl.float32)), 2))
        highs.store(gl.convert_layout(gl.reshape(high, [HEADS, 4, 16]), by_block))
        lows.store(gl.convert_layout(gl.reshape(low, [HEADS, 4, 16]), by_block))
    else:
        high = gl.zeros([HEADS, 64], gl.float32, flat_layout)
        low = high
        entry = high + 1.0
        leave = weight
        whole = gl.full([HEADS], 1.0, gl.float32, gl.SliceLayout(1, flat_layout))
    head = gl.arange(0, HEADS, gl.SliceLayout(1, flat_layout))
    token = gl.arange(0, 64, gl.SliceLayout(0, flat_layout))
    kept = (head < present)[:, None] & (token >= 0)[None, :]
    vector = head[:, None] * 64 + token[None, :]
    sums = head[:, None] * 128 + token[None, :]
    gl.store(cumulative + flat * 128 + sums, high, mask=kept)
    gl.store(cumulative + flat * 128 + 64 + sums, low, mask=kept)
    gl.store(from_start + flat * 64 + vector, entry, mask=kept)
    gl.store(to_end + flat * 64 + vector, leave, mask=kept)
    gl.store(total + flat + head, whole, mask=head < present)


@gluon.jit
def beside(a, b):
    """[n, rows, w] and [n, rows, w] to [n, rows, 2 w]."""
    shape: gl.constexpr = [a.shape[0], a.shape[1], 2 * a.shape[2]]
    return gl.reshape(gl.permute(gl.join(a, b), (0, 1, 3, 2)), shape)


@gluon.jit
def store_rows(array, a, b, c, d, present, HEADS: gl.constexpr, MASKED: gl.constexpr):
    """Store four blocks [HEADS, 16, 16] beside one another: 16 rows of HEADS matrices of 64 x 64."""
    layout: gl.constexpr = gl.BlockedLayout([1, 1, 8], [1, 4, 8], [HEADS, 1, 1], [2, 1, 0])
    rows = gl.convert_layout(beside(beside(a, b), beside(c, d)).to(array.dtype.element_ty), layout)
    head = gl.arange(0, HEADS, gl.SliceLayout(1, gl.SliceLayout(2, layout)))[:, None, None]
    i = gl.arange(0, 16, gl.SliceLayout(0, gl.SliceLayout(2, layout)))[None, :, None]
    j = gl.arange(0, 64, gl.SliceLayout(0, gl.SliceLayout(1, layout)))[None, None, :]
    offset = head * 4096 + i * 64 + j
    if MASKED:
        gl.store(array + offset, rows, mask=(head < present) & (offset >= 0))
    else:
        gl.store(array + offset, rows)


@gluon.jit
def side_by_side(x):
    """[32, 32] as [column of blocks, row of blocks, 16, 16]."""
    return gl.permute(gl.reshape(x, [2, 16, 2, 16]), (2, 0, 1, 3))


@gluon.jit
def allocate_products():
    """Shared memory for the blocks on and below the diagonal of a product: the two left columns, the last corner."""
    left: gl.constexpr = gl.SwizzledSharedLayout(8, 2, 2, [2, 1, 0])
    corner: gl.constexpr = gl.SwizzledSharedLayout(8, 2, 2, [3, 2, 1, 0])
    return (gl.allocate_shared_memory(gl.float32, [2, 4, 16, 16], left),
            gl.allocate_shared_memory(gl.float32, [2, 2, 16, 16], corner))  # fmt: skip


@gluon.jit
def load_product(products, r, c, HEADS: gl.constexpr):
    """The block (r, c) of a product, [1, 16, 16], for every warp."""
    left, corner = products
    layout: gl.constexpr = accumulators(HEADS)
    if c < 2:
        return left.index(c).slice(r, 1, 0).load(layout)
    else:
        block = corner.slice(c - 2, 1, 0).slice(r - 2, 1, 1).load(shared_block(HEADS))
        return gl.convert_layout(gl.reshape(block, [1, 16, 16]), layout, assert_trivial=True)


@gluon.jit
def multiply_all(q_tile, k_tile, scale, TIED: gl.constexpr, HEADS: gl.constexpr):
    """scale Q K^T and, if TIED, K K^T on and below the diagonal, to shared memory."""
    rows: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [HEADS, 1], [16, 8])
    left: gl.constexpr = gl.DotOperandLayout(0, rows, 2)
    right: gl.constexpr = gl.DotOperandLayout(1, rows, 2)
    k_last = k_tile.slice(32, 32, 0)
    k_last_columns = k_last.permute((1, 0)).load(right)
    zero = gl.zeros([32, 32], gl.float32, rows)
    read_corner = mma_v2(q_tile.slice(32, 32, 0).load(left), k_last_columns, zero) * scale
    q_rows = q_tile.load(left)
    # allocated when the queries are in registers, so that the results may take their place
    reads = allocate_products()
    owns = allocate_products()
    reads[1].store(side_by_side(read_corner))
    zero = gl.zeros([64, 16], gl.float32, rows)
    for c in gl.static_range(2):
        k_columns = k_tile.slice(16 * c, 16, 0).permute((1, 0)).load(right)
        reads[0].index(c).store(gl.reshape(mma_v2(q_rows, k_columns, zero) * scale, [4, 16, 16]))
    if TIED:
        owns[1].store(side_by_side(mma_v2(k_last.load(left), k_last_columns, gl.zeros([32, 32], gl.float32, rows))))
        k_rows = k_tile.load(left)
        for c in gl.static_range(2):
            k_columns = k_tile.slice(16 * c, 16, 0).permute((1, 0)).load(right)
            owns[0].index(c).store(gl.reshape(mma_v2(k_rows, k_columns, zero), [4, 16, 16]))
    return reads, owns


@gluon.jit
def multiply_block(a, k_tile, c, HEADS: gl.constexpr):
    """The product of 16 rows, a left operand, with the keys of block c, [1, 16, 16]."""
    rows: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [HEADS, 1], [16, 8])
    k_columns = k_tile.slice(16 * c, 16, 0).permute((1, 0)).load(gl.DotOperandLayout(1, rows, 2))
    product = mma_v2(a, k_columns, gl.zeros([16, 16], gl.float32, rows))
    return gl.expand_dims(gl.convert_layout(product, gl.SliceLayout(0, accumulators(HEADS))), 0)


@gluon.jit
def decay_block(tables, r, c, HEADS: gl.constexpr, HAS_DECAY: gl.constexpr):
    """beta_s D[t, s] for the rows of block r and the columns of block c; above the diagonal it may be anything."""
    highs, lows, weights, afters, befores, spans = tables
    layout: gl.constexpr = accumulators(HEADS)
    if not HAS_DECAY:
        return weights.slice(c, 1, 1).load(layout)
    elif r == c:
        late_high = highs.slice(r, 1, 1).permute((0, 2, 1)).load(layout)
        late_low = lows.slice(r, 1, 1).permute((0, 2, 1)).load(layout)
        exponent = (late_high - highs.slice(c, 1, 1).load(layout)) + (late_low - lows.slice(c, 1, 1).load(layout))
        return weights.slice(c, 1, 1).load(layout) * power_of_two(exponent)
    else:
        before = befores.slice(c, 1, 1).load(layout)
        for middle in gl.static_range(c + 1, r):
            before = before * spans.slice(middle, 1, 1).load(layout)
        return afters.slice(r, 1, 1).permute((0, 2, 1)).load(layout) * before


@gluon.jit(do_not_specialize=["time", "per_sequence"])
def prepare_kernel(query, key, beta, log_decay, inverse, scores, cumulative, from_start, to_end, total, table,
                   time, per_sequence, scale, H: gl.constexpr, HV: gl.constexpr, K: gl.constexpr, WIDTH: gl.constexpr,
                   HEADS: gl.constexpr, PACKED: gl.constexpr, TIED: gl.constexpr, HAS_BETA: gl.constexpr,
                   HAS_DECAY: gl.constexpr):  # fmt: skip
    """One chunk and key head; HEADS (1 or 2) of its value heads at a time.  WIDTH: K, rounded up to a power of two."""
    GROUP: gl.constexpr = HV // H
    TURNS: gl.constexpr = (GROUP + HEADS - 1) // HEADS
    MASKED: gl.constexpr = GROUP % HEADS != 0
    gl.static_assert(HEADS == 2 or GROUP == 1, "one warp alone serves one value head")
    dtype: gl.constexpr = key.dtype.element_ty
    layout: gl.constexpr = accumulators(HEADS)
    chunk = gl.program_id(0) // H
    key_head = gl.program_id(0) % H
    if PACKED:
        first = gl.load(table + 2 * chunk).to(gl.int64)
        length = gl.load(table + 2 * chunk + 1)
    else:
        sequence = chunk // per_sequence
        before = (chunk - sequence * per_sequence) * 64
        first = sequence.to(gl.int64) * time + before
        length = gl.minimum(time - before, 64)
    chunk = chunk.to(gl.int64)

    # the tiles of queries and keys are on their way while the vectors are made
    LANES: gl.constexpr = WIDTH // 8
    copied: gl.constexpr = gl.BlockedLayout([1, 8], [32 // LANES, LANES], [HEADS, 1], [1, 0])
    PHASES: gl.constexpr = 8 if LANES >= 8 else LANES
    swizzled: gl.constexpr = gl.SwizzledSharedLayout(8, 8 // PHASES, PHASES, [1, 0])
    query += (first * H + key_head) * K
    key += (first * H + key_head) * K
    k_tile = gl.allocate_shared_memory(dtype, [64, WIDTH], swizzled)
    q_tile = gl.allocate_shared_memory(dtype, [64 if HEADS == 2 else 16, WIDTH], swizzled)
    copy_rows(q_tile, query, 0, length, H, K, copied)
    copy_rows(k_tile, key, 0, length, H, K, copied)
    async_copy.commit_group()
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    tables = (gl.allocate_shared_memory(gl.float32, [HEADS, 4, 16], plain),
              gl.allocate_shared_memory(gl.float32, [HEADS, 4, 16], plain),
              gl.allocate_shared_memory(gl.float32, [HEADS, 4, 16], plain),
              gl.allocate_shared_memory(gl.float32, [HEADS, 4, 16], plain),
              gl.allocate_shared_memory(gl.float32, [HEADS, 4, 16], plain),
              gl.allocate_shared_memory(gl.float32, [HEADS, 4, 1], plain))  # fmt: skip
    place = first * HV + key_head * GROUP
    weight, step = load_steps(beta, log_decay, place, length, GROUP, HV, HEADS, HAS_BETA, HAS_DECAY)
    decay_vectors(weight, step, cumulative, from_start, to_end, total, tables, chunk * HV + key_head * GROUP, GROUP,
                  HEADS, HAS_DECAY)  # fmt: skip
    async_copy.wait_group(0)
    gl.thread_barrier()
    if HEADS == 2:
        reads, owns = multiply_all(q_tile, k_tile, scale, TIED, HEADS)

    operand: gl.constexpr = gl.DotOperandLayout(0, gl.NVMMADistributedLayout([2, 0], [HEADS, 1], [16, 8]), 2)
    row = gl.arange(0, 16, gl.SliceLayout(0, gl.SliceLayout(2, layout)))[None, :, None]
    column = gl.arange(0, 16, gl.SliceLayout(0, gl.SliceLayout(1, layout)))[None, None, :]
    zero = gl.zeros([HEADS, 16, 16], gl.float32, layout)
    for turn in range(TURNS):
        present = GROUP - turn * HEADS
        flat = chunk * HV + key_head * GROUP + turn * HEADS
        if TURNS > 1:  # noqa: SIM102 - settled while compiling
            if turn > 0:
                # other names than before the loop: what it carries costs registers
                weights, steps = load_steps(beta, log_decay, place + turn * HEADS, length, present, HV, HEADS, HAS_BETA,
                                            HAS_DECAY)  # fmt: skip
                decay_vectors(weights, steps, cumulative, from_start, to_end, total, tables, flat, present, HEADS,
                              HAS_DECAY)  # fmt: skip
        if TIED:
            diagonal = allocate_diagonal(HEADS)
        below: gl.tuple = ()
        for r in gl.static_range(4):
            if HEADS == 1:
                if r > 0:
                    async_copy.wait_group(0)
                    gl.thread_barrier()
                q_rows = q_tile.load(operand)
                if TIED:
                    k_rows = k_tile.slice(16 * r, 16, 0).load(operand)
                if r < 3:  # the next 16 queries take the place of these
                    gl.thread_barrier()
                    copy_rows(q_tile, query, 16 * r + 16, length, H, K, copied)
                    async_copy.commit_group()
            blocks: gl.tuple = ()
            for c in gl.static_range(r + 1):
                decay = decay_block(tables, r, c, HEADS, HAS_DECAY)
                if HEADS == 2:
                    read = load_product(reads, r, c, HEADS)
                else:
                    read = multiply_block(q_rows, k_tile, c, HEADS) * scale
                if c == r:
                    blocks += (gl.where(row >= column, read * decay, 0.0),)
                else:
                    blocks += (zero + read * decay,)
                if TIED:
                    if HEADS == 2:
                        own = load_product(owns, r, c, HEADS)
                    else:
                        own = multiply_block(k_rows, k_tile, c, HEADS)
                    if c == r:
                        store_diagonal(diagonal, gl.where(row > column, own * decay, 0.0), r, HEADS)
                    else:
                        below += (right_transposed(own * (decay * -1.0), HEADS),)
            blocks += (zero, zero, zero)
            store_rows(scores + flat * 4096 + r * 1024, blocks[0], blocks[1], blocks[2], blocks[3], present, HEADS,
                       MASKED)  # fmt: skip
        if TIED:
            x00, x10, x11, x20, x21, x22, x30, x31, x32, x33 = invert(diagonal, below, HEADS)
            target = inverse + flat * 4096
            store_rows(target, x00, zero, zero, zero, present, HEADS, MASKED)
            store_rows(target + 1024, x10, x11, zero, zero, present, HEADS, MASKED)
            store_rows(target + 2048, x20, x21, x22, zero, present, HEADS, MASKED)
            store_rows(target + 3072, x30, x31, x32, x33, present, HEADS, MASKED)


def fits(query: Tensor, key: Tensor, chunks: Chunks) -> bool:
    """Whether this kernel serves queries and keys [B, T, H, K] of these shapes, dtype, alignment and device."""
    size = query.shape[-1]
    return (
        query.is_cuda
        and torch.cuda.get_device_capability(query.device)[0] == 9
        and query.dtype in (torch.bfloat16, torch.float16)
        and 16 <= size <= LARGEST_HEAD
        and size % 8 == 0
        and query.data_ptr() % 16 == 0
        and key.data_ptr() % 16 == 0
        and chunks.size == CHUNK
    )


def prepare(query: Tensor, key: Tensor, beta: Tensor | None, log_decay: Tensor | None, chunks: Chunks, *, scale: float,
            into: Prepared) -> None:  # fmt: skip
    """The chunk-wise arrays of q, k [B, T, H, K], beta, log_decay [B, T, HV] (None: 1 and 0), in the arrays of `into`,
    the inverse if it is there."""
    heads, size, value_heads = query.shape[2], query.shape[3], into.scores.shape[1]
    if chunks.count == 0:
        return
    warps = 1 if value_heads == heads else 2
    registers = {} if warps == 1 else {"maxnreg": 200}  # five programs to a multiprocessor
    launch = bind(
        prepare_kernel, H=heads, HV=value_heads, K=size, WIDTH=next_power_of_2(size), HEADS=warps,
        PACKED=chunks.packed, TIED=into.inverse is not None, HAS_BETA=beta is not None,
        HAS_DECAY=log_decay is not None, num_warps=warps, **registers,
    )  # fmt: skip
    launch(chunks.count * heads, query, key, beta, log_decay, *into, chunks.table, chunks.time,
           chunks.per_sequence, scale)  # fmt: skip
