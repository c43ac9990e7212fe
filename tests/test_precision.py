"""On ordinary data every dtype is within the error budget that rounding its inputs and outputs makes."""

from __future__ import annotations

import pytest
import torch

from parallelflow.testing import FLOOR, Sizes, error_budget, relative_error, round_inputs
from tests.cases import AGGREGATES, MODELS, SOLVERS, STRUCTURES, by_name, gradients, require_grad, with_backends

SIZES = Sizes(batch=1, length=150, heads=1, value_heads=2, key_size=24, value_size=16)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NARROW = (torch.bfloat16, torch.float16)


def data(model, dtype, sizes=SIZES, seed=0):
    inputs = model.inputs(sizes, seed=seed)
    return {name: x.float().double() for name, x in inputs.items()} if dtype == torch.float32 else inputs


def check(actual, budget, names):
    for name, x, reference, allowed in zip(names, actual, budget.reference, budget.allowed, strict=True):
        assert x.isfinite().all(), name
        error = relative_error(x, reference)
        assert error <= allowed, f"{name} off by {error:.2e}, allowed {allowed:.2e}"


def recurrence_of(model):
    def recurrence(tensors, dtype):
        result = model.oracle(tensors, dtype=dtype)
        return result.output, result.final_state

    return recurrence


@pytest.mark.parametrize("keep", [(), ("beta", "log_decay")], ids=["all", "float32-gates"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("model", "backend"), with_backends(MODELS))
def test_within_the_budget(model, backend, dtype, keep):
    inputs = data(model, dtype)
    if keep and (dtype == torch.float32 or not set(keep) & set(inputs)):
        pytest.skip("the same as without float32 gates")
    budget = error_budget(recurrence_of(model), inputs, dtype, keep=keep)
    result = model(round_inputs(inputs, dtype, keep=keep), return_final_state=True, backend=backend)
    assert result.output.dtype == dtype
    assert result.final_state.dtype == torch.float32
    check((result.output, result.final_state), budget, ("output", "final state"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("model", [m for m in STRUCTURES if m.normalized], ids=by_name)
def test_normalized_queries_and_keys_within_the_budget(model, dtype):
    """The norms are part of the computation: they bring no rounding of their own."""
    inputs = {name: 3 * x if name in model.normalized else x for name, x in data(model, dtype).items()}

    def recurrence(tensors, dtype):
        result = model.oracle(tensors, dtype=dtype, normalized=model.normalized)
        return result.output, result.final_state

    budget = error_budget(recurrence, inputs, dtype)
    result = model(round_inputs(inputs, dtype), return_final_state=True, normalize_query_key=True)
    check((result.output, result.final_state), budget, ("output", "final state"))


@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("solver", SOLVERS)
def test_every_choice_within_the_budget(solver, aggregate):
    for model in STRUCTURES:
        dtype = torch.bfloat16 if solver == "sigdelta" else torch.float32
        inputs = data(model, dtype)
        budget = error_budget(recurrence_of(model), inputs, dtype)
        result = model(
            round_inputs(inputs, dtype), return_final_state=True, solver=solver, aggregate=aggregate, chunk_size=32
        )
        check((result.output, result.final_state), budget, (f"{model.name} output", f"{model.name} final state"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("model", "backend"), with_backends(STRUCTURES))
def test_gradients_within_the_budget(model, backend, dtype):
    """The budget of a gradient: the recurrence's gradient at rounded inputs and rounded upstream gradient, rounded.

    Over several draws together: some gradients are two numbers, whose error on one draw is a matter of luck.
    """
    errors: dict[str, list[tuple[float, float]]] = {}
    for seed in range(3):
        inputs = data(model, dtype, SIZES._replace(length=70), seed)
        upstream = torch.randn(
            model.oracle(inputs).output.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        )
        if dtype == torch.float32:
            upstream = upstream.float().double()

        def recurrence(tensors, working, upstream):
            leaves = {name: x.to(working).requires_grad_() for name, x in tensors.items()}
            output = model.oracle(leaves, dtype=working).output
            return torch.autograd.grad(output, list(leaves.values()), upstream.to(working))

        rounded = round_inputs(inputs, dtype)
        reference = recurrence(inputs, torch.float64, upstream)
        working = torch.float32 if dtype == torch.float32 else torch.float64
        alone = recurrence(rounded, working, upstream.to(dtype))
        leaves = require_grad(rounded)
        actual = torch.autograd.grad(model(leaves, backend=backend).output, list(leaves.values()), upstream.to(dtype))
        for name, got, wanted, unavoidable in zip(inputs, actual, reference, alone, strict=True):
            assert got.dtype == dtype
            own = relative_error(got, wanted), relative_error(unavoidable.to(dtype), wanted)
            errors.setdefault(name, []).append(own)
    for name, pairs in errors.items():
        error, unavoidable = (sum(x**2 for x in column) ** 0.5 for column in zip(*pairs, strict=True))
        allowed = max(2 * unavoidable, FLOOR * len(pairs) ** 0.5)
        assert error <= allowed, f"d {name} off by {error:.2e}, allowed {allowed:.2e}"


@pytest.mark.parametrize("model", MODELS, ids=by_name)
def test_float64_stays_float64(model):
    result = model(model.inputs(SIZES), return_final_state=True)
    assert result.output.dtype == result.final_state.dtype == torch.float64


@pytest.mark.parametrize("model", STRUCTURES, ids=by_name)
def test_initial_state_keeps_its_precision(model):
    """A float64 state beside float32 inputs is computed in float64; a float32 one beside bfloat16 is not rounded."""
    inputs = model.inputs(SIZES, dtype=torch.float32)
    state = model.initial_state(SIZES)
    wide = model(inputs, initial_state=state, return_final_state=True)
    assert wide.output.dtype == torch.float32
    assert wide.final_state.dtype == torch.float64
    assert relative_error(wide.final_state, model.oracle(inputs, initial_state=state).final_state) < 1e-12
    narrow = round_inputs(inputs, torch.bfloat16)
    result = model(narrow, initial_state=state.float(), return_final_state=True)
    expected = model.oracle(narrow, initial_state=state.float()).final_state
    assert relative_error(result.final_state, expected) < 1e-5


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("model", STRUCTURES, ids=by_name)
def test_narrow_inputs_are_computed_in_float32(model, dtype):
    """The final state of rounded inputs, against float64 on the same rounded inputs: float32 accuracy, not half."""
    rounded = round_inputs(model.inputs(SIZES), dtype)
    result = model(rounded, return_final_state=True)
    assert relative_error(result.final_state, model.oracle(rounded).final_state) < 1e-5


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("model", STRUCTURES, ids=by_name)
def test_autocast_does_not_touch_the_arithmetic(model, dtype):
    """Under autocast the products inside stay in float32, forward and backward; the output's dtype is a plain one."""
    inputs = require_grad(model.inputs(SIZES, dtype=torch.float32))
    plain = model(inputs, return_final_state=True)
    expected = gradients([plain.output], inputs)
    with torch.autocast("cpu", dtype=dtype):
        result = model(inputs, return_final_state=True)
        narrow = model(round_inputs(inputs, dtype), return_final_state=True)
    assert narrow.output.dtype == dtype
    assert narrow.final_state.dtype == torch.float32
    assert result.final_state.dtype == torch.float32
    assert result.output.dtype in (torch.float32, dtype)
    tolerance = 1e-5 if result.output.dtype == torch.float32 else 8 * torch.finfo(dtype).eps
    assert relative_error(result.output, plain.output) < tolerance
    assert relative_error(result.final_state, plain.final_state) < tolerance
    for name, got in gradients([result.output.float()], inputs).items():
        assert relative_error(got, expected[name]) < max(tolerance, 1e-4), name


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("model", STRUCTURES, ids=by_name)
def test_autocast_changes_nothing_for_inputs_of_its_dtype(model, dtype):
    """The same bits with and without, states and gradients too: no product inside is taken in the narrow dtype."""

    def run(enabled):
        tensors = require_grad(round_inputs(model.inputs(SIZES), dtype, keep=("beta", "log_decay")))
        with torch.autocast("cpu", dtype=dtype, enabled=enabled):
            result = model(tensors, return_final_state=True)
            grads = gradients([result.output.float(), result.final_state], tensors)
        return {"output": result.output, "final state": result.final_state, **grads}

    inside, outside = run(True), run(False)
    for name, wanted in outside.items():
        assert torch.equal(inside[name], wanted), name


@pytest.mark.parametrize("model", STRUCTURES, ids=by_name)
def test_autocast_takes_what_layers_hand_over(model):
    """Projections in bfloat16 beside float32 gates, as autocast leaves them, forward and backward."""
    inputs = model.inputs(SIZES, dtype=torch.float32)
    tensors = require_grad(round_inputs(inputs, torch.bfloat16, keep=("beta", "log_decay")))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = model(tensors)
    result.output.float().sum().backward()
    assert all(x.grad.dtype == x.dtype and x.grad.isfinite().all() for x in tensors.values())
