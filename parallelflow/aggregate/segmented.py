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
    """Cuts each lane in segments, finds every segment's flow by carrying ``[I | 0]`` through it, composes those, and runs
    all segments at once from their entry states: the exact result for every driver."""
    runs, segments = lanes.cut(SEGMENTS)
    flows = _flows_of_runs(recursion, runs, initial, reverse)
    order = segments.reversal(initial.device) if reverse else None
    entries, final = entry_states(flows if order is None else flows[order], segments, initial)
    inside = sequential(recursion, runs, entries if order is None else entries[order], reverse)
    return inside._replace(final=final)


def _flows_of_runs(recursion: Recursion, runs: Lanes, initial: Tensor, reverse: bool) -> Flow:
    """Each run's ``(P, H)``: the identity beside a zero state, carried along. Where no row reads, P is diagonal and one
    column of ones shows it."""
    key_dim = initial.shape[-2]
    probe = torch.ones_like(initial[:1, ..., :1])
    if recursion.right is not None:
        probe = torch.eye(key_dim, dtype=initial.dtype, device=initial.device).expand(*initial[:1].shape[:-2], -1, -1)
    width = probe.shape[-1]
    blank = torch.zeros_like(initial[:1])
    start = torch.cat((probe, blank), -1).expand(len(runs.lengths), *(-1,) * (initial.ndim - 1))
    widened = replace(
        recursion,
        source=None if recursion.source is None else pad(recursion.source, (width, 0)),
        extra=None if recursion.extra is None else pad(recursion.extra, (width, 0)),
    )
    carried = sequential(widened, runs, start, reverse).final
    transition = carried[..., :width]
    return Flow(transition if recursion.right is not None else transition.squeeze(-1), carried[..., width:])
