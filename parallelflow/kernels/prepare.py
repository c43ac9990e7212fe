"""What every chunk needs before the scan, made for all chunks at once: decay vectors, scores and the inverse.

With c_t the sum of the log-decays from the chunk's start to token t and D[t, s] = e^{c_t - c_s}:

    from_start[t] = e^{c_t}          to_end[s] = beta_s e^{c_C - c_s}          total = e^{c_C}
    scores  P[t, s] = 1(s <= t) scale (q_t . k_s) D[t, s] beta_s
    inverse (I + L)^-1,   L[t, s] = 1(s < t) (k_t . k_s) D[t, s] beta_s

The coefficient stands in columns only.  So the scan carries R = (I + L)^-1 (V - e^c K S_0), the values less what the
state already returns for their keys, and beta needs no division in the gradients.

The sums c are kept as two float32 numbers, high + low, in units of log 2: a plain float32 difference loses the
small decays beside the large ones.  Log-decays under -800 (and -inf) count as -800, whose exponential is 0 in float32.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arena import Arena
from .chunks import Chunks, locate_chunk
from .launch import bind
from .products import float32_precision, precise_product


class Prepared(NamedTuple):
    """The chunk-wise arrays, with M chunks of C tokens and HV value heads.

    inverse [M, HV, C, C] in the input dtype, None for rows that only write; scores [M, HV, C, C] in the input dtype;
    cumulative [M, HV, 2, C], from_start [M, HV, C], to_end [M, HV, C], total [M, HV] in float32.
    Tokens past the end of a sequence have k = q = v = 0, beta = 0 and no decay.
    """

    inverse: Tensor | None
    scores: Tensor
    cumulative: Tensor
    from_start: Tensor
    to_end: Tensor
    total: Tensor


@triton.jit
def decay_between(late_high, late_low, early_high, early_low, keep):
    """e^{late - early} where `keep`, else 0, from two-float sums in units of log 2."""
    exponent = (late_high - early_high) + (late_low - early_low)
    return tl.exp2(tl.where(keep, exponent, float("-inf")))


@triton.jit(do_not_specialize=["time", "per_sequence"])
def scores_kernel(query, key, beta, log_decay, scores, cumulative, from_start, to_end, total, table,
                  time, per_sequence, scale, H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr,
                  C: tl.constexpr, BK: tl.constexpr, PACKED: tl.constexpr, HAS_BETA: tl.constexpr,
                  HAS_DECAY: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Decay vectors and scores of one chunk, for all the value heads of one key head."""
    chunk = (tl.program_id(0) // H).to(tl.int64)
    head = tl.program_id(0) % H
    first, length = locate_chunk(chunk, table, time, per_sequence, C, PACKED)
    row = tl.arange(0, C)
    valid = row < length
    products = tl.zeros([C, C], tl.float32)
    for start in range(0, K, BK):
        column = start + tl.arange(0, BK)
        offset = row[:, None] * (H * K) + column[None, :]
        inside = valid[:, None] & (column < K)[None, :]
        base = (first * H + head) * K
        q = tl.load(query + base + offset, mask=inside, other=0.0)
        k = tl.load(key + base + offset, mask=inside, other=0.0)
        products = tl.dot(q, tl.trans(k), products, input_precision=PRECISION)
    products *= scale
    causal = row[:, None] >= row[None, :]
    for j in range(HV // H):
        value_head = head * (HV // H) + j
        flat = chunk * HV + value_head
        token = (first + row) * HV + value_head
        weight = tl.where(valid, 1.0, 0.0)
        if HAS_BETA:
            weight = tl.load(beta + token, mask=valid, other=0.0).to(tl.float32)
        if HAS_DECAY:
            step = tl.load(log_decay + token, mask=valid, other=0.0).to(tl.float64)
            step = tl.maximum(step, -800.0) * 1.4426950408889634
            c = tl.cumsum(step, 0)
            end = tl.sum(step, 0)
            high = c.to(tl.float32)
            low = (c - high.to(tl.float64)).to(tl.float32)
            decay = decay_between(high[:, None], low[:, None], high[None, :], low[None, :], causal)
            p = products * decay * weight[None, :]
            entry_decay = tl.exp2(high)
            exit_decay = tl.exp2((end - c).to(tl.float32))
            whole = tl.exp2(end.to(tl.float32))
        else:
            high = tl.zeros([C], tl.float32)
            low = high
            p = tl.where(causal, products, 0.0) * weight[None, :]
            entry_decay = high + 1.0
            exit_decay = high + 1.0
            whole = 1.0
        tl.store(cumulative + flat * 2 * C + row, high)
        tl.store(cumulative + flat * 2 * C + C + row, low)
        tl.store(from_start + flat * C + row, entry_decay)
        tl.store(to_end + flat * C + row, exit_decay * weight)
        tl.store(total + flat, whole)
        tl.store(scores + flat * C * C + row[:, None] * C + row[None, :], p.to(scores.dtype.element_ty))


@triton.jit
def coupling(key, beta, sums, late, early, length, H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, C: tl.constexpr,
             BK: tl.constexpr, DIAGONAL: tl.constexpr, HAS_DECAY: tl.constexpr,
             PRECISION: tl.constexpr):  # fmt: skip
    """Blocks of L at the rows `late` and the columns `early`: tokens [n, b] -> [n, b, b], or [b] -> [b, b]."""
    SHAPE: tl.constexpr = late.shape + late.shape[-1:]
    LAST: tl.constexpr = len(late.shape)
    blocks = tl.zeros(SHAPE, tl.float32)
    for start in tl.static_range(0, K, BK):
        column = start + tl.arange(0, BK)
        k_late = tl.load(key + tl.expand_dims(late, LAST) * (H * K) + column,
                         mask=tl.expand_dims(late < length, LAST) & (column < K), other=0.0)  # fmt: skip
        k_early = k_late
        if not DIAGONAL:
            k_early = tl.load(key + tl.expand_dims(early, LAST) * (H * K) + column,
                              mask=tl.expand_dims(early < length, LAST) & (column < K), other=0.0)  # fmt: skip
        turned = tl.trans(k_early) if LAST == 1 else tl.permute(k_early, (0, 2, 1))
        blocks = tl.dot(k_late, turned, blocks, input_precision=PRECISION)
    weight = tl.load(beta + early * HV, mask=early < length, other=0.0).to(tl.float32)
    keep = tl.expand_dims(late, LAST) > tl.expand_dims(early, LAST - 1)
    blocks *= tl.expand_dims(weight, LAST - 1)
    if HAS_DECAY:
        late_high = tl.load(sums + late)
        late_low = tl.load(sums + C + late)
        early_high = tl.load(sums + early)
        early_low = tl.load(sums + C + early)
        return blocks * decay_between(tl.expand_dims(late_high, LAST), tl.expand_dims(late_low, LAST),
                                      tl.expand_dims(early_high, LAST - 1), tl.expand_dims(early_low, LAST - 1),
                                      keep)  # fmt: skip
    else:
        return tl.where(keep, blocks, 0.0)


@triton.jit
def invert_base(blocks, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """(I + L)^-1 of the blocks [n, 16, 16] by the ladder X <- X - X L_b X, L_b what first meets at that size."""
    row = tl.arange(0, 16)
    i = row[None, :, None]
    j = row[None, None, :]
    x = tl.where(i == j, 1.0, 0.0) - tl.where(i >> 1 == j >> 1, blocks, 0.0)
    for level in tl.static_range(1, 4):  # blocks of 2, 4, 8 meet in blocks of 4, 8, 16
        step = tl.where((i >> (level + 1) == j >> (level + 1)) & (i >> level != j >> level), blocks, 0.0)
        x -= precise_product(x, precise_product(step, x, SPLIT, PRECISION), SPLIT, PRECISION)
    return x


@triton.jit
def corner(upper, lower, blocks, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """The corner below of the inverse of [[upper^-1, 0], [blocks, lower^-1]]."""
    return -precise_product(lower, precise_product(blocks, upper, SPLIT, PRECISION), SPLIT, PRECISION)


@triton.jit
def assemble(upper, lower, below):
    """[[upper, 0], [below, lower]], from blocks [n, b, b] to [n, 2b, 2b]."""
    n: tl.constexpr = upper.shape[0]
    b: tl.constexpr = upper.shape[1]
    top = tl.reshape(tl.permute(tl.join(upper, tl.zeros_like(upper)), (0, 1, 3, 2)), [n, b, 2 * b])
    bottom = tl.reshape(tl.permute(tl.join(below, lower), (0, 1, 3, 2)), [n, b, 2 * b])
    return tl.reshape(tl.permute(tl.join(top, bottom), (0, 3, 1, 2)), [n, 2 * b, 2 * b])


@triton.jit
def store_block(inverse, block, row, column, C: tl.constexpr):
    """Store [b, b] with its corner at (row, column)."""
    i = tl.arange(0, block.shape[0])
    tl.store(inverse + (row + i)[:, None] * C + (column + i)[None, :], block.to(inverse.dtype.element_ty))


@triton.jit(do_not_specialize=["time", "per_sequence"])
def inverse_kernel(key, beta, cumulative, inverse, table, time, per_sequence,
                   H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
                   PACKED: tl.constexpr, HAS_DECAY: tl.constexpr, SPLIT: tl.constexpr,
                   PRECISION: tl.constexpr):  # fmt: skip
    """(I + L)^-1 of one chunk and value head: inverses of 16 x 16 blocks, merged by pairs."""
    flat = tl.program_id(0).to(tl.int64)
    chunk = flat // HV
    value_head = flat % HV
    first, length = locate_chunk(chunk, table, time, per_sequence, C, PACKED)
    key += (first * H + value_head // (HV // H)) * K
    beta += first * HV + value_head
    sums = cumulative + flat * 2 * C
    inverse += flat * C * C
    base = tl.arange(0, C // 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    blocks = coupling(key, beta, sums, base, base, length, H, HV, K, C, BK, True, HAS_DECAY, PRECISION)
    x = invert_base(blocks, SPLIT, PRECISION)
    if C == 64:
        pair = tl.arange(0, 2)[:, None] * 32 + tl.arange(0, 16)[None, :]
        blocks = coupling(key, beta, sums, pair + 16, pair, length, H, HV, K, C, BK, False, HAS_DECAY, PRECISION)
        upper, lower = tl.split(tl.permute(tl.reshape(x, [2, 2, 16, 16]), (0, 2, 3, 1)))
        x = assemble(upper, lower, corner(upper, lower, blocks, SPLIT, PRECISION))
    half: tl.constexpr = C // 2
    token = tl.arange(0, half)
    blocks = coupling(key, beta, sums, token + half, token, length, H, HV, K, C, BK, False, HAS_DECAY, PRECISION)
    upper, lower = tl.split(tl.permute(x, (1, 2, 0)))
    store_block(inverse, upper, 0, 0, C)
    store_block(inverse, tl.zeros_like(upper), 0, half, C)
    store_block(inverse, lower, half, half, C)
    store_block(inverse, corner(upper, lower, blocks, SPLIT, PRECISION), half, 0, C)


def vacant_arrays(arena: Arena, dtype: torch.dtype, value_heads: int, chunks: Chunks, *, tied: bool) -> Prepared:
    """Uninitialised arrays for `prepare` to fill."""
    m, c = chunks.count, chunks.size
    inverse = arena.empty(m, value_heads, c, c, dtype=dtype) if tied else None
    scores = arena.empty(m, value_heads, c, c, dtype=dtype)
    cumulative = arena.empty(m, value_heads, 2, c, dtype=torch.float32)
    from_start, to_end = (arena.empty(m, value_heads, c, dtype=torch.float32) for _ in range(2))
    return Prepared(inverse, scores, cumulative, from_start, to_end, arena.empty(m, value_heads, dtype=torch.float32))


def prepare(query: Tensor, key: Tensor, beta: Tensor | None, log_decay: Tensor | None, chunks: Chunks, *, scale: float,
            into: Prepared) -> None:  # fmt: skip
    """The chunk-wise arrays of q, k [B, T, H, K], beta, log_decay [B, T, HV] (None: 1 and 0), in the arrays of `into`,
    the inverse if it is there."""
    heads, size = query.shape[2], query.shape[3]
    c, m = chunks.size, chunks.count
    inverse, scores, cumulative, from_start, to_end, total = into
    value_heads = scores.shape[1]
    if m == 0:
        return
    precision = float32_precision(query.device)
    full = query.dtype == torch.float32
    width = max(16, min(triton.next_power_of_2(size), 64 if full else 128))
    common = {"H": heads, "HV": value_heads, "K": size, "C": c, "PACKED": chunks.packed,
              "HAS_DECAY": log_decay is not None, "PRECISION": precision}  # fmt: skip
    batch = chunks.table, chunks.time, chunks.per_sequence
    launch = bind(scores_kernel, BK=width, HAS_BETA=beta is not None, num_warps=1, num_stages=1, **common)
    launch(m * heads, query, key, beta, log_decay, scores, cumulative, from_start, to_end, total, *batch, scale)
    if inverse is not None:
        launch = bind(inverse_kernel, BK=min(width, 64), SPLIT=not full, num_warps=1, num_stages=1, **common)
        launch(m * value_heads, key, beta, cumulative, inverse, *batch)
