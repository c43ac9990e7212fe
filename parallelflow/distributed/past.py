"""The inputs just before a rank's tokens, for whatever looks back a few: short convolutions, token shifts."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.autograd.function import once_differentiable

from parallelflow.checks import expect_shape
from parallelflow.distributed import agreement
from parallelflow.distributed.context import Context
from parallelflow.distributed.shards import Shard

WHAT = "the last inputs of the ranks before"


class Piece(NamedTuple):
    """Places ``start`` to ``stop`` of the line, which ``source`` has and ``target`` wants."""

    source: int
    target: int
    start: int
    stop: int


class Pieces(NamedTuple):
    """Who sends what to whom so that every rank has the ``past`` inputs before its first token, of the sequence that
    goes on there. ``lengths`` are the ranks' tokens, ``starts`` the packed sequences' boundaries (None: sequences side
    by side); these have ``past`` places before the line's first, which the first rank holds."""

    lengths: tuple[int, ...]
    past: int
    starts: tuple[int, ...] | None

    @property
    def edges(self) -> list[int]:
        return [0, *accumulate(self.lengths)]

    def of(self, rank: int) -> list[Piece]:
        """Those that this rank sends or receives."""
        edges, found = self.edges, []
        for target in range(1, len(self.lengths)):
            first = edges[target]
            least = -self.past if self.starts is None else self._begin(first)
            for source in range(target):
                low = edges[source] if source else least
                start, stop = max(low, least, first - self.past), min(edges[source + 1], first)
                if start < stop and rank in (source, target):
                    found.append(Piece(source, target, start, stop))
        return found

    def _begin(self, place: int) -> int:
        """Where the sequence begins that goes on at ``place``; ``place`` where none does."""
        assert self.starts is not None
        return max(start for start in self.starts if start <= place)


class _Past(torch.autograd.Function):
    """``(context, pieces, line) -> (line, window [B, past, C])``; the line is this rank's inputs, and on the first
    rank, of sequences side by side, the ``past`` before them. The backward pass sends the other way; it runs on every
    rank, for every rank goes on with its line."""

    @staticmethod
    def forward(ctx: Any, context: Context, pieces: Pieces, line: Tensor) -> tuple[Tensor, Tensor]:
        ctx.context, ctx.pieces = context, pieces
        window = line.new_zeros(line.shape[0], pieces.past, line.shape[2])
        _trade(context, pieces, line, window, adjoint=False)
        return line.view_as(line), window

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_line: Tensor, d_window: Tensor) -> tuple[None, None, Tensor]:
        d_line = d_line.clone()
        _trade(ctx.context, ctx.pieces, d_line, d_window, adjoint=True)
        return None, None, d_line


def _trade(context: Context, pieces: Pieces, line: Tensor, window: Tensor, *, adjoint: bool) -> None:
    """From lines into windows, or, adjoint, from windows onto lines."""
    context.meet(line.device)
    edges, rank = pieces.edges, context.rank
    base = edges[rank] - (line.shape[1] - pieces.lengths[rank])  # the place of the line's first input
    sends, receives, arrivals = [], [], []
    for piece in pieces.of(rank):
        if piece.target == rank:
            mine, other = window, piece.source
            first = pieces.past - edges[rank]
        else:
            mine, other = line, piece.target
            first = -base
        part = mine[:, piece.start + first : piece.stop + first]
        if (piece.source == rank) != adjoint:
            sends.append((other, part.contiguous()))
        else:
            arrivals.append((part, torch.empty_like(part, memory_format=torch.contiguous_format)))
            receives.append((other, arrivals[-1][1]))
    context.wait(context.start_trade(sends, receives, WHAT), WHAT)
    for part, arrived in arrivals:
        part += arrived


class Surroundings(NamedTuple):
    """What a rank's sequences are and see: its ``inputs``, ``window [N, past, C]`` before each of the sequences that
    have tokens here, and their boundaries ``cu_seqlens`` here (None: side by side)."""

    inputs: Tensor
    window: Tensor
    cu_seqlens: Tensor | None


@_disable_dynamo
def past_inputs(
    inputs: Tensor,
    past: int,
    window: Tensor | None,
    cu_seqlens: Tensor | None,
    context_group: Any,
    context_lengths: Sequence[int] | None = None,
) -> Surroundings:
    """The ``past`` inputs before this rank's ``[B, T, C]``, zeros before a sequence's first.

    Args:
        window: ``[B, past, C]``, what the first rank's sequences have before them; None is zeros.
        cu_seqlens: the packed sequences' boundaries on the whole line.
        context_group: see ``integrate``; ``context_lengths`` None are asked for.

    Raises:
        ValueError: for a window of another shape, and for one with packed sequences.
    """
    context = Context.of(context_group)
    batch, time, channels = inputs.shape
    if window is not None:
        if cu_seqlens is not None:
            raise ValueError("memory: got one with cu_seqlens and a context_group, expected one or the other")
        expect_shape("memory.window", window, "[N, width - 1, channels]", (batch, past, channels))
    if context_lengths is None:
        context_lengths = agreement.lengths_of(context, time, inputs.device)
    starts = None if cu_seqlens is None else tuple(cu_seqlens.tolist())
    line = inputs
    if context.rank == 0 and cu_seqlens is None:
        window = inputs.new_zeros(batch, past, channels) if window is None else window.to(inputs.dtype)
        line = torch.cat([window, inputs], 1)
    line, before = _Past.apply(context, Pieces(tuple(context_lengths), past, starts), line)
    if starts is None:
        held = line.shape[1] - time  # past on the first rank, which has its window from the start
        return Surroundings(line[:, held:], line[:, :held] if held else before, None)
    shard = Shard.packed(context.rank, context_lengths, starts)
    assert shard.rest_starts is not None
    bounds = [shard.head + bound for bound in shard.rest_starts]
    bounds = [0, *bounds] if shard.continued else bounds
    windows = inputs.new_zeros(len(bounds) - 1, past, channels)
    if shard.continued:
        windows = torch.cat([before, windows[1:]])
    return Surroundings(line, windows, torch.tensor(bounds, dtype=torch.int64, device=inputs.device))
