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
    solutions: list[Tensor] = []
    ended: list[Tensor] = []
    state = initial[: lanes.active[-1]] if reverse else initial
    for step in reversed(range(lanes.steps)) if reverse else range(lanes.steps):
        active = lanes.active[step]
        if active < state.shape[0]:
            ended.append(state[active:])
            state = state[:active]
        elif active > state.shape[0]:
            state = torch.cat((state, initial[state.shape[0] : active]))
        entries.append(state)
        state, solution = recursion.step(state, lanes.at(step))
        if solution is not None:
            solutions.append(solution)
    if reverse:
        entries.reverse()
        solutions.reverse()
    return Trajectory(
        torch.cat(entries),
        torch.cat(solutions) if solutions else None,
        torch.cat([state, *reversed(ended)]) if ended else state,
    )
