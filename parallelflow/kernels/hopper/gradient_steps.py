"""Where the roles of the gradient kernel are: chunks by number, their rows for the copy engine, and steps counted."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier


@gluon.jit
def locate_chunk(chunk, table, time, per_sequence, PACKED: gl.constexpr):
    """First token of a chunk, counted from the start of the batch, and its number of tokens."""
    if PACKED:
        first = gl.load(table + 2 * chunk)
        length = gl.load(table + 2 * chunk + 1)
    else:
        sequence = chunk // per_sequence
        step = (chunk - sequence * per_sequence) * 64
        first = sequence * time + step
        length = gl.minimum(time - step, 64)
    return first, length


@gluon.jit
def window_of(first, length):
    """Coordinates of a chunk for a descriptor made by ``rows`` (descriptors.py).  A spare chunk reads one token."""
    spare = length == 0
    return gl.where(spare, 1, first + length), gl.where(spare, 63, 64 - length)


@gluon.jit
def await_step(barriers, step):
    """Wait until `step`, counted over all items, has arrived at its one of two barriers; steps before 0 have."""
    mbarrier.wait(barriers.index((step + 2) % 2), (((step + 2) // 2) & 1) ^ 1)
