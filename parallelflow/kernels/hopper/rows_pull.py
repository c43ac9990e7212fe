"""The gradients of the rows and of the decays (``kernels/rows/pull.py``) on Hopper GPUs: what they launch, and what
they serve.  ``serves`` is the one place that says so; the rest is left to the portable kernels."""

from torch import Tensor
from triton import next_power_of_2

from ..chunks import Chunks
from ..launch import bind
from ..rows.layout import SCALAR_DECAY, VECTOR_DECAY, WHOLE, Factor, Layout
from ..rows.pull import Tier
from .descriptors import CHUNK, Descriptor, blocks, places, rows
from .pull import rows_pull_kernel
from .rows_scan import SHARED_BYTES, reaches

CHANNELS = 64  # of the keys, in a program; also the columns of every tile
TILE = CHUNK * CHANNELS * 2  # bytes
BARRIERS = 1024  # bytes, and a number a channel
LINES = 8 * CHUNK * 4  # bytes of sums of scalar decays


def shared_bytes(layout: Layout, tied: bool) -> int:
    """What a program takes."""
    reading, lone = layout.R > 0, layout.L > 0
    vector, scalar = layout.decay == VECTOR_DECAY, layout.decay == SCALAR_DECAY
    parts = layout.V // CHANNELS
    values = parts * (3 + 2 * reading + lone)
    keys = 1 + reading * (1 + (lone and not tied)) + lone
    exponents = 2 * vector * (1 + (layout.raw and reading))
    own = 2 * (scalar and layout.R > 1 and parts == 1)
    again = vector and reading and lone and tied  # where everything else is taken
    return (values + keys + exponents + own + again) * TILE + scalar * LINES + BARRIERS


def serves(layout: Layout, chunks: Chunks, read: Factor | None) -> bool:
    """Whether the Hopper kernel takes these rows, on a device and of a dtype that Hopper's scans take: K and V
    multiples of 64; at most one row of a family a token where decays are a channel's; coefficients a channel of 16
    bits, and without rows that only write."""
    families = [count for count in (layout.R, layout.L) if count]
    return (
        layout.K % CHANNELS == 0
        and layout.V % CHANNELS == 0
        and (read is None or read.kind < 2 or (layout.L == 0 and _narrow(read.coefficient)))
        and (layout.decay != VECTOR_DECAY or (layout.C == CHUNK and max(families) == 1))
        and (layout.decay != SCALAR_DECAY or layout.L < 2)
        and all(count == next_power_of_2(count) or layout.C * next_power_of_2(count) == CHUNK for count in families)
        and layout.C * next_power_of_2(max(families)) <= CHUNK
        and max(shared_bytes(layout, tied) for tied in (False, True)) <= SHARED_BYTES
        and reaches(layout, chunks)
    )


def channels(layout: Layout, full: bool) -> int:
    """Channels of the keys in a program."""
    return CHANNELS


def _narrow(coefficient: Tensor | None) -> bool:
    return coefficient is not None and coefficient.element_size() == 2


def launch(count: int, arrays: tuple, layout: Layout, chunks: Chunks, constants: dict, tokens: int,
           scale: float) -> None:  # fmt: skip
    """All chunks but those too strong to be centred; ``arrays`` and ``constants`` are those of the portable kernel."""
    (query, vector, coefficient, write, lone_write, log_decay, solution, given, d_source, d_output, entry_states,
     exit_gradients, _, floors, _, _, _, _, _, _, *gradients, table, time, per_sequence) = arrays  # fmt: skip
    square = blocks(entry_states, CHANNELS, CHANNELS)  # stands in for descriptors that are not read

    def tiles(tensor: Tensor | None) -> Descriptor:
        if tensor is None:
            return square
        if tensor.data_ptr() % 16:  # a copy needs that much
            tensor = tensor.clone()
        alone = tensor.ndim == 4 or tensor.shape[2] == next_power_of_2(tensor.shape[2])
        return (rows if alone else places)(tensor, CHANNELS, CHUNK)

    named = ("C", "R", "L", "H", "HV", "K", "V", "DECAY", "RAW", "SEQUENTIAL", "READ_HEADS", "READ_KIND",
             "READ_COEFFICIENT_HEADS", "READ_SIGN", "WRITE_HEADS", "LONE_HEADS", "GIVEN_HEADS", "TIED",
             "PACKED")  # fmt: skip
    bound = bind(
        rows_pull_kernel, **{name: constants[name] for name in named}, WHOLE=WHOLE,
        PLACES=next_power_of_2(max(layout.R, 1)), LONE_PLACES=next_power_of_2(max(layout.L, 1)), num_warps=4,
    )  # fmt: skip
    factors = coefficient if constants["READ_KIND"] == 2 else None
    bound(
        count * (layout.K // CHANNELS), tiles(query), tiles(vector), tiles(factors), tiles(write), tiles(lone_write),
        tiles(d_output), tiles(d_source), tiles(solution), tiles(given), square,
        blocks(exit_gradients, CHANNELS, CHANNELS), coefficient, lone_write, log_decay, floors, *gradients, table, time,
        per_sequence, tokens, scale,
    )  # fmt: skip


HOPPER = Tier(launch, channels, True)
