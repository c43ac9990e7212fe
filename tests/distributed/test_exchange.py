"""The scan over ranks: three ways, any pattern of sequences, three kinds of transition; and what travels."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from parallelflow.distributed import Context, even_lengths, exchange
from parallelflow.distributed.shards import Shard
from parallelflow.flow import Flow
from tests.cases import assert_close
from tests.distributed.ranks import SIZES

KINDS = {"scalar": (), "diagonal": (3,), "dense": (3, 3)}


def flows_of(size, kind):
    generator = torch.Generator().manual_seed(size)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return [Flow(normal(2, *KINDS[kind]), normal(2, 3, 2)) for _ in range(size)]


def scan_on_rank(group, flows, passing, reverse, method):
    """The state that enters this rank, and the bytes and messages that came for it."""
    context, came = Context.of(group), []
    start_trade, start_gather = Context.start_trade, Context.start_gather

    def trade(self, sends, receives, what):
        came.extend(tensor.nbytes for _, tensor in receives)
        return start_trade(self, sends, receives, what)

    def gather(self, tensor, what):
        came.append(tensor.nbytes * (self.size - 1))
        return start_gather(self, tensor, what)

    Context.start_trade, Context.start_gather = trade, gather
    try:
        entry = exchange.start(context, flows[context.rank], passing, reverse=reverse, method=method)()
    finally:
        Context.start_trade, Context.start_gather = start_trade, start_gather
    return entry, came


def entries(flows, passing):
    """One after another."""
    state, found = torch.zeros_like(flows[0].source), []
    for place, (flow, goes_on) in enumerate(zip(flows, passing, strict=True)):
        found.append(state)
        state = flow.apply(state) if goes_on and place else flow.source
    return found


def patterns(size):
    yield [0 < rank < size - 1 for rank in range(size)]
    generator = random.Random(size)
    for _ in range(3):
        yield [0 < rank < size - 1 and generator.random() < 0.6 for rank in range(size)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", exchange.METHODS)
@pytest.mark.parametrize("size", SIZES)
def test_all_ways_give_the_state_that_enters(ranks, size, method, kind):
    flows = flows_of(size, kind)
    for passing, reverse in itertools.product(patterns(size), (False, True)):
        found = ranks.run(size, scan_on_rank, flows, passing, reverse, method)
        turned = (flows[::-1], passing[::-1]) if reverse else (flows, passing)
        expected = entries(*turned)
        expected = expected[::-1] if reverse else expected
        for rank in range(size):
            assert_close(found[rank][0], expected[rank], 1e-12, f"{passing} {reverse} rank {rank}")


@pytest.mark.parametrize("size", [2, 3, 4, 7])
def test_what_travels_is_what_the_costs_say(ranks, size):
    """The busiest rank's bytes and rounds: the rule that chooses rests on them."""
    flows, passing = flows_of(size, "dense"), [0 < rank < size - 1 for rank in range(size)]
    state, transition = flows[0].source.nbytes, flows[0].transition.nbytes
    rounds = (size - 1).bit_length()
    for method in exchange.METHODS:
        came = [found[1] for found in ranks.run(size, scan_on_rank, flows, passing, False, method)]
        most = max(sum(each) for each in came)
        if method == "ring":
            assert most == state
        elif method == "scan":
            assert most <= rounds * (state + transition) - transition
            assert max(len(each) for each in came) <= 2 * rounds - 1  # a window's state and transition, or its state
        else:
            assert most == (size - 1) * (state + transition)


def test_the_rule():
    """Two ranks never need a transition; many, or small messages, want fewer rounds; large ones fewer bytes."""
    for size, state, transition in itertools.product((2, 3, 4, 8, 64, 4096), (1e3, 1e6, 1e9), (1e2, 1e6)):
        costs = exchange.costs(size, size - 1, state, transition, 1e6)
        assert exchange.cheapest(size, size - 1, state, transition, 1e6) == min(costs, key=costs.__getitem__)
    assert exchange.cheapest(2, 1, 1e6, 1e6, 1e5) == "ring"
    assert exchange.cheapest(8, 7, 1e3, 1e3, 1e6) == "all_gather"
    assert exchange.cheapest(4096, 4095, 1e6, 1e6, 1e6) == "scan"
    assert exchange.cheapest(4096, 1, 1e6, 1e6, 1e6) == "ring"  # packed sequences that cross one boundary each


@pytest.mark.parametrize("method", exchange.METHODS)
def test_what_is_not_finite_stays_in_its_sequence(ranks, method):
    flows, passing = flows_of(7, "dense"), [False, True, True, False, True, False, False]
    flows[1].source.fill_(float("nan"))
    flows[2].transition.fill_(float("inf"))
    flows[3].transition.fill_(float("inf"))  # not passing: only its source counts
    found = [entry for entry, _ in ranks.run(7, scan_on_rank, flows, passing, False, method)]
    assert [bool(entry.isfinite().all()) for entry in found] == [True, True, False, False, True, True, True]


def test_shards_are_a_partition():
    """Any lengths, any sequences, empty ones too: each begins once and ends once, and every token is somewhere."""
    generator = random.Random(0)
    for _ in range(3000):
        lengths = [generator.choice([0, 0, 1, 2, 3, 5]) for _ in range(generator.randint(1, 6))]
        total, count = sum(lengths), generator.randint(1, 6)
        starts = [0, *sorted(generator.randint(0, total) for _ in range(count - 1)), total]
        shards = [Shard.packed(rank, lengths, starts) for rank in range(len(lengths))]
        edges = [0, *itertools.accumulate(lengths)]
        assert [n for shard in shards for n in shard.begins] == list(range(count))
        assert [n for shard in shards for n in shard.ends] == list(range(count))
        for shard, (first, stop) in zip(shards, itertools.pairwise(edges), strict=True):
            assert shard.continued == any(a < first < b for a, b in itertools.pairwise(starts))
            assert shard.unfinished == any(a < stop < b for a, b in itertools.pairwise(starts))
            assert shard.head + shard.rest_starts[-1] == stop - first
            for place, sequence in enumerate(shard.begins):
                here = min(starts[sequence + 1], stop) - starts[sequence]
                assert shard.rest_starts[place + 1] - shard.rest_starts[place] == max(here, 0)


def test_even_lengths():
    assert even_lengths(10, 4) == [3, 3, 2, 2]
    assert even_lengths(2, 4) == [1, 1, 0, 0]
