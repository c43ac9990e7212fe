"""The layer of a controlled equation: causal where it says so, blind to padding, trained from random weights."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from parallelflow import Discretization
from parallelflow.nn import LinearCDE
from parallelflow.paths import LinearField
from tests.cases import assert_close

NAN = float("nan")


def data(batch: int = 2, length: int = 9, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    times = torch.rand(batch, length, generator=generator, dtype=torch.float64).sort(1).values
    values = torch.randn(batch, length, 2, generator=generator, dtype=torch.float64)
    values[:, 1:-1] = values[:, 1:-1].masked_fill(torch.rand(batch, length - 2, 2, generator=generator) < 0.4, NAN)
    return times.to(dtype), values.to(dtype)


def layer(**options) -> LinearCDE:
    torch.manual_seed(1)
    return LinearCDE(2, 5, num_heads=2, head_dim=4, value_head_dim=3, **options).double()


@pytest.mark.parametrize("interpolation", ["linear", "hermite", "rectilinear"])
@pytest.mark.parametrize("discretization", ["exact", "magnus4", "log_ode", Discretization("cayley", node="left")])
def test_it_is_the_recurrence_along_its_path(interpolation, discretization):
    """Against a loop of dense exponentials, where that is what the scheme is: straight pieces, exactly stepped."""
    module, (times, values) = layer(interpolation=interpolation, discretization=discretization, rank=2), data()
    output = module(times, values)
    path, field = module.path(times, values), module.field()
    assert output.shape == (2, path.knots.shape[1] - 1, 5)
    assert isinstance(field, LinearField)
    if interpolation == "hermite" or isinstance(discretization, Discretization):
        return
    state = torch.zeros(2, 2, 4, 3, dtype=torch.float64)
    generator = torch.einsum("drhk,drhl->dhkl", field.write, field.read)
    generator = generator + torch.diag_embed(field.log_decay[..., None].expand(-1, -1, 4))
    source = torch.einsum("drhk,drhv->dhkv", field.write, field.value)
    both = torch.nn.functional.pad(torch.cat((generator, source), -1), (0, 0, 0, 3))
    steps = path.evaluate(path.knots).diff(dim=1)
    for t in range(steps.shape[1]):
        flow = torch.linalg.matrix_exp(torch.einsum("bd,dhij->bhij", steps[:, t], both))
        state = flow[..., :4, :4] @ state + flow[..., :4, 4:]
        query = module.q_proj(path.evaluate(path.knots[:, 1:])[:, t]).unflatten(-1, (2, 4))
        read = torch.einsum("bhkv,bhk->bhv", state, query) / 2
        assert_close(output[:, t], module.o_proj(module.o_norm(read).flatten(-2)), 1e-11)


def test_windows_and_padding():
    module, (times, values) = layer(discretization="log_ode"), data()
    grid = torch.cat((times[:, ::4], times[:, -1:]), 1)
    assert module(times, values, grid).shape == (2, 3, 5)
    more = torch.cat((times, times[:, -1:].expand(-1, 4)), 1), torch.cat((values, values.new_full((2, 4, 2), NAN)), 1)
    assert_close(module(*more, grid), module(times, values, grid), 1e-13)


def test_rectilinear_is_causal():
    module, (times, values) = layer(interpolation="rectilinear"), data()
    later = values.clone()
    later[:, 5:] = 1.0
    same = (module(times, values) == module(times, later)).all(-1).all(0)
    assert same[:9].all()  # step 10 is the jump to observation 5
    assert not same[9]


@pytest.mark.parametrize("discretization", ["exact", "log_ode"])
def test_narrow_numbers(discretization):
    """float32; under autocast; and parameters in bfloat16 beside times in float32, where times belong."""
    expected = layer(rank=2, discretization=discretization)(*data())
    times, values = data(dtype=torch.float32)
    module = layer(rank=2, discretization=discretization).float()
    assert (module(times, values).double() - expected).norm() <= 1e-5 * expected.norm()
    with torch.autocast("cpu", torch.bfloat16):
        output = module(times, values)
    assert (output.double() - expected).norm() <= 5e-2 * expected.norm()
    output = module.bfloat16()(times, values)
    assert output.dtype == torch.bfloat16
    assert (output.double() - expected).norm() <= 5e-2 * expected.norm()


def test_it_learns_the_sense_of_rotation():
    """From 24 noisy points of a circle at irregular times, half of the values missing; chance is 50 %."""
    torch.manual_seed(0)
    module = LinearCDE(2, 8, num_heads=2, head_dim=4, discretization="log_ode")
    head = torch.nn.Linear(8, 2)
    optimizer = torch.optim.AdamW([*module.parameters(), *head.parameters()], lr=2e-2)

    def batch(count: int = 64):
        sense = torch.randint(2, (count,))
        times = torch.rand(count, 24).sort(1).values
        angle = 2 * math.pi * ((2 * sense[:, None] - 1) * 2 * times + torch.rand(count, 1))
        values = torch.stack((angle.cos(), angle.sin()), -1) + 0.2 * torch.randn(count, 24, 2)
        values = values.masked_fill(torch.rand(values.shape) < 0.5, NAN)
        return head(module(times, values, torch.cat((times[:, ::4], times[:, -1:]), 1))[:, -1]), sense

    for _ in range(60):
        logits, sense = batch()
        loss = torch.nn.functional.cross_entropy(logits, sense)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        logits, sense = batch(512)
    assert (logits.argmax(-1) == sense).float().mean() > 0.85


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: layer(interpolation="spline"), "interpolation: got 'spline'"),
        (lambda: layer(discretization="log-ode"), "discretization: got 'log-ode'"),
        (lambda: layer(rank=0), "rank: got 0"),
        (lambda: layer()(*data()[:1], data()[1][..., :1]), r"values: got shape \[2, 9, 1\], expected .*channels = 2"),
        (lambda: layer(discretization=Discretization("exact", "strang"))(*data()), "splitting: got 'strang' with"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
