"""Decays inside a chunk, for the kernel in ``pull.py``: their sums beforehand, and afterwards sums of slopes.

Decays a key channel of a chunk that may be centred (``kernels/rows/factors.py``) are summed once a channel; decays a
head once a row, in float64, for one may be as strong as it likes beside a weak one.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .primitives import opaque


@gluon.jit
def add(x, y):
    return x + y


@gluon.jit
def load_decays(log_decay, length, HV: gl.constexpr, K: gl.constexpr):
    """A chunk's decays of 64 channels in units of log 2, 0 where there is none. One under -800 counts as -800."""
    down: gl.constexpr = gl.BlockedLayout([64, 1], [1, 32], [1, 4], [1, 0])  # no sum leaves its thread
    token = gl.arange(0, 64, gl.SliceLayout(1, down))
    channel = gl.arange(0, 64, gl.SliceLayout(0, down))
    inside = (token < length)[:, None] & (channel < 64)[None, :]
    at = token[:, None] * (HV * K) + channel[None, :]
    decays = gl.load(log_decay + at, mask=inside, other=0.0).to(gl.float32)
    return gl.where(decays < -800.0, -800.0, decays) * 1.4426950408889634


@gluon.jit
def sum_decays(decays, tiles, half_line, RAW: gl.constexpr):
    """c_t - m of every token and channel, with m half the chunk's sum, in units of log 2; RAW: also c_{t-1} - m; e^m.
    The sums are at most 144 in bfloat16 and 6 in float16 here (``layout.centred``), so that a difference loses less
    than a rounding to 16 bits."""
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


@gluon.jit
def sum_tokens(log_decay, first, length, head, lines, place: gl.constexpr, C: gl.constexpr, PLACES: gl.constexpr,
               HV: gl.constexpr, EXCLUSIVE: gl.constexpr):  # fmt: skip
    """Sums of scalar decays from the chunk's start to the token of each of 64 rows, PLACES a token, in units of log 2,
    into two lines: a float32 number and what it leaves. Returns the sum of all, in float64."""
    flat: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    row = gl.arange(0, 64, flat)
    token = row // PLACES
    there = (token < length) & (token < C)
    own = gl.load(log_decay + first.to(gl.int64) * HV + head + token * HV, mask=there, other=0.0).to(gl.float64)
    own = gl.where(own < -800.0, -800.0, own) * 1.4426950408889634
    step = gl.where(row % PLACES == 0, own, 0.0)
    sums = gl.associative_scan(step, 0, add)
    if EXCLUSIVE:
        sums = sums - own
    high = sums.to(gl.float32)
    lines.index(place).store(high)
    lines.index(place + 1).store((sums - high.to(gl.float64)).to(gl.float32))
    return gl.sum(step, 0)


@gluon.jit
def from_start(lines, place: gl.constexpr, by_row: gl.constexpr):
    """e^{sum up to each row}."""
    return gl.exp2(lines.index(place).load(by_row))[:, None]


@gluon.jit
def to_end(end, lines, place: gl.constexpr, by_row: gl.constexpr):
    """e^{sum after each row}."""
    high = end.to(gl.float32)
    low = (end - high.to(gl.float64)).to(gl.float32)
    return gl.exp2((high - lines.index(place).load(by_row)) + (low - lines.index(place + 1).load(by_row)))[:, None]


@gluon.jit
def kept(pairs, keep, lines, late: gl.constexpr, early: gl.constexpr, by_row: gl.constexpr, by_column: gl.constexpr,
         SCALAR: gl.constexpr):  # fmt: skip
    """``pairs`` where ``keep``, times the decay between their tokens if that is a scalar."""
    if SCALAR:
        high = lines.index(late).load(by_row)[:, None] - lines.index(early).load(by_column)[None, :]
        low = lines.index(late + 1).load(by_row)[:, None] - lines.index(early + 1).load(by_column)[None, :]
        return pairs * gl.exp2(gl.where(keep, high + low, float("-inf")))
    else:
        return gl.where(keep, pairs, 0.0)


@gluon.jit
def later(sums, lines, place: gl.constexpr, row, of, by_column: gl.constexpr):
    """``sums`` and a line's slopes where their row's token ``of`` is not before that of the row of sums."""
    return sums + gl.where(of[None, :] >= row[:, None], lines.index(place).load(by_column)[None, :], 0.0)
