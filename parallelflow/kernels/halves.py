"""The delta rule's passes in two halves, for initial states that are not known yet.

A problem in segments finds their flows before it runs them (``delta``), and flows need no initial state. So the first
half prepares and finds the flow of every segment, and by composition that of the whole sequences; the second, given the
initial states, runs the segments from their entry states and leaves behind what an ordinary forward pass does. Nothing
is rounded that is not rounded there, and where sequences are in segments no work is done twice. Where they are not,
each is one segment, and the flow is what the first half does more.

Backward, the gradient of the initial states is ``P^T dS + h``; h is composed of what the segments' outputs say of their
entry states (``reverse_flow_scan``).
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from parallelflow.decays import accurate
from parallelflow.flow import Flow

from .arena import Arena
from .compose import entry_states
from .delta import Arguments, contiguous, schedule_of
from .schedule import Schedule
from .segments import Segments


class Half(NamedTuple):
    """A forward pass after its first half: ``flows [S, HV, K, V + K]`` are [H | P] of all segments ([H] of rows that
    only write), ``flow`` is that of the whole sequences."""

    schedule: Schedule
    given: Arguments
    scale: float
    workspace: Tensor
    flows: Tensor
    flow: Flow


def begin(query: Tensor, key: Tensor, value: Tensor, beta: Tensor | None, log_decay: Tensor | None, *, tied: bool,
          scale: float, tier: str) -> Half:  # fmt: skip
    """The first half, of a batch as ``delta.forward`` takes it."""
    given = Arguments(*contiguous(query, key, value, beta, log_decay, None))
    schedule = schedule_of(given, tied, tier, True, None, None, None)
    query, key, value, beta, log_decay, _ = given
    workspace = schedule.workspace(schedule.kept_bytes, value.device)
    prepared = schedule.kept(Arena(workspace)).prepared
    schedule.prepare.prepare(query, key, beta, log_decay, schedule.chunks, scale=scale, into=prepared)
    every = _every_segment(schedule)
    heads, value_dim, key_dim = *value.shape[2:], key.shape[3]
    flows = value.new_empty(every.flows, heads, key_dim, value_dim + tied * key_dim, dtype=torch.float32)
    schedule.scans.flow_scan(key, value, prepared, every, initial_state=None, flows=flows)
    return Half(schedule, given, scale, workspace, flows, _whole(_flows(schedule, workspace, flows)))


def finish(half: Half, initial_state: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The second half: the output, and what ``delta.forward`` from these states keeps for its backward pass."""
    schedule, given, scale, workspace, flows, _ = half
    cut, kept = schedule.segments, schedule.kept(Arena(workspace))
    state = initial_state.float().contiguous()
    if cut is not None:
        leading = kept.flows.unflatten(0, (cut.sequences, -1))  # all but each sequence's last
        leading.copy_(flows.unflatten(0, (cut.sequences, -1))[:, :-1])
        wide = accurate(flows.device)  # of the first ones, what the initial states become
        first = Flow(*(part[:, 0].to(wide) for part in _flows(schedule, workspace, flows)))
        leading[:, 0, ..., : given.value.shape[3]] = first.apply(state.to(wide))
        entry_states(kept.flows, kept.prepared.total, cut, state, dense=schedule.tied, into=kept.entries)
        state = kept.entries
    output = torch.empty_like(given.value)
    schedule.scans.forward_scan(
        *given[:3], kept.prepared, schedule.layout, scale=scale, initial_state=state, output=output,
        final_state=None, ended=None, halts=kept.halts, halt=schedule.halt)  # fmt: skip
    return output, [workspace]


def pull(query: Tensor, key: Tensor, value: Tensor, beta: Tensor | None, log_decay: Tensor | None, workspace: Tensor,
         flows: Tensor, d_output: Tensor, *, tied: bool, scale: float, tier: str) -> Tensor:  # fmt: skip
    """h, ``[B, HV, K, V]`` in float32, from what the two halves left."""
    given = Arguments(*contiguous(query, key, value, beta, log_decay, None))
    schedule = schedule_of(given, tied, tier, True, None, None, None)
    every = _every_segment(schedule)
    prepared = schedule.kept(Arena(workspace)).prepared
    sources = torch.empty(
        every.flows, *given.value.shape[2:3], key.shape[3], value.shape[3], dtype=torch.float32, device=value.device
    )
    schedule.scans.reverse_flow_scan(
        given.query, given.key, d_output.contiguous(), prepared, every, scale=scale, d_final_state=None,
        sources=sources)  # fmt: skip
    transition, _ = _flows(schedule, workspace, flows)
    sources = sources.unflatten(0, (every.sequences, -1))
    adjoint = Flow(transition.mT if schedule.tied else transition, sources)
    return _whole(Flow(*(part.flip(1) for part in adjoint))).source


def _flows(schedule: Schedule, workspace: Tensor, flows: Tensor) -> Flow:
    """The flows of all segments, ``[B, segments, …]``; the transition of rows that only write is the product of their
    chunks' decays."""
    chunks, value_dim = schedule.chunks, schedule.value.shape[3]
    by_segment = flows.unflatten(0, (chunks.sequences, -1))
    if schedule.tied:
        return Flow(by_segment[..., value_dim:], by_segment[..., :value_dim])
    total = schedule.kept(Arena(workspace)).prepared.total.unflatten(0, (chunks.sequences, chunks.per_sequence))
    length = chunks.per_sequence if schedule.segments is None else schedule.segments.length
    return Flow(torch.stack([part.prod(1) for part in total.split(length, 1)], 1), by_segment)


def _whole(flows: Flow) -> Flow:
    """The flow over all of ``[B, segments, …]``, composed in pairs, in the widest dtype; returned in float32."""
    wide = accurate(flows.source.device)
    found = Flow(flows.transition.to(wide), flows.source.to(wide))
    while found.source.shape[1] > 1:
        pairs = found.source.shape[1] // 2 * 2
        first, second = (Flow(*(part[:, n:pairs:2] for part in found)) for n in range(2))
        both = first.then(second)
        found = Flow(*(torch.cat([pair, part[:, pairs:]], 1) for pair, part in zip(both, found, strict=True)))
    return Flow(*(part[:, 0].float() for part in found))


@lru_cache(maxsize=64)
def _table(count: int, device: torch.device) -> Tensor:
    """All of so many segments, none with a sequence whose state is known."""
    return torch.stack([torch.arange(count), torch.full((count,), -1)], 1).to(torch.int32).to(device)


def _every_segment(schedule: Schedule) -> Segments:
    """The segments, or the sequences where they are whole, as those whose flows are wanted, each from no state."""
    chunks, cut = schedule.chunks, schedule.segments
    count = chunks.sequences if cut is None else cut.layout.sequences
    table = _table(count, schedule.device)
    if cut is None:  # where they begin and end is of no matter here
        return Segments(chunks, chunks.sequences, count, table, table, table, table, table, chunks.per_sequence)
    return cut._replace(flows=count, leading=table, trailing=table)
