"""Bad arguments raise, naming the argument, what came and what is expected; hard data stays within its error budget."""

from __future__ import annotations

import re
from functools import cache

import pytest
import torch

import parallelflow as pf
from parallelflow.testing import (
    HOSTILE_KINDS,
    Sizes,
    error_budget,
    hostile_inputs,
    hostile_kinds,
    relative_error,
    round_inputs,
)
from tests.cases import AGGREGATES, BACKENDS, MODELS, PUBLISHED, SOLVERS, STRUCTURES, Model, by_name

SIZES = Sizes(batch=2, length=6, heads=2, value_heads=4, key_size=3, value_size=5)
DELTA = next(model for model in MODELS if model.name == "gated_delta_rule")
LOW_RANK = next(model for model in MODELS if model.name == "low_rank_flow-2-simultaneous-vector-raw")
WRONG = (TypeError, ValueError)


def each_argument():
    for model in STRUCTURES:
        for name in model.inputs(SIZES):
            yield pytest.param(model, name, id=f"{model.name}-{name}")


def raises(call, *names, kinds=WRONG, shows=()):
    """The call raises an error that names one of `names` and shows everything in `shows`."""
    with pytest.raises(kinds) as caught:
        call()
    message = str(caught.value)
    assert any(re.search(rf"\b{name}\b", message) for name in names), f"{names} not named in: {message}"
    for text in shows:
        assert str(text) in message, f"{text!r} not in: {message}"
    return message


def shape(tensor):
    return ", ".join(map(str, tensor.shape))


# Metadata: always checked.


@pytest.mark.parametrize(("model", "name"), list(each_argument()))
def test_wrong_rank(model, name):
    inputs = model.inputs(SIZES)
    broken = inputs[name][0]
    raises(lambda: model(inputs | {name: broken}), name, shows=[shape(broken)])
    broken = inputs[name][None]
    raises(lambda: model(inputs | {name: broken}), name, shows=[shape(broken)])


@pytest.mark.parametrize("axis", [0, 1, -2, -1])
@pytest.mark.parametrize(("model", "name"), list(each_argument()))
def test_wrong_extent(model, name, axis):
    """One more along an axis: another batch, another length, other heads, another size."""
    inputs = model.inputs(SIZES)
    if axis >= inputs[name].dim() or -axis > inputs[name].dim():
        pytest.skip("no such axis")
    broken = torch.cat([inputs[name], inputs[name].narrow(axis, 0, 1)], dim=axis)
    if name == "value" and axis == -1 and model.function != "gated_delta_rule_2":
        assert model(inputs | {name: broken}).output.shape[-1] == 6  # V is free
        return
    who = tuple(inputs) if name in ("query", "value") else (name,)  # these set what the others must be
    if name in ("read", "write") and model.function == "low_rank_flow":
        who = ("read", "write", "value")
    message = raises(lambda: model(inputs | {name: broken}), *who)
    assert re.search(r"got .*\d.*expected .*\d", message), f"not what came and what is expected: {message}"


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize(("model", "name"), list(each_argument()))
def test_wrong_dtype(model, name, dtype):
    inputs = model.inputs(SIZES)
    raises(lambda: model(inputs | {name: inputs[name].to(dtype)}), name, shows=[dtype])


@pytest.mark.parametrize("model", MODELS, ids=by_name)
def test_query_key_and_value_share_a_dtype(model):
    inputs = model.inputs(SIZES, dtype=torch.float32)
    raises(
        lambda: model(inputs | {"value": inputs["value"].bfloat16()}), "value", "query", shows=["bfloat16", "float32"]
    )


@pytest.mark.parametrize(("model", "name"), list(each_argument()))
def test_wrong_device(model, name):
    inputs = model.inputs(SIZES)
    message = raises(lambda: model(inputs | {name: inputs[name].to("meta")}), name, "query", shows=["meta", "cpu"])
    assert name in message or name == "query"


@pytest.mark.parametrize(("model", "name"), list(each_argument()))
def test_not_a_tensor(model, name):
    inputs = model.inputs(SIZES)
    raises(lambda: model(inputs | {name: inputs[name].tolist()}), name, kinds=TypeError, shows=["list"])
    if name != "log_decay" or model.function not in ("delta_product", "low_rank_flow"):
        raises(lambda: model(inputs | {name: None}), name, kinds=TypeError, shows=["None"])


@pytest.mark.parametrize("model", MODELS, ids=by_name)
def test_unknown_keyword(model):
    """No misspelt flag is swallowed: TypeError, naming it and what there is."""
    message = raises(lambda: model(model.inputs(SIZES), chunksize=4), "chunksize", kinds=TypeError)
    assert "chunk_size" in message
    assert "initial_state" in message


@pytest.mark.parametrize("model", MODELS, ids=by_name)
def test_missing_argument(model):
    inputs = model.inputs(SIZES)
    inputs.pop("value")
    raises(lambda: model(inputs), "value", kinds=TypeError)


@pytest.mark.parametrize("option", ["solver", "aggregate", "backend"])
@pytest.mark.parametrize("model", STRUCTURES, ids=by_name)
def test_unknown_choice(model, option):
    message = raises(lambda: model(model.inputs(SIZES), **{option: "sequentail"}), option, shows=["sequentail"])
    assert {"solver": "substitution", "aggregate": "segmented", "backend": "triton"}[option] in message
    raises(lambda: model(model.inputs(SIZES), **{option: 3}), option, shows=["3"])


@pytest.mark.parametrize("backend", ["triton", "hopper"])
def test_a_kernel_asked_for_is_never_silently_replaced(backend):
    raises(
        lambda: DELTA(DELTA.inputs(SIZES, dtype=torch.float64), backend=backend),
        "backend",
        kinds=Exception,
        shows=[backend],
    )


@pytest.mark.parametrize("chunk_size", [0, -1, 2.5, "64", True, None])
def test_bad_chunk_size(chunk_size):
    raises(lambda: DELTA(DELTA.inputs(SIZES), chunk_size=chunk_size), "chunk_size", shows=[chunk_size])


@pytest.mark.parametrize("scale", ["1", [1.0], torch.ones(2)], ids=str)
def test_bad_scale(scale):
    raises(lambda: DELTA(DELTA.inputs(SIZES), scale=scale), "scale")


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -float("inf")])
def test_a_scale_is_finite(scale):
    for _ in range(2):
        raises(lambda: DELTA(DELTA.inputs(SIZES), scale=scale), "scale", kinds=ValueError, shows=[scale, "finite"])


FLAGS = ("return_final_state", "normalize_query_key", "in_place", "batch_invariant")


@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize("value", ["no", 1, 0, None], ids=str)
def test_a_flag_is_true_or_false(flag, value):
    """Not what Python takes for true: a string "no" is."""
    raises(lambda: DELTA(DELTA.inputs(SIZES), **{flag: value}), flag, kinds=TypeError, shows=["True or False"])


@pytest.mark.parametrize("value", ["no", 1, 0], ids=str)
def test_validate_is_a_flag_or_none(value):
    raises(
        lambda: DELTA(DELTA.inputs(SIZES), validate=value), "validate", kinds=TypeError, shows=["True, False or None"]
    )


@pytest.mark.parametrize("model", [m for m in MODELS if m.normalizes], ids=by_name)
def test_normalize_is_a_flag(model):
    inputs = model.inputs(SIZES)
    raises(lambda: pf.linear_attention(**inputs, normalize="no"), "normalize", kinds=TypeError, shows=["'no'"])


@pytest.mark.parametrize("option", [{"context_lengths": [3, 3]}, {"final_state_on": "all"}], ids=str)
def test_options_of_ranks_need_ranks(option):
    (name,) = option
    raises(lambda: DELTA(DELTA.inputs(SIZES), **option), name, kinds=ValueError, shows=["context_group"])


def test_accepted_tokens_need_a_state_to_keep():
    accepted = torch.tensor([1, 2])
    raises(
        lambda: DELTA(DELTA.inputs(SIZES), accepted_tokens=accepted), "accepted_tokens", shows=["return_final_state"]
    )


@pytest.mark.parametrize("name", ["query", "value", "beta"])
def test_not_dense(name):
    """After a dense tensor of the same shape has passed, too."""
    inputs = DELTA.inputs(SIZES)
    DELTA(inputs)
    broken = inputs | {name: inputs[name].to_sparse()}
    raises(lambda: DELTA(broken), name, kinds=TypeError, shows=["sparse_coo", "dense"])


def test_no_heads():
    inputs = {name: tensor[:, :, :0] for name, tensor in DELTA.inputs(SIZES).items()}
    raises(lambda: DELTA(inputs), "query", kinds=ValueError, shows=[shape(inputs["query"]), "at least one head"])


def test_a_kernel_that_makes_its_own_choices_says_which():
    inputs = DELTA.inputs(SIZES, dtype=torch.float32)
    message = raises(lambda: DELTA(inputs, backend="cpu", chunk_size=32), "backend", shows=["chunk_size=32", "64"])
    assert "solver" not in message
    raises(lambda: DELTA(inputs, backend="cpu", solver="sigdelta"), "backend", shows=["solver='sigdelta'"])


@pytest.mark.parametrize("model", STRUCTURES, ids=by_name)
def test_bad_initial_state(model):
    inputs, state = model.inputs(SIZES), model.initial_state(SIZES)
    for broken in (state[:1], state[:, :1], state[:, :, :1], state[..., :1], state[0], state[None]):
        raises(lambda b=broken: model(inputs, initial_state=b), "initial_state", shows=[shape(broken)])
    for broken in (state.bfloat16(), state.half(), state.long()):
        raises(lambda b=broken: model(inputs, initial_state=b), "initial_state", shows=[broken.dtype, "float32"])
    raises(lambda: model(inputs, initial_state=state.to("meta")), "initial_state", shows=["meta"])
    raises(lambda: model(inputs, initial_state=0.0), "initial_state", kinds=TypeError)


@pytest.mark.parametrize("positions", [[-1], [7], [3, 2], [1.5], [], 3, "12"], ids=str)
def test_bad_state_positions(positions):
    raises(lambda: DELTA(DELTA.inputs(SIZES), state_positions=positions), "state_positions")


# Packed sequences.


def packed():
    return DELTA.inputs(SIZES._replace(batch=1))


@pytest.mark.parametrize("model", STRUCTURES, ids=by_name)
def test_packed_sequences_are_one_batch_row(model):
    raises(lambda: model(model.inputs(SIZES), cu_seqlens=torch.tensor([0, 6])), "cu_seqlens", shows=["2"])


@pytest.mark.parametrize("offsets", [[0, 4, 3, 6], [1, 6], [0, 5], [0, 7], [0, -1, 6], [0], [3], []], ids=str)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_bad_offsets(offsets, dtype):
    raises(lambda: DELTA(packed(), cu_seqlens=torch.tensor(offsets, dtype=dtype)), "cu_seqlens")


def test_offsets_of_the_wrong_kind():
    raises(lambda: DELTA(packed(), cu_seqlens=torch.tensor([0.0, 6.0])), "cu_seqlens", shows=["float32", "int"])
    raises(lambda: DELTA(packed(), cu_seqlens=torch.tensor([[0, 6]])), "cu_seqlens", shows=["1, 2"])
    raises(lambda: DELTA(packed(), cu_seqlens=[0, 6]), "cu_seqlens", kinds=TypeError, shows=["list"])
    raises(lambda: DELTA(packed(), cu_seqlens=torch.tensor([0, 6], dtype=torch.int16)), "cu_seqlens", shows=["int16"])


def test_offsets_on_another_device():
    offsets = torch.tensor([0, 6], device="meta")
    raises(lambda: DELTA(packed(), cu_seqlens=offsets), "cu_seqlens", kinds=ValueError, shows=["meta", "cpu"])


def test_offsets_on_the_host_must_agree():
    offsets = torch.tensor([0, 2, 6])
    raises(lambda: DELTA(packed(), cu_seqlens=offsets, cu_seqlens_cpu=torch.tensor([0, 6])), "cu_seqlens_cpu")
    raises(lambda: DELTA(packed(), cu_seqlens=offsets, cu_seqlens_cpu=torch.tensor([0, 3, 6])), "cu_seqlens_cpu")
    raises(lambda: DELTA(packed(), cu_seqlens_cpu=offsets), "cu_seqlens")


def test_packed_initial_state_has_a_row_a_sequence():
    state = DELTA.initial_state(SIZES, sequences=3)
    offsets = torch.tensor([0, 2, 6])
    raises(lambda: DELTA(packed(), cu_seqlens=offsets, initial_state=state), "initial_state", shows=[shape(state), "2"])


# Values: checked in eager mode on the CPU, or when asked for.


@pytest.mark.parametrize("model", [m for m in MODELS if "log_decay" in m.inputs(SIZES)], ids=by_name)
@pytest.mark.parametrize("bad", [0.5, float("nan"), float("inf")])
def test_growing_or_undefined_decay(model, bad):
    inputs = model.inputs(SIZES)
    inputs["log_decay"].view(-1)[-1] = bad
    for validate in (None, True):
        raises(lambda v=validate: model(inputs, validate=v), "log_decay", kinds=ValueError)
    model(inputs, validate=False)


def test_values_are_not_read_without_validation():
    """validate=False asks for no look at the data: a positive decay computes what the formula says."""
    inputs = DELTA.inputs(SIZES)
    inputs["log_decay"] = inputs["log_decay"].abs()
    expected = DELTA.oracle(inputs)
    assert torch.allclose(DELTA(inputs, validate=False, chunk_size=2).output, expected.output)


# The general flow and drivers.


def test_orders_and_reads():
    inputs = LOW_RANK.inputs(SIZES)
    raises(
        lambda: pf.low_rank_flow(**inputs, order="parallel"), "order", shows=["parallel", "simultaneous", "sequential"]
    )
    raises(lambda: pf.low_rank_flow(**inputs, reads="before"), "reads", shows=["before", "decayed", "raw"])
    raises(lambda: pf.low_rank_flow(**inputs, order="sequential", reads="raw"), "reads", shows=["raw", "sequential"])


def test_nothing_to_normalize():
    raises(lambda: pf.low_rank_flow(**LOW_RANK.inputs(SIZES), normalize_query_key=True), "normalize_query_key")


def test_rows_and_drivers():
    x = torch.zeros(1, 4, 2, 3)
    raises(lambda: pf.LowRankDriver(rows=()), "rows")
    raises(lambda: pf.LowRankDriver(rows=(pf.Row(read=None, write=x, value=None),)), "rows", "Row")
    raises(lambda: pf.LowRankDriver(rows=(pf.Row(read=None, write=x[0], value=pf.Factor(x)),)), "write")
    raises(lambda: pf.LowRankDriver(rows=(pf.Row(read=pf.Factor(x[..., :2]), write=x, value=pf.Factor(x)),)), "read")
    raises(lambda: pf.LowRankDriver(rows=(pf.Row(read=None, write=x, value=pf.Factor(x, sign=2)),)), "sign", "value")
    raises(
        lambda: pf.LowRankDriver(rows=(pf.Row(read=None, write=x, value=pf.Factor(x, x[..., :2])),)),
        "coefficient",
        "value",
    )


@pytest.mark.parametrize(
    ("make", "name", "came"),
    [
        (lambda x: pf.Row(x, value=x), "value", "Tensor"),
        (lambda x: pf.Row(x, x, pf.Factor(x)), "read", "Tensor"),
        (lambda x: pf.Row(pf.Factor(x), value=pf.Factor(x)), "write", "Factor"),
        (lambda x: pf.Row(None, value=pf.Factor(x)), "write", "NoneType"),
        (lambda x: pf.Row(x, value=(x, None)), "value", "tuple"),
        (lambda x: pf.LowRankDriver(pf.Row(x, value=pf.Factor(x))), "rows", "Row"),
        (lambda x: pf.LowRankDriver(None), "rows", "NoneType"),
        (lambda x: pf.LowRankDriver((x,)), "rows", "Tensor"),
        (lambda x: pf.LowRankDriver(x), "rows", "Tensor"),
        (lambda x: pf.discretize(x, "exact"), "driver", "Tensor"),
        (lambda x: pf.discretize(None), "driver", "NoneType"),
        (lambda x: pf.DriverSource(3, torch.linspace(0, 1, 5)), "rates", "int"),
    ],
)
def test_parts_of_a_driver_are_what_they_are_called(make, name, came):
    raises(lambda: make(torch.zeros(1, 4, 2, 3)), name, kinds=TypeError, shows=[f"got {came}"])


# Hard data. Budgets are derived from the data: see parallelflow.testing.error_budget.

LONG = Sizes(batch=1, length=150, heads=1, value_heads=2, key_size=16, value_size=16)
COVERED = (*PUBLISHED, *(m for m in STRUCTURES if m not in PUBLISHED))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def hard_cases():
    for model in COVERED:
        for kind in hostile_kinds(model.inputs(Sizes(length=2))):
            if not (model.normalizes and "zero" in kind):  # 0 / 0 by definition
                yield pytest.param(model, kind, id=f"{model.name}-{kind}")


@cache
def hard_budget(model: Model, kind: str, dtype: torch.dtype, keep: tuple[str, ...]):
    inputs = hostile_inputs(model.inputs(LONG), kind)
    if dtype == torch.float32:  # float32 data, exactly: the budget is the recurrence's own error on them
        inputs = {name: x.float().double() for name, x in inputs.items()}

    def recurrence(tensors, dtype):
        result = model.oracle(tensors, dtype=dtype)
        return result.output, result.final_state

    return inputs, error_budget(recurrence, inputs, dtype, keep=keep)


def check_budget(model: Model, kind: str, dtype: torch.dtype, keep=("beta", "log_decay"), **options):
    inputs, budget = hard_budget(model, kind, dtype, keep)
    result = model(round_inputs(inputs, dtype, keep=keep), return_final_state=True, **options)
    assert result.output.dtype == dtype
    assert result.final_state.dtype == torch.float32
    for name, actual, reference, allowed in zip(
        ("output", "final state"), (result.output, result.final_state), budget.reference, budget.allowed, strict=True
    ):
        assert actual.isfinite().all(), f"{name} is not finite"
        error = relative_error(actual, reference)
        assert error <= allowed, f"{name} off by {error:.2e}, allowed {allowed:.2e} ({options})"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("model", "kind"), list(hard_cases()))
def test_hard_data_within_budget(model, kind, dtype):
    for backend in BACKENDS:
        check_budget(model, kind, dtype, backend=backend)


@pytest.mark.parametrize(("model", "kind"), list(hard_cases()))
def test_hard_data_all_in_bfloat16(model, kind):
    """beta and the decays in bfloat16 too, as a model under plain bfloat16 hands them over."""
    check_budget(model, kind, torch.bfloat16, keep=())


@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("kind", HOSTILE_KINDS)
def test_hard_data_with_every_choice(kind, solver, aggregate):
    """float32; in bfloat16 sigdelta, whose rounding grows with the chunk (docs/theory.md)."""
    dtype = torch.bfloat16 if solver == "sigdelta" else torch.float32
    names = ("gated_delta_rule", "kimi_delta_attention", "delta_product-3-scalar", "rwkv7")
    for model in (m for m in STRUCTURES if m.name in names):
        if kind in hostile_kinds(model.inputs(Sizes(length=2))):
            check_budget(model, kind, dtype, solver=solver, aggregate=aggregate)


@pytest.mark.parametrize(("model", "kind"), list(hard_cases()))
def test_hard_data_has_finite_gradients(model, kind):
    inputs = hostile_inputs(model.inputs(LONG), kind)
    tensors = {name: x.float().requires_grad_() for name, x in inputs.items()}
    state = model.initial_state(LONG, dtype=torch.float32).requires_grad_()
    result = model(tensors, initial_state=state, return_final_state=True)
    (result.output.square().sum() + result.final_state.square().sum()).backward()
    for name, x in {**tensors, "initial_state": state}.items():
        assert x.grad.isfinite().all(), name


def test_a_reset_forgets_everything():
    """log_decay = -inf: what comes after is the same bits whatever came before."""
    for model in (m for m in MODELS if "log_decay" in m.inputs(SIZES) and m.options.get("reads") != "raw"):
        if model.function in ("comba", "rwkv7", "retention", "lightning_attention"):
            continue  # raw reads carry the old state over, and one decay a head resets at every token
        inputs = model.inputs(SIZES)
        inputs["log_decay"][:, 3] = -torch.inf
        first = model(inputs, chunk_size=4, initial_state=model.initial_state(SIZES), return_final_state=True)
        other = {name: torch.cat([x[:, :3].flip(1) * 0.5, x[:, 3:]], dim=1) for name, x in inputs.items()}
        second = model(other, chunk_size=4, return_final_state=True)
        assert torch.allclose(first.output[:, 3:], second.output[:, 3:], rtol=0, atol=1e-13), model.name
        assert torch.allclose(first.final_state, second.final_state, rtol=0, atol=1e-13), model.name
