"""Across chunks one after another, all lanes at once."""

from __future__ import annotations

import torch
from torch import Tensor

from parallelflow.aggregate.base import Recursion, Trajectory
from parallelflow.lanes import Lanes


def sequential(recursion: Recursion, lanes: Lanes, initial: Tensor, reverse: bool = False) -> Trajectory:
    """Carries S from chunk to chunk: as many stages as the longest lane has chunks, and no P is ever formed.

    Lanes that are shorter leave at their end, or, in reverse, join there.
    """
    entries: list[Tensor] = []
    written: list[Tensor] = []
    said: list[Tensor] = []
    ended: list[Tensor] = []
    state, owned = initial[: lanes.active[-1]] if reverse else initial, False
    for step in reversed(range(lanes.steps)) if reverse else range(lanes.steps):
        active = lanes.active[step]
        if active < state.shape[0]:
            ended.append(state[active:])
            state, owned = state[:active], False
        elif active > state.shape[0]:
            state = torch.cat((state, initial[state.shape[0] : active]))
        following, writes, says = recursion.step(state, lanes.at(step), owned)
        if recursion.keep:
            entries.append(state)
            written.append(writes)
        if says is not None:
            said.append(says)
        state, owned = following, not recursion.keep
    return Trajectory(
        _along(entries, reverse),
        _along(written, reverse),
        _along(said, reverse),
        torch.cat([state, *reversed(ended)]) if ended else state,
    )


def _along(pieces: list[Tensor], reverse: bool) -> Tensor | None:
    """The steps' pieces on the axis of chunks."""
    if not pieces:
        return None
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces[::-1] if reverse else pieces)
