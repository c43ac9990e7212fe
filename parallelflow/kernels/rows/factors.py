"""Device functions: a family's rows, and the decay between two tokens of a chunk, every factor at most 1.

Vector decays: the pair of a later token t and an earlier one s is served at the one block size h, a power of two, at
which they lie in the two halves of a block of 2 h tokens. With b the first token of the later half,

    e^{c_t - c_s} = e^{g_b + … + g_t} · e^{g_{s+1} + … + g_{b-1}}:

each exponent is a sum of its own terms, none is positive, and no difference of sums is ever taken.
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
def load_rows(base, first, length, head, column, ROWS: tl.constexpr, COUNT: tl.constexpr, HV: tl.constexpr,
              HEADS: tl.constexpr, D: tl.constexpr):  # fmt: skip
    """Rows ``[ROWS, columns]`` of ``[tokens, COUNT, HEADS, D]`` for a value head, 0 where there is none."""
    token, place = places(ROWS, COUNT)
    own = head // (HV // HEADS)
    at = ((first + token) * COUNT + place) * HEADS + own
    inside = ((token < length) & (place < COUNT))[:, None] & (column < D)[None, :]
    return tl.load(base + at[:, None] * D + column[None, :], mask=inside, other=0.0)


@triton.jit
def store_rows(base, rows, first, length, head, column, ROWS: tl.constexpr, COUNT: tl.constexpr, HV: tl.constexpr,
               D: tl.constexpr):  # fmt: skip
    """Rows to ``[tokens, COUNT, HV, D]``."""
    token, place = places(ROWS, COUNT)
    at = ((first + token) * COUNT + place) * HV + head
    inside = ((token < length) & (place < COUNT))[:, None] & (column < D)[None, :]
    tl.store(base + at[:, None] * D + column[None, :], rows.to(base.dtype.element_ty), mask=inside)


@triton.jit
def load_weights(coefficient, first, length, head, ROWS: tl.constexpr, COUNT: tl.constexpr, HV: tl.constexpr,
                 HEADS: tl.constexpr):  # fmt: skip
    """One number a row, ``[tokens, COUNT, HEADS]``, for a value head, in float32; 0 where there is none."""
    token, place = places(ROWS, COUNT)
    at = ((first + token) * COUNT + place) * HEADS + head // (HV // HEADS)
    return tl.load(coefficient + at, mask=(token < length) & (place < COUNT), other=0.0).to(tl.float32)


@triton.jit
def load_factor(vector, coefficient, first, length, head, column, ROWS: tl.constexpr, COUNT: tl.constexpr,
                HV: tl.constexpr, HEADS: tl.constexpr, KIND: tl.constexpr, COEFFICIENT_HEADS: tl.constexpr,
                SIGN: tl.constexpr, D: tl.constexpr):  # fmt: skip
    """``sign · coefficient · vector`` of a value head's rows, in float32."""
    rows = load_rows(vector, first, length, head, column, ROWS, COUNT, HV, HEADS, D).to(tl.float32)
    if KIND == 1:
        rows *= load_weights(coefficient, first, length, head, ROWS, COUNT, HV, COEFFICIENT_HEADS)[:, None]
    if KIND == 2:
        rows *= load_rows(coefficient, first, length, head, column, ROWS, COUNT, HV, COEFFICIENT_HEADS,
                          D).to(tl.float32)  # fmt: skip
    if SIGN == -1:
        rows = -rows
    return rows


@triton.jit
def load_channel_decays(log_decay, first, length, head, column, SHIFT: tl.constexpr, ROWS: tl.constexpr,
                        COUNT: tl.constexpr, HV: tl.constexpr, K: tl.constexpr):  # fmt: skip
    """Decays of the tokens SHIFT away, in units of log 2, at one row of each token: the first for SHIFT ≤ 0, the last
    for SHIFT > 0. 0 outside the chunk."""
    PADDED: tl.constexpr = 1 if COUNT == 1 else 2 if COUNT == 2 else 4 if COUNT <= 4 else 8 if COUNT <= 8 else 16
    token, place = places(ROWS, COUNT)
    there = token + SHIFT
    inside = (place == (PADDED - 1 if SHIFT > 0 else 0)) & (there >= 0) & (there < length)
    at = (first + there) * HV + head
    found = tl.load(log_decay + at[:, None] * K + column[None, :], mask=inside[:, None] & (column < K)[None, :],
                    other=0.0)  # fmt: skip
    return found.to(tl.float32) * LOG2_E


@triton.jit
def summed(decays, BLOCK: tl.constexpr, COUNT: tl.constexpr, REVERSE: tl.constexpr):
    """Running sums inside blocks of BLOCK tokens: up to each row, or from it on."""
    PADDED: tl.constexpr = 1 if COUNT == 1 else 2 if COUNT == 2 else 4 if COUNT <= 4 else 8 if COUNT <= 8 else 16
    ROWS: tl.constexpr = decays.shape[0]
    COLUMNS: tl.constexpr = decays.shape[1]
    SIZE: tl.constexpr = BLOCK * PADDED
    if SIZE == 1:
        return decays
    if SIZE >= ROWS:
        return tl.cumsum(decays, 0, reverse=REVERSE)
    blocks = tl.reshape(decays, [ROWS // SIZE, SIZE, COLUMNS])
    return tl.reshape(tl.cumsum(blocks, 1, reverse=REVERSE), [ROWS, COLUMNS])


@triton.jit
def from_boundary(decays, BLOCK: tl.constexpr, COUNT: tl.constexpr, RAW: tl.constexpr):
    """e^{sum from the first token of the row's block to the row's own}; RAW: the own one left out, ``decays`` being
    those of the tokens before."""
    if RAW:
        token, place = places(decays.shape[0], COUNT)
        decays = tl.where((token % BLOCK != 0)[:, None], decays, 0.0)
    return tl.exp2(summed(decays, BLOCK, COUNT, False))


@triton.jit
def to_boundary(decays, BLOCK: tl.constexpr, COUNT: tl.constexpr):
    """e^{sum after the row's token to the last of its block}, ``decays`` being those of the tokens after."""
    token, place = places(decays.shape[0], COUNT)
    return tl.exp2(summed(tl.where(((token + 1) % BLOCK != 0)[:, None], decays, 0.0), BLOCK, COUNT, True))


@triton.jit
def halves_of_a_block(late, early, BLOCK: tl.constexpr):
    """Which pairs of tokens lie in the two halves of one block of 2 BLOCK tokens."""
    late, early = late[:, None], early[None, :]
    together = late // (2 * BLOCK) == early // (2 * BLOCK)
    return together & (late // BLOCK % 2 == 1) & (early // BLOCK % 2 == 0)


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
