"""Gradients are those of the recurrence: of every input, of the initial state, through the final state, twice."""

from __future__ import annotations

import itertools
from functools import cache

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import parallelflow as pf
from parallelflow.testing import Sizes, hostile_inputs, hostile_kinds
from tests.cases import (
    AGGREGATES,
    CHUNK_SIZES,
    MODELS,
    PUBLISHED,
    SOLVERS,
    STRUCTURES,
    Model,
    assert_close,
    by_name,
    gradients,
    require_grad,
)

TINY = Sizes(batch=2, length=7, heads=1, value_heads=2, key_size=3, value_size=2)
SMALLEST = Sizes(batch=1, length=5, heads=1, value_heads=2, key_size=2, value_size=2)


def leaves(model: Model, sizes: Sizes):
    tensors = require_grad(model.inputs(sizes) | {"initial_state": model.initial_state(sizes)})
    return tensors, {name: x for name, x in tensors.items() if name != "initial_state"}


def call(model: Model, tensors, **options):
    inputs = {name: x for name, x in tensors.items() if name != "initial_state"}
    result = model(inputs, initial_state=tensors.get("initial_state"), return_final_state=True, **options)
    return result.output, result.final_state


def reference(model: Model, tensors):
    inputs = {name: x for name, x in tensors.items() if name != "initial_state"}
    result = model.oracle(inputs, initial_state=tensors.get("initial_state"))
    return result.output, result.final_state


@cache
def expected_gradients(model: Model, sizes: Sizes, which: str = "both"):
    tensors, _ = leaves(model, sizes)
    return gradients(pick(reference(model, tensors), which), tensors)


def pick(outputs, which: str):
    return {"both": outputs, "output": outputs[:1], "final_state": outputs[1:]}[which]


def assert_gradients(actual, expected, tolerance=1e-10, what=""):
    for name, wanted in expected.items():
        got = actual[name]
        if wanted is None:
            assert got is None or not got.any(), f"d {name}: expected none {what}"
        elif got is None:
            assert not wanted.any(), f"d {name}: got none {what}"
        else:
            assert_close(got, wanted, tolerance, f"d {name} {what}")


@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("model", MODELS, ids=by_name)
def test_every_choice_has_the_gradients_of_the_recurrence(model, solver, aggregate):
    for chunk_size in (1, 3, 16):
        tensors, _ = leaves(model, TINY)
        outputs = call(model, tensors, solver=solver, aggregate=aggregate, chunk_size=chunk_size)
        assert_gradients(gradients(outputs, tensors), expected_gradients(model, TINY), what=f"chunks of {chunk_size}")


@pytest.mark.parametrize("which", ["output", "final_state"])
@pytest.mark.parametrize("model", MODELS, ids=by_name)
def test_gradients_through_one_result_alone(model, which):
    tensors, _ = leaves(model, TINY)
    outputs = pick(call(model, tensors, chunk_size=3), which)
    assert_gradients(gradients(outputs, tensors), expected_gradients(model, TINY, which))


@pytest.mark.parametrize("model", MODELS, ids=by_name)
def test_gradients_of_one_input_alone(model):
    """What needs no gradient is not in the way of what does."""
    expected = expected_gradients(model, TINY)
    for name in expected:
        tensors = {key: x.detach().requires_grad_(key == name) for key, x in leaves(model, TINY)[0].items()}
        actual = gradients(call(model, tensors, chunk_size=3), {name: tensors[name]})
        assert_gradients(actual, {name: expected[name]})


@pytest.mark.parametrize("model", STRUCTURES, ids=by_name)
def test_gradients_with_large_chunks(model):
    """Over several chunks of 64 and a part of one, several levels of the blocked inverse."""
    sizes = Sizes(length=150, key_size=4, value_size=2)
    tensors, _ = leaves(model, sizes)
    expected = expected_gradients(model, sizes)
    for aggregate in AGGREGATES:
        assert_gradients(gradients(call(model, tensors, aggregate=aggregate), tensors), expected, 1e-9)


@pytest.mark.parametrize("heads", [(1, 3), (2, 2), (2, 6)], ids=str)
@pytest.mark.parametrize("model", MODELS, ids=by_name)
def test_gradients_of_grouped_heads(model, heads):
    sizes = Sizes(batch=1, length=5, heads=heads[0], value_heads=heads[1], key_size=2, value_size=3)
    tensors, _ = leaves(model, sizes)
    assert_gradients(gradients(call(model, tensors, chunk_size=2), tensors), expected_gradients(model, sizes))


@pytest.mark.parametrize("model", MODELS, ids=by_name)
def test_gradients_of_one_token(model):
    sizes = TINY._replace(length=1, heads=2, value_heads=4)
    tensors, _ = leaves(model, sizes)
    first = gradients(call(model, tensors), tensors, create_graph=True)
    wanted = gradients(reference(model, tensors), tensors, create_graph=True)
    assert_gradients(first, wanted)
    twice = lambda grads: sum(x.square().sum() for x in grads.values() if x is not None)  # noqa: E731
    second = gradients([twice(first)], tensors)
    assert_gradients(second, gradients([twice(wanted)], tensors))


def test_gradients_of_no_token():
    for model in STRUCTURES:
        tensors, _ = leaves(model, TINY._replace(length=0))
        expected = {name: torch.zeros_like(x) for name, x in tensors.items()}
        expected["initial_state"] = torch.ones_like(tensors["initial_state"])
        output, state = call(model, tensors)
        grads = torch.autograd.grad(output.sum() + state.sum(), list(tensors.values()), allow_unused=True)
        assert_gradients(dict(zip(tensors, grads, strict=True)), expected, what=model.name)


@pytest.mark.parametrize("model", MODELS, ids=by_name)
def test_gradients_with_many_heads(model):
    """Where time may be walked in windows to bound memory, so every window edge is met."""
    sizes = Sizes(batch=2, length=13, heads=16, value_heads=64, key_size=2, value_size=1)
    tensors, _ = leaves(model, sizes)
    assert_gradients(gradients(call(model, tensors, chunk_size=2), tensors), expected_gradients(model, sizes))


@pytest.mark.parametrize("model", PUBLISHED, ids=by_name)
def test_gradients_of_normalized_queries_and_keys(model):
    tensors, inputs = leaves(model, TINY)
    expected = model.oracle(inputs, initial_state=tensors["initial_state"], normalized=model.normalized)
    actual = call(model, tensors, chunk_size=3, normalize_query_key=True)
    assert_gradients(gradients(actual, tensors), gradients(expected[:2], tensors))


@pytest.mark.parametrize("model", MODELS, ids=by_name)
def test_gradients_of_hostile_inputs(model):
    """Decays of -100 beside -1e-6, -inf and 0, correlated keys, beta = 2, zero keys: finite, and the recurrence's."""
    sizes = Sizes(batch=1, length=14, heads=1, value_heads=2, key_size=3, value_size=2)
    inputs = model.inputs(sizes)
    for kind in hostile_kinds(inputs):
        if model.normalizes and "zero" in kind:
            continue
        tensors = require_grad(hostile_inputs(inputs, kind) | {"initial_state": model.initial_state(sizes)})
        expected = gradients(reference(model, tensors), tensors)
        for solver, chunk_size in (("tensor_inverse", 4), ("substitution", 16)):
            actual = gradients(call(model, tensors, solver=solver, chunk_size=chunk_size), tensors)
            assert_gradients(actual, expected, 1e-9, what=f"{kind}, {solver}")


def test_gradients_of_states_at_positions():
    for model in STRUCTURES:
        tensors, inputs = leaves(model, TINY)
        state = tensors["initial_state"]
        expected = model.oracle(inputs, initial_state=state, state_positions=[2, 3, 7])
        actual = model(inputs, initial_state=state, state_positions=[2, 3, 7], chunk_size=3, return_final_state=True)
        outputs = (actual.output, actual.final_state, actual.states)
        assert_gradients(gradients(outputs, tensors), gradients(expected, tensors), what=model.name)


@pytest.mark.parametrize("model", MODELS, ids=by_name)
def test_gradcheck(model):
    """Against finite differences, so that the oracle's own autograd is not the only witness."""
    tensors, _ = leaves(model, SMALLEST)
    names = list(tensors)

    def function(*values):
        return call(model, dict(zip(names, values, strict=True)), chunk_size=2)

    assert gradcheck(function, tuple(tensors.values()), fast_mode=model not in STRUCTURES)


@pytest.mark.parametrize("model", STRUCTURES, ids=by_name)
def test_gradgradcheck(model):
    """Double backward on a chunked path (T > chunk), in eager mode."""
    tensors, _ = leaves(model, SMALLEST)
    names = list(tensors)

    def function(*values):
        return call(model, dict(zip(names, values, strict=True)), chunk_size=2)

    assert gradgradcheck(function, tuple(tensors.values()), fast_mode=True, atol=1e-4)


@pytest.mark.parametrize("model", MODELS, ids=by_name)
def test_second_derivatives_are_those_of_the_recurrence(model):
    """A Hessian-vector product, for every solver and aggregate in turn."""

    def product(function):
        tensors, _ = leaves(model, TINY)
        output, state = function(tensors)
        first = gradients((output.square(), state.square()), tensors, create_graph=True)
        return gradients([x for x in first.values() if x is not None], tensors, seed=4)

    expected = product(lambda tensors: reference(model, tensors))
    choices = list(itertools.product(SOLVERS, AGGREGATES))
    for solver, aggregate in choices[MODELS.index(model) % len(choices) :: 5]:
        actual = product(lambda t, s=solver, a=aggregate: call(model, t, solver=s, aggregate=a, chunk_size=3))
        assert_gradients(actual, expected, 1e-9, what=f"{solver}, {aggregate}")


@pytest.mark.parametrize("model", STRUCTURES, ids=by_name)
def test_one_tensor_in_two_arguments(model):
    """Tensors that are the same object (a tie of the caller's making) get the sum of both gradients."""
    sizes = TINY._replace(value_heads=1, value_size=3)
    inputs = model.inputs(sizes)
    if "key" not in inputs or inputs["key"].shape != inputs["query"].shape:
        pytest.skip("query and key differ in shape")
    shared = inputs["key"].clone().requires_grad_()
    tensors = inputs | {"query": shared, "key": shared, "value": shared}
    actual = gradients(model(tensors, chunk_size=3)[:1], {"shared": shared})
    expected = gradients(model.oracle(tensors)[:1], {"shared": shared})
    assert_gradients(actual, expected)


@pytest.mark.parametrize("model", STRUCTURES, ids=by_name)
def test_backward_of_a_plain_sum(model):
    """The gradient that autograd passes in is expanded, without storage of its own."""
    inputs = require_grad(model.inputs(TINY))
    actual = torch.autograd.grad(model(inputs, chunk_size=3).output.sum(), inputs["query"])
    expected = torch.autograd.grad(model.oracle(inputs).output.sum(), inputs["query"])
    assert_close(actual[0], expected[0])


@pytest.mark.parametrize("model", STRUCTURES, ids=by_name)
def test_backward_twice_and_under_checkpointing(model):
    inputs = require_grad(model.inputs(TINY))
    output = model(inputs, chunk_size=3).output
    first = torch.autograd.grad(output.sum(), inputs["value"], retain_graph=True)[0]
    second = torch.autograd.grad(output.sum(), inputs["value"])[0]
    assert torch.equal(first, second)
    again = torch.utils.checkpoint.checkpoint(
        lambda x: model(inputs | {"value": x}).output, inputs["value"], use_reentrant=False
    )
    assert_close(torch.autograd.grad(again.sum(), inputs["value"])[0], first)


@pytest.mark.parametrize("model", STRUCTURES, ids=by_name)
def test_no_graph_without_need(model):
    inputs, state = model.inputs(TINY), model.initial_state(TINY)
    assert not model(inputs, initial_state=state).output.requires_grad
    with torch.no_grad():
        assert not model(require_grad(inputs)).output.requires_grad
    with torch.inference_mode():
        expected = model.oracle(inputs).output
        assert_close(model(inputs, chunk_size=3).output, expected)


# Every chunk size once more, with the state handed on: the gradient of a cut sequence is that of the whole.


@pytest.mark.parametrize("model", STRUCTURES, ids=by_name)
@pytest.mark.parametrize("chunk_size", CHUNK_SIZES)
def test_gradients_pass_through_a_cut(model, chunk_size):
    tensors, inputs = leaves(model, TINY)
    head = {name: x if x.dim() == 1 else x[:, :3] for name, x in inputs.items()}
    tail = {name: x if x.dim() == 1 else x[:, 3:] for name, x in inputs.items()}
    first = model(head, initial_state=tensors["initial_state"], return_final_state=True, chunk_size=chunk_size)
    second = model(tail, initial_state=first.final_state, return_final_state=True, chunk_size=chunk_size)
    outputs = (torch.cat([first.output, second.output], dim=1), second.final_state)
    assert_gradients(gradients(outputs, tensors), expected_gradients(model, TINY))


# Mixed dtypes.


@pytest.mark.parametrize("model", MODELS, ids=by_name)
def test_gradients_have_the_dtype_of_their_inputs(model):
    inputs = model.inputs(TINY, dtype=torch.bfloat16)
    for name in ("beta", "log_decay"):
        if name in inputs:
            inputs[name] = inputs[name].float()
    tensors = require_grad(inputs | {"initial_state": model.initial_state(TINY, dtype=torch.float32)})
    output, state = call(model, tensors, chunk_size=3)
    assert output.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    (output.float().sum() + state.sum()).backward()
    for name, x in tensors.items():
        assert x.grad.dtype == x.dtype, name
        assert x.grad.isfinite().all(), name


@pytest.mark.parametrize("model", STRUCTURES, ids=by_name)
def test_float64_decay_beside_float32_values_computes_in_float64(model):
    inputs = model.inputs(TINY, dtype=torch.float32)
    wide = [name for name in ("beta", "log_decay") if name in inputs]
    if not wide:
        pytest.skip("neither beta nor log_decay")
    tensors = require_grad({name: x.double() if name in wide else x for name, x in inputs.items()})
    result = model(tensors, chunk_size=3, return_final_state=True)
    expected = model.oracle(tensors)
    assert result.output.dtype == torch.float32
    assert result.final_state.dtype == torch.float64
    assert_close(result.final_state, expected.final_state, 1e-12)
    actual = gradients([result.final_state], tensors)
    for name, wanted in gradients([expected.final_state], tensors).items():
        if wanted is not None:
            assert actual[name].dtype == tensors[name].dtype
            assert_close(actual[name], wanted, 1e-12 if name in wide else 1e-6, name)


# torch.func.


def arguments(model: Model, sizes: Sizes = TINY):
    inputs = model.inputs(sizes)
    return tuple(inputs), tuple(inputs.values())


def loss_of(model: Model, names, oracle=False):
    def loss(*values):
        inputs = dict(zip(names, values, strict=True))
        result = model.oracle(inputs) if oracle else model(inputs, chunk_size=3, validate=False)
        return result.output.square().sum()

    return loss


@pytest.mark.parametrize("model", STRUCTURES, ids=by_name)
def test_func_grad(model):
    names, values = arguments(model)
    every = tuple(range(len(names)))
    actual = torch.func.grad(loss_of(model, names), argnums=every)(*values)
    expected = torch.func.grad(loss_of(model, names, oracle=True), argnums=every)(*values)
    for name, got, wanted in zip(names, actual, expected, strict=True):
        assert_close(got, wanted, what=name)


@pytest.mark.parametrize("model", STRUCTURES, ids=by_name)
def test_func_grad_of_grad(model):
    names, values = arguments(model, SMALLEST)
    value = names.index("value")

    def second(loss):
        inner = torch.func.grad(loss, argnums=value)
        return torch.func.grad(lambda *x: inner(*x).square().sum())(*values)

    assert_close(second(loss_of(model, names)), second(loss_of(model, names, oracle=True)), 1e-9)


@pytest.mark.parametrize("model", STRUCTURES, ids=by_name)
def test_func_vmap_and_vmap_of_grad(model):
    """Mapped over a new axis of some arguments and not of others: the same as a loop."""
    names, values = arguments(model)
    stacked = [
        torch.stack([x, 0.5 * x, 0.9 * x]) if name != "query" else x for name, x in zip(names, values, strict=True)
    ]
    dims = tuple(None if name == "query" else 0 for name in names)
    sample = lambda i: [x if name == "query" else x[i] for name, x in zip(names, stacked, strict=True)]  # noqa: E731
    forward = torch.func.vmap(loss_of(model, names), in_dims=dims)(*stacked)
    for i in range(3):
        assert_close(forward[i], loss_of(model, names)(*sample(i)))
    every = tuple(range(len(names)))
    grads = torch.func.vmap(torch.func.grad(loss_of(model, names), argnums=every), in_dims=dims)(*stacked)
    for i in range(3):
        expected = torch.func.grad(loss_of(model, names, oracle=True), argnums=every)(*sample(i))
        for name, got, wanted in zip(names, grads, expected, strict=True):
            assert_close(got[i], wanted, what=name)


@pytest.mark.parametrize("model", STRUCTURES, ids=by_name)
def test_func_jvp_says_that_it_is_not_there(model):
    """Forward-mode differentiation is not implemented: an error that says so and what to use, never a silent zero."""
    names, values = arguments(model)
    tangents = tuple(torch.ones_like(x) * 0.1 for x in values)
    with pytest.raises(NotImplementedError, match=r"forward-mode.*reverse"):
        torch.func.jvp(loss_of(model, names), values, tangents)


def test_names_are_all_public():
    for model in MODELS:
        assert getattr(pf, model.function) is getattr(pf.functional, model.function)
