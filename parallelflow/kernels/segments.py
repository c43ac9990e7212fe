"""Time cut into segments, so that few heads and a short batch fill a card: which, and where they lie.

A scan carries a state from chunk to chunk, and what runs at once is sequences x value heads x tiles of value channels.
Where that leaves multiprocessors idle, a long sequence is cut into segments of whole chunks.  A segment is to the scans
what a packed sequence is: some tokens, and a state to begin from.  Those states come from the segments' flows
S -> P S + H (the scan once more, without outputs), composed by ``compose``: exact for every driver.

The same bits, whatever else is in the batch: by default the cut of a sequence depends on its own number of chunks, the
value heads, the tiles of value channels and the card, never on other sequences.  The rule is ``segment_length``.
"""

from functools import lru_cache
from itertools import chain, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from .chunks import Chunks, known_chunks, to_device

SHORTEST = 8192  # tokens of a sequence that is cut whatever else there is; shorter ones come in batches
FEWEST = 16  # chunks of a segment: with less its flow, composed, costs more than it saves
PLACES = 3  # segments at least; with two the backward gains less than from its two scans side by side
PLACES_OF_UNITS = 4  # where the P of a segment takes programs of its own
HOPPERS = 132  # multiprocessors of an H100 or H200: in the rule where there is no GPU


class Segments(NamedTuple):
    """Sequences in segments; S segments of N sequences, F = S - N of them with a flow that somebody needs.

    layout: the segments as packed sequences.  first: int32 [N + 1], the first segment of each sequence.  leading: int32
    [F, 2], all but the last of each sequence, each beside the sequence that begins with it, else -1.  trailing: int32
    [F, 2], all but the first, each beside the sequence that ends with it, else -1.  begun, ended: int32 [S], the
    sequence that begins or ends with each segment, else -1.
    length: chunks of all segments but each sequence's last, of a regular batch (else 0).
    So segment g of sequence n has row g - n of ``leading`` and row g - n - 1 of ``trailing``.
    """

    layout: Chunks
    sequences: int
    flows: int
    first: Tensor
    leading: Tensor
    trailing: Tensor
    begun: Tensor
    ended: Tensor
    length: int = 0


def segment_length(steps: int, size: int, rivals: int, programs: int, units: int, processors: int,
                   batch_invariant: bool) -> int:  # fmt: skip
    """Chunks in each segment of a sequence of ``steps`` chunks of ``size`` tokens; ``steps`` or more: it is not cut.

    ``programs`` carry one sequence (value heads x tiles), and ``units`` more the P of a segment, where those take
    multiprocessors of their own.  All segments are to run at once, and before them all flows (the first needs no P, the
    last none at all), so there are at most ``processors // programs``, and fewer with units.  ``rivals`` is the number
    of chunks of all sequences; it counts only if not ``batch_invariant``, where the card is shared out among them and
    shorter sequences are cut too.
    """
    places = processors // programs
    few = places < (PLACES_OF_UNITS if units else PLACES)
    if few or (steps * size < SHORTEST if batch_invariant else steps < 2 * FEWEST):
        return steps
    if units:
        places = min(places, (processors + programs + 2 * units) // (programs + units))
    return max(FEWEST, -(-(steps if batch_invariant else rivals) // places))


@lru_cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU."""
    if device.type != "cuda":
        return HOPPERS
    return torch.cuda.get_device_properties(device).multi_processor_count


def regular_segments(batch: int, time: int, size: int, programs: int, units: int, batch_invariant: bool,
                     device: torch.device) -> Segments | None:  # fmt: skip
    """The segments of ``batch`` sequences of ``time`` tokens; None where none is cut."""
    steps = -(-time // size)
    length = segment_length(steps, size, batch * steps, programs, units, processors(device), batch_invariant)
    if length >= steps:
        return None
    return _regular(batch, time, size, length, device)


@lru_cache(maxsize=64)
def _regular(batch: int, time: int, size: int, length: int, device: torch.device) -> Segments:
    return _tables(tuple(range(0, batch * time + 1, time)), size, (length,) * batch, device)._replace(length=length)


def known_segments(starts: tuple[int, ...], size: int, programs: int, units: int, batch_invariant: bool,
                   device: torch.device) -> Segments | None:  # fmt: skip
    """The segments of packed sequences whose boundaries are known on the host; None where none is cut."""
    return _known(starts, size, programs, units, processors(device), batch_invariant, device)


@lru_cache(maxsize=16)
def _known(starts: tuple[int, ...], size: int, programs: int, units: int, processors: int, batch_invariant: bool,
           device: torch.device) -> Segments | None:  # fmt: skip
    steps = [-(-(last - first) // size) for first, last in pairwise(starts)]
    rivals = sum(steps)
    lengths = tuple(segment_length(own, size, rivals, programs, units, processors, batch_invariant) for own in steps)
    if all(length >= own for length, own in zip(lengths, steps, strict=True)):
        return None
    return _tables(starts, size, lengths, device)


def _tables(starts: tuple[int, ...], size: int, lengths: tuple[int, ...], device: torch.device) -> Segments:
    """Sequence n has tokens starts[n] to starts[n + 1], cut every lengths[n] chunks; an empty one is a segment."""
    edges, first, begun, ended = [starts[0]], [0], [], []
    for sequence, (begin, end) in enumerate(pairwise(starts)):
        ends = [*range(begin + lengths[sequence] * size, end, lengths[sequence] * size), end] if end > begin else [end]
        edges += ends
        begun += [sequence, *[-1] * (len(ends) - 1)]
        ended += [*[-1] * (len(ends) - 1), sequence]
        first.append(len(begun))
    count, sequences = len(edges) - 1, len(starts) - 1
    leading = chain.from_iterable((number, begun[number]) for number in range(count) if ended[number] < 0)
    trailing = chain.from_iterable((number, ended[number]) for number in range(count) if begun[number] < 0)
    tables = to_device([first, list(leading), list(trailing), begun, ended], device)
    return Segments(known_chunks(tuple(edges), size, device), sequences, count - sequences, tables[0],
                    tables[1].view(-1, 2), tables[2].view(-1, 2), tables[3], tables[4])  # fmt: skip
