"""The Triton kernels of the delta rule and write-only rows against the float64 recurrence, every gradient.

Budget: inputs drawn in float64 are rounded to the kernel's dtype; rounding them and the results costs some error
against the unrounded recurrence, and the kernel may cost at most twice that.
"""

import pytest
import torch

pytest.importorskip("triton")
from delta_recurrence import NAMES, relative, results

from parallelflow.kernels import chunks, delta

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def draw(time, heads, value_heads, k, v, *, batch=1, sequences=None, beta=True, decay=None, cosine=0.0, initial=False,
         seed=0):  # fmt: skip
    """Inputs in float64 with unit keys; `decay` names a kind of log-decay, `cosine` correlates the keys."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def unit(x):
        return x / x.norm(dim=-1, keepdim=True)

    key = unit(normal(batch, time, heads, k))
    key = unit(cosine**0.5 * unit(normal(1, 1, heads, k)) + (1 - cosine) ** 0.5 * key)
    strength = normal(batch, time, value_heads).sigmoid()
    if cosine:
        strength = 2 * strength
    steps = normal(batch, time, value_heads)
    uniform = torch.rand(batch, time, value_heads, generator=generator, dtype=torch.float64)
    log_decay = {
        None: None,
        "mild": -0.2 * steps.exp(),
        "strong": torch.where(uniform < 0.3, -100.0, torch.where(uniform < 0.6, -1e-6, 0.0)).double(),
        "resets": torch.where(uniform < 0.1, float("-inf"), -0.1 * uniform),
    }[decay]
    return {
        "query": unit(normal(batch, time, heads, k)),
        "key": key,
        "value": normal(batch, time, value_heads, v),
        "beta": strength if beta else None,
        "log_decay": log_decay,
        "initial_state": 0.5 * normal(sequences or batch, value_heads, k, v) if initial else None,
    }


def kernel_results(inputs, cotangents, *, tied, scale, lengths=None):
    options = {"tied": tied, "scale": scale, "initial_state": inputs["initial_state"]}
    if lengths is not None:
        host = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
        options |= {"cu_seqlens": host.to(DEVICE), "cu_seqlens_host": host if len(lengths) % 2 else None}
    five = [inputs[n] for n in NAMES[:5]]
    output, final, saved = delta.forward(*five, need_final_state=True, save_for_backward=True, **options)
    gradients = delta.backward(*five, saved, *cotangents, **options)
    named = {f"d_{n}": g for n, g in zip(NAMES, gradients, strict=True) if g is not None}
    return {"output": output, "final_state": final, **named}


def check(inputs, dtype, *, tied, lengths=None, scale=0.3):
    generator = torch.Generator().manual_seed(9)
    state_shape = (len(lengths) if lengths else inputs["value"].shape[0], inputs["value"].shape[2],
                   inputs["query"].shape[3], inputs["value"].shape[3])  # fmt: skip
    exact = (torch.randn(inputs["value"].shape, generator=generator, dtype=torch.float64),
             torch.randn(state_shape, generator=generator, dtype=torch.float64))  # fmt: skip
    options = {"tied": tied, "scale": scale, "lengths": lengths}
    truth = results(inputs, exact, **options)
    kinds = {n: dtype if n in ("query", "key", "value") else torch.float32 for n in NAMES}
    rounded = {n: None if x is None else x.to(kinds[n]) for n, x in inputs.items()}
    cotangents = (exact[0].to(dtype), exact[1].float())
    budget = results(rounded, cotangents, **options)
    moved = {n: None if x is None else x.to(DEVICE) for n, x in rounded.items()}
    got = kernel_results(moved, tuple(c.to(DEVICE) for c in cotangents), **options)
    assert got.keys() == truth.keys()
    floor = 3e-6 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    for name, expected in truth.items():
        result = got[name].cpu()
        allowed = 2 * max(floor, relative(budget[name].to(result.dtype), expected))
        error = relative(result, expected)
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("decay", [None, "mild"])
def test_gradients(tied, decay, dtype):
    check(draw(97, 1, 2, 32, 16, decay=decay, initial=True), dtype, tied=tied)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("decay", ["strong", "resets"])
def test_extreme_decays(decay, dtype):
    check(draw(131, 1, 1, 16, 16, decay=decay, initial=True), dtype, tied=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("decay", [None, "mild"])
def test_correlated_keys(dtype, decay):
    check(draw(128, 1, 1, 128, 16, cosine=0.999, decay=decay), dtype, tied=True)


def test_beta_zero_has_a_gradient():
    inputs = draw(70, 1, 1, 16, 16, decay="mild")
    inputs["beta"][:, ::3] = 0.0
    check(inputs, torch.float32, tied=True)
    check(inputs, torch.float16, tied=True)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("lengths", [[65, 0, 1, 64], [0, 30, 0]])
def test_packed_sequences(lengths, tied):
    inputs = draw(sum(lengths), 1, 2, 16, 16, decay="mild", initial=True, sequences=len(lengths))
    check(inputs, torch.float32, tied=tied, lengths=lengths)


@pytest.mark.parametrize(("k", "v"), [(48, 80), (100, 16)])
def test_sizes_that_are_no_power_of_two(k, v):
    check(draw(66, 1, 1, k, v, decay="mild", initial=True), torch.float32, tied=True)


def test_large_heads():
    check(draw(40, 1, 1, 272, 16, decay="mild", initial=True), torch.bfloat16, tied=True)


def test_batches_and_groups_of_heads():
    check(draw(65, 2, 6, 16, 32, batch=2, decay="mild"), torch.float32, tied=True)


def test_write_only_without_coefficient():
    check(draw(65, 1, 2, 16, 16, beta=False, decay="mild"), torch.float32, tied=False)


def test_one_sequence_keeps_its_nan():
    lengths = [40, 30, 70]
    inputs = draw(sum(lengths), 1, 1, 16, 16, decay="mild", initial=True, sequences=3)
    single = {n: None if x is None else x.float().to(DEVICE) for n, x in inputs.items()}
    cotangents = (torch.ones(1, 140, 1, 16, device=DEVICE), torch.ones(3, 1, 16, 16, device=DEVICE))
    clean = kernel_results(single, cotangents, tied=True, scale=1.0, lengths=lengths)
    single["value"][:, 50] = float("nan")
    single["key"][:, 60] = float("inf")
    hurt = kernel_results(single, cotangents, tied=True, scale=1.0, lengths=lengths)
    for name, result in clean.items():
        for own in ((0, slice(0, 40)), (2, slice(70, 140))):
            place = own[0] if result.ndim == 4 and result.shape[0] == 3 else (slice(None), own[1])
            assert torch.equal(result[place], hurt[name][place]), name


def test_errors_name_the_argument():
    inputs = draw(8, 2, 2, 16, 16)
    five = [inputs[n] for n in NAMES[:5]]
    with pytest.raises(ValueError, match="query, key, value"):
        delta.forward(*five, tied=True, scale=1.0)
    five = [None if x is None else x.float() for x in five]
    with pytest.raises(ValueError, match="beta"):
        delta.forward(*five[:3], None, None, tied=True, scale=1.0)


@pytest.mark.parametrize("tied", [True, False])
def test_a_long_sequence_goes_back_in_pieces(tied, monkeypatch):
    """The reverse scan halts for the gradients, and the bits stay the same."""
    inputs = {n: None if x is None else x.float().to(DEVICE) for n, x in
              draw(130, 1, 2, 16, 16, decay="mild", initial=True).items()}  # fmt: skip
    cotangents = torch.ones(1, 130, 2, 16, device=DEVICE), torch.ones(1, 2, 16, 16, device=DEVICE)
    whole = kernel_results(inputs, cotangents, tied=tied, scale=0.3)
    monkeypatch.setattr(delta, "LARGEST_STATES", 2 * 2 * 16 * 16 * 4)
    layout = delta.chunks_of(inputs["query"], inputs["value"], None, None)
    states = torch.empty(layout.count, 2, 16, 16)
    assert [piece.tokens for piece in delta.pieces_of(layout, states)] == [slice(0, 64), slice(64, 192)]
    pieces = kernel_results(inputs, cotangents, tied=tied, scale=0.3)
    for name, expected in whole.items():
        assert torch.equal(pieces[name], expected), name


@pytest.mark.parametrize("starts", [(0, 70), (0, 0, 64, 65, 200, 200), (0, 31, 160)])
def test_chunks_of_known_sequences(starts):
    """The tables made on the host are those made on the device."""
    bounds = torch.tensor(starts, dtype=torch.int32)
    expected = chunks.packed_chunks(bounds.to(DEVICE), starts[-1], 32, bounds)
    found = chunks.known_chunks(starts, 32, torch.device(DEVICE))
    for name, field in expected._asdict().items():
        got = getattr(found, name)
        assert torch.equal(got.cpu(), field.cpu()) if isinstance(field, torch.Tensor) else got == field, name
