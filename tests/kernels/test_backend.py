"""The kernels behind the public functions: the same results and gradients as the torch backend, or a clear refusal."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

import parallelflow as pf
from parallelflow.kernels import backend as kernel_backend
from parallelflow.kernels import delta
from parallelflow.problem import Inputs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def draw(time=70, heads=1, value_heads=2, k=16, v=16, sequences=2):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    tensors = (
        normal(1, time, heads, k),
        torch.nn.functional.normalize(normal(1, time, heads, k), dim=-1),
        normal(1, time, value_heads, v),
        normal(1, time, value_heads).sigmoid(),
        -normal(1, time, value_heads).abs(),
        normal(sequences, value_heads, k, v),
    )
    return [tensor.to(DEVICE).requires_grad_() for tensor in tensors]


MODELS = {
    "gated_delta_rule": lambda q, k, v, b, g, s, **o: pf.gated_delta_rule(q, k, v, b, g, initial_state=s, **o),
    "delta_rule": lambda q, k, v, b, g, s, **o: pf.delta_rule(q, k, v, b, initial_state=s, **o),
    "longhorn": lambda q, k, v, b, g, s, **o: pf.longhorn(q, k, v, b, initial_state=s, **o),
    "efla": lambda q, k, v, b, g, s, **o: pf.efla(q, k, v, b, initial_state=s, **o),
    "ssd": lambda q, k, v, b, g, s, **o: pf.ssd(q, k, v, g, initial_state=s, **o),
    "retention": lambda q, k, v, b, g, s, **o: pf.retention(q, k, v, g[0, 0], initial_state=s, **o),
    "linear_attention": lambda q, k, v, b, g, s, **o: pf.linear_attention(q, k, v, initial_state=s, **o),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_kernels_are_the_torch_backend(name):
    tensors = draw()
    bounds = torch.tensor([0, 30, 70], device=DEVICE)
    found = []
    for backend in ("torch", "triton"):
        output, state = MODELS[name](*tensors, cu_seqlens=bounds, return_final_state=True, backend=backend)
        weights = torch.linspace(-1, 1, output.numel(), device=DEVICE).reshape(output.shape)
        gradients = torch.autograd.grad((output * weights).sum() + state.square().sum(), tensors, allow_unused=True)
        found.append((output, state, *gradients))
    for place, (expected, got) in enumerate(zip(*found, strict=True)):
        if expected is None:
            assert got is None
            continue
        assert got.dtype == expected.dtype
        # The float32 kernels round like the float32 engine; both are 1e-6 from the recurrence here. One decay for all
        # tokens has a gradient that sums as many terms of either sign.
        allowed = 2e-5 if (name, place) != ("retention", 6) else 2e-4
        assert (got - expected).norm() <= allowed * expected.norm()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"chunk_size": 32}, "chunk_size=32"),
        ({"solver": "substitution"}, "substitution"),
        ({"aggregate": "associative"}, "associative"),
    ],
)
def test_choices_that_kernels_do_not_have_are_refused(change, why):
    q, k, v, b, g, s = draw()
    with pytest.raises(ValueError, match=rf"backend: got 'triton' with .*{why}"):
        pf.gated_delta_rule(q, k, v, b, g, backend="triton", **change)


def test_what_kernels_do_not_have_is_refused():
    q, k, v, b, g, s = draw(value_heads=1)
    with pytest.raises(ValueError, match=r"backend: got 'triton' with dtype torch.float64"):
        pf.delta_rule(q.double(), k.double(), v.double(), b, backend="triton")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_hopper_is_refused_without_one():
    q, k, v, b, g, s = draw()
    with pytest.raises(ValueError, match=r"backend: got 'hopper' with another GPU, dtype, size or number of rows"):
        pf.gated_delta_rule(q, k, v, b, g, backend="hopper")
    with pytest.raises(ValueError, match=r"backend: got 'hopper' with another GPU, dtype, size or number of rows"):
        pf.gated_linear_attention(k, k, k, -k.abs(), backend="hopper")


def test_a_forced_backend_serves_one_token_or_refuses():
    *tensors, states = draw(value_heads=1)
    q, k, v, b, g = (tensor[:, :1] for tensor in tensors)
    state = states[:1]
    expected, after = pf.gated_delta_rule(q, k, v, b, g, initial_state=state, return_final_state=True)
    calls = []
    forward = delta.forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(delta, "forward", lambda *a, **o: calls.append(1) or forward(*a, **o))
        output, final = pf.gated_delta_rule(
            q, k, v, b, g, initial_state=state, return_final_state=True, backend="triton"
        )
    assert calls
    for got, want in ((output, expected), (final, after)):
        assert (got - want).norm() <= 1e-6 * want.norm()
    with pytest.raises(ValueError, match=r"backend: got 'triton' with dtype torch.float64"):
        pf.delta_rule(q.double(), k.double(), v.double(), b, backend="triton")


@pytest.mark.parametrize(
    ("fits", "capability", "expected"),
    [(True, (9, 0), "hopper"), (False, (9, 0), "triton"), (False, (8, 6), "triton"), (False, (7, 5), "torch")],
)
def test_auto_takes_the_fastest_tier(fits, capability, expected, monkeypatch):
    monkeypatch.setattr(kernel_backend, "hopper_fits", lambda inputs, traits: fits)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    query = SimpleNamespace(device=torch.device("cuda"), numel=lambda: 1)
    assert kernel_backend.fastest(Inputs(query=query), None) == expected


@pytest.mark.parametrize(("beyond", "kernels"), [(None, ("triton", "hopper")), ("other rows", ("rows", "hopper_rows"))])
def test_rows_of_every_kind_have_kernels_of_their_own(beyond, kernels, monkeypatch):
    monkeypatch.setattr(kernel_backend, "_beyond_the_delta_rule", lambda inputs, traits: beyond)
    assert tuple(kernel_backend.kernels_of(tier, None, None) for tier in ("triton", "hopper")) == kernels
    assert kernel_backend.kernels_of("cpu", None, None) == "cpu"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the choice is made on a GPU")
@pytest.mark.parametrize(("dtype", "expected"), [(torch.bfloat16, {"hopper"}), (torch.float32, {"triton"})])
def test_auto_runs_on_the_kernels(dtype, expected, monkeypatch):
    tensors = [t.detach().to(dtype) for t in draw(k=64, v=64, sequences=1)[:5]]
    tiers, forward = set(), delta.forward
    monkeypatch.setattr(delta, "forward", lambda *a, **o: tiers.add(o["tier"]) or forward(*a, **o))
    pf.gated_delta_rule(*tensors)
    assert tiers == (expected if torch.cuda.get_device_capability()[0] == 9 else {"triton"})
