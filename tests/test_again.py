"""On a CPU: a call that has been made before is the same pass with other tensors, checked as the first one was."""

from __future__ import annotations

import sys

import pytest
import torch
from torch.autograd import forward_ad

from parallelflow.kernels.cpu import build
from parallelflow.testing import Sizes
from tests.cases import MODELS, by_name, require_grad, token

pytestmark = pytest.mark.skipif(not build.usable(), reason="no C++ compiler")
SIZES = Sizes(batch=2, length=20, heads=1, value_heads=2, key_size=16, value_size=12)
COMPUTED = ("linear_attention-normalized", "longhorn", "efla")
"""Models that hand the engine something other than their arguments."""
VIEWS = ("retention", "lightning_attention")
"""Models that hand it views of their arguments, through which a gradient is to go."""
DELTA = next(model for model in MODELS if model.name == "gated_delta_rule")
KIMI = next(model for model in MODELS if model.name == "kimi_delta_attention")


@pytest.fixture
def whole(monkeypatch):
    """The calls that went the whole way."""
    calls = []
    module = sys.modules["parallelflow.integrate"]
    canonical = module.canonical
    monkeypatch.setattr(module, "canonical", lambda *a: calls.append(1) or canonical(*a))
    return calls


def draw(model, seed, dtype=torch.float32):
    return model.inputs(SIZES, seed=seed, dtype=dtype), model.initial_state(SIZES, seed=seed).float()


def assert_same(found, wanted, allowed=2e-6):
    for got, reference in zip(found, wanted, strict=True):
        assert got.shape == reference.shape
        assert got.dtype == reference.dtype
        assert (got.double() - reference.double()).norm() <= allowed * reference.double().norm()


NORMALISED = [
    (model, normalize) for model in MODELS for normalize in (False, True) if model.normalized or not normalize
]
CASES = pytest.mark.parametrize(
    ("model", "normalize"), NORMALISED, ids=[f"{model.name}{'-unit' * unit}" for model, unit in NORMALISED]
)


@CASES
def test_the_second_call_is_one_pass(model, normalize, whole):
    """A step, and many tokens at once."""
    computed = model.name in COMPUTED
    options = {"normalize_query_key": True} if normalize else {}
    for seed in range(3):
        inputs, state = draw(model, seed)
        one = token(inputs, 3)
        wanted = model.step(one, state=state, backend="torch", **options)
        options |= {"return_final_state": True}
        many = model(inputs, initial_state=state, backend="torch", **options)
        whole.clear()
        assert_same(model(inputs, initial_state=state, **options), many, 2e-5)
        assert len(whole) >= 1 if seed == 0 or computed else not whole
        del options["return_final_state"]
        whole.clear()
        assert_same(model.step(one, state=state, **options), wanted)
        assert len(whole) >= 1 if seed == 0 or computed else not whole


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("wrong", [1e-3, float("nan"), float("inf")])
@pytest.mark.parametrize("model", [DELTA, KIMI], ids=by_name)
def test_log_decays_are_checked_each_time(model, wrong, dtype):
    """Those that are positive or NaN, anywhere, raise; resets do not."""
    inputs, state = draw(model, 0, dtype)
    one, resets = token(inputs, 0), token(inputs, 1)
    for _ in range(2):
        model.step(one, state=state)
    for place in (0, -1):
        log_decay = one["log_decay"].clone()
        log_decay.view(-1)[place] = wrong
        with pytest.raises(ValueError, match="log_decay"):
            model.step(one | {"log_decay": log_decay}, state=state)
    resets["log_decay"] = torch.full_like(resets["log_decay"], -torch.inf)
    found = model.step(resets, state=state)
    assert_same(found, model.step(resets, state=state, backend="torch"), max(2e-6, torch.finfo(dtype).eps))


def test_unchecked_means_unchecked():
    inputs, state = draw(DELTA, 0)
    one = token(inputs, 0)
    one["log_decay"] = one["log_decay"].abs()
    found = [DELTA.step(one, state=state, validate=False) for _ in range(2)]
    assert_same(found[1], found[0], 0)


@pytest.mark.parametrize(
    "change",
    [
        lambda one, state: (one, state, {"scale": 0.5}),
        lambda one, state: (one, state, {"normalize_query_key": True}),
        lambda one, state: (one | {"key": one["key"].transpose(-1, -2).clone().transpose(-1, -2)}, state, {}),
        lambda one, state: (one | {"key": torch.stack([one["key"]] * 2, -1)[..., 0]}, state, {}),
        lambda one, state: ({n: x[:1] for n, x in one.items()}, state[:1], {}),
        lambda one, state: (one | {"key": one["query"]}, state, {}),
        lambda one, state: (one, torch.stack([state, state])[0], {}),
        lambda one, state: (one, state.transpose(0, 1).clone().transpose(0, 1), {}),
        lambda one, state: (one, state.double(), {}),
        lambda one, state: ({n: x.bfloat16() for n, x in one.items()}, state, {}),
    ],
    ids=["scale", "normalised", "strides", "spread channels", "batch", "one tensor twice", "another state",
         "a state's strides", "a wide state", "dtype"],
)  # fmt: skip
def test_what_differs_is_seen(change):
    inputs, state = draw(DELTA, 0)
    for _ in range(2):
        DELTA.step(token(inputs, 0), state=state)
    inputs, state = draw(DELTA, 1)
    one, state, options = change(token(inputs, 0), state)
    wanted = DELTA.step(one, state=state, backend="torch", **options)
    for _ in range(2):
        assert_same(DELTA.step(one, state=state, **options), wanted, max(2e-6, torch.finfo(one["key"].dtype).eps))


def test_errors_stay_errors():
    inputs, state = draw(DELTA, 0)
    one = token(inputs, 0)
    for _ in range(2):
        DELTA.step(one, state=state)
    with pytest.raises(TypeError, match="key"):
        DELTA.step(one | {"key": one["key"].bfloat16()}, state=state)
    with pytest.raises(ValueError, match="beta"):
        DELTA.step(one | {"beta": one["beta"][:1]}, state=state)
    with pytest.raises(TypeError, match="in_place"):
        DELTA.step(one, state=state, in_place=1)
    with pytest.raises(TypeError, match="scael"):
        DELTA.step(one, state=state, scael=1.0)


@pytest.mark.parametrize("returned", [True, False])
def test_a_store_is_written_each_time(returned):
    """The pass itself does not write it."""
    inputs, store = draw(DELTA, 0)
    expected = store.clone()
    for t in range(3):
        one = {name: x[:, t : t + 1] for name, x in inputs.items()}
        options = {"in_place": True, "return_final_state": returned}
        DELTA(one, initial_state=store, **options)
        DELTA(one, initial_state=expected, backend="torch", **options)
        assert_same([store], [expected])


@pytest.mark.parametrize("recorded", [False, True])
def test_sequences_of_other_lengths_are_other_sequences(recorded):
    """The same tensors' shapes, other boundaries."""
    inputs, _ = draw(DELTA, 0)
    inputs = {name: x[:1].clone().requires_grad_(recorded) for name, x in inputs.items()}
    for bounds in ([0, 5, 20], [0, 12, 20], [0, 5, 20]):
        options = {"cu_seqlens": torch.tensor(bounds), "return_final_state": True}
        found = DELTA(inputs, validate=False, **options)
        assert found.output.requires_grad == recorded
        assert_same(found, DELTA(inputs, backend="torch", **options), 2e-5)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_number_of_threads_is_asked_for_each_time(threads):
    inputs, state = draw(DELTA, 0)
    one, before = token(inputs, 0), torch.get_num_threads()
    first = DELTA.step(one, state=state)
    try:
        torch.set_num_threads(threads)
        assert_same(DELTA.step(one, state=state), first, 0)
    finally:
        torch.set_num_threads(before)


def gradients_of(model, inputs, state, **options):
    """Output, and the gradients of all that has one."""
    leaves = {**require_grad(inputs), "state": state.clone().requires_grad_()}
    result = model(
        {name: leaves[name] for name in inputs}, initial_state=leaves["state"], return_final_state=True, **options
    )
    loss = result.output.square().sum() + result.final_state.sum()
    return [result.output, *torch.autograd.grad(loss, list(leaves.values()))]


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@CASES
def test_a_training_step_is_one_operation(model, normalize, backend, whole):
    inputs, state = draw(model, 0)
    options = {"backend": backend, **({"normalize_query_key": True} if normalize else {})}
    wanted = gradients_of(model, inputs, state, **options)  # checked, and never remembered
    for number in range(3):
        whole.clear()
        found = gradients_of(model, inputs, state, validate=False, **options)
        assert len(whole) >= 1 if number == 0 or model.name in (*COMPUTED, *VIEWS) else not whole
        assert_same(found, wanted, 0)


def test_who_has_a_gradient_is_seen():
    """After a training step: some of the gradients, none recorded, gradients of gradients, a transform, autocast."""
    inputs, state = draw(DELTA, 0)
    options = {"validate": False, "initial_state": state, "return_final_state": True}
    for _ in range(2):
        gradients_of(DELTA, inputs, state, validate=False)
    some = inputs | {"value": inputs["value"].clone().requires_grad_()}
    for _ in range(2):
        assert DELTA(some, **options).output.requires_grad
        with torch.no_grad():
            assert not DELTA(some, **options).output.requires_grad
        with torch.inference_mode():
            assert DELTA(some, **options).output.is_inference()
    other = inputs | {"beta": inputs["beta"].clone().requires_grad_()}
    for _ in range(2):
        with torch.no_grad():
            assert not DELTA(other, **options).output.requires_grad
    assert DELTA(other, **options).output.requires_grad
    leaves = require_grad(inputs)
    for _ in range(2):
        (first,) = torch.autograd.grad(DELTA(leaves, **options).output.square().sum(), leaves["key"], create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), leaves["value"])
        (wanted,) = torch.autograd.grad(
            DELTA(leaves, **options | {"backend": "torch"}).output.square().sum(), leaves["key"], create_graph=True
        )
        assert_same([second], [torch.autograd.grad(wanted.sum(), leaves["value"])[0]], 1e-4)

    def loss(value):
        return DELTA(inputs | {"value": value}, **options).output.square().sum()

    value = inputs["value"].clone().requires_grad_()
    loss(value).backward()
    assert_same([torch.func.grad(loss)(inputs["value"])], [value.grad])
    with torch.autocast("cpu", torch.bfloat16):
        assert DELTA(leaves, **options).output.dtype == torch.bfloat16
    assert DELTA(leaves, **options).output.dtype == torch.float32
    for _ in range(2):
        DELTA(inputs, **options)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        DELTA(inputs | {"value": forward_ad.make_dual(inputs["value"], inputs["value"])}, **options)


def test_nobody_watches_while_a_graph_is_traced():
    """One graph, whatever is computed on the way; and calls beside it are remembered as before."""
    inputs, state = draw(DELTA, 0)
    options = {"initial_state": state, "normalize_query_key": True}
    compiled = torch.compile(lambda inputs: DELTA(inputs, **options).output, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        assert_same([compiled(inputs)], [DELTA(inputs, **options).output])
