"""What follows from shapes, dtypes and options alone, found once: chunks, segments, arrays, and which stages run.

A call then takes one workspace from the allocator, in which every array has its place, and launches.
"""

from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import gradient as portable_gradient
from . import pieces, segments
from . import prepare as portable_prepare
from .arena import Arena
from .chunks import Chunks, known_chunks, packed_chunks, regular_chunks
from .pieces import Group
from .plan import Pass
from .prepare import Prepared, vacant_arrays
from .scan import SCANS
from .scans import Scans
from .segments import Segments, known_segments, regular_segments
from .streams import leaves_room


class Kept(NamedTuple):
    """What the forward pass leaves to the backward one: the arrays of ``prepare``; if sequences are cut, the segments'
    flows and the states at their entries (else not to be used); if they go back in pieces, the states at their entries
    (else None)."""

    prepared: Prepared
    flows: Tensor
    entries: Tensor
    halts: Tensor | None


class Scratch(NamedTuple):
    """What only the backward pass needs, for a piece at a time: the states at the chunks' entries, R, the gradients of
    the states at their exits; those at the exit of the piece or the segments, what segments add to them, the gradient
    stage's own. What a problem does not need has no place, and the exit gradients stand for it."""

    entry_states: Tensor
    innovation: Tensor
    exit_gradients: Tensor
    carried: Tensor
    sources: Tensor
    sums: Any


def chunk_size(query: Tensor, value: Tensor) -> int:
    """Tokens in a chunk: 64, or 32 where a token's key or value takes more than 512 bytes."""
    return 64 if max(query.shape[-1], value.shape[-1]) * query.element_size() <= 512 else 32


def chunks_of(query: Tensor, value: Tensor, cu_seqlens: Tensor | None, cu_seqlens_host: Tensor | None,
              sequence_starts: tuple[int, ...] | None = None) -> Chunks:  # fmt: skip
    """How the line is cut."""
    batch, time = query.shape[:2]
    size = chunk_size(query, value)
    if sequence_starts is not None:
        return known_chunks(sequence_starts, size, query.device)
    if cu_seqlens is None:
        return regular_chunks(batch, time, size)
    return packed_chunks(cu_seqlens, time, size, cu_seqlens_host)


class Schedule:
    """One problem's stages and arrays."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, chunks: Chunks, tied: bool, tier: str,
                 batch_invariant: bool, sequence_starts: tuple[int, ...] | None) -> None:  # fmt: skip
        self.query, self.value = (torch.empty_like(tensor, device="meta") for tensor in (query, value))
        self.chunks, self.tied, self.device = chunks, tied, query.device
        self.prepare, self.scans, self.gradient = stages(tier, query, key, value, chunks)
        programs = value.shape[2] * self.scans.tiles(key, value, tied)
        self.segments = self._segments(programs, sequence_starts, batch_invariant, query.device)
        self.layout = chunks if self.segments is None else self.segments.layout
        self.overwrites = tied and self.gradient.may_overwrite(query, value)
        self.groups = self._groups(programs, segments.processors(query.device), sequence_starts, query.device)
        self.halt = -(-self.groups[0].pieces[0].layout.length // chunks.size)  # chunks of a piece
        self.together = leaves_room(query.device, self.groups[0].layout.sequences * programs)
        self.kept_bytes, self.passing_bytes, self.scratch_bytes = Arena(), Arena(), Arena()
        self.kept(self.kept_bytes)
        self.kept(self.passing_bytes, halting=False)
        self.scratch(self.scratch_bytes)
        self.passes: dict[tuple, Pass] = {}

    def _segments(self, programs: int, starts: tuple[int, ...] | None, batch_invariant: bool,
                  device: torch.device) -> Segments | None:  # fmt: skip
        """None where nothing is cut; nothing is where only the device knows how long the sequences are."""
        chunks = self.chunks
        if starts is not None:
            return known_segments(starts, chunks.size, programs, 0, batch_invariant, device)
        if chunks.packed or not chunks.count:
            return None
        return regular_segments(chunks.sequences, chunks.time, chunks.size, programs, 0, batch_invariant, device)

    def _groups(self, programs: int, processors: int, starts: tuple[int, ...] | None,
                device: torch.device) -> list[Group]:  # fmt: skip
        """How the sequences go back; segments, which are many and short, all in one piece, and so does a packed line
        of which only the device knows where its sequences end."""
        chunks, groups = self.chunks, []
        state = prod(self.value.shape[2:]) * self.query.shape[3] * self.value.element_size()
        if self.segments is None and chunks.count and starts is not None:
            groups = pieces.packed_groups(starts, chunks.size, state, programs, processors, device)
        elif self.segments is None and chunks.count and not chunks.packed:
            groups = pieces.groups_of(chunks, state, programs, processors)
        return groups or pieces.whole(self.layout, chunks)

    def kept(self, arena: Arena, halting: bool = True) -> Kept:
        """The arrays of the forward pass, with or without what only a backward pass wants."""
        heads, v, k = *self.value.shape[2:], self.query.shape[3]
        prepared = vacant_arrays(arena, self.query.dtype, heads, self.chunks, tied=self.tied)
        cut = self.segments
        if cut is None:
            halts, number = None, len(self.groups[0].pieces)
            if number > 1 and halting:
                halts = arena.empty(number, self.chunks.sequences, heads, k, v, dtype=torch.float32)
            return Kept(prepared, prepared.total, prepared.total, halts)
        flows = arena.empty(cut.flows, heads, k, v + k if self.tied else v, dtype=torch.float32)
        return Kept(prepared, flows, arena.empty(cut.layout.sequences, heads, k, v, dtype=torch.float32), None)

    def scratch(self, arena: Arena) -> Scratch:
        """The arrays of the backward pass that do not outlive it."""
        value, dtype = self.value, self.value.dtype
        heads, v, k = *value.shape[2:], self.query.shape[3]
        layouts = [piece.layout for group in self.groups for piece in group.pieces]
        layout, count = layouts[0], max(layout.count for layout in layouts)
        entry_states = arena.empty(count, heads, v, k, dtype=dtype)
        innovation = carried = sources = exit_gradients = arena.empty(count, heads, v, k, dtype=dtype)
        if self.tied and not self.overwrites:
            batch = value.shape[0] if layout.packed else layout.sequences
            # of several sequences R lies as their values do: the piece's first tokens of each are apart
            length = layout.time if batch > 1 else max(layout.length for layout in layouts)
            innovation = arena.empty(batch, length, heads, v, dtype=dtype)
        if self.segments is not None:
            carried = arena.empty(self.layout.sequences, heads, k, v, dtype=torch.float32)
            sources = arena.empty(self.segments.flows, heads, k, v, dtype=torch.float32)
        elif len(self.groups[0].pieces) > 1:
            carried = arena.empty(layout.sequences, heads, k, v, dtype=torch.float32)
        sums = self.gradient.vacant_sums(arena, self.query, value, count, self.chunks.size)
        return Scratch(entry_states, innovation, exit_gradients, carried, sources, sums)

    def one(self, *options: Any) -> Pass:
        """The pass with these options."""
        found = self.passes.get(options)
        if found is None:
            found = self.passes[options] = Pass()
        return found

    def workspace(self, arena: Arena, device: torch.device) -> Tensor:
        """Memory for as much as ``arena`` measured."""
        return torch.empty(arena.size, dtype=torch.uint8, device=device)


def stages(tier: str, query: Tensor, key: Tensor, value: Tensor, chunks: Chunks) -> tuple[Any, Scans, Any]:
    """What prepares, scans and forms gradients in a tier; the portable ones where Hopper's do not fit."""
    if tier == "triton":
        return portable_prepare, SCANS, portable_gradient
    if tier != "hopper":
        raise ValueError(f"tier: got {tier!r}, expected 'triton' or 'hopper'")
    from .hopper import gradient, prepare, scan

    return (prepare if prepare.fits(query, key, chunks) else portable_prepare, scan.SCANS,
            gradient if gradient.fits(query, value, chunks) else portable_gradient)  # fmt: skip
