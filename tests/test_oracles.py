"""The oracles agree with each other: each model's own recurrence is an instance of the general low-rank one."""

from __future__ import annotations

import pytest
import torch

from parallelflow.testing import Sizes, hostile_inputs, hostile_kinds
from tests import oracles
from tests.cases import GENERAL, MODELS, PUBLISHED, assert_close, by_name, slice_time

SIZES = Sizes(batch=2, length=9, heads=2, value_heads=4, key_size=5, value_size=3)


def spread(tensor, heads):
    return oracles.per_value_head(tensor, heads)


def as_low_rank(model, inputs):
    """The table of rows: what the model's inputs are in the general system. Materialised products, on purpose."""
    heads = inputs["value"].shape[-2]
    query = spread(inputs["query"], heads)
    key = spread(inputs["key"], heads)
    value, beta, decay = inputs["value"], inputs.get("beta"), inputs.get("log_decay")
    if decay is not None and decay.dim() == 1:
        decay = decay.expand(*value.shape[:2], heads)
    stack = lambda *rows: torch.stack(rows, dim=2)  # noqa: E731
    name, order, reads = model.function, "simultaneous", "decayed"
    if name in ("linear_attention", "retention", "lightning_attention", "ssd", "gated_linear_attention"):
        read, write, value = stack(torch.zeros_like(key)), stack(key), stack(value)
    elif name in ("delta_rule", "gated_delta_rule", "kimi_delta_attention", "longhorn", "efla"):
        squared = key.square().sum(-1)
        if name == "longhorn":
            beta = beta / (1 + beta * squared)
        if name == "efla":
            beta = (1 - torch.exp(-beta * squared)) / squared
        read, write, value = stack(-beta[..., None] * key), stack(key), stack(beta[..., None] * value)
    elif name == "gated_delta_rule_2":
        read, write, value = stack(-inputs["erase"] * key), stack(key), stack(inputs["write"] * value)
    elif name == "comba":
        removal = spread(inputs["removal_key"], heads)
        read, write, value = stack(-beta[..., None] * removal), stack(key), stack(beta[..., None] * value)
        reads = "raw"
    elif name == "delta_product":
        read, write, value, order = -beta[..., None] * key, key, beta[..., None] * value, "sequential"
    elif name == "rwkv7":
        read, write = stack(inputs["read"], torch.zeros_like(key)), stack(inputs["write"], key)
        value, reads = stack(torch.zeros_like(value), value), "raw"
    tensors = {"query": query, "value": value, "log_decay": decay, "read": read, "write": write}
    tensors = {name: x for name, x in tensors.items() if x is not None}
    return tensors, {"order": order, "reads": reads}


@pytest.mark.parametrize("model", [m for m in PUBLISHED if not m.normalizes], ids=by_name)
@pytest.mark.parametrize("stated", [False, True], ids=["fresh", "stated"])
def test_every_model_is_a_low_rank_flow(model, stated):
    inputs = model.inputs(SIZES)
    state = model.initial_state(SIZES) if stated else None
    scale = 1.0 if model.function in ("rwkv7", "ssd") else None
    tensors, options = as_low_rank(model, inputs)
    expected = oracles.evaluate(oracles.low_rank_flow, tensors, initial_state=state, scale=scale, **options)
    actual = model.oracle(inputs, initial_state=state)
    assert_close(actual.output, expected.output, 1e-12, "output")
    assert_close(actual.final_state, expected.final_state, 1e-12, "final state")


def test_normalized_linear_attention_is_a_weighted_mean_of_the_values():
    model = next(m for m in PUBLISHED if m.normalizes)
    inputs = model.inputs(SIZES._replace(value_heads=2))
    weights = torch.einsum("bthk,bshk->bhts", inputs["query"], inputs["key"]).tril()
    weights = weights / weights.sum(-1, keepdim=True)
    assert_close(model.oracle(inputs).output, torch.einsum("bhts,bshv->bthv", weights, inputs["value"]), 1e-12)


def test_longhorn_step_solves_its_implicit_equation():
    """min |S - S_0|^2 + beta |S^T k - v|^2 has the solution (I + beta k k^T) S = S_0 + beta k v^T."""
    model = next(m for m in PUBLISHED if m.name == "longhorn")
    inputs = slice_time(model.inputs(SIZES._replace(heads=4)), 0, 1)
    inputs["key"] = 1.7 * inputs["key"]
    state = model.initial_state(SIZES)
    key, beta = inputs["key"][:, 0], inputs["beta"][:, 0, :, None, None]
    left = torch.eye(5, dtype=torch.float64) + beta * oracles.outer(key, key)
    right = state + beta * oracles.outer(key, inputs["value"][:, 0])
    assert_close(model.oracle(inputs, initial_state=state).final_state, torch.linalg.solve(left, right), 1e-12)


def test_efla_step_is_the_exponential_of_its_generator():
    """exp [[-beta k k^T, beta k], [0, 0]] = [[P, h], [0, 1]] and the step is S = P S_0 + h v^T."""
    model = next(m for m in PUBLISHED if m.name == "efla")
    inputs = slice_time(model.inputs(SIZES._replace(heads=4)), 0, 1)
    inputs["key"] = 1.7 * inputs["key"]
    inputs["key"][0] = 0.0
    state = model.initial_state(SIZES)
    key, beta = inputs["key"][:, 0], inputs["beta"][:, 0, :, None, None]
    generator = torch.zeros(2, 4, 6, 6, dtype=torch.float64)
    generator[..., :5, :5] = -beta * oracles.outer(key, key)
    generator[..., :5, 5] = beta[..., 0] * key
    flow = torch.matrix_exp(generator)
    expected = flow[..., :5, :5] @ state + oracles.outer(flow[..., :5, 5], inputs["value"][:, 0])
    assert_close(model.oracle(inputs, initial_state=state).final_state, expected, 1e-12)


@pytest.mark.parametrize("model", MODELS, ids=by_name)
def test_state_carries_over_a_cut(model):
    inputs, state = model.inputs(SIZES), model.initial_state(SIZES)
    whole = model.oracle(inputs, initial_state=state, state_positions=[4])
    first = model.oracle(slice_time(inputs, 0, 4), initial_state=state)
    second = model.oracle(slice_time(inputs, 4, None), initial_state=first.final_state)
    assert_close(torch.cat([first.output, second.output], dim=1), whole.output, 1e-12)
    assert_close(second.final_state, whole.final_state, 1e-12)
    assert_close(first.final_state, whole.states[:, 0], 1e-12)


@pytest.mark.parametrize(
    "model", [m for m in GENERAL if m.rows > 1 and m.options["order"] == "simultaneous"], ids=by_name
)
def test_simultaneous_rows_have_no_order(model):
    inputs = model.inputs(SIZES)
    flipped = {name: x.flip(2) if name in ("read", "write", "value") else x for name, x in inputs.items()}
    assert_close(model.oracle(flipped).final_state, model.oracle(inputs).final_state, 1e-12)


@pytest.mark.parametrize("model", MODELS, ids=by_name)
def test_hostile_inputs_are_what_they_say_and_leave_the_recurrence_finite(model):
    sizes = SIZES._replace(length=40)
    inputs = model.inputs(sizes)
    for kind in hostile_kinds(inputs):
        if model.normalizes and "zero" in kind:
            continue  # 0 / 0 by definition
        hostile = hostile_inputs(inputs, kind)
        result = model.oracle(hostile)
        assert result.output.isfinite().all(), kind
        assert result.final_state.isfinite().all(), kind
        assert result.output.norm() < 1e3, kind
        if "correlated" in kind:
            keys = hostile.get("key", hostile.get("write")).transpose(1, -2).flatten(2, -2)
            assert (keys @ keys.mT).min() >= 0.999
        if kind == "reset":
            assert hostile["log_decay"].isneginf().any() or hostile["log_decay"].numel() < 8
