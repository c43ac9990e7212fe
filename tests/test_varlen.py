"""Packed sequences are separate calls: outputs, states, gradients, empty sequences, and nothing leaks between them."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parallelflow.testing import Sizes
from tests.cases import (
    AGGREGATES,
    MODELS,
    SOLVERS,
    STRUCTURES,
    assert_close,
    by_name,
    gradients,
    require_grad,
    slice_time,
)

LENGTHS = (3, 0, 1, 7, 0, 0, 4, 5, 0)


def bounds_of(lengths):
    return [0, *torch.tensor(lengths).cumsum(0).tolist()]


def packed(model, lengths, heads=1, value_heads=2):
    sizes = Sizes(1, sum(lengths), heads, value_heads, 3, 2)
    return model.inputs(sizes), model.initial_state(sizes, sequences=len(lengths)), bounds_of(lengths)


def offsets(bounds, dtype=torch.int64):
    return torch.tensor(bounds, dtype=dtype)


def check(model, lengths, *, dtype=torch.int64, stated=True, **options):
    inputs, state, bounds = packed(model, lengths)
    state = state if stated else None
    expected = model.oracle(inputs, initial_state=state, cu_seqlens=bounds)
    cu_seqlens = offsets(bounds, dtype)
    actual = model(inputs, initial_state=state, cu_seqlens=cu_seqlens, return_final_state=True, **options)
    assert_close(actual.output, expected.output, what=f"output {options}")
    assert_close(actual.final_state, expected.final_state, what=f"final state {options}")


@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("model", MODELS, ids=by_name)
def test_packed_is_separate(model, aggregate):
    solver = SOLVERS[(MODELS.index(model) + AGGREGATES.index(aggregate)) % len(SOLVERS)]
    for chunk_size in (1, 2, 4, 16):
        check(model, LENGTHS, aggregate=aggregate, solver=solver, chunk_size=chunk_size)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("model", STRUCTURES, ids=by_name)
def test_both_integer_types_with_and_without_states(model, dtype):
    check(model, LENGTHS, dtype=dtype, chunk_size=4)
    check(model, LENGTHS, dtype=dtype, stated=False, chunk_size=4)


@pytest.mark.parametrize("model", STRUCTURES, ids=by_name)
def test_offsets_on_the_host(model):
    inputs, state, bounds = packed(model, LENGTHS)
    there = {"cu_seqlens": offsets(bounds), "cu_seqlens_cpu": offsets(bounds)}
    actual = model(inputs, initial_state=state, return_final_state=True, chunk_size=4, **there)
    expected = model.oracle(inputs, initial_state=state, cu_seqlens=bounds)
    assert_close(actual.output, expected.output)
    assert_close(actual.final_state, expected.final_state)


@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("model", STRUCTURES, ids=by_name)
def test_empty_sequences_keep_their_state_and_pass_its_gradient(model, aggregate):
    inputs, state, bounds = packed(model, LENGTHS)
    state.requires_grad_()
    result = model(
        inputs,
        initial_state=state,
        cu_seqlens=offsets(bounds),
        return_final_state=True,
        chunk_size=4,
        aggregate=aggregate,
    )
    weights = torch.randn(state.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (result.final_state * weights).sum().backward()
    for n, length in enumerate(LENGTHS):
        if length == 0:
            assert torch.equal(result.final_state[n], state[n])
            assert_close(state.grad[n], weights[n], 1e-15)


@pytest.mark.parametrize("lengths", [(0,), (0, 0), (5,), (0, 5), (5, 0), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("model", STRUCTURES, ids=by_name)
def test_edge_lengths(model, lengths):
    for aggregate in AGGREGATES:
        check(model, lengths, chunk_size=2, aggregate=aggregate)


@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("model", MODELS, ids=by_name)
def test_gradients_of_packed_sequences(model, aggregate):
    inputs, state, bounds = packed(model, LENGTHS)
    tensors = require_grad(inputs | {"initial_state": state})
    parts = {name: x for name, x in tensors.items() if name != "initial_state"}
    state = tensors["initial_state"]
    expected = model.oracle(parts, initial_state=state, cu_seqlens=bounds)
    actual = model(
        parts,
        initial_state=state,
        cu_seqlens=offsets(bounds),
        return_final_state=True,
        chunk_size=3,
        aggregate=aggregate,
    )
    wanted = gradients(expected[:2], tensors)
    for name, got in gradients(actual[:2], tensors).items():
        assert_close(got, wanted[name], what=f"d {name}")


@pytest.mark.parametrize("model", MODELS, ids=by_name)
def test_many_heads(model):
    """Where time may be walked in windows: sequences longer than a window, many to a window, on and off its edges."""
    for lengths in ((3, 0, 1, 7, 0, 4, 5, 0), (4, 4, 8, 1, 0, 2), (13, 1, 9)):
        inputs, state, bounds = packed(model, lengths, heads=8, value_heads=64)
        tensors = require_grad(inputs | {"initial_state": state})
        parts = {name: x for name, x in tensors.items() if name != "initial_state"}
        state = tensors["initial_state"]
        expected = model.oracle(parts, initial_state=state, cu_seqlens=bounds)
        actual = model(parts, initial_state=state, cu_seqlens=offsets(bounds), return_final_state=True, chunk_size=2)
        assert_close(actual.output, expected.output)
        assert_close(actual.final_state, expected.final_state)
        wanted = gradients(expected[:2], tensors)
        for name, got in gradients(actual[:2], tensors).items():
            assert_close(got, wanted[name], what=f"d {name}, {lengths}")


@settings(max_examples=60)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=7),
    model=st.sampled_from(MODELS),
    chunk_size=st.integers(1, 10),
    aggregate=st.sampled_from(AGGREGATES),
    solver=st.sampled_from(SOLVERS),
    dtype=st.sampled_from([torch.int32, torch.int64]),
    stated=st.booleans(),
)
def test_any_lengths(lengths, model, chunk_size, aggregate, solver, dtype, stated):
    check(model, tuple(lengths), dtype=dtype, stated=stated, chunk_size=chunk_size, aggregate=aggregate, solver=solver)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("model", MODELS, ids=by_name)
def test_nan_and_inf_stay_in_their_sequence(model, aggregate, poison):
    """Outputs, final states and all gradients of the other packed sequences are the same bits as without it."""
    lengths = (3, 5, 4)
    inputs, state, bounds = packed(model, lengths)
    names = [name for name, x in inputs.items() if x.dim() > 1]  # one decay a head belongs to all sequences
    where = 4

    def run(poisoned):
        tensors = require_grad(inputs | {"initial_state": state})
        if poisoned is not None:
            with torch.no_grad():
                target = tensors["initial_state"][1] if poisoned == "initial_state" else tensors[poisoned][:, where]
                target.fill_(poison)
        parts = {name: x for name, x in tensors.items() if name != "initial_state"}
        result = model(
            parts,
            initial_state=tensors["initial_state"],
            cu_seqlens=offsets(bounds),
            return_final_state=True,
            chunk_size=4,
            aggregate=aggregate,
            validate=False,
        )
        return result, gradients(result[:2], tensors)

    clean, clean_gradients = run(None)
    for name in (*names, "initial_state"):
        result, grads = run(name)
        for n, (start, stop) in enumerate(pairwise(bounds)):
            if n == 1:
                continue
            assert torch.equal(result.output[:, start:stop], clean.output[:, start:stop]), (
                f"{name} leaks into output {n}"
            )
            assert torch.equal(result.final_state[n], clean.final_state[n]), f"{name} leaks into state {n}"
            assert torch.equal(grads["initial_state"][n], clean_gradients["initial_state"][n]), f"{name}: state {n}"
            for other, x in slice_time(grads, start, stop).items():
                if other != "initial_state" and x.dim() > 1:
                    wanted = clean_gradients[other][:, start:stop]
                    assert torch.equal(x, wanted), f"{name} leaks into the gradient of {other} in sequence {n}"


@pytest.mark.parametrize("model", STRUCTURES, ids=by_name)
def test_nan_stays_in_its_batch_row_and_head(model):
    sizes = Sizes(3, 6, 2, 2, 3, 2)
    inputs, state = model.inputs(sizes), model.initial_state(sizes)
    for aggregate in AGGREGATES:
        options = {"initial_state": state, "return_final_state": True, "chunk_size": 4, "aggregate": aggregate}
        clean = model(inputs, **options)
        broken = {name: x.clone() for name, x in inputs.items()}
        broken["value"][1, 2, ..., 1, :] = float("nan")
        result = model(broken, **options)
        keep = torch.ones(3, 2, dtype=torch.bool)
        keep[1, 1] = False
        assert torch.equal(result.output.transpose(1, 2)[keep], clean.output.transpose(1, 2)[keep])
        assert torch.equal(result.final_state[keep], clean.final_state[keep])
        assert result.output[1, 2:, 1].isnan().any()


@pytest.mark.parametrize("model", STRUCTURES, ids=by_name)
def test_same_bits_whatever_else_is_in_the_batch(model):
    """A sequence alone, in a batch, and packed between others: the same numbers (float32), and the same run to run."""
    sizes = Sizes(4, 13, 1, 1, 8, 8)
    inputs = model.inputs(sizes, dtype=torch.float32)
    whole = model(inputs, chunk_size=4).output
    assert torch.equal(whole, model(inputs, chunk_size=4).output)
    alone = {name: x if x.dim() == 1 else x[2:3] for name, x in inputs.items()}
    assert_close(whole[2:3], model(alone, chunk_size=4).output, 1e-6)
