"""Every driver over 1, 2, 3, 4 and 7 ranks, beside one device, in float64: outputs, states, and all gradients."""

from __future__ import annotations

import pytest

from parallelflow.testing import Sizes
from tests.cases import PUBLISHED, STRUCTURES, by_name
from tests.distributed.cases import alone, expect_same, on_rank
from tests.distributed.ranks import SIZES

LENGTHS = {1: [23], 2: [9, 14], 3: [11, 0, 12], 4: [1, 10, 5, 7], 7: [0, 3, 1, 7, 0, 12, 0]}
"""Uneven shards, some of them empty; 23 tokens in all."""

STARTS = [0, 0, 2, 5, 20, 20, 21, 23, 23]
"""Packed sequences, some empty; one lies on up to five ranks."""


def model(name):
    return next(each for each in (*PUBLISHED, *STRUCTURES) if each.name == name)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", PUBLISHED, ids=by_name)
def test_a_batch_over_ranks(ranks, case, size):
    sizes = case.sizes(Sizes(2, 23, 1, 2, 4, 3))
    inputs, state = case.inputs(sizes), case.initial_state(sizes)
    call = (case.function, {"chunk_size": 4, **case.options})
    expected = alone(call, inputs, state, None)
    found = ranks.run(size, on_rank, call, inputs, state, None, LENGTHS[size], {})
    expect_same(expected, found)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", STRUCTURES, ids=by_name)
def test_packed_sequences_that_straddle_ranks(ranks, case, size):
    sizes = case.sizes(Sizes(1, 23, 1, 2, 4, 3))
    inputs = case.inputs(sizes)
    state = case.initial_state(sizes._replace(batch=len(STARTS) - 1))
    call = (case.function, {"chunk_size": 4, **case.options})
    expected = alone(call, inputs, state, STARTS)
    found = ranks.run(size, on_rank, call, inputs, state, STARTS, LENGTHS[size], {"final_state_on": "all"})
    expect_same(expected, found)
