"""Coarse windows: a whole stretch of path as one step, through its log-signature of depth 2."""

from __future__ import annotations

import torch
from torch import Tensor

from parallelflow.checks import expect_kind
from parallelflow.discretizations.base import identity_like
from parallelflow.discretizations.magnus import check_decay, exponential_phi
from parallelflow.discretizations.rows import Stack, compute_dtype, mixed, value_heads
from parallelflow.discretizations.source import check_grid
from parallelflow.drivers.base import LowRankDriver
from parallelflow.paths.controlled import LinearField
from parallelflow.paths.interpolation import Path
from parallelflow.problem import without_autocast


def log_signature(path: Path, grid: Tensor) -> tuple[Tensor, Tensor]:
    """Increment ``ΔX^i [B, W, D]`` and Lévy area ``½ ∫ (X^i dX^j - X^j dX^i) [B, W, D, D]`` of every window of the
    grid, X from each window's start. Exact for piecewise polynomials, whatever the number of pieces in a window.

    ``grid [W + 1]`` or ``[B, W + 1]``, in the path's parameter. Areas are summed in float64.

    Raises:
        TypeError, ValueError: for other than a path and a grid.
    """
    expect_kind("path", path, Path, "a Path")
    check_grid(grid, "[W + 1] or [B, W + 1]")
    grid = grid.expand(path.knots.shape[0], -1)
    wide = Path(path.knots.double(), path.coefficients.double())
    start = wide.coefficients[:, :1, 0]  # X and areas from the path's own start, [B, 1, D]
    whole = _piece_area(wide.coefficients, wide.knots.diff(dim=1)[..., None, None])
    at_knots = wide.coefficients[:, :, 0] - start
    steps = wide.evaluate(wide.knots[:, 1:]) - wide.coefficients[:, :, 0]
    grown = whole + _wedge(at_knots, steps) / 2  # Chen's relation, piece after piece
    before = torch.cat((torch.zeros_like(grown[:, :1]), grown.cumsum(1)[:, :-1]), 1)

    piece = path.piece(grid)
    rows = torch.arange(piece.shape[0], device=piece.device)[:, None]
    elapsed = (grid.double() - wide.knots[rows, piece])[..., None, None]
    position = wide.evaluate(grid.double()) - start
    inside = position - at_knots[rows, piece]
    area = before[rows, piece] + _piece_area(wide.coefficients[rows, piece], elapsed)
    area = area + _wedge(at_knots[rows, piece], inside) / 2
    increment = position.diff(dim=1)
    window = area.diff(dim=1) - _wedge(position[:, :-1], increment) / 2
    return increment.to(path.coefficients.dtype), window.to(path.coefficients.dtype)


def log_ode(path: Path, field: LinearField, grid: Tensor) -> LowRankDriver:
    """One token a window of the grid: the exponential of the equation's log-signature, cut after depth 2.

        Ω = Σ_i ω_i ΔX^i + Σ_{i<j} [ω_j, ω_i] L^{ij},   ω_i = (g_i + B_i A_iᵀ, B_i U_iᵀ), L the Lévy area

    of rank D · R, however many observations a window holds: the blocks ``C_ji = δ_ij ΔX^i + L^{ij} A_jᵀB_i``. For
    smooth paths it is of order 4 in the window (Magnus' expansion with exact integrals).

    Raises:
        ValueError: for a decay a key channel, whose commutators with the rows are not of low rank.

    Source: Morrill, Salvi, Kidger and Foster 2021, *Neural rough differential equations for long time series*,
    arXiv 2009.08295.
    """
    increment, area = log_signature(path, grid)
    windows = field.along(torch.ones_like(increment))  # A, B and U themselves
    check_decay("log_ode", windows)
    with without_autocast(increment.device):
        heads, dtype = value_heads(windows), compute_dtype(windows)
        stack = Stack(windows, heads, dtype)
        rank = field.read.shape[1]
        increment, area = increment.to(dtype), area.to(dtype)
        product = stack.product  # M[(j, r), (i, s)] = A_jᵀ B_i
        bends = area.mT.repeat_interleave(rank, -1).repeat_interleave(rank, -2)[:, :, None]
        weights = increment.repeat_interleave(rank, -1)[:, :, None, None] * identity_like(product) + bends * product
        value_weights, decay = weights, None
        if field.log_decay is not None:
            rates = field.log_decay.to(dtype)
            decay = torch.einsum("bwd,dh->bwh", increment, rates)
            drift = torch.einsum("bwij,jh->bwhi", area, rates).repeat_interleave(rank, -1)
            value_weights = weights + torch.diag_embed(drift)
        phi = exponential_phi(product, weights, value_weights, decay)
        return LowRankDriver(mixed(windows, stack, phi), decay)


def _wedge(x: Tensor, y: Tensor) -> Tensor:
    """``x^i y^j - x^j y^i``."""
    product = x[..., :, None] * y[..., None, :]
    return product - product.mT


def _piece_area(coefficients: Tensor, elapsed: Tensor) -> Tensor:
    """The area ``[…, D, D]`` of a piece ``[…, degree + 1, D]`` up to ``elapsed [… , 1, 1]``:

    ``½ Σ_{d,e ≥ 1} (e - d) / (d + e) · c_d^i c_e^j · t^{d+e}``.
    """
    degrees = range(1, coefficients.shape[-2])
    area = torch.zeros_like(coefficients[..., :1, :].mT * coefficients[..., :1, :])
    for d in degrees:
        for e in degrees:
            if d < e:  # the pair (e, d) is the same wedge
                wedge = _wedge(coefficients[..., d, :], coefficients[..., e, :])
                area = area + (e - d) / (2 * (d + e)) * wedge * elapsed ** (d + e)
    return area
