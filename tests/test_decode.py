"""Single steps and the chunked form share one state: any mixture of them is the recurrence."""

from __future__ import annotations

import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import parallelflow as pf
import parallelflow.step
from parallelflow.testing import Sizes
from tests.cases import (
    AGGREGATES,
    MODELS,
    PUBLISHED,
    STRUCTURES,
    assert_close,
    by_name,
    gradients,
    require_grad,
    slice_time,
    token,
)

SIZES = Sizes(batch=2, length=11, heads=1, value_heads=2, key_size=4, value_size=3)


def steps(model, inputs, state, start, stop, **options):
    outputs = []
    for t in range(start, stop):
        result = model.step(token(inputs, t), state=state, **options)
        state = result.final_state
        outputs.append(result.output)
    return torch.stack(outputs, dim=1), state


@pytest.mark.parametrize("heads", [(1, 2), (2, 2), (2, 6)], ids=str)
@pytest.mark.parametrize("model", MODELS, ids=by_name)
def test_steps_are_the_recurrence(model, heads):
    sizes = SIZES._replace(heads=heads[0], value_heads=heads[1])
    inputs, state = model.inputs(sizes), model.initial_state(sizes)
    expected = model.oracle(inputs, initial_state=state)
    output, final = steps(model, inputs, state, 0, sizes.length)
    assert_close(output, expected.output)
    assert_close(final, expected.final_state)


@pytest.mark.parametrize("model", MODELS, ids=by_name)
def test_steps_and_chunks_in_turn(model):
    inputs, state = model.inputs(SIZES), model.initial_state(SIZES)
    expected = model.oracle(inputs, initial_state=state)
    first = model(slice_time(inputs, 0, 5), initial_state=state, return_final_state=True, chunk_size=4)
    middle, state = steps(model, inputs, first.final_state, 5, 8)
    last = model(slice_time(inputs, 8, None), initial_state=state, return_final_state=True, chunk_size=4)
    assert_close(torch.cat([first.output, middle, last.output], dim=1), expected.output)
    assert_close(last.final_state, expected.final_state)


@pytest.mark.parametrize("model", MODELS, ids=by_name)
def test_step_options(model):
    inputs, state = model.inputs(SIZES), model.initial_state(SIZES)
    inputs |= {name: 2 * inputs[name] for name in model.normalized}
    normalize = {"normalize_query_key": True} if model.normalized else {}
    expected = model.oracle(inputs, initial_state=state, scale=0.3, normalized=model.normalized)
    output, final = steps(model, inputs, state, 0, SIZES.length, scale=0.3, **normalize)
    assert_close(output, expected.output)
    assert_close(final, expected.final_state)


@pytest.mark.parametrize("model", MODELS, ids=by_name)
def test_step_has_the_arguments_of_the_chunked_form(model):
    """The same names in the same order, no time axis; state is keyword-only and left as it was."""
    step = inspect.signature(getattr(parallelflow.step, model.function)).parameters
    chunked = inspect.signature(getattr(pf, model.function)).parameters
    positional = lambda parameters: [n for n, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]  # noqa: E731
    assert positional(step) == positional(chunked)
    assert step["state"].kind is inspect.Parameter.KEYWORD_ONLY
    inputs, state = model.inputs(SIZES), model.initial_state(SIZES)
    kept = state.clone()
    result = model.step(token(inputs, 0), state=state)
    assert torch.equal(state, kept)
    assert result._fields == ("output", "final_state")


@pytest.mark.parametrize("model", STRUCTURES, ids=by_name)
def test_step_in_half_precision_keeps_a_float32_state(model):
    inputs = model.inputs(SIZES, dtype=torch.bfloat16)
    state = model.initial_state(SIZES, dtype=torch.float32)
    output, final = steps(model, inputs, state, 0, SIZES.length)
    expected = model.oracle(inputs, initial_state=state)
    assert output.dtype == torch.bfloat16
    assert final.dtype == torch.float32
    assert_close(final, expected.final_state, 1e-5)
    assert_close(output.float(), expected.output.bfloat16().float(), 1e-2)


@pytest.mark.parametrize("model", STRUCTURES, ids=by_name)
def test_steps_are_differentiable(model):
    tensors = require_grad(model.inputs(SIZES) | {"initial_state": model.initial_state(SIZES)})
    inputs = {name: x for name, x in tensors.items() if name != "initial_state"}
    expected = model.oracle(inputs, initial_state=tensors["initial_state"])
    actual = steps(model, inputs, tensors["initial_state"], 0, SIZES.length)
    wanted = gradients(expected[:2], tensors)
    for name, got in gradients(actual, tensors).items():
        assert_close(got, wanted[name], what=name)


@pytest.mark.parametrize("model", STRUCTURES, ids=by_name)
def test_bad_steps_name_the_argument(model):
    inputs, state = token(model.inputs(SIZES), 0), model.initial_state(SIZES)
    for broken in (state[:1], state[..., :1], state[0]):
        with pytest.raises((TypeError, ValueError), match="state"):
            model.step(inputs, state=broken)
    with pytest.raises(TypeError, match="chunk_size"):
        model.step(inputs, state=state, chunk_size=4)
    with pytest.raises(TypeError, match="state"):
        model.step(inputs)
    with pytest.raises((TypeError, ValueError), match="value"):
        model.step(inputs | {"value": inputs["value"][:1]}, state=state)
    with pytest.raises((TypeError, ValueError), match="query"):
        model.step(inputs | {"query": inputs["query"][:, None]}, state=state)


def test_errors_are_of_what_was_given():
    """A step's arguments have no time axis and its state is called that; nor do its errors say otherwise."""
    model = next(model for model in MODELS if model.name == "gated_delta_rule")
    inputs, state = token(model.inputs(SIZES), 0), model.initial_state(SIZES)
    query, key = inputs["query"], inputs["key"]

    def message(changed, **options):
        with pytest.raises((TypeError, ValueError)) as caught:
            model.step(inputs | changed, **{"state": state, **options})
        return str(caught.value)

    shown = [list(query[:, None].shape), list(query.shape)]
    assert message({"query": query[:, None]}) == f"query: got shape {shown[0]} with 4 axes, expected [B, H, K]"
    more = torch.cat([key, key[..., :1]], -1)
    assert message({"key": more}) == f"key: got shape {list(more.shape)}, expected [B, H, K] = {shown[1]}"
    assert message({"query": query[0]}).startswith(f"query: got shape {list(query[0].shape)} with 2 axes")
    assert message({}, state=state[:1]).startswith(f"state: got shape {list(state[:1].shape)}, expected")
    assert message({}, state=state.bfloat16()).startswith("state: got dtype torch.bfloat16, expected float32")


# States at requested positions.


@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("model", MODELS, ids=by_name)
def test_states_at_positions(model, aggregate):
    """On and off the chunk boundaries, at the start and at the end; the rest of the result is what it was."""
    inputs, state = model.inputs(SIZES), model.initial_state(SIZES)
    positions = (0, 1, 4, 6, 8, 10, 11)
    options = {"initial_state": state, "chunk_size": 4, "aggregate": aggregate, "return_final_state": True}
    result = model(inputs, state_positions=positions, **options)
    expected = model.oracle(inputs, initial_state=state, state_positions=positions)
    assert result._fields == ("output", "final_state", "states")
    assert_close(result.states, expected.states)
    assert_close(result.output, expected.output)
    assert_close(result.final_state, expected.final_state)


@pytest.mark.parametrize("model", STRUCTURES, ids=by_name)
def test_a_prefix_is_continued_from_its_state(model):
    inputs = model.inputs(SIZES)
    whole = model(inputs, state_positions=[6], chunk_size=4)
    assert whole.final_state is None
    rest = model(slice_time(inputs, 6, None), initial_state=whole.states[:, 0], chunk_size=4)
    assert_close(rest.output, whole.output[:, 6:])
    output, _ = steps(model, inputs, whole.states[:, 0], 6, SIZES.length)
    assert_close(output, whole.output[:, 6:])


@pytest.mark.parametrize("model", STRUCTURES, ids=by_name)
def test_states_at_positions_with_many_heads(model):
    """Where time may be walked in windows: positions on and off their edges."""
    sizes = Sizes(batch=2, length=13, heads=16, value_heads=64, key_size=2, value_size=1)
    inputs = model.inputs(sizes)
    positions = (1, 4, 5, 8, 12, 13)
    result = model(inputs, state_positions=positions, chunk_size=2)
    assert_close(result.states, model.oracle(inputs, state_positions=positions).states)


@settings(max_examples=40)
@given(data=st.data())
def test_states_at_any_positions(data):
    model = data.draw(st.sampled_from(MODELS))
    length = data.draw(st.integers(1, 20))
    positions = sorted(data.draw(st.sets(st.integers(0, length), min_size=1, max_size=5)))
    sizes = SIZES._replace(length=length)
    inputs = model.inputs(sizes)
    result = model(inputs, state_positions=positions, chunk_size=data.draw(st.integers(1, 8)))
    assert result.states.shape[:2] == (2, len(positions))
    for i, position in enumerate(positions):
        assert_close(result.states[:, i], model.oracle(slice_time(inputs, 0, position)).final_state)


def test_every_model_has_both_forms():
    for model in PUBLISHED:
        assert callable(getattr(pf, model.function))
        assert callable(getattr(parallelflow.step, model.function))
