"""The Triton kernels of the delta rule and write-only rows against the float64 recurrence, every gradient."""

import pytest
import torch

pytest.importorskip("triton")
from delta_checks import DEVICE, check, draw, kernel_results
from delta_recurrence import NAMES

from parallelflow.kernels import chunks, delta


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


@pytest.mark.parametrize("starts", [(0, 70), (0, 0, 64, 65, 200, 200), (0, 31, 160)])
def test_chunks_of_known_sequences(starts):
    """The tables made on the host are those made on the device."""
    bounds = torch.tensor(starts, dtype=torch.int32)
    expected = chunks.packed_chunks(bounds.to(DEVICE), starts[-1], 32, bounds)
    found = chunks.known_chunks(starts, 32, torch.device(DEVICE))
    for name, field in expected._asdict().items():
        got = getattr(found, name)
        assert torch.equal(got.cpu(), field.cpu()) if isinstance(field, torch.Tensor) else got == field, name
