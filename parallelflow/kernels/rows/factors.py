"""Device functions: a family's rows, and the decay between two tokens of a chunk.

Vector decays. With c_t the sum of a channel's decays up to token t, a pair of a later token t and an earlier one s
needs e^{c_t - c_s} as a factor of t times a factor of s. Inside a block of tokens whose decays sum to little enough in
every channel, both are taken to the block's middle, m half the sum of its decays:

    e^{c_t - c_s} = e^{c_t - m} · e^{m - c_s},

one product for all pairs of the block, factors between e^m and e^-m. Where decays are stronger a pair is served at the
one block size h, a power of two, at which its tokens lie in the two halves of a block of 2 h tokens. With b the first
token of the later half,

    e^{c_t - c_s} = e^{g_b + … + g_t} · e^{g_{s+1} + … + g_{b-1}}:

each exponent is a sum of its own terms, none is positive, and no difference of sums is ever taken. The kernels look at
the decays themselves and choose for each chunk and head the largest block that may be centred (``floor``): the chunk,
16 tokens, or one. Nothing is asked of the gate.

Every exponent is a weighted sum of the chunk's decays, so all of a tile's are one product with a matrix of 0, 1, ±1/2.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def places(ROWS: tl.constexpr, COUNT: tl.constexpr):
    """Token and place of each row of a tile; COUNT places a token."""
    PADDED: tl.constexpr = 1 if COUNT == 1 else 2 if COUNT == 2 else 4 if COUNT <= 4 else 8 if COUNT <= 8 else 16
    row = tl.arange(0, ROWS)
    return row // PADDED, row % PADDED


@triton.jit
def lying(first, length, head, column, ROWS: tl.constexpr, COUNT: tl.constexpr, HV: tl.constexpr,
          HEADS: tl.constexpr, D: tl.constexpr):  # fmt: skip
    """Where rows of a value head lie in ``[tokens, COUNT, HEADS, D]``: the first one, the others from it in 32 bits,
    and which there are."""
    token, place = places(ROWS, COUNT)
    start = (first * COUNT * HEADS + head // (HV // HEADS)) * D
    at = ((token * COUNT + place) * (HEADS * D))[:, None] + column[None, :]
    there = token < length.to(tl.int32)
    if (COUNT & (COUNT - 1)) != 0:
        there = there & (place < COUNT)
    inside = there[:, None]
    if column.shape[0] * (D // column.shape[0]) != D:  # tiles of columns start at multiples of their width
        inside = inside & (column < D)[None, :]
    return start, at, inside


@triton.jit
def load_rows(base, first, length, head, column, ROWS: tl.constexpr, COUNT: tl.constexpr, HV: tl.constexpr,
              HEADS: tl.constexpr, D: tl.constexpr):  # fmt: skip
    """Rows ``[ROWS, columns]`` of ``[tokens, COUNT, HEADS, D]`` for a value head, 0 where there is none."""
    start, at, inside = lying(first, length, head, column, ROWS, COUNT, HV, HEADS, D)
    return tl.load(base + start + at, mask=inside, other=0.0)


@triton.jit
def store_rows(base, rows, first, length, head, column, ROWS: tl.constexpr, COUNT: tl.constexpr, HV: tl.constexpr,
               D: tl.constexpr):  # fmt: skip
    """Rows to ``[tokens, COUNT, HV, D]``."""
    start, at, inside = lying(first, length, head, column, ROWS, COUNT, HV, HV, D)
    tl.store(base + start + at, rows.to(base.dtype.element_ty), mask=inside)


@triton.jit
def load_weights(coefficient, first, length, head, ROWS: tl.constexpr, COUNT: tl.constexpr, HV: tl.constexpr,
                 HEADS: tl.constexpr):  # fmt: skip
    """One number a row, ``[tokens, COUNT, HEADS]``, for a value head, in float32; 0 where there is none."""
    token, place = places(ROWS, COUNT)
    start = first * COUNT * HEADS + head // (HV // HEADS)
    at = (token * COUNT + place) * HEADS
    inside = (token < length.to(tl.int32)) & (place < COUNT)
    return tl.load(coefficient + start + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def times_coefficient(rows, coefficient, first, length, head, column, ROWS: tl.constexpr, COUNT: tl.constexpr,
                      HV: tl.constexpr, KIND: tl.constexpr, HEADS: tl.constexpr, SIGN: tl.constexpr,
                      D: tl.constexpr):  # fmt: skip
    """``sign · coefficient · rows`` of a value head, in float32."""
    rows = rows.to(tl.float32)
    if KIND == 1:
        rows *= load_weights(coefficient, first, length, head, ROWS, COUNT, HV, HEADS)[:, None]
    if KIND == 2:
        rows *= load_rows(coefficient, first, length, head, column, ROWS, COUNT, HV, HEADS, D).to(tl.float32)
    if SIGN == -1:
        rows = -rows
    return rows


@triton.jit
def load_factor(vector, coefficient, first, length, head, column, ROWS: tl.constexpr, COUNT: tl.constexpr,
                HV: tl.constexpr, HEADS: tl.constexpr, KIND: tl.constexpr, COEFFICIENT_HEADS: tl.constexpr,
                SIGN: tl.constexpr, D: tl.constexpr):  # fmt: skip
    """``sign · coefficient · vector`` of a value head's rows, in float32."""
    rows = load_rows(vector, first, length, head, column, ROWS, COUNT, HV, HEADS, D)
    return times_coefficient(rows, coefficient, first, length, head, column, ROWS, COUNT, HV, KIND, COEFFICIENT_HEADS,
                             SIGN, D)  # fmt: skip


@triton.jit
def load_channel_decays(log_decay, first, length, head, column, Q: tl.constexpr, HV: tl.constexpr,
                        K: tl.constexpr):  # fmt: skip
    """Decays of a chunk's tokens in units of log 2, 0 where there is none. One under -800 counts as -800."""
    found = load_rows(log_decay, first, length, head, column, Q, 1, HV, HV, K).to(tl.float32)
    return tl.where(found < -800.0, -800.0, found) * LOG2_E


@triton.jit
def in_three(x):
    """Three bfloat16 numbers whose sum is the float32 number ``x``."""
    high = x.to(tl.bfloat16)
    rest = x - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    return high, middle, (rest - middle.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def weighted(weights, parts):
    """``weights @ x`` in float32, for weights that bfloat16 has, and ``parts`` of x (``in_three``)."""
    high, middle, low = parts
    weights = weights.to(tl.bfloat16)
    return tl.dot(weights, high, tl.dot(weights, middle, tl.dot(weights, low)))


@triton.jit
def span(decays, BLOCK: tl.constexpr):
    """The most that any block's decays sum to in any channel, without the sign."""
    SIZE: tl.constexpr = BLOCK if decays.shape[0] > BLOCK else decays.shape[0]
    sums = tl.sum(tl.reshape(decays, [decays.shape[0] // SIZE, SIZE, decays.shape[1]]), 1)
    return tl.max(tl.max(-sums, 1), 0)  # NaN would be lost here, and stays in the sums


@triton.jit
def from_middle(decays, token, level, RAW: tl.constexpr):
    """c_t - m for rows of the tokens ``token`` in their blocks of 2^level, ``decays`` in three; RAW: c_{t-1} - m."""
    t = token[:, None]
    s = tl.arange(0, decays[0].shape[0])[None, :]
    up_to = s < t if RAW else s <= t
    return weighted(tl.where((t ^ s) >> level == 0, tl.where(up_to, 0.5, -0.5), 0.0), decays)


@triton.jit
def sums_to(triangle, token, parts):
    """Sums of rows up to each token of ``token``, of rows in three ``parts``, one a token; ``triangle [64, 64]`` has
    ones on and below the diagonal."""
    s = tl.arange(0, parts[0].shape[0])[None, :]
    return weighted(tl.load(triangle + token[:, None] * 64 + s, mask=token[:, None] >= 0, other=0.0), parts)


@triton.jit
def sums_from(ones, rows):
    """Sums of rows over each one and all after it; ``ones`` on and below the diagonal."""
    return weighted(tl.trans(ones), in_three(rows))


@triton.jit
def from_boundary(decays, token, level, RAW: tl.constexpr):
    """e^{sum from the first token of the row's block of 2^level to the row's own}; RAW: the own one left out."""
    t = token[:, None]
    s = tl.arange(0, decays[0].shape[0])[None, :]
    up_to = s < t if RAW else s <= t
    return tl.exp2(weighted(tl.where(((t ^ s) >> level == 0) & up_to, 1.0, 0.0), decays))


@triton.jit
def to_boundary(decays, token, level):
    """e^{sum after the row's token to the last of its block of 2^level}."""
    t = token[:, None]
    s = tl.arange(0, decays[0].shape[0])[None, :]
    return tl.exp2(weighted(tl.where(((t ^ s) >> level == 0) & (s > t), 1.0, 0.0), decays))


@triton.jit
def boundary_factors(decays, tokens, level, R: tl.constexpr, L: tl.constexpr, RAW: tl.constexpr):
    """Of queries, reads, writes and lone rows: readers from the first token of their block of 2^level, writers to its
    last; of a family that there is none of, 0."""
    q_token, n_token, m_token = tokens
    q_factor = from_boundary(decays, q_token, level, False)
    a_factor, b_factor, w_factor = 0, 0, 0
    if R > 0:
        a_factor = q_factor if R == 1 and not RAW else from_boundary(decays, n_token, level, RAW)
        b_factor = to_boundary(decays, n_token, level)
    if L > 0:
        w_factor = b_factor if R == L else to_boundary(decays, m_token, level)
    return q_factor, a_factor, b_factor, w_factor


@triton.jit
def same_block(late, early, level):
    """Which pairs of a later and an earlier token lie in one block of 2^level tokens."""
    late, early = late[:, None], early[None, :]
    return ((late ^ early) >> level == 0) & (late > early)


@triton.jit
def in_halves(late, early, level):
    """Which pairs of a later and an earlier token lie in the two halves of a block of 2^(level + 1) tokens."""
    late, early = late[:, None], early[None, :]
    return ((late ^ early) >> level == 1) & (late > early)


@triton.jit
def token_sums(log_decay, first, length, head, ROWS: tl.constexpr, COUNT: tl.constexpr, EXCLUSIVE: tl.constexpr,
               HV: tl.constexpr):  # fmt: skip
    """Sums of scalar decays from the chunk's start to each row's token, in units of log 2, as two float32 numbers, and
    the sum of all, in float64. A decay under -800 counts as -800."""
    token, place = places(ROWS, COUNT)
    at = (first + token) * HV + head
    inside = (place == 0) & (token < length)
    step = tl.load(log_decay + at, mask=inside, other=0.0).to(tl.float64)
    step = tl.maximum(step, -800.0) * LOG2_E
    sums = tl.cumsum(step, 0)
    end = tl.sum(step, 0)
    if EXCLUSIVE:
        own = tl.load(log_decay + at, mask=token < length, other=0.0).to(tl.float64)
        sums -= tl.maximum(own, -800.0) * LOG2_E
    high = sums.to(tl.float32)
    return high, (sums - high.to(tl.float64)).to(tl.float32), end


@triton.jit
def to_end(end, high, low):
    """e^{end - sum}, from the sum of all decays in float64 and the sums up to each row as two float32 numbers."""
    end_high = end.to(tl.float32)
    end_low = (end - end_high.to(tl.float64)).to(tl.float32)
    return tl.exp2((end_high - high) + (end_low - low))
