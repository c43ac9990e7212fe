"""The compiled kernels against the float64 recurrence and against themselves: sizes, layouts, sequences, threads."""

from itertools import pairwise

import pytest
import torch

import parallelflow as pf
from parallelflow.kernels.cpu import build, flow
from parallelflow.testing import FLOOR, Sizes, hostile_inputs, hostile_kinds, make_inputs, relative_error
from tests.cases import MODELS, STRUCTURES, by_name, gradients, require_grad

pytestmark = pytest.mark.skipif(not build.usable(), reason="no C++ compiler")
WINDOW = 128  # tokens between the states that the backward pass starts from, for one row a token
SERVED = [model for model in MODELS if not model.normalizes]
STRUCTURED = [model for model in STRUCTURES if not model.normalizes]


def named(name):
    return next(model for model in MODELS if model.name == name)


def run(model, inputs, state, backend="cpu", **options):
    """Output, final state and all gradients of a fixed linear function of both."""
    tensors = require_grad({**inputs, "initial_state": state})
    result = model(tensors, return_final_state=True, backend=backend, **options)
    return {
        "output": result.output.detach(),
        "final_state": result.final_state.detach(),
        **gradients([result.output, result.final_state], tensors),
    }


def recurrence(model, inputs, state, dtype):
    """The same of the recurrence."""
    tensors = require_grad({name: x.to(dtype) for name, x in {**inputs, "initial_state": state}.items()})
    own = {name: x for name, x in tensors.items() if name != "initial_state"}
    result = model.oracle(own, dtype=dtype, initial_state=tensors["initial_state"])
    found = {"output": result.output.detach(), "final_state": result.final_state.detach()}
    return {**found, **gradients([result.output, result.final_state], tensors)}


def draw(model, sizes, kind=None, seed=0):
    """float32 inputs and states."""
    inputs = model.inputs(sizes, seed=seed)
    inputs = inputs if kind is None else hostile_inputs(inputs, kind)
    return {name: x.float() for name, x in inputs.items()}, model.initial_state(sizes).float()


def assert_within(found, exact, *others):
    """At most twice the error that others make in float32."""
    for name, reference in exact.items():
        allowed = max(FLOOR, *(2 * relative_error(other[name], reference) for other in others))
        error = relative_error(found[name], reference)
        assert error <= allowed, f"{name} off by {error:.1e}, allowed {allowed:.1e}"


def check(model, sizes, kind=None):
    """Outputs, states and all gradients within twice the error of the recurrence in float32."""
    inputs, state = draw(model, sizes, kind)
    exact, plain = (recurrence(model, inputs, state, dtype) for dtype in (torch.float64, torch.float32))
    assert_within(run(model, inputs, state), exact, plain)


def check_torch(model, sizes):
    """Within twice the error of the torch backend in float32, where a recurrence would take long."""
    inputs, state = draw(model, sizes)
    exact = run(model, {name: x.double() for name, x in inputs.items()}, state.double(), "torch")
    assert_within(run(model, inputs, state), exact, run(model, inputs, state, "torch"))


@pytest.mark.parametrize("model", SERVED, ids=by_name)
def test_auto_takes_them_for_every_model(model, monkeypatch):
    calls = []
    monkeypatch.setattr(flow, "forward", lambda *a, _run=flow.forward, **o: calls.append(1) or _run(*a, **o))
    model(model.inputs(Sizes(batch=1, length=5), dtype=torch.float32))
    assert calls


@pytest.mark.parametrize("model", SERVED, ids=by_name)
def test_every_model_is_its_recurrence(model):
    """Chunks whole and unfinished, key heads shared by value heads, sizes that are no whole vectors."""
    check(model, Sizes(batch=2, length=70, heads=2, value_heads=4, key_size=20, value_size=17))


@pytest.mark.parametrize("model", STRUCTURED, ids=by_name)
def test_hostile_inputs(model):
    """Decays of -100 beside -1e-6, resets, equal keys, beta = 2, zeros: gradients too. A chunk of reflections of equal
    keys rounds more than the recurrence in any chunked form: there the torch backend's errors are the measure."""
    sizes = Sizes(batch=1, length=70, heads=1, value_heads=2, key_size=16, value_size=16)
    for kind in hostile_kinds(model.inputs(sizes)):
        inputs, state = draw(model, sizes, kind)
        exact, plain = (recurrence(model, inputs, state, dtype) for dtype in (torch.float64, torch.float32))
        others = (run(model, inputs, state, "torch"),) if "correlated" in kind else ()
        assert_within(run(model, inputs, state), exact, plain, *others)


@pytest.mark.parametrize("length", [1, 15, 16, 17, WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW + 45])
def test_every_length(length):
    """Chunks and windows unfinished and whole."""
    sizes = Sizes(batch=2, length=length, heads=2, value_heads=4, key_size=20, value_size=36)
    names = ("gated_delta_rule", "ssd", "rwkv7", "delta_product-3-scalar", "low_rank_flow-4-sequential-vector-decayed")
    for name in names:
        check_torch(named(name), sizes)


@pytest.mark.parametrize("size", [(1, 1), (3, 17), (17, 3), (16, 16), (64, 100), (256, 48), (512, 512)])
def test_every_head_size(size):
    for name in ("gated_delta_rule", "kimi_delta_attention"):
        check_torch(
            named(name), Sizes(batch=1, length=70, heads=1, value_heads=1, key_size=size[0], value_size=size[1])
        )


@pytest.mark.parametrize("order", ["simultaneous", "sequential"])
@pytest.mark.parametrize("decay", ["none", "scalar", "vector"])
def test_every_number_of_rows(decay, order):
    """Chunks of 16 tokens down to 1: rows a token that divide 16, and those that do not."""
    for rows in range(1, 17):
        model = named("low_rank_flow-1-simultaneous-none-decayed")
        inputs = make_inputs("low_rank_flow", Sizes(length=41, rows=rows, key_size=9), decay=decay)
        state = model.initial_state(Sizes(key_size=9))
        found = {}
        for backend, dtype in (("cpu", torch.float32), ("torch", torch.float32), ("torch", torch.float64)):
            tensors = require_grad({name: x.float().to(dtype) for name, x in inputs.items()} | {"s": state.to(dtype)})
            own = {name: x for name, x in tensors.items() if name != "s"}
            result = pf.low_rank_flow(
                **own, order=order, initial_state=tensors["s"], return_final_state=True, backend=backend
            )
            grads = gradients([result.output, result.final_state], tensors)
            found[backend, dtype] = {"output": result.output.detach(), **grads}
        exact, plain = found["torch", torch.float64], found["torch", torch.float32]
        assert_within(found["cpu", torch.float32], exact, plain)


def test_more_rows_are_the_torch_backends():
    inputs = make_inputs("low_rank_flow", Sizes(length=3, rows=17), dtype=torch.float32)
    assert pf.low_rank_flow(**inputs).output.isfinite().all()
    with pytest.raises(ValueError, match="17 rows a token, expected at most 16"):
        pf.low_rank_flow(**inputs, backend="cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("model", STRUCTURED, ids=by_name)
def test_narrow_inputs(model, dtype):
    """The results of the same numbers in float32, rounded once; gradients in the inputs' dtypes."""
    sizes = Sizes(batch=1, length=70, heads=1, value_heads=2, key_size=16, value_size=24)
    inputs, state = draw(model, sizes)
    narrow = {name: x.to(dtype) for name, x in inputs.items()}
    wide = run(model, {name: x.float() for name, x in narrow.items()}, state)
    found = run(model, narrow, state)
    for name, reference in wide.items():
        assert found[name].dtype == (torch.float32 if name in ("final_state", "initial_state") else dtype)
        # What a function computes of its inputs before the engine (a decay, a coefficient) is in their dtype.
        assert relative_error(found[name], reference) <= 2 * torch.finfo(dtype).eps, name


def test_larger_heads_are_the_torch_backends():
    model = named("delta_rule")
    inputs = model.inputs(
        Sizes(batch=1, length=3, heads=1, value_heads=1, key_size=513, value_size=2), dtype=torch.float32
    )
    assert model(inputs).output.isfinite().all()
    with pytest.raises(ValueError, match="K = 513, V = 2, expected at most 512"):
        model(inputs, backend="cpu")


def draw_packed(lengths, name="gated_delta_rule", heads=2, value_heads=4, k=16, v=24, dtype=torch.float32):
    sizes = Sizes(batch=1, length=sum(lengths), heads=heads, value_heads=value_heads, key_size=k, value_size=v)
    model = named(name)
    inputs = model.inputs(sizes, dtype=dtype)
    state = model.initial_state(sizes._replace(batch=len(lengths))).float()
    return model, inputs, state, torch.tensor([0, *torch.tensor(lengths).cumsum(0)])


@pytest.mark.parametrize("name", ["gated_delta_rule", "rwkv7", "delta_product-3-scalar"])
@pytest.mark.parametrize("lengths", [(70, 0, 1, 300, 33), (0,), (0, 5), (5, 0)])
def test_packed_sequences_are_the_sequences_alone(lengths, name):
    """The same bits: no sequence knows of its neighbours."""
    model, inputs, state, bounds = draw_packed(lengths, name)
    together, plain = (run(model, inputs, state, each, cu_seqlens=bounds) for each in ("cpu", "torch"))
    for key, tensor in plain.items():
        assert (together[key] - tensor).norm() <= 1e-5 * tensor.norm(), key
    for number, (first, last) in enumerate(pairwise(bounds)):
        if first == last:
            assert torch.equal(together["final_state"][number], state[number])
            assert torch.equal(together["initial_state"][number], plain["initial_state"][number])
            continue
        own = {key: x[:, first:last] for key, x in inputs.items()}
        alone = model(own, initial_state=state[number : number + 1], return_final_state=True, backend="cpu")
        assert torch.equal(together["output"][:, first:last], alone.output)
        assert torch.equal(together["final_state"][number], alone.final_state[0])


def test_a_nan_stays_in_its_sequence_and_head():
    model, inputs, state, bounds = draw_packed((70, 70, 70))
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
    model, inputs, state, _ = draw_packed((90,), heads=2, value_heads=2, k=16, v=16)
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


@pytest.mark.parametrize("name", ["gated_delta_rule", "gated_delta_rule_2", "rwkv7", "delta_product-3-scalar"])
@pytest.mark.parametrize("batch", [1, 5])
def test_the_same_bits_with_any_number_of_threads(batch, name):
    """With few sequences each value head is a task of its own, whose gradients of shared factors are summed after."""
    sizes = Sizes(batch=batch, length=100, heads=1, value_heads=3, key_size=16, value_size=16)
    model = named(name)
    inputs, state = draw(model, sizes)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(run(model, inputs, state))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        for key, tensor in found[0].items():
            assert torch.equal(tensor, other[key]), key


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
    model = named("delta_rule")
    state = torch.zeros(1, 1, size, size)
    exact, plain = (recurrence(model, inputs, state, dtype) for dtype in (torch.float64, torch.float32))
    found = run(model, inputs, state)
    for name in ("output", "final_state"):
        assert relative_error(found[name], exact[name]) <= max(2 * relative_error(plain[name], exact[name]), FLOOR)


def test_gradients_of_gradients_and_transforms():
    model, inputs, state, _ = draw_packed((9,), heads=1, value_heads=1, k=4, v=4)

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
