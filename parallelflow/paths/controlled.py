"""Linear controlled differential equations: a state driven by the increments of a path."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from parallelflow.checks import check_layouts, expect_kind
from parallelflow.discretizations import DriverSource
from parallelflow.drivers.base import Factor, LowRankDriver, Row
from parallelflow.paths.interpolation import Path


@dataclass(frozen=True, eq=False)
class LinearField:
    """``dS = Σ_i (diag(g_i) + B_i A_iᵀ) S dX^i + B_i U_iᵀ dX^i``: how a state answers each channel of a path.

    Args:
        read: A_i, ``[D, R, H, K]`` for the D channels of the path (the first is time).
        write: B_i, ``[D, R, H, K]``.
        value: U_i, ``[D, R, HV, V]``, HV a multiple of H.
        log_decay: g_i, ``[D, HV]`` or ``[D, HV, K]``, or None. What it makes along the path, ``Σ_i g_i dX^i``, must
            not be positive: 0 for channels that go up and down, ≤ 0 for time.

    Raises:
        TypeError, ValueError: for tensors that do not fit together.

    Source: Muca Cirone and Salvi, *ParallelFlow* (arXiv 2504.00492); Walker et al. 2025, *Structured linear CDEs*,
    arXiv 2505.17761, whose diagonal-plus-low-rank form this is.
    """

    read: Tensor
    write: Tensor
    value: Tensor
    log_decay: Tensor | None = None

    def __post_init__(self) -> None:
        decay = self.log_decay
        check_layouts(
            read=(self.read, "D R H K"),
            write=(self.write, "D R H K"),
            value=(self.value, "D R HV V"),
            log_decay=(decay, "D HV K?" if getattr(decay, "ndim", 2) == 3 else "D HV?"),
        )

    @property
    def channels(self) -> int:
        """D."""
        return self.read.shape[0]

    def along(self, speed: Tensor) -> LowRankDriver:
        """The driver of D · R rows whose channels move by ``speed [B, T, D]``: ``dX/dt`` for rates."""
        batch, time, channels = speed.shape
        if channels != self.channels:
            raise ValueError(f"path: got {channels} channels with time, expected the field's {self.channels}")
        rank, heads = self.read.shape[1], self.value.shape[2]
        coefficient = speed.repeat_interleave(rank, 2)[..., None].expand(-1, -1, -1, heads)

        def rows(tensor: Tensor) -> Tensor:
            return tensor.flatten(0, 1).expand(batch, time, *([-1] * (tensor.ndim - 1)))

        row = Row(rows(self.write), Factor(rows(self.read), coefficient), Factor(rows(self.value), coefficient))
        log_decay = None
        if self.log_decay is not None:
            log_decay = torch.einsum("btd,d...->bt...", speed, self.log_decay.to(speed.dtype))
        return LowRankDriver((row,), log_decay)


def controlled(path: Path, field: LinearField, grid: Tensor | None = None) -> DriverSource:
    """The equation ``field`` along ``path`` as a source of drivers, for ``integrate`` and any discretisation.

    ``grid`` ``[T + 1]`` or ``[B, T + 1]`` are the times between which steps are made; None takes the path's knots. On a
    piecewise straight path with its knots in the grid the rates are constant in every step, and ``exact`` is exact.

    Raises:
        TypeError, ValueError: for other than a path, its field and a grid.
    """
    expect_kind("path", path, Path, "a Path")
    expect_kind("field", field, LinearField, "a LinearField")
    return DriverSource(lambda times: field.along(path.derivative(times)), path.knots if grid is None else grid)
