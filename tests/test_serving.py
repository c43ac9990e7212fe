"""States in a store, updated in place, kept after accepted tokens: in plain tensor algebra, on every model."""

from __future__ import annotations

import pytest
import torch

import parallelflow as pf
from tests.cases import MODELS, STRUCTURES, assert_close, by_name, gradients, require_grad, slice_time, token
from tests.stores import CASES, SIZES, case_of, check_within_budget, expected

DELTA = next(model for model in STRUCTURES if model.name == "gated_delta_rule")


def run(model, case, **options):
    store = case.store.clone()
    output, final = model(
        case.inputs, initial_state=store, in_place=True, return_final_state=True, **case.options(), **options
    )
    assert final is store
    return output, store


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("model", MODELS, ids=by_name)
def test_a_store_is_the_recurrence_of_each_sequence(model, name):
    case = case_of(model, name)
    output, store = run(model, case, chunk_size=4)
    for got, wanted in zip((output, store), expected(model, case), strict=True):
        assert_close(got, wanted)


@pytest.mark.parametrize("name", sorted(set(CASES) - {"all padding"}))
@pytest.mark.parametrize("model", STRUCTURES, ids=by_name)
def test_without_in_place_the_store_stays(model, name):
    """The final states of the sequences come out, zeros for padding, and are differentiable."""
    case = case_of(model, name)
    tensors = require_grad(case.inputs | {"initial_state": case.store})
    inputs = {name: x for name, x in tensors.items() if name != "initial_state"}
    store = tensors["initial_state"]
    result = model(inputs, initial_state=store, return_final_state=True, chunk_size=4, **case.options())
    assert torch.equal(store, case.store)
    output, after = expected(model, case._replace(inputs=inputs, store=store))
    indices = list(range(store.shape[0])) if case.indices is None else case.indices
    final = torch.stack([after[slot] if slot >= 0 else torch.zeros_like(after[0]) for slot in indices])
    assert_close(result.output, output)
    assert_close(result.final_state, final)
    wanted = gradients((output, final), tensors)
    for name, got in gradients((result.output, result.final_state), tensors).items():
        zero = torch.zeros_like(tensors[name])
        assert_close(zero if got is None else got, zero if wanted[name] is None else wanted[name], what=name)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["slots", "packed and accepted"])
@pytest.mark.parametrize("model", STRUCTURES, ids=by_name)
def test_stores_in_16_and_32_bits(model, name, stored):
    """All sums are in float32; a store in bfloat16 is rounded once."""
    check_within_budget(model, case_of(model, name), torch.float32, stored, "cpu")


@pytest.mark.parametrize("integer", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("model", STRUCTURES, ids=by_name)
def test_steps_on_a_store(model, integer):
    """Two users, of whom one leaves and another takes the slot."""
    inputs, store = model.inputs(SIZES), model.initial_state(SIZES, sequences=4)
    states = {slot: store[slot : slot + 1].clone() for slot in range(4)}
    for t, slots in enumerate(([3, 0, -1], [0, -1, 2], [-1, 2, 3])):
        one = token(inputs, t)
        indices = torch.tensor(slots, dtype=integer)
        result = model.step(one, state=store, state_indices=indices, in_place=True)
        assert result.final_state is store
        for row, slot in enumerate(slots):
            if slot < 0:
                assert not result.output[row].any()
                continue
            alone = {n: x if x.dim() == 1 else x[row : row + 1] for n, x in one.items()}
            output, states[slot] = model.step(alone, state=states[slot])
            assert_close(result.output[row : row + 1], output)
        for slot, state in states.items():
            assert_close(store[slot : slot + 1], state)


@pytest.mark.parametrize("model", STRUCTURES, ids=by_name)
def test_speculative_decoding(model):
    """Drafts are verified without a trace; what was accepted of them is run again in front of the next ones."""
    inputs = model.inputs(SIZES._replace(length=12))
    store = model.initial_state(SIZES)
    whole = model.oracle(inputs, initial_state=store)
    done, kept, drafted = 0, 0, 3
    for accepted in (2, 0, 3, 1):
        before = store.clone()
        part = slice_time(inputs, done, done + kept + drafted)
        counts = torch.full((SIZES.batch,), kept, dtype=torch.int32)
        output = model(part, initial_state=store, in_place=True, accepted_tokens=counts).output
        assert_close(output, whole.output[:, done : done + kept + drafted])
        if kept == 0:
            assert torch.equal(store, before)
        done, kept = done + kept, accepted
    assert_close(store, model.oracle(slice_time(inputs, 0, done), initial_state=model.initial_state(SIZES)).final_state)


def test_a_slot_is_emptied_by_a_reset():
    """A sequence that starts with the log-decay -inf owes nothing to what its slot held."""
    case = case_of(DELTA, "slots")
    case.inputs["log_decay"][:, 0] = -torch.inf
    output, store = run(DELTA, case)
    fresh = case._replace(store=torch.zeros_like(case.store))
    assert_close(output, expected(DELTA, fresh)[0])
    assert_close(store[[4, 0, 2]], expected(DELTA, fresh)[1][[4, 0, 2]])


def test_slots_that_do_not_lie_densely():
    """A store may be part of a larger one."""
    case = case_of(DELTA, "padding")
    wide = torch.zeros(6, 3, *case.store.shape[1:], dtype=torch.float64)
    part = wide[:, 1]
    part.copy_(case.store)
    DELTA(case.inputs, initial_state=part, in_place=True, **case.options())
    assert_close(part, expected(DELTA, case)[1])
    assert not wide[:, 0].any()
    assert not wide[:, 2].any()


def test_one_sequence_keeps_its_nan():
    case = case_of(DELTA, "slots")
    clean = run(DELTA, case)
    case.store[4] = torch.nan
    case.inputs["value"][1, 2:] = torch.inf
    hurt = run(DELTA, case._replace(accepted=[5, 2, 5]))
    assert torch.equal(hurt[0][2], clean[0][2])
    assert torch.equal(hurt[1][2], clean[1][2])
    assert_close(hurt[1][0], expected(DELTA, case._replace(accepted=[5, 2, 5]))[1][0])


def test_stores_compile():
    case = case_of(DELTA, "packed and accepted")
    options = case.options()

    def call(inputs, store):
        return pf.gated_delta_rule(**inputs, initial_state=store, in_place=True, **options).output

    store = case.store.clone()
    output = torch.compile(call, fullgraph=True, backend="aot_eager")(case.inputs, store)
    for got, wanted in zip((output, store), expected(DELTA, case), strict=True):
        assert_close(got, wanted)


def number(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"state_indices": number(0, 1)}, r"state_indices: got shape \[2\], expected one number a sequence, \[3\]"),
        ({"state_indices": number(0, 1, 2, dtype=torch.int16)}, "state_indices: got dtype torch.int16"),
        ({"state_indices": [0, 1, 2]}, "state_indices: got list"),
        ({"state_indices": number(0, 1, 6)}, r"state_indices: got \[0, 1, 6\], expected slots from 0 to 5"),
        ({"state_indices": number(0, -2, 3)}, "state_indices: got"),
        ({"state_indices": number(3, 1, 3), "in_place": True}, "state_indices: got .* each slot once"),
        ({"state_indices": number(0, 1, 2), "initial_state": None}, "initial_state: got none with state_indices"),
        ({"in_place": True, "initial_state": None}, "initial_state: got none with in_place"),
        ({"in_place": 1}, "in_place: got 1"),
        ({"in_place": True}, r"initial_state: got shape \[6, .* N = 3"),
        ({"accepted_tokens": number(0, 1)}, "accepted_tokens: got shape"),
        ({"accepted_tokens": number(0, 1, 6), "initial_state": None}, r"accepted_tokens: got \[0, 1, 6\]"),
        ({"accepted_tokens": number(0, -1, 2), "initial_state": None}, "accepted_tokens: got"),
        ({"state_positions": [1], "in_place": True}, "state_positions: got some with"),
    ],
)
def test_errors_name_the_argument(options, message):
    inputs = DELTA.inputs(SIZES)
    store = DELTA.initial_state(SIZES, sequences=6)
    with pytest.raises((TypeError, ValueError), match=message):
        DELTA(inputs, **{"initial_state": store, **options})


def test_states_of_16_bits_are_for_stores():
    inputs, state = DELTA.inputs(SIZES, dtype=torch.float32), DELTA.initial_state(SIZES, dtype=torch.bfloat16)
    with pytest.raises(TypeError, match=r"initial_state: got dtype torch.bfloat16, .* in_place"):
        DELTA(inputs, initial_state=state)
    with pytest.raises(TypeError, match=r"initial_state: got dtype torch.float16"):
        DELTA(inputs, initial_state=state.half(), in_place=True)


def test_in_place_records_no_gradient():
    inputs, state = require_grad(DELTA.inputs(SIZES)), DELTA.initial_state(SIZES)
    with pytest.raises(ValueError, match=r"in_place: got True where gradients are recorded"):
        DELTA(inputs, initial_state=state, in_place=True)
    with torch.no_grad():
        DELTA(inputs, initial_state=state, in_place=True)
