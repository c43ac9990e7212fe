"""Where the roles of the gradient kernel are: chunks by number, their rows for the copy engine, and steps counted."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier


@gluon.jit
def locate_chunk(own, extent, PACKED: gl.constexpr):
    """First token of an own chunk (``Chunks``), counted from the start of the batch, its number of tokens, and its
    number among all chunks."""
    table, time, length, per_sequence = extent
    if PACKED:
        first = gl.load(table + 2 * own)
        valid = gl.load(table + 2 * own + 1)
        chunk = own
    else:
        count = (length + 63) // 64
        sequence = own // count
        step = own - sequence * count
        first = sequence * time + step * 64
        valid = gl.minimum(length - step * 64, 64)
        chunk = sequence * per_sequence + step
    return first, valid, chunk


@gluon.jit
def window_of(first, length):
    """Coordinates of a chunk for a descriptor made by ``rows`` (descriptors.py).  A spare chunk reads one token."""
    spare = length == 0
    return gl.where(spare, 1, first + length), gl.where(spare, 63, 64 - length)


@gluon.jit
def await_step(barriers, step):
    """Wait until `step`, counted over all items, has arrived at its one of two barriers; steps before 0 have."""
    mbarrier.wait(barriers.index((step + 2) % 2), (((step + 2) // 2) & 1) ^ 1)
