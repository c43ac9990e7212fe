"""Across chunks one after another, all lanes at once."""

from __future__ import annotations

import torch
from torch import Tensor

from parallelflow.aggregate.base import Recursion, Trajectory
from parallelflow.lanes import Lanes


def sequential(recursion: Recursion, lanes: Lanes, initial: Tensor, reverse: bool = False) -> Trajectory:
    """Carries S from chunk to chunk: as many stages as the longest lane has chunks, and no P is ever formed."""
    state = lanes.sort(initial)
    entries: list[Tensor] = []
    solutions: list[Tensor] = []
    done: list[Tensor] = []  # lanes that ended, the longest last
    for step in range(max(lanes.lengths)):
        active = lanes.active(step)
        if active < state.shape[0]:
            done.append(state[active:])
            state = state[:active]
        entries.append(state)
        state, solution = recursion.step(state, lanes.select(step, initial.device, reverse))
        if solution is not None:
            solutions.append(solution)
    final = lanes.unsort(torch.cat([state, *reversed(done)])) if done else lanes.unsort(state)
    return Trajectory(
        lanes.gather(entries, reverse),
        lanes.gather(solutions, reverse) if solutions else None,
        final,
    )
