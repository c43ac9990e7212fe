"""A driver that varies in continuous time, and the grid on which it is stepped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from parallelflow.checks import expect_floating, expect_rank, show
from parallelflow.drivers.base import LowRankDriver
from parallelflow.problem import may_read


@dataclass(frozen=True, eq=False)
class DriverSource:
    """``dS = (diag(g(t)) + B(t) A(t)ᵀ) S dt + B(t) U(t)ᵀ dt`` from grid point to grid point: T steps, each a token.

    Args:
        rates: from times ``[T]`` or ``[B, T]`` (the grid's layout) to the driver whose tokens hold the rows and the
            log-decay *per unit of time* at these times. It is called with times inside the steps.
        grid: ``[T + 1]``, or ``[B, T + 1]`` for a grid a sequence; never decreasing, which is looked at on a CPU only.
            Steps of length 0 do nothing.

    Raises:
        TypeError, ValueError: for a grid that is no grid.
    """

    rates: Callable[[Tensor], LowRankDriver]
    grid: Tensor

    def __post_init__(self) -> None:
        if not callable(self.rates):
            raise TypeError(f"rates: got {type(self.rates).__name__}, expected a function of times")
        check_grid(self.grid, "[T + 1] or [B, T + 1]")

    @property
    def steps(self) -> Tensor:
        """``[T]`` or ``[B, T]``: how long each step is."""
        return self.grid.diff(dim=-1)

    def at(self, fraction: float) -> LowRankDriver:
        """The rates at this fraction of every step: 0 its left end, ½ its middle."""
        times = torch.lerp(self.grid[..., :-1], self.grid[..., 1:], fraction)
        driver = self.rates(times)
        if not isinstance(driver, LowRankDriver):
            raise TypeError(f"rates: returned {type(driver).__name__}, expected a LowRankDriver")
        write = driver.rows[0].write
        if write.shape[1] != times.shape[-1] or (times.ndim == 2 and write.shape[0] != times.shape[0]):
            raise ValueError(
                f"rates: returned rows of shape {show(write)} for times {show(times)}, expected [B, T, …] of these"
            )
        return driver

    def per_token(self, driver: LowRankDriver) -> Tensor:
        """The steps as ``[B, T]`` of this driver."""
        return self.steps.expand(driver.rows[0].write.shape[0], -1)


def check_grid(grid: Tensor, layout: str) -> None:
    """TypeError or ValueError unless these are at least two times; on a CPU also for times that decrease, which would
    run the system backwards."""
    expect_floating("grid", grid)
    expect_rank("grid", grid, layout, 1, 2)
    if grid.shape[-1] < 2:
        raise ValueError(f"grid: got shape {show(grid)}, expected at least two times")
    if may_read(grid) and not bool((grid.diff(dim=-1) >= 0).all()):
        raise ValueError("grid: got times that decrease or are NaN, expected some that never decrease")
