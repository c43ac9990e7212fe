"""A step that has been made before is the same launch with other tensors, and nothing that matters is forgotten."""

from __future__ import annotations

import inspect

import pytest
import torch

pytest.importorskip("triton")

import parallelflow as pf
from parallelflow.again import remembered
from parallelflow.kernels import serving
from tests.cases import STRUCTURES, by_name, token
from tests.stores import SIZES as WIDER

SIZES = WIDER._replace(value_heads=1, key_size=8, value_size=8)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DELTA = next(model for model in STRUCTURES if model.name == "gated_delta_rule")
COMPUTED = ("linear_attention-normalized",)
"""Models that hand the kernel something other than their arguments."""


@pytest.fixture
def forwards(monkeypatch):
    """The calls that went all the way."""
    calls = []
    forward = serving.forward
    monkeypatch.setattr(serving, "forward", lambda *a, **o: calls.append(1) or forward(*a, **o))
    return calls


def draw(model, seed):
    inputs = {n: x.float().to(DEVICE) for n, x in token(model.inputs(SIZES, seed=seed), 0).items()}
    return inputs, model.initial_state(SIZES, seed=seed).float().to(DEVICE)


def step(model, inputs, state, **options):
    return model.step(inputs, state=state, backend="triton", validate=False, **options)


@pytest.mark.parametrize(
    ("in_place", "normalize"), [(True, False), (False, False), (True, True)], ids=["in place", "new", "unit vectors"]
)
@pytest.mark.parametrize("model", STRUCTURES, ids=by_name)
def test_the_second_step_is_one_launch(model, in_place, normalize, forwards):
    if normalize and not model.normalized:
        pytest.skip("no key to normalise")
    options = {"normalize_query_key": True} if normalize else {}
    for seed in range(3):
        inputs, state = draw(model, seed)
        wanted = model.step(inputs, state=state, backend="torch", **options)
        forwards.clear()
        found = step(model, inputs, state, in_place=in_place, **options)
        assert len(forwards) == (1 if seed == 0 or model.name in COMPUTED else 0)
        assert (found.final_state is state) == in_place
        for got, reference in zip(found, wanted, strict=True):
            assert got.shape == reference.shape
            assert (got - reference).norm() <= 2e-6 * reference.norm()


@pytest.mark.parametrize(
    "change",
    [
        lambda inputs, state: (inputs, state, {"scale": 0.5}),
        lambda inputs, state: (inputs, state, {"normalize_query_key": True}),
        lambda inputs, state: (inputs | {"key": inputs["key"].transpose(-1, -2).clone().transpose(-1, -2)}, state, {}),
        lambda inputs, state: ({n: x[:2] for n, x in inputs.items()}, state[:2], {}),
        lambda inputs, state: (inputs | {"key": inputs["query"]}, state, {}),
        lambda inputs, state: (inputs | {"beta": inputs["beta"].double().float()}, state, {}),
        lambda inputs, state: (inputs, torch.cat([state, state])[::2], {}),
    ],
    ids=["scale", "normalised", "strides", "batch", "one tensor twice", "another beta", "another state"],
)
def test_what_differs_is_seen(change):
    inputs, state = draw(DELTA, 0)
    for _ in range(2):
        step(DELTA, inputs, state)
    inputs, state, options = change(*draw(DELTA, 1))
    for _ in range(2):
        wanted = DELTA.step(inputs, state=state, backend="torch", **options)
        found = step(DELTA, inputs, state, **options)
        for got, reference in zip(found, wanted, strict=True):
            assert (got - reference).norm() <= 2e-6 * reference.norm()


def test_dtypes_are_seen():
    inputs, state = draw(DELTA, 0)
    for _ in range(2):
        step(DELTA, inputs, state)
    halves = {name: x if name in ("beta", "log_decay") else x.bfloat16() for name, x in inputs.items()}
    assert step(DELTA, halves, state).output.dtype == torch.bfloat16
    with pytest.raises(TypeError, match="key"):
        step(DELTA, inputs | {"key": inputs["key"].bfloat16()}, state)
    for _ in range(2):
        step(DELTA, inputs, state, in_place=True)
    with pytest.raises(TypeError, match="in_place"):
        step(DELTA, inputs, state, in_place=1)


def test_one_tensor_twice_does_not_teach_that_two_are_one():
    """A removal key that is the key, and then one that is not."""
    comba = next(model for model in STRUCTURES if model.name == "comba")
    for seed in range(4):
        inputs, state = draw(comba, seed)
        if seed < 2:
            inputs["removal_key"] = inputs["key"]
        wanted = comba.step(inputs, state=state, backend="torch")
        found = step(comba, inputs, state)
        assert (found.output - wanted.output).norm() <= 2e-6 * wanted.output.norm()


def test_numbers_are_checked_where_they_are_read(forwards):
    inputs, state = draw(DELTA, 0)
    for _ in range(2):
        DELTA.step(inputs, state=state, backend="triton", validate=True)
    assert len(forwards) == 2
    with pytest.raises(ValueError, match="log_decay"):
        DELTA.step(inputs | {"log_decay": -inputs["log_decay"]}, state=state, backend="triton", validate=True)


def test_gradients_transforms_and_autocast_go_all_the_way(forwards):
    inputs, state = draw(DELTA, 0)
    for _ in range(2):
        step(DELTA, inputs, state)
    forwards.clear()
    grad = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    with torch.enable_grad():
        step(DELTA, grad, state).output.sum().backward()
    assert grad["key"].grad.abs().sum() > 0
    assert not forwards
    each = torch.func.vmap(lambda value: step(DELTA, inputs | {"value": value}, state).output)
    values = torch.stack([inputs["value"], 2 * inputs["value"]])
    assert torch.allclose(each(values)[0], step(DELTA, inputs, state).output, atol=1e-5)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert step(DELTA, inputs, state).output.dtype == torch.bfloat16
    assert step(DELTA, inputs, state).output.dtype == torch.float32


def test_a_store_is_used_again(forwards):
    inputs, _ = draw(DELTA, 0)
    store = DELTA.initial_state(SIZES, sequences=5).float().to(DEVICE)
    expected = store.clone()
    for slots in ([4, 0, 2], [1, -1, 3], [-1, -1, 0]):
        indices = torch.tensor(slots, device=DEVICE)
        found = step(DELTA, inputs, store, state_indices=indices, in_place=True)
        wanted = DELTA.step(inputs, state=expected, state_indices=indices, in_place=True, backend="torch")
        assert torch.allclose(found.output, wanted.output, atol=1e-5)
        assert torch.allclose(store, expected, atol=1e-5)
    assert len(forwards) == 1


def test_what_is_done_with_the_output_is_done_each_time(forwards):
    """A function whose result is not what the kernel wrote."""

    @remembered
    def twice(**arguments):
        found = inspect.unwrap(pf.gated_delta_rule)(**arguments)
        return found._replace(output=2 * found.output.squeeze(1))

    inputs, state = draw(DELTA, 0)
    for _ in range(2):
        plain = step(DELTA, inputs, state)
        forwards.clear()
        options = {"backend": "triton", "validate": False, "return_final_state": True, "initial_state": state}
        tokens = {name: x.unsqueeze(1) for name, x in inputs.items()}
        result = twice(**tokens, **options)
        assert torch.equal(result.output, 2 * plain.output)
        assert len(forwards) == 1


def test_calls_of_several_tokens_on_a_store(forwards):
    """Of a batch, of drafts, of a short line; boundaries on the host are looked at each time."""
    sizes = SIZES._replace(length=4)
    store = DELTA.initial_state(sizes, sequences=5).float().to(DEVICE)
    number = lambda *numbers: torch.tensor(numbers, device=DEVICE)  # noqa: E731
    bounds = torch.tensor([0, 1, 4], dtype=torch.int32)
    ways = {
        "batch": ({"state_indices": number(3, 1, -1)}, 3, 0),
        "drafts": ({"state_indices": number(3, 1, 0), "accepted_tokens": number(0, 4, 2)}, 3, 0),
        "line": ({"state_indices": number(2, 1), "cu_seqlens": bounds.to(DEVICE)}, 1, 0),
        "bounds": ({"state_indices": number(2, 1), "cu_seqlens": bounds.to(DEVICE), "cu_seqlens_cpu": bounds}, 1, 1),
    }
    for options, batch, again in ways.values():
        for seed in range(2):
            inputs = DELTA.inputs(sizes._replace(batch=batch), seed=seed)
            inputs = {name: x.float().to(DEVICE) for name, x in inputs.items()}
            options |= {"in_place": True, "validate": False}
            wanted = store.clone()
            reference = DELTA(inputs, initial_state=wanted, backend="torch", **options)
            forwards.clear()
            found = DELTA(inputs, initial_state=store, backend="triton", **options)
            assert len(forwards) == (1 if seed == 0 else again)
            assert found.final_state is None
            assert torch.allclose(found.output, reference.output, atol=1e-5)
            assert torch.allclose(store, wanted, atol=1e-5)


def test_a_models_own_step_is_computed_each_time(forwards):
    """Longhorn's β is made of its arguments."""
    for seed in range(2):
        inputs, state = draw(DELTA, seed)
        del inputs["log_decay"]
        options = {"state": state, "validate": False}
        found = pf.step.longhorn(**inputs, backend="triton", **options).output
        wanted = pf.step.longhorn(**inputs, backend="torch", **options).output
        assert (found - wanted).norm() <= 2e-6 * wanted.norm()
    assert len(forwards) == 2
