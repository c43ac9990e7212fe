"""Across chunks by composing their flows in a tree."""

from __future__ import annotations

from torch import Tensor

from parallelflow.aggregate.base import Recursion, Trajectory
from parallelflow.flow import Flow, entry_states
from parallelflow.lanes import Lanes


def associative(recursion: Recursion, lanes: Lanes, initial: Tensor, reverse: bool = False) -> Trajectory:
    """Every chunk's flow at once, then an exclusive scan of them: 2 log2(chunks) stages, K³ a composition where P is
    dense, K or 1 where it is not. ``initial [lanes, HV, K, V]``.

    Source: Muca Cirone and Salvi, *ParallelFlow* (arXiv 2504.00492), section 2; Blelloch 1990, *Prefix sums and their
    applications*.
    """
    flows = recursion.flows(initial)
    if not reverse:
        entries, final = entry_states(flows, lanes, initial)
    else:
        order = lanes.reversal(initial.device)
        entries, final = entry_states(Flow(flows.transition[order], flows.source[order]), lanes, initial)
        entries = entries[order]
    return Trajectory(entries, *recursion.answers(entries, slice(None)), final)
