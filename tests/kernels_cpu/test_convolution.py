"""The compiled short convolution against the same in float64 tensor algebra: values, gradients, their gradients."""

from __future__ import annotations

import pytest
import torch

from parallelflow.kernels.cpu import build
from parallelflow.nn import convolution
from parallelflow.nn.convolution import short_convolution

pytestmark = pytest.mark.skipif(build.COMPILER is None, reason="no C++ compiler")

SHAPES = [(2, 1, 16), (3, 2, 48), (1, 3, 80), (2, 37, 144), (1, 300, 64)]
BUDGET = 3e-7
"""Of the norm: sums of at most four products, or of T in runs of 128, in float32."""


def problem(width, shape, bias, seed=0):
    generator = torch.Generator().manual_seed(seed)
    batch, time, channels = shape

    def draw(*sizes):
        return torch.randn(*sizes, generator=generator, dtype=torch.float64).float()

    tensors = [draw(*shape), draw(channels, 1, width), draw(channels) if bias else None]
    return tensors, draw(batch, width - 1, channels), draw(*shape)


def values_and_gradients(tensors, window, cotangent, silu, create_graph=False):
    leaves = [None if each is None else each.detach().clone().requires_grad_() for each in tensors]
    output, last = short_convolution(*leaves, silu=silu, window=window)
    wanted = [each for each in leaves if each is not None]
    gradients = torch.autograd.grad(output, wanted, cotangent, create_graph=create_graph)
    if create_graph:
        gradients = torch.autograd.grad(sum(each.square().sum() for each in gradients), wanted, allow_unused=True)
    return [output, last, *(each for each in gradients if each is not None)]


def assert_close(actual, expected, factors=1):
    """``factors``: how many quantities that are off by the budget are multiplied."""
    for ours, exact in zip(actual, expected, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - exact).norm() <= factors * BUDGET * exact.norm()


@pytest.fixture
def compiled(monkeypatch):
    """Counts the calls of the compiled kernel."""
    from parallelflow.kernels.cpu import convolution as kernel

    calls, run = [], kernel._run
    monkeypatch.setattr(kernel, "_run", lambda *arguments: calls.append(1) or run(*arguments))
    return calls


@pytest.mark.parametrize("create_graph", [False, True], ids=["once", "twice"])
@pytest.mark.parametrize("silu", [False, True], ids=["plain", "silu"])
@pytest.mark.parametrize("width", [2, 3, 4])
def test_values_and_gradients(width, silu, create_graph, compiled):
    for shape in SHAPES:
        for bias in (False, True):
            tensors, window, cotangent = problem(width, shape, bias)
            if create_graph and not silu:
                cotangent.requires_grad_()
            wide = [None if each is None else each.double() for each in tensors]
            expected = values_and_gradients(wide, window.double(), cotangent.double(), silu, create_graph)
            before = len(compiled)
            actual = values_and_gradients(tensors, window, cotangent, silu, create_graph)
            assert len(compiled) - before == (1 if create_graph else 2)
            assert_close(actual, expected, 3 if create_graph else 1)


def test_a_view_of_channels_and_no_window(compiled):
    """As layers hand it on: a part of a wider projection, or the transpose of ``[B, C, T]``."""
    (inputs, weight, _), _, _ = problem(4, (2, 21, 32), False)
    for view in (torch.cat([inputs, inputs, inputs], -1)[..., 32:64], inputs.transpose(1, 2).contiguous().mT):
        expected, last = short_convolution(view.double(), weight.double(), silu=True)
        assert_close(short_convolution(view, weight, silu=True), [expected, last])
    assert len(compiled) == 1  # channels that do not lie side by side are another matter


def test_token_by_token(compiled):
    (inputs, weight, bias), window, _ = problem(4, (2, 9, 32), True)
    whole, last = short_convolution(inputs, weight, bias, silu=True, window=window)
    parts = []
    for token in inputs.split(1, 1):
        part, window = short_convolution(token, weight, bias, silu=True, window=window)
        parts.append(part)
    assert torch.equal(torch.cat(parts, 1), whole) and torch.equal(window, last)
    assert len(compiled) == 10


def test_far_out_numbers():
    """SiLU of ±1e4 and beyond is exact, a NaN stays where it was."""
    inputs = torch.tensor([-1e30, -1e4, -90.0, -20.0, 0.0, 20.0, 90.0, 1e4, 1e30, float("nan")])
    inputs = inputs[:, None].expand(-1, 16).contiguous()[None]
    weight = torch.tensor([0.0, 0.0, 0.0, 1.0]).expand(16, 1, 4).contiguous()
    leaf = inputs.clone().requires_grad_()
    with torch.no_grad():
        output, _ = short_convolution(leaf[:, :9], weight, silu=True)
        assert torch.allclose(output, torch.nn.functional.silu(inputs[:, :9]), rtol=1e-6, atol=1e-36)
        assert short_convolution(leaf, weight, silu=True)[0][:, -1].isnan().all()
    (gradient,) = torch.autograd.grad(short_convolution(leaf[:, :9], weight, silu=True)[0].sum(), leaf)
    assert gradient.isfinite().all() and gradient[0, 1, 0] == 0 and gradient[0, 7, 0] == 1


def test_what_the_kernel_does_not_take_is_computed_all_the_same(compiled):
    for width, channels, dtype in ((4, 17, torch.float32), (5, 32, torch.float32), (4, 32, torch.bfloat16)):
        (inputs, weight, _), _, _ = problem(width, (2, 9, channels), False)
        inputs, weight = inputs.to(dtype), weight.to(dtype)
        expected, _ = short_convolution(inputs.double(), weight.double(), silu=True)
        actual, _ = short_convolution(inputs, weight, silu=True)
        assert actual.dtype == dtype
        assert (actual - expected).norm() <= 2 * torch.finfo(dtype).eps * expected.norm()
    assert not compiled


def test_without_a_compiler(monkeypatch, compiled):
    monkeypatch.setattr(build, "COMPILER", None)
    tensors, window, cotangent = problem(4, (2, 37, 32), True)
    wide = [each.double() for each in tensors]
    expected = values_and_gradients(wide, window.double(), cotangent.double(), True)
    assert_close(values_and_gradients(tensors, window, cotangent, True), expected)
    assert not compiled


def test_a_compiled_graph_and_transforms_take_the_tensor_algebra(compiled):
    (inputs, weight, _), window, _ = problem(4, (2, 9, 32), False)

    def total(inputs, weight):
        return short_convolution(inputs, weight, silu=True, window=window)[0].square().sum()

    gradients = torch.func.grad(total, (0, 1))(inputs, weight)
    assert not compiled
    leaves = inputs.clone().requires_grad_(), weight.clone().requires_grad_()
    assert_close(gradients, [each.double() for each in torch.autograd.grad(total(*leaves), leaves)])
    assert convolution._compiled(inputs, weight, None, window)
