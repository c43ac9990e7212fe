"""A driver whose rows turn smoothly over one unit of time, and its state at the end."""

from __future__ import annotations

import torch
from torch import Tensor

from parallelflow.discretizations import Discretization, DriverSource
from parallelflow.drivers import Factor, LowRankDriver, Row
from parallelflow.integrate import integrate

RANK, KEY, VALUE = 2, 4, 3
ORDERS = {"euler": 1, "backward_euler": 1, "cayley": 2, "rk4": 2, "exact": 2, "magnus4": 4}
"""Of each scheme on a driver that varies in time, sampled at the middle of a step (Magnus-4: at its own nodes)."""

_GENERATOR = torch.Generator().manual_seed(1)
_CURVES = {
    name: torch.randn(3, RANK, 1, width, generator=_GENERATOR, dtype=torch.float64) / 2
    for name, width in (("read", KEY), ("write", KEY), ("value", VALUE))
}
_STATE = torch.randn(1, 1, KEY, VALUE, generator=_GENERATOR, dtype=torch.float64)


def _at(name: str, time: Tensor) -> Tensor:
    """``[1, steps, R, 1, width]``."""
    constant, sine, cosine = _CURVES[name]
    time = time.reshape(1, -1, 1, 1, 1)
    return constant + sine * torch.sin(2 * time) + cosine * torch.cos(3 * time)


def _rates(time: Tensor) -> LowRankDriver:
    row = Row(_at("write", time), Factor(_at("read", time)), Factor(_at("value", time)))
    return LowRankDriver((row,), -0.3 - torch.sin(time).square().reshape(1, -1, 1))


def final_state(steps: int, scheme: str) -> Tensor:
    """The state after one unit of time in ``steps`` even steps, ``[1, 1, K, V]``, float64."""
    source = DriverSource(_rates, torch.linspace(0, 1, steps + 1, dtype=torch.float64))
    query = torch.zeros(1, steps, 1, KEY, dtype=torch.float64)
    state = integrate(
        source, query, discretization=Discretization(scheme), initial_state=_STATE, return_final_state=True
    ).final_state
    assert state is not None
    return state
