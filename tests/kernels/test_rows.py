"""Rows of every kind on the portable kernels: output, final state and all gradients against float64, packed or not."""

import sys

import pytest
import torch

pytest.importorskip("triton")

import parallelflow as pf
from parallelflow.kernels.rows import engine
from parallelflow.kernels.rows.pull import pull
from parallelflow.testing import Sizes, relative_error
from tests.cases import MODELS, by_name, gradients, require_grad

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
NEEDS_HOPPER = pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
SERVED = {
    "gated_linear_attention", "gated_delta_rule_2", "kimi_delta_attention", "comba", "delta_product-2-none",
    "delta_product-3-scalar", "rwkv7", "low_rank_flow-1-simultaneous-none-decayed",
    "low_rank_flow-2-simultaneous-vector-raw", "low_rank_flow-2-sequential-scalar-decayed",
    "low_rank_flow-4-sequential-vector-decayed", "low_rank_flow-4-simultaneous-scalar-raw",
}  # fmt: skip
ROWS = [model for model in MODELS if model.name in SERVED]
assert len(ROWS) == len(SERVED)


def run(model, inputs, state, backend, **options):
    tensors = require_grad({**inputs, "initial_state": state})
    result = model(tensors, return_final_state=True, backend=backend, **options)
    grads = gradients([result.output, result.final_state], tensors)
    return {"output": result.output.detach(), "state": result.final_state.detach(), **grads}


def compare(model, sizes, dtype, *, starts=None, change=None, backend="triton"):
    """Errors of the kernels at most twice those of rounding (16 bits) or of the plain float32 engine."""
    inputs = model.inputs(sizes)
    if change is not None:
        change(inputs)
    vectors = {name: x.to(dtype) if x.ndim > 3 and name != "log_decay" else x.float() for name, x in inputs.items()}
    vectors = {name: x.to(DEVICE) for name, x in vectors.items()}
    count = sizes.batch if starts is None else len(starts) - 1
    shape = (count, sizes.value_heads, sizes.key_size, model.state_value_size(sizes.value_size))
    state = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) / 3).to(DEVICE)
    options = {} if starts is None else {"cu_seqlens": torch.tensor(starts, device=DEVICE)}
    found = run(model, vectors, state, backend, **options)
    again = run(model, vectors, state, backend, **options) if DEVICE == "cuda" else found  # the interpreter is serial
    wide = {name: x.double() for name, x in vectors.items()}
    exact = run(model, wide, state.double(), "torch", **options)
    plain = run(model, {name: x.float() for name, x in vectors.items()}, state, "torch", **options)
    # A rounding of every input and of every output; the tensor cores' operands are rounded too.
    unit = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}[dtype]
    for name, expected in exact.items():
        assert torch.equal(found[name], again[name]), f"{name}: other bits in a second run"
        error = relative_error(found[name], expected)
        allowed = 2 * max(relative_error(plain[name], expected), (4 if dtype is torch.float32 else 3) * unit)
        assert error <= allowed, f"{name}: {error:.1e}, allowed {allowed:.1e}"


@pytest.mark.parametrize("model", ROWS, ids=by_name)
def test_float32(model):
    compare(model, Sizes(2 if DEVICE == "cuda" else 1, 37, 1, 2, 20, 18, model.rows), torch.float32)


@pytest.mark.parametrize("model", ROWS, ids=by_name)
def test_packed(model):
    compare(model, Sizes(1, 40, 1, 2, 16, 16, model.rows), torch.float32, starts=[0, 21, 21, 40])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["kimi_delta_attention", "rwkv7", "delta_product-3-scalar"])
def test_sixteen_bits(name, dtype):
    model = next(model for model in ROWS if model.name == name)
    compare(model, Sizes(1, 70, 1, 2, 32, 32, model.rows), dtype)


@NEEDS_HOPPER
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("model", ROWS, ids=by_name)
def test_hopper(model, packed, dtype):
    """Hopper's scan, chunks and sequences that end anywhere."""
    starts = [0, 70, 70, 71, 333] if packed else None
    size = 64 if packed else 128
    if model.name == "rwkv7":
        size = 64
    compare(model, Sizes(1 if packed else 2, 333, 1, 2, size, size, model.rows), dtype, starts=starts, backend="hopper")


@NEEDS_HOPPER
@pytest.mark.parametrize("name", ["kimi_delta_attention", "gated_linear_attention", "rwkv7", "comba"])
def test_hopper_with_decays_of_every_strength(name):
    model = next(model for model in ROWS if model.name == name)
    compare(model, Sizes(1, 333, 1, 1, 64, 64, model.rows), torch.float16, change=mixed_decays, backend="hopper")


def mixed_decays(inputs):
    decay = inputs["log_decay"]
    choice = torch.randint(0, 5, decay.shape, generator=torch.Generator().manual_seed(2))
    for place, value in enumerate((-100.0, -1e-6, 0.0)):
        decay.masked_fill_(choice == place, value)


@pytest.mark.parametrize("name", ["kimi_delta_attention", "gated_linear_attention", "rwkv7", "comba"])
def test_decays_of_every_strength(name):
    model = next(model for model in ROWS if model.name == name)
    compare(model, Sizes(1, 70, 1, 1, 16, 16, model.rows), torch.float32, change=mixed_decays)


def of_three_strengths(decay):
    """Three chunks of 64 tokens: one that may be centred, one whose blocks of 16 tokens may, one where none may."""
    decay[:, :64] /= decay[:, :64].abs().max()
    decay[:, 64:128] = -4.0
    decay[:, 128:, :, ::2] = -100.0


@pytest.mark.parametrize("backend", ["triton", pytest.param("hopper", marks=NEEDS_HOPPER)])
@pytest.mark.parametrize("name", ["kimi_delta_attention", "rwkv7", "gated_linear_attention"])
def test_every_floor(name, backend, monkeypatch):
    model = next(model for model in ROWS if model.name == name)
    floors, prepare = [], engine.prepare

    def watched(*arguments):
        floors.append(prepare(*arguments))
        return floors[-1]

    monkeypatch.setattr(engine, "prepare", watched)
    size = 64 if backend == "hopper" else 16
    compare(model, Sizes(1, 150, 1, 1, size, size, model.rows), torch.bfloat16, backend=backend,
            change=lambda inputs: of_three_strengths(inputs["log_decay"]))  # fmt: skip
    assert all(found.floors.tolist() == [64, 16, 1] for found in floors)


@pytest.mark.parametrize("programs", [1, 2])
def test_strong_chunks_that_share_a_program(programs, monkeypatch):
    """Programs for few of the strong chunks each, or for all of them: three or six chunks of which a third is not."""
    monkeypatch.setattr(sys.modules[pull.__module__], "PROGRAMS", programs)
    model = next(model for model in ROWS if model.name == "kimi_delta_attention")
    compare(model, Sizes(1, 150, 1, 2, 16, 16, model.rows), torch.bfloat16,
            change=lambda inputs: of_three_strengths(inputs["log_decay"]))  # fmt: skip


@pytest.mark.parametrize("name", ["kimi_delta_attention", "rwkv7", "gated_linear_attention"])
def test_what_two_tokens_say_of_the_decays_before_both_cancels(name):
    """A decay's gradient summed over time, as that of a gate's bias is: nothing may leak to earlier tokens."""
    model = next(model for model in ROWS if model.name == name)
    inputs = model.inputs(Sizes(1, 190, 1, 1, 32, 32, model.rows))
    of_three_strengths(inputs["log_decay"])
    vectors = {name: x.float() if name == "log_decay" else x.bfloat16() for name, x in inputs.items()}
    vectors = {name: x.to(DEVICE) for name, x in vectors.items()}
    found = {}
    for backend, given in (("triton", vectors), ("torch", {name: x.double() for name, x in vectors.items()})):
        tensors = require_grad(given)
        output = model(tensors, backend=backend).output
        found[backend] = gradients([output], tensors)["log_decay"].double()
    for chunk in (slice(0, 64), slice(64, 128)):
        error = relative_error(found["triton"][:, chunk].sum(1), found["torch"][:, chunk].sum(1))
        assert error <= 2**-7


@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("name", ["kimi_delta_attention", "rwkv7", "gated_linear_attention", "gated_delta_rule_2"])
def test_hopper_with_every_floor(name):
    """Hopper's gradients of the chunks that may be centred, the portable ones of the others."""
    model = next(model for model in ROWS if model.name == name)
    compare(model, Sizes(1, 150, 1, 2, 64, 64, model.rows), torch.bfloat16, backend="hopper",
            change=lambda inputs: of_three_strengths(inputs["log_decay"]))  # fmt: skip


def test_resets():
    model = next(model for model in ROWS if model.name == "kimi_delta_attention")

    def change(inputs):
        inputs["log_decay"][:, 17] = -torch.inf

    inputs = model.inputs(Sizes(1, 40, 1, 1, 16, 16, 1))
    change(inputs)
    inputs = {name: x.float().to(DEVICE) for name, x in inputs.items()}
    whole = model(inputs, backend="triton").output
    after = model({name: x[:, 17:] for name, x in inputs.items()}, backend="triton").output
    assert relative_error(whole[:, 17:], after.double()) <= 2e-6


def test_large_heads():
    model = next(model for model in ROWS if model.name == "delta_product-2-none")
    compare(model, Sizes(1, 20, 1, 1, 160, 200, 2), torch.float32)


def test_sixteen_rows_and_no_more():
    def call(rows, backend):
        draw = lambda *shape: torch.randn(*shape, generator=torch.Generator().manual_seed(rows)).to(DEVICE)  # noqa: E731
        key = torch.nn.functional.normalize(draw(1, 9, rows, 1, 16), dim=-1)
        query = draw(1, 9, 1, 16).requires_grad_()
        value = draw(1, 9, rows, 1, 16)
        return pf.low_rank_flow(query, value, read=-key / rows, write=key, backend=backend).output

    assert relative_error(call(16, "triton").detach(), call(16, "torch").detach().double()) <= 1e-5
    with pytest.raises(ValueError, match="backend: got 'triton' with 17 rows a token, expected at most 16"):
        call(17, "triton")


def test_sequential_rows_that_only_write_are_refused():
    key = torch.randn(1, 5, 1, 16, device=DEVICE)
    rows = (pf.Row(read=pf.Factor(key, sign=-1), write=key, value=pf.Factor(key)), pf.Row(key, value=pf.Factor(key)))
    driver = pf.LowRankDriver(rows=rows, order="sequential")
    with pytest.raises(ValueError, match="backend: got 'triton' with sequential rows of which some only write"):
        pf.integrate(driver, key.requires_grad_(), backend="triton")


def test_the_delta_rule_has_kernels_of_its_own(monkeypatch):
    monkeypatch.setattr(engine, "forward", lambda *a: pytest.fail("the general kernels were taken"))
    key = torch.nn.functional.normalize(torch.randn(1, 70, 1, 16, device=DEVICE), dim=-1)
    beta = torch.rand(1, 70, 1, device=DEVICE)
    assert pf.delta_rule(key.requires_grad_(), key, key, beta, backend="triton").output.shape == key.shape


@pytest.mark.parametrize("scheme", ["backward_euler", "cayley", "rk4", "exact"])
def test_discretised_rows(scheme):
    model = next(model for model in ROWS if model.name == "low_rank_flow-4-simultaneous-scalar-raw")
    inputs = {name: x.float().to(DEVICE) for name, x in model.inputs(Sizes(1, 20, 1, 1, 16, 16, 4)).items()}
    options = {"discretization": scheme, "reads": "decayed"}
    found = {}
    for backend in ("triton", "torch"):
        wide = {name: x.double() if backend == "torch" else x for name, x in inputs.items()}
        tensors = require_grad(wide)
        output = pf.low_rank_flow(**tensors, **options, backend=backend).output
        found[backend] = {"output": output.detach(), **gradients([output], tensors)}
    for name, expected in found["torch"].items():
        assert relative_error(found["triton"][name], expected) <= 2e-6, name
