"""The kernel for short sequences: every driver against the float64 recurrence, on states in a store."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

import parallelflow as pf
from parallelflow.kernels import serving
from parallelflow.testing import hostile_inputs, hostile_kinds
from tests.cases import MODELS, STRUCTURES, by_name, slice_time, token
from tests.stores import CASES, SIZES, case_of, check_within_budget

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FEW = tuple(m for m in STRUCTURES if m.name in {"gated_delta_rule", "delta_product-3-scalar", "rwkv7"})
DELTA = next(model for model in STRUCTURES if model.name == "gated_delta_rule")


@pytest.fixture(autouse=True)
def counted(monkeypatch):
    """How many calls have come to the kernel."""
    calls = []
    forward = serving.forward
    monkeypatch.setattr(serving, "forward", lambda *a, **o: calls.append(1) or forward(*a, **o))
    return calls


def moved(inputs, dtype=torch.float32):
    return {name: x.to(device=DEVICE, dtype=dtype) for name, x in inputs.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model", MODELS, ids=by_name)
def test_every_driver(model, dtype, counted):
    case = case_of(model, "slots", SIZES._replace(length=3))
    check_within_budget(model, case, dtype, torch.float32, DEVICE, backend="triton")
    assert counted


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_every_store(name, stored, counted):
    case = case_of(DELTA, name, SIZES._replace(value_heads=1))
    check_within_budget(DELTA, case, torch.float32, stored, DEVICE, backend="triton")
    assert counted


@pytest.mark.parametrize("name", ["padding", "packed and accepted"])
@pytest.mark.parametrize("model", FEW, ids=by_name)
def test_padding_writes_nothing(model, name):
    case = case_of(model, name, SIZES._replace(length=2, value_heads=1))
    output, store = check_within_budget(model, case, torch.float32, torch.float32, DEVICE, backend="triton")
    unused = sorted(set(range(6)) - set(case.indices))
    assert torch.equal(store[unused].cpu(), case.store[unused].float())
    if case.bounds is None:
        assert not output[[row for row, slot in enumerate(case.indices) if slot < 0]].any()


@pytest.mark.parametrize("heads", [(1, 3), (2, 2), (2, 6)], ids=str)
@pytest.mark.parametrize("model", FEW, ids=by_name)
def test_grouped_heads(model, heads):
    sizes = SIZES._replace(heads=heads[0], value_heads=heads[1], length=2)
    check_within_budget(model, case_of(model, "slots", sizes), torch.float32, torch.float32, DEVICE, backend="triton")


@pytest.mark.parametrize(("keys", "values"), [(1, 1), (7, 70), (100, 33), (300, 20)])
@pytest.mark.parametrize("model", FEW, ids=by_name)
def test_sizes_that_are_no_power_of_two(model, keys, values):
    sizes = SIZES._replace(batch=1, key_size=keys, value_size=values, length=2)
    check_within_budget(model, case_of(model, "alone", sizes), torch.float32, torch.float32, DEVICE, backend="triton")


@pytest.mark.parametrize("model", STRUCTURES, ids=by_name)
def test_hostile_inputs(model):
    case = case_of(model, "alone", SIZES._replace(batch=1, value_heads=1))
    for kind in hostile_kinds(case.inputs):
        hurt = case._replace(inputs=hostile_inputs(case.inputs, kind))
        check_within_budget(model, hurt, torch.float32, torch.float32, DEVICE, backend="triton")


@pytest.mark.parametrize("model", FEW, ids=by_name)
def test_sixty_four_tokens_and_one_more(model, counted):
    for length, expected in ((64, 1), (65, 0)):
        inputs = moved(model.inputs(SIZES._replace(length=length, batch=1, value_heads=1)))
        counted.clear()
        backend = "triton" if length == 64 or model is DELTA else "torch"
        model(inputs, backend=backend)
        assert len(counted) == expected


@pytest.mark.parametrize("model", STRUCTURES, ids=by_name)
def test_token_by_token_has_the_bits_of_all_at_once(model):
    """And of any number of them accepted, of any batch, and of a packed line."""
    sizes = SIZES._replace(batch=2, length=2, value_heads=1)
    inputs = moved(model.inputs(sizes))
    store = moved({"state": model.initial_state(sizes, sequences=6)})["state"]
    indices = torch.tensor([4, 0], device=DEVICE)
    options = {"initial_state": store, "state_indices": indices, "return_final_state": True, "backend": "triton"}
    whole = model(inputs, **options)
    steps, outputs = store.clone(), []
    for t in range(sizes.length):
        one = {"state": steps, "state_indices": indices, "in_place": True, "backend": "triton"}
        outputs.append(model.step(token(inputs, t), **one).output)
        part = model(inputs, accepted_tokens=torch.full_like(indices, t + 1), **options)
        assert torch.equal(part.final_state, steps[indices])
        assert torch.equal(part.output, whole.output)
    assert torch.equal(torch.stack(outputs, 1), whole.output)
    assert torch.equal(steps[indices], whole.final_state)
    alone = {name: x if x.dim() == 1 else x[1:2] for name, x in inputs.items()}
    result = model(alone, **options | {"state_indices": indices[1:2]})
    assert torch.equal(result.output[0], whole.output[1])
    assert torch.equal(result.final_state[0], whole.final_state[1])
    line = {name: x if x.dim() == 1 else x.flatten(0, 1)[None] for name, x in inputs.items()}
    bounds = torch.arange(3, dtype=torch.int32, device=DEVICE) * sizes.length
    packed = model(line, cu_seqlens=bounds, **options)
    assert torch.equal(packed.output[0], whole.output.flatten(0, 1))
    assert torch.equal(packed.final_state, whole.final_state)


@pytest.mark.parametrize("model", STRUCTURES, ids=by_name)
def test_many_steps_on_a_store(model):
    """Many steps of rows that come and go leave what each slot's own sequence leaves."""
    sizes = SIZES._replace(batch=2, length=20, value_heads=1, key_size=8, value_size=8)
    inputs = model.inputs(sizes)
    store = model.initial_state(sizes, sequences=3).float().to(DEVICE)
    states = {slot: store[slot : slot + 1].double().cpu() for slot in range(3)}
    single = moved(inputs)
    for t in range(sizes.length):
        slots = [(t // 4) % 3, -1 if t % 5 == 0 else (t // 4 + 1) % 3]
        indices = torch.tensor(slots, device=DEVICE)
        model.step(token(single, t), state=store, state_indices=indices, in_place=True, backend="triton")
        for row, slot in enumerate(slots):
            if slot >= 0:
                part = {n: x if x.dim() == 1 else x[row : row + 1] for n, x in slice_time(inputs, t, t + 1).items()}
                states[slot] = model.oracle(part, initial_state=states[slot]).final_state
    for slot, state in states.items():
        error = (store[slot : slot + 1].cpu().double() - state).norm() / state.norm()
        assert error < 20 * torch.finfo(torch.float32).eps


def test_factors_are_read_where_they_lie(monkeypatch):
    """Heads that are cut from one projection, a decay that is expanded: nothing is copied."""
    copies: list[torch.Tensor] = []
    contiguous = torch.Tensor.contiguous
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda x: copies.append(x) or contiguous(x))
    generator = torch.Generator().manual_seed(0)
    joint = torch.randn(2, 4, 3 * 2 * 16, generator=generator).to(DEVICE)
    query, key, value = (x.unflatten(-1, (2, 16)) for x in joint.split(32, -1))
    decay = -torch.rand(2, generator=generator).to(DEVICE)
    found = pf.retention(query, key, value, decay, backend="triton").output
    assert not copies
    turned = [torch.stack(x.unbind(2), 1).transpose(1, 2) for x in (query, key, value)]  # heads before tokens
    assert torch.equal(pf.retention(*turned, decay, backend="triton").output, found)
    assert copies
    copies.clear()
    pf.retention(*(x[:1] for x in turned), decay, backend="triton")
    assert copies  # or every length would be another kernel
    longer = [torch.cat([x, x.flip(1)], 1)[:, :4] for x in (query, key, value)]  # batches farther apart than tokens
    assert torch.equal(pf.retention(*longer, decay, backend="triton").output, found)
    monkeypatch.undo()
    expected = pf.retention(query, key, value, decay, backend="torch").output
    assert (found - expected).norm() <= 1e-6 * expected.norm()


def test_what_it_does_not_serve(counted):
    """Gradients, other choices and wider dtypes go the other ways, or are refused."""
    inputs = moved(DELTA.inputs(SIZES))
    grad = {name: x.requires_grad_() for name, x in moved(DELTA.inputs(SIZES)).items()}
    DELTA(grad, backend="triton").output.sum().backward()
    assert grad["key"].grad.isfinite().all()
    for change in ({"chunk_size": 32}, {"solver": "substitution"}):
        with pytest.raises(ValueError, match="backend: got 'triton' with"):
            DELTA(inputs, backend="triton", **change)
    with pytest.raises(ValueError, match=r"backend: got 'triton' with dtype torch.float64"):
        DELTA(moved(inputs, torch.float64), backend="triton")
    comba = next(model for model in MODELS if model.name == "comba")
    comba(moved(comba.inputs(SIZES._replace(length=65))), backend="triton")  # chunks
    assert not counted


def test_autograd_is_told_of_a_store_that_changed():
    """The first call, and a remembered one; also under inference mode, which has no graph to protect."""
    inputs = moved(token(DELTA.inputs(SIZES), 0))
    for _ in range(2):
        store = moved({"state": DELTA.initial_state(SIZES)})["state"]
        weight = torch.ones_like(store).requires_grad_()
        product = weight * store
        with torch.no_grad():
            DELTA.step(inputs, state=store, in_place=True, backend="triton", validate=False)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.sum().backward()
    with torch.inference_mode():
        store = moved({"state": DELTA.initial_state(SIZES)})["state"]
        for _ in range(2):
            DELTA.step(inputs, state=store, in_place=True, backend="triton", validate=False)


@pytest.mark.parametrize("name", ["slots", "packed and accepted"])
@pytest.mark.parametrize("in_place", [True, False])
def test_the_kernel_compiles_into_one_graph(name, in_place, counted):
    case = case_of(DELTA, name, SIZES._replace(length=2, value_heads=1))
    inputs, options = moved(case.inputs), case.options(DEVICE)

    def call(inputs, store):
        result = DELTA(
            inputs, initial_state=store, in_place=in_place, return_final_state=True, backend="triton", **options
        )
        return result.output, result.final_state

    found = []
    for function in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        store = case.store.float().to(DEVICE)
        found.append((*function(inputs, store), store))
    for got, wanted in zip(*found, strict=True):
        assert torch.equal(got, wanted)
    assert len(counted) == 2
