"""Which scheme, how a decay is split from the rows, how long a step is: one argument, applied to a driver."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from parallelflow.checks import expect_choice, expect_floating, expect_kind, expect_number, expect_rank, show
from parallelflow.discretizations.backward_euler import BackwardEuler
from parallelflow.discretizations.base import Scheme
from parallelflow.discretizations.cayley import Cayley
from parallelflow.discretizations.euler import Euler
from parallelflow.discretizations.exact import Exact
from parallelflow.discretizations.magnus import magnus4
from parallelflow.discretizations.rk4 import RungeKutta4
from parallelflow.discretizations.rows import compute_dtype, rescaled, value_heads
from parallelflow.discretizations.source import DriverSource
from parallelflow.discretizations.splitting import commuting, lie, strang
from parallelflow.drivers.base import LowRankDriver, Row
from parallelflow.problem import may_read, without_autocast

ONE_NODE: dict[str, Scheme] = {
    scheme.name: scheme for scheme in (Euler(), BackwardEuler(), Cayley(), RungeKutta4(), Exact())
}
"""The schemes that see one driver a step."""

SCHEMES = (*ONE_NODE, "magnus4")

FRACTIONS = {"left": 0.0, "midpoint": 0.5}
"""Where in a step a scheme of one node sees a source."""


@dataclass(frozen=True, eq=False)
class Discretization:
    """How the continuous system of a driver becomes steps: rows to rows, whatever solver and aggregate then run.

    A token's rows and log-decay are *rates* that hold for the token's step: ``dS = (diag(g) + B Aᵀ) S dt + B Uᵀ dt``
    for a time ``step``. With ``step`` 1 (None) and ``"euler"`` a driver is what it says: the models as published.

    Args:
        scheme: ``euler``, ``backward_euler``, ``cayley``, ``rk4``, ``exact``; or ``magnus4``, which needs a
            ``DriverSource`` (the tokens of a driver are constant, where it would be ``exact``).
        splitting: for a log-decay a key channel, which does not commute with the rows: ``lie`` (decay, then rows: order
            1; what None means) or ``strang`` (half, rows, half: order 2). With any other decay nothing is split.
        step: how long tokens last, ≥ 0 (a tensor's numbers are looked at on a CPU only): a number, or a tensor of one
            number, ``[B, T]`` or ``[B, T, HV]``. None is 1. A ``DriverSource`` has its grid instead.
        node: where in a step a ``DriverSource`` is sampled: ``midpoint`` (None) or ``left``.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is expected.

    Source: Muca Cirone and Salvi, *ParallelFlow* (arXiv 2504.00492).
    """

    scheme: str
    splitting: Literal["lie", "strang"] | None = None
    step: float | Tensor | None = None
    node: Literal["midpoint", "left"] | None = None

    def __post_init__(self) -> None:
        expect_choice("discretization", self.scheme, SCHEMES)
        if self.splitting is not None:
            expect_choice("splitting", self.splitting, ("lie", "strang"))
        if self.node is not None:
            expect_choice("node", self.node, FRACTIONS)
        if isinstance(self.step, Tensor):
            expect_floating("step", self.step)
            expect_rank("step", self.step, "one number, [B, T] or [B, T, HV]", 0, 2, 3)
            if may_read(self.step) and not bool((self.step >= 0).all()):
                raise ValueError("step: got some that are negative or NaN, expected lengths of time, ≥ 0")
        elif self.step is not None:
            expect_number("step", self.step)
            if not 0 <= self.step < float("inf"):
                raise ValueError(f"step: got {self.step}, expected a finite length of time, ≥ 0")
        if self.scheme == "magnus4":
            for name in ("splitting", "node"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"{name}: got {getattr(self, name)!r} with 'magnus4', expected none: it has its own"
                    )

    @property
    def order(self) -> int:
        """Of convergence on a ``DriverSource``; with a decay a key channel and no Strang splitting it is 1."""
        if self.scheme == "magnus4":
            return 4
        return 1 if self.node == "left" or self.splitting == "lie" else ONE_NODE[self.scheme].order


def discretize(
    driver: LowRankDriver | DriverSource, discretization: Discretization | str | None = None
) -> LowRankDriver:
    """The driver of discrete steps: ``S ← diag(e^g) S``, then rows that stand for the flow of a whole step.

    ``discretization`` is a ``Discretization`` or the name of a scheme; None is ``euler`` for a driver. A driver with
    ``reads="raw"`` means the same continuous system as one with decayed reads: only Euler tells them apart.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is expected.
    """
    expect_kind("driver", driver, (LowRankDriver, DriverSource), "a LowRankDriver or a DriverSource")
    if isinstance(discretization, str):
        discretization = Discretization(discretization)
    if discretization is None:
        if isinstance(driver, DriverSource):
            raise ValueError(f"discretization: got none with a DriverSource, expected one of {', '.join(SCHEMES)}")
        return driver
    if not isinstance(discretization, Discretization):
        raise TypeError(
            f"discretization: got {type(discretization).__name__}, expected a Discretization or one of {SCHEMES}"
        )
    if isinstance(driver, DriverSource):
        return _discretize_source(driver, discretization)
    if discretization.node is not None:
        raise ValueError(
            f"node: got {discretization.node!r} with a driver, whose tokens are constant; expected a DriverSource"
        )
    if discretization.scheme == "magnus4":
        raise ValueError(
            "discretization: got 'magnus4' with a driver, whose tokens are constant (there it is 'exact'); expected a "
            "DriverSource, which can be sampled inside a step"
        )
    return _frozen(driver, discretization)


def _discretize_source(source: DriverSource, discretization: Discretization) -> LowRankDriver:
    if discretization.step is not None:
        raise ValueError("step: got one with a DriverSource, expected none: the source's grid has the steps")
    with without_autocast(source.grid.device):
        if discretization.scheme == "magnus4":
            return magnus4(source)
        driver = source.at(FRACTIONS[discretization.node or "midpoint"])
    chosen = Discretization(discretization.scheme, discretization.splitting, source.per_token(driver))
    return _frozen(driver, chosen)


def _frozen(driver: LowRankDriver, discretization: Discretization) -> LowRankDriver:
    """One node a step: the rates hold throughout."""
    scheme, splitting = ONE_NODE[discretization.scheme], discretization.splitting
    vector_decay = driver.log_decay is not None and driver.log_decay.ndim == 4
    if splitting is not None and not vector_decay:
        raise ValueError(
            f"splitting: got {splitting!r} with no decay or one a head, which commutes with the rows; expected none"
        )
    with without_autocast(driver.rows[0].write.device):
        if discretization.step is not None:
            driver = over_step(driver, discretization.step)
        if scheme.name == "euler" and splitting is None:
            return driver
        if splitting == "strang":
            return strang(driver, scheme)
        return lie(driver, scheme) if vector_decay else commuting(driver, scheme)


def over_step(driver: LowRankDriver, step: float | Tensor) -> LowRankDriver:
    """Rates times the length of the step: reads, values and log-decays; a reset (-inf) stays one. Ties stay ties."""
    batch, time = driver.rows[0].write.shape[:2]
    if not isinstance(step, Tensor) or step.ndim == 0:
        dtype = step.dtype if isinstance(step, Tensor) else compute_dtype(driver)
        step = torch.as_tensor(step, dtype=dtype, device=driver.rows[0].write.device).expand(batch, time)
    if tuple(step.shape[:2]) != (batch, time):
        raise ValueError(f"step: got shape {show(step)}, expected [B, T] = [{batch}, {time}] first")
    heads = value_heads(driver)
    if step.ndim == 2:
        step = step.unsqueeze(-1).expand(-1, -1, heads)
    if step.shape[2] != heads:
        raise ValueError(f"step: got shape {show(step)}, expected [B, T] or [B, T, HV] = [{batch}, {time}, {heads}]")

    def scaled(row: Row) -> Row:
        number = step.unsqueeze(2).expand(*row.write.shape[:3], -1) if row.write.ndim == 5 else step
        return rescaled(row, number, number)

    decay = driver.log_decay
    if decay is not None:
        number = step if decay.ndim == 3 else step.unsqueeze(-1)
        decay = torch.where(decay == -torch.inf, decay, torch.where(decay == -torch.inf, 0, decay) * number)
    return LowRankDriver(tuple(map(scaled, driver.rows)), decay, driver.order, driver.reads)
