"""The products of the kernel in ``pull.py``, and the tiles of 64 rows and columns that they read."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from .primitives import unpack
from .rows import fetch_rows


@gluon.jit
def fetch_values(descriptor, tiles, ready, first, length, column, C: gl.constexpr, COUNT: gl.constexpr,
                 PARTS: gl.constexpr):  # fmt: skip
    """A chunk's rows, 64 columns a tile."""
    for p in gl.static_range(PARTS):
        fetch_rows(descriptor, tiles.index(p), ready, first, first + length, 0, column + p * 64, True, C, COUNT, 64)


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
def late_rows(tile, target, weight, factors, exponents, layout: gl.constexpr, KIND: gl.constexpr, SIGN: gl.constexpr,
              VECTOR: gl.constexpr):  # fmt: skip
    """Readers at the chunk's middle, with their sign and their weight, or a factor a channel."""
    rows = unpack(tile.load(layout))
    if KIND == 1:
        rows = rows * weight[:, None]
    else:
        if KIND == 2:
            rows = rows * unpack(factors.load(layout))
        if SIGN == -1:
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
