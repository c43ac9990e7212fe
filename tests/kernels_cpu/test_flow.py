"""The compiled kernels against the float64 recurrence and against themselves: sizes, layouts, sequences, threads."""

from itertools import pairwise

import pytest
import torch

import parallelflow as pf
from parallelflow.kernels.cpu import build, flow as delta
from parallelflow.testing import Sizes, error_budget, relative_error
from tests.cases import COMPILED, MODELS, by_name, gradients, require_grad

pytestmark = pytest.mark.skipif(not build.usable(), reason="no C++ compiler")
WINDOW = 256  # tokens between the states that the backward pass starts from


def recurrence_of(model, initial_state):
    def recurrence(tensors, dtype):
        result = model.oracle(tensors, dtype=dtype, initial_state=initial_state.to(dtype))
        return result.output, result.final_state

    return recurrence


def run(model, inputs, state, backend="cpu", **options):
    """Output, final state and all gradients of a fixed linear function of both."""
    tensors = require_grad({**inputs, "initial_state": state})
    result = model(tensors, return_final_state=True, backend=backend, **options)
    return {
        "output": result.output.detach(),
        "final_state": result.final_state.detach(),
        **gradients([result.output, result.final_state], tensors),
    }


@pytest.mark.parametrize("model", [m for m in MODELS if "normalize" not in m.options], ids=by_name)
def test_auto_takes_them_for_exactly_the_models_that_they_serve(model, monkeypatch):
    calls = []
    monkeypatch.setattr(delta, "forward", lambda *a, _run=delta.forward, **o: calls.append(1) or _run(*a, **o))
    inputs = model.inputs(Sizes(batch=1, length=5), dtype=torch.float32)
    model(inputs)
    assert bool(calls) == (model.function in COMPILED)
    if not calls:
        with pytest.raises(ValueError, match="backend: got 'cpu' with "):
            model(inputs, backend="cpu")


@pytest.mark.parametrize("length", [1, 31, 32, 33, WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW + 45])
def test_every_length(length):
    """Chunks and windows unfinished and whole; forward against the recurrence, gradients against the torch backend."""
    sizes = Sizes(batch=2, length=length, heads=2, value_heads=4, key_size=20, value_size=36)
    for name in ("gated_delta_rule", "ssd"):
        model = next(model for model in MODELS if model.name == name)
        inputs = {key: x.float() for key, x in model.inputs(sizes).items()}
        state = model.initial_state(sizes).float()
        budget = error_budget(recurrence_of(model, state), {k: x.double() for k, x in inputs.items()}, torch.float32)
        found = run(model, inputs, state)
        for key, reference, allowed in zip(("output", "final_state"), budget.reference, budget.allowed, strict=True):
            assert relative_error(found[key], reference) <= allowed, (name, key)
        exact = run(model, {k: x.double() for k, x in inputs.items()}, state.double(), "torch")
        plain = run(model, inputs, state, "torch")
        for key, reference in exact.items():
            unavoidable = max(relative_error(plain[key], reference), 1e-7)
            assert relative_error(found[key], reference) <= 3 * unavoidable, (name, key)


@pytest.mark.parametrize("size", [(1, 1), (3, 17), (16, 16), (64, 100), (256, 48), (512, 512)])
def test_every_head_size(size):
    sizes = Sizes(batch=1, length=70, heads=1, value_heads=1, key_size=size[0], value_size=size[1])
    model = next(model for model in MODELS if model.name == "gated_delta_rule")
    inputs = {key: x.float() for key, x in model.inputs(sizes).items()}
    state = model.initial_state(sizes).float()
    found, exact = (
        run(model, inputs, state),
        run(model, {k: x.double() for k, x in inputs.items()}, state.double(), "torch"),
    )
    plain = run(model, inputs, state, "torch")
    for key, reference in exact.items():
        unavoidable = max(relative_error(plain[key], reference), 1e-7)
        assert relative_error(found[key], reference) <= 3 * unavoidable, key


def test_larger_heads_are_the_torch_backends():
    model = next(model for model in MODELS if model.name == "delta_rule")
    inputs = model.inputs(
        Sizes(batch=1, length=3, heads=1, value_heads=1, key_size=513, value_size=2), dtype=torch.float32
    )
    assert model(inputs).output.isfinite().all()
    with pytest.raises(ValueError, match="K = 513, V = 2, expected at most 512"):
        model(inputs, backend="cpu")


def draw(lengths, heads=2, value_heads=4, k=16, v=24, dtype=torch.float32):
    sizes = Sizes(batch=1, length=sum(lengths), heads=heads, value_heads=value_heads, key_size=k, value_size=v)
    model = next(model for model in MODELS if model.name == "gated_delta_rule")
    inputs = model.inputs(sizes, dtype=dtype)
    state = model.initial_state(sizes._replace(batch=len(lengths))).float()
    return model, inputs, state, torch.tensor([0, *torch.tensor(lengths).cumsum(0)])


@pytest.mark.parametrize("lengths", [(70, 0, 1, 300, 33), (0,), (0, 5), (5, 0)])
def test_packed_sequences_are_the_sequences_alone(lengths):
    """The same bits: no sequence knows of its neighbours."""
    model, inputs, state, bounds = draw(lengths)
    together, plain = (run(model, inputs, state, each, cu_seqlens=bounds) for each in ("cpu", "torch"))
    for name, tensor in plain.items():
        assert (together[name] - tensor).norm() <= 1e-5 * tensor.norm(), name
    for number, (first, last) in enumerate(pairwise(bounds)):
        if first == last:
            assert torch.equal(together["final_state"][number], state[number])
            assert torch.equal(together["initial_state"][number], plain["initial_state"][number])
            continue
        own = {name: x[:, first:last] for name, x in inputs.items()}
        alone = model(own, initial_state=state[number : number + 1], return_final_state=True, backend="cpu")
        assert torch.equal(together["output"][:, first:last], alone.output)
        assert torch.equal(together["final_state"][number], alone.final_state[0])


def test_a_nan_stays_in_its_sequence_and_head():
    model, inputs, state, bounds = draw((70, 70, 70))
    clean = run(model, inputs, state, cu_seqlens=bounds)
    poisoned = {name: x.clone() for name, x in inputs.items()}
    poisoned["value"][:, 80, 1] = torch.nan
    found = run(model, poisoned, state, cu_seqlens=bounds)
    others = [0, 2, 3]
    assert torch.equal(found["output"][:, :70], clean["output"][:, :70])
    assert torch.equal(found["output"][:, 140:], clean["output"][:, 140:])
    assert torch.equal(found["output"][:, :, others], clean["output"][:, :, others])
    assert found["output"][:, 80:140, 1].isnan().all()
    assert torch.equal(found["value"][:, :, others], clean["value"][:, :, others])


def test_strided_inputs_are_read_as_they_lie():
    """Views into one projection, transposed heads, an expanded batch: the bits of their copies."""
    model, inputs, state, _ = draw((90,), heads=2, value_heads=2, k=16, v=16)
    fused = torch.cat([inputs["query"], inputs["key"], inputs["value"]], -1)
    query, key, value = fused.split(16, -1)
    views = {**inputs, "query": query, "key": key.transpose(1, 2).contiguous().transpose(1, 2), "value": value}
    want, got = run(model, inputs, state), run(model, views, state)
    assert want.keys() == got.keys()
    for name, tensor in want.items():
        assert torch.equal(tensor, got[name]), name
    turned = inputs["value"].transpose(2, 3).contiguous().transpose(2, 3)  # the last axis is not the dense one
    output = model({**inputs, "value": turned}, initial_state=state, backend="cpu").output
    assert torch.equal(output, want["output"])
    # The gradient of the output may come expanded.
    leaf = require_grad(inputs)
    model(leaf, backend="cpu").output.sum().backward()
    dense = require_grad(inputs)
    result = model(dense, backend="cpu").output
    result.backward(torch.ones_like(result))
    for name, x in leaf.items():
        assert torch.equal(x.grad, dense[name].grad), name


@pytest.mark.parametrize("batch", [1, 5])
def test_the_same_bits_with_any_number_of_threads(batch):
    """With few sequences each value head is a task of its own, whose gradients of query and key are summed after."""
    sizes = Sizes(batch=batch, length=300, heads=1, value_heads=3, key_size=16, value_size=16)
    model = next(model for model in MODELS if model.name == "gated_delta_rule")
    inputs, state = model.inputs(sizes, dtype=torch.float32), model.initial_state(sizes).float()
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(run(model, inputs, state))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        for name, tensor in found[0].items():
            assert torch.equal(tensor, other[name]), name


def test_correlated_keys_are_solved_in_float64():
    """β = 2 and nearly equal keys: without the wider solve, errors are several times those of the recurrence."""
    generator = torch.Generator().manual_seed(0)
    time, size = 200, 32
    key = torch.randn(1, 1, 1, size, generator=generator) + 0.03 * torch.randn(1, time, 1, size, generator=generator)
    inputs = {
        "query": torch.randn(1, time, 1, size, generator=generator),
        "key": torch.nn.functional.normalize(key, dim=-1),
        "value": torch.randn(1, time, 1, size, generator=generator),
        "beta": torch.full((1, time, 1), 2.0),
    }
    model = next(model for model in MODELS if model.name == "delta_rule")
    state = torch.zeros(1, 1, size, size)
    budget = error_budget(recurrence_of(model, state), {k: x.double() for k, x in inputs.items()}, torch.float32)
    result = model(inputs, initial_state=state, return_final_state=True, backend="cpu")
    assert relative_error(result.output, budget.reference[0]) <= budget.allowed[0]
    assert relative_error(result.final_state, budget.reference[1]) <= budget.allowed[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["gated_delta_rule", "delta_rule", "ssd", "linear_attention"])
def test_one_token_is_the_recurrence(name, dtype):
    model = next(model for model in MODELS if model.name == name)
    sizes = Sizes(batch=3, length=1, heads=2, value_heads=4, key_size=24, value_size=70)
    inputs, state = model.inputs(sizes, dtype=dtype), model.initial_state(sizes).float()
    for initial in (state, None):
        found = model(inputs, initial_state=initial, return_final_state=True)
        exact = model.oracle(inputs, initial_state=initial)
        assert found.output.dtype == dtype
        assert relative_error(found.output, exact.output) <= max(2e-7, torch.finfo(dtype).eps)
        assert relative_error(found.final_state, exact.final_state) <= 2e-7


def test_one_token_runs_compiled_only_where_nothing_is_recorded(monkeypatch):
    calls = []
    monkeypatch.setattr(delta, "step", lambda *a, _run=delta.step, **o: calls.append(1) or _run(*a, **o))
    model, inputs, state, _ = draw((1,))
    model(inputs, initial_state=state)
    assert len(calls) == 1
    leaves = require_grad(inputs)
    model(leaves, initial_state=state).output.sum().backward()
    assert len(calls) == 1
    with torch.no_grad():
        model(leaves, initial_state=state)
    assert len(calls) == 2


def test_gradients_of_gradients_and_transforms():
    model, inputs, state, _ = draw((9,), heads=1, value_heads=1, k=4, v=4)

    def loss(query, backend):
        return model({**inputs, "query": query}, initial_state=state, backend=backend).output.square().sum()

    query = inputs["query"]
    for of in (
        lambda backend: torch.func.grad(loss)(query, backend),
        lambda backend: torch.func.vmap(torch.func.grad(loss), in_dims=(0, None))(
            query.expand(3, *query.shape), backend
        ),
        lambda backend: torch.func.grad(lambda q: torch.func.grad(loss)(q, backend).square().sum())(query),
    ):
        assert relative_error(of("cpu"), of("torch")) < 1e-5
    assert pf.delta_rule(*(inputs[name] for name in ("query", "key", "value", "beta"))).output.isfinite().all()
