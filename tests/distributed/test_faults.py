"""What goes wrong on one rank is said on all, and nobody waits for ever."""

from __future__ import annotations

import os
import time

import pytest
import torch

from parallelflow import functional
from parallelflow.testing import Sizes, make_inputs
from tests.distributed.cases import alone, expect_same, on_rank
from tests.distributed.ranks import Ranks

PATIENCE = 3.0
"""Seconds until a rank of the impatient group gives up."""


def call_on_rank(group, changed, rank_that_differs, everyone):
    """The gated delta rule, with something else on one rank."""
    options = {**everyone}
    tensors = make_inputs("gated_delta_rule", Sizes(1, 6, 1, 2, 4, 3))
    if group.rank() == rank_that_differs:
        for name, value in changed.items():
            if callable(value):
                tensors[name] = value(tensors[name])
            else:
                options[name] = value
    options = {"aggregate": "distributed", "context_group": group, **options}
    functional.gated_delta_rule(**tensors, **options)


def narrow(tensor):
    return tensor.float()


def fewer_channels(tensor):
    return tensor[..., :2]


def growing(tensor):
    return -tensor


DIFFERENT = {
    "value": (
        {"value": fewer_channels},
        r"value: got torch.float64 \[1, T, 2, 2\] on rank 1 of 3, expected the first rank's .* \[1, T, 2, 3\]",
    ),
    "scale": ({"scale": 0.5}, "scale: got 0.5 on rank 1 of 3, expected the first rank's None"),
    "chunk_size": ({"chunk_size": 32}, "chunk_size: got 32 on rank 1 of 3, expected the first rank's 64"),
    "solver": ({"solver": "sigdelta"}, "solver: got sigdelta"),
    "backend": ({"backend": "torch"}, "backend: got torch on rank 1"),
    "final_state_on": ({"return_final_state": True}, "final_state_on: got"),
    "context_lengths": ({"context_lengths": [6, 6, 6]}, "context_lengths: got .* on rank 1"),
    "cu_seqlens": ({"cu_seqlens": torch.tensor([0, 18])}, "cu_seqlens: got .* on rank 1"),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_differs_is_named_on_every_rank(ranks, name):
    changed, message = DIFFERENT[name]
    answers = ranks.answers(3, call_on_rank, changed, 1, {})
    for answer, error in answers:
        assert error is not None
        with pytest.raises(ValueError, match=message):
            raise ValueError(answer)


WRONG = {
    "log_decay": ({"log_decay": growing}, "log_decay: got positive or NaN values"),
    "dtype": ({"value": narrow}, "value: got dtype torch.float32"),
    "chunk_size": ({"chunk_size": 0}, "chunk_size: got 0"),
    "final_state_on": ({"final_state_on": "first"}, "final_state_on: got 'first'"),
    "aggregate": ({"aggregate": "segmented"}, "aggregate: got 'segmented'"),
    "initial_state": ({"initial_state": torch.zeros(2, 2, 4, 3)}, "initial_state: got shape"),
    "initial dtype": ({"initial_state": torch.zeros(1, 2, 4, 3)}, "initial_state: got dtype torch.float32"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_on_one_rank_is_raised_on_all(ranks, name):
    changed, message = WRONG[name]
    answers = ranks.answers(3, call_on_rank, changed, 2, {})
    for rank, (answer, error) in enumerate(answers):
        assert error is not None
        assert message in answer
        assert ("rank 2 raised" in answer) == (rank != 2)


SAME = {
    "total": (
        {"cu_seqlens": torch.tensor([0, 17])},
        "cu_seqlens: got 17 tokens in all, expected those of all ranks, 18",
    ),
    "lengths": ({"context_lengths": [6, 6, 7]}, "context_lengths: got 7 for rank 2, expected its T = 6"),
    "count": ({"context_lengths": [9, 9]}, "context_lengths: got [9, 9], expected tokens of 3 ranks"),
    "positions": ({"state_positions": [3]}, "state_positions: got some with a context_group"),
    "group": ({"context_group": None}, "context_group: got NoneType"),
}


@pytest.mark.parametrize("name", SAME)
def test_what_is_wrong_everywhere(ranks, name):
    changed, message = SAME[name]
    for answer, error in ranks.answers(3, call_on_rank, {}, 0, changed):
        assert error is not None
        assert message in answer


def test_the_ranks_go_on_after_an_error(ranks):
    ranks.answers(3, call_on_rank, {"scale": 0.5}, 1, {})
    ranks.run(3, call_on_rank, {}, 0, {})


def partly_recorded(group, what):
    """Only one rank has something with a gradient, or uses its output."""
    tensors = make_inputs("gated_delta_rule", Sizes(1, 6, 1, 2, 4, 3))
    state = torch.zeros(1, 2, 4, 3, dtype=torch.float64)
    options = {"aggregate": "distributed", "context_group": group, "return_final_state": True}
    if what == "first state alone":
        state.requires_grad_(group.rank() == 0)
        output, _ = functional.gated_delta_rule(**tensors, initial_state=state, **options)
        (output.sum() if group.rank() == group.size() - 1 else 0 * output.sum()).backward()
        return state.grad
    if what == "last state alone":
        tensors["value"].requires_grad_()
        output, final = functional.gated_delta_rule(**tensors, **options)
        (0 * output.sum() if final is None else final.sum()).backward()
        return tensors["value"].grad
    with torch.set_grad_enabled(group.rank() != 1):
        return functional.gated_delta_rule(**tensors, **options)


def test_a_gradient_that_one_rank_alone_wants_reaches_it(ranks):
    """Though no other rank has anything that requires one, all of them run the backward pass."""
    found = ranks.run(3, partly_recorded, "first state alone")
    assert found[0].abs().sum() > 0
    assert found[1] is None


def test_a_loss_of_the_last_rank_alone_reaches_all(ranks):
    for gradient in ranks.run(3, partly_recorded, "last state alone"):
        assert gradient.abs().sum() > 0


def test_gradients_on_some_ranks_only_are_refused(ranks):
    for answer, _ in ranks.answers(3, partly_recorded, "no_grad on one"):
        assert "torch.is_grad_enabled(): got False on rank 1" in answer


def twice_on_rank(group):
    tensors = make_inputs("gated_delta_rule", Sizes(1, 6, 1, 2, 4, 3))
    value = tensors.pop("value").requires_grad_()
    output, _ = functional.gated_delta_rule(**tensors, value=value, aggregate="distributed", context_group=group)
    (gradient,) = torch.autograd.grad(output.square().sum(), value, create_graph=True)
    gradient.sum().backward()


def test_a_second_derivative_is_refused(ranks):
    for answer, error in ranks.answers(2, twice_on_rank):
        assert error is not None
        assert "once_differentiable" in answer


def fail_on_rank(group, how, when):
    """One rank dies, or sleeps for longer than the test takes, before the call or between its passes."""
    tensors = make_inputs("gated_delta_rule", Sizes(1, 6, 1, 2, 4, 3))
    tensors["value"].requires_grad_()

    def fail():
        if group.rank() == 1:
            if how == "dies":
                os._exit(1)
            time.sleep(1000)

    try:
        if when == "before":
            fail()
        output, _ = functional.gated_delta_rule(**tensors, aggregate="distributed", context_group=group)
        if when == "between":
            fail()
        output.sum().backward()
    except Exception as error:
        return type(error).__name__, str(error)
    return "nothing", ""


@pytest.mark.parametrize("when", ["before", "between"])
@pytest.mark.parametrize("how", ["dies", "sleeps"])
def test_a_rank_that_does_not_come(how, when):
    """Every other rank gets an error that says so, while the one that sleeps still does."""
    impatient = Ranks(3, (3,), PATIENCE)
    try:
        answers = impatient.answers(3, fail_on_rank, how, when, but=1)
        for rank, ((kind, message), _) in zip((0, 2), answers, strict=True):
            assert kind == "ContextGroupError"
            assert f"rank {rank} of 3 waited in vain for the others" in message
    finally:
        impatient.stop()


def test_hostile_decays_and_keys(ranks):
    """Resets beside near-zero decays, keys nearly alike, beta 2: as on one device."""
    from parallelflow.testing import hostile_inputs, hostile_kinds

    sizes = Sizes(1, 23, 1, 2, 4, 3)
    for function in ("gated_delta_rule", "kimi_delta_attention"):
        inputs = make_inputs(function, sizes)
        for kind in hostile_kinds(inputs):
            inputs = hostile_inputs(make_inputs(function, sizes), kind)
            call = (function, {"chunk_size": 4})
            state = torch.ones(1, 2, 4, 3, dtype=torch.float64)
            found = ranks.run(4, on_rank, call, inputs, state, None, [5, 1, 9, 8], {})
            expect_same(alone(call, inputs, state, None), found)
