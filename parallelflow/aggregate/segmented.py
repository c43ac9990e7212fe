"""Across chunks in a few segments at once: the way to use many workers when batch and heads are few."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from parallelflow.aggregate.base import Recursion, Trajectory
from parallelflow.aggregate.sequential import sequential
from parallelflow.flow import Flow, entry_states
from parallelflow.lanes import Lanes

SEGMENTS = 8  # at most, a lane


def segmented(recursion: Recursion, lanes: Lanes, initial: Tensor, reverse: bool = False) -> Trajectory:
    """Cuts each lane in segments, finds every segment's flow by carrying ``[I | 0]`` through it, composes those, and
    runs all segments at once from their entry states: the exact result for every driver."""
    runs, lanes_of_runs, chunks, numbers = lanes.cut(SEGMENTS, initial.device)
    recursion = replace(recursion, system=recursion.system.take(chunks))
    flows = _flows_of_runs(recursion, runs, initial, reverse)  # in the order in which the runs are given
    if reverse:
        numbers = numbers[lanes_of_runs.reversal(initial.device)]
    ordered = Flow(flows.transition[numbers], flows.source[numbers])
    entries, final = entry_states(ordered, lanes_of_runs, initial)
    back = numbers.argsort()
    inside = sequential(recursion, runs, runs.sort(entries[back]), reverse)
    places = chunks.argsort()

    def back_in_place(along: Tensor | None) -> Tensor | None:
        return None if along is None else along[places]

    parts = [back_in_place(part) for part in (inside.entries, inside.written, inside.said)]
    return Trajectory(parts[0], parts[1], parts[2], final)


def _flows_of_runs(recursion: Recursion, runs: Lanes, initial: Tensor, reverse: bool) -> Flow:
    """Each run's ``(P, H)``: the identity beside a zero state, carried along. Where no row reads, P is diagonal and one
    column of ones shows it."""
    system, (_, heads, key_dim, value_dim) = recursion.system.without_queries(), initial.shape
    if system.factors is None:
        probe = initial.new_ones(key_dim, 1)
    else:
        probe = torch.eye(key_dim, dtype=initial.dtype, device=initial.device)
    width = probe.shape[-1]

    source = None if system.source is None else system.source._replace(vectors=pad(system.source.vectors, (width, 0)))
    given = None if system.given is None else pad(system.given, (width, 0))
    system = replace(system, source=source, given=given)
    start = pad(probe, (0, value_dim)).expand(len(runs), heads, -1, -1)
    carried = runs.unsort(sequential(Recursion(system, keep=False), runs, start, reverse).final)
    transition = carried[..., :width]
    return Flow(transition.squeeze(-1) if system.factors is None else transition, carried[..., width:])
