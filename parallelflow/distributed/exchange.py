"""The state that enters each rank, from the flows of the ranks before it: a scan over ranks.

Three ways give the same state. With s bytes of state and p of transition, W ranks of which a sequence crosses at most D
boundaries, and L the bytes that a link carries in the time that a message takes to start:

* ``ring``: rank after rank applies its flow to the state and hands it on; D (L + s).
* ``scan``: recursive doubling; ⌈log₂(D + 1)⌉ rounds in which windows of 1, 2, 4, … ranks are composed. A window that
  reaches back to a sequence's first rank is a state alone, as all are in the last round: rounds · (L + s + p) - p.
* ``all_gather``: everyone's flow to everyone, who then applies those before; L + (W - 1)(s + p).

``cheapest`` is the rule: the least of the three. None depends on the number of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from parallelflow.decays import accurate
from parallelflow.distributed.context import Context, Transfer
from parallelflow.flow import Flow

WHAT = "the exchange of flows"
LATENCY_BYTES = {True: 4 << 20, False: 128 << 10}
"""L, over NCCL (some 10 µs at 400 GB/s) and otherwise (some 100 µs at 1 GB/s)."""

METHODS = ("ring", "scan", "all_gather")


def costs(size: int, span: int, state: float, transition: float, latency: float) -> dict[str, float]:
    """Of each way, in bytes on the longest path (see above); ``span`` is D."""
    rounds = span.bit_length()  # ⌈log₂(D + 1)⌉
    return {
        "ring": span * (latency + state),
        "scan": rounds * (latency + state + transition) - min(rounds, 1) * transition,
        "all_gather": min(size - 1, 1) * latency + (size - 1) * (state + transition),
    }


def cheapest(size: int, span: int, state: float, transition: float, latency: float) -> str:
    """The way with the least cost; of equal ones the first of ``METHODS``."""
    found = costs(size, span, state, transition, latency)
    return min(METHODS, key=lambda method: found[method])


@dataclass(frozen=True)
class Line:
    """The ranks as the state meets them, and this one's place among them.

    ``passing[place]``: what leaves that rank depends on what enters it; else its flow is a state alone. Everyone knows
    it of all, so nothing travels that is not needed, and nothing of one sequence touches another's, NaN or not.
    """

    ranks: range
    place: int
    passing: tuple[bool, ...]

    @staticmethod
    def of(context: Context, passing: Sequence[bool], reverse: bool) -> Line:
        ranks = range(context.size)[::-1] if reverse else range(context.size)
        return Line(ranks, ranks.index(context.rank), tuple(passing[rank] for rank in ranks))

    def origin(self, place: int) -> int:
        """The nearest place before, where what enters ``place`` comes from; 0 if there is none."""
        place -= 1
        while place > 0 and self.passing[place]:
            place -= 1
        return max(place, 0)

    @property
    def span(self) -> int:
        """The most boundaries that a state crosses."""
        return max(place - self.origin(place) for place in range(len(self.ranks)))

    def complete(self, place: int, reach: int) -> bool:
        """Whether the ``reach`` ranks up to this one have a state alone for a flow."""
        return not self.passing[place] or self.origin(place) > place - reach

    def wanting(self, place: int, reach: int) -> bool:
        """Whether the ``reach`` - 1 ranks before do not tell yet what enters, and there are ranks before those."""
        return place >= reach and self.origin(place) <= place - reach


def apply(flow: Flow, state: Tensor) -> Tensor:
    """``P S + H``, summed in the widest dtype there is: neither autocast nor TF32 has a say in what ranks exchange."""
    wide = accurate(state.device)
    return Flow(flow.transition.to(wide), flow.source.to(wide)).apply(state.to(wide)).to(state.dtype)


def then(first: Flow, second: Flow) -> Flow:
    """``first``, then ``second``, summed likewise."""
    wide, dtype = accurate(first.source.device), first.source.dtype
    both = (Flow(flow.transition.to(wide), flow.source.to(wide)) for flow in (first, second))
    composed = next(both).then(next(both))
    return Flow(composed.transition.to(dtype), composed.source.to(dtype))


def start(
    context: Context, flow: Flow, passing: Sequence[bool], *, reverse: bool = False, method: str | None = None
) -> Callable[[], Tensor]:
    """Sets the scan going and returns what finishes it and gives the state ``[..., K, V]`` that enters this rank.

    Args:
        flow: this rank's; where it is not passing, only its source counts. The same shapes on all ranks.
        passing: of every rank, whether the state that leaves it depends on the one that enters.
        reverse: from the last rank to the first.
        method: None is the cheapest.

    What enters the first rank is 0; what enters where no sequence goes on is of no meaning.
    """
    flow = Flow(flow.transition.contiguous(), flow.source.contiguous())
    if context.size == 1 or not flow.source.numel():
        return partial(torch.zeros_like, flow.source)
    context.meet(flow.source.device)
    line = Line.of(context, passing, reverse)
    if method is None:
        sizes = (flow.source.nbytes, flow.transition.nbytes, LATENCY_BYTES[context.over_nccl(flow.source.device)])
        method = cheapest(context.size, line.span, *sizes)
    return {"ring": _ring, "scan": _scan, "all_gather": _all_gather}[method](context, flow, line)


def _ring(context: Context, flow: Flow, line: Line) -> Callable[[], Tensor]:
    entry, place = torch.zeros_like(flow.source), line.place

    def send(state: Tensor) -> list:
        if place + 1 == len(line.ranks):
            return []
        return context.start_trade([(line.ranks[place + 1], state.contiguous())], [], WHAT)

    passing = line.passing[place] and place > 0
    going = [] if passing else send(flow.source)
    coming = context.start_trade([], [(line.ranks[place - 1], entry)], WHAT) if place else []

    def finish() -> Tensor:
        context.wait(coming, WHAT)
        if passing:
            leaving = apply(flow, entry)
            context.wait(send(leaving), WHAT)
        context.wait(going, WHAT)
        return entry

    return finish


def _scan(context: Context, flow: Flow, line: Line) -> Callable[[], Tensor]:
    """Before the round of a reach, ``inclusive`` is the flow of so many ranks up to this one, and ``before`` that of
    those without this one."""
    place, size = line.place, len(line.ranks)

    def post(reach: int, inclusive: Flow) -> tuple[list, Flow, list[Transfer]]:
        """A round under way: its works, what comes, and what goes (kept until it has gone)."""
        received = Flow(torch.zeros_like(flow.transition), torch.zeros_like(flow.source))
        sends: list[Transfer] = []
        receives: list[Transfer] = []
        if place + reach < size and line.wanting(place + reach, reach):
            parts = inclusive[line.complete(place, reach) :]
            sends = [(line.ranks[place + reach], part.contiguous()) for part in parts]
        if line.wanting(place, reach):
            parts = received[line.complete(place - reach, reach) :]
            receives = [(line.ranks[place - reach], part) for part in parts]
        return context.start_trade(sends, receives, WHAT), received, sends

    first = post(1, flow)

    def finish() -> Tensor:
        before, inclusive, reach, under_way = Flow.identity(flow), flow, 1, first
        while True:
            works, received, _ = under_way
            context.wait(works, WHAT)
            if line.wanting(place, reach):
                before = received if reach == 1 else then(received, before)
                inclusive = then(before, flow) if line.passing[place] else flow
            reach *= 2
            if reach > line.span:
                return before.source
            under_way = post(reach, inclusive)

    return finish


def _all_gather(context: Context, flow: Flow, line: Line) -> Callable[[], Tensor]:
    transition, source = flow
    sizes = [source.numel(), transition.numel()]
    everyone, works = context.start_gather(torch.cat([source.flatten(), transition.flatten()]), WHAT)

    def finish() -> Tensor:
        context.wait(works, WHAT)
        state = torch.zeros_like(source)
        for before in range(line.origin(line.place), line.place):
            parts = everyone[line.ranks[before]].split(sizes)
            leaving = parts[0].view_as(source)
            if before > line.origin(line.place):
                leaving = apply(Flow(parts[1].view_as(transition), leaving), state)
            state = leaving
        return state

    return finish
