"""Observations at irregular times, some of them missing, as a path in continuous time.

A path is piecewise polynomial. Its channel 0 is time itself, so that what is driven by the path also feels time pass.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from parallelflow.checks import expect_floating, expect_rank, expect_shape, show


@dataclass(frozen=True, eq=False)
class Path:
    """``x(t) = Σ_d c_nd (t - t_n)^d`` on piece n, ``t_n ≤ t ≤ t_{n+1}``: D channels, of which the first is time.

    ``knots [B, N + 1]`` never decrease; ``coefficients [B, N, degree + 1, D]``. Pieces of length 0 are never entered.
    """

    knots: Tensor
    coefficients: Tensor

    @property
    def channels(self) -> int:
        """D, time included."""
        return self.coefficients.shape[-1]

    def evaluate(self, times: Tensor) -> Tensor:
        """``x(t)``: ``times [T]`` or ``[B, T]`` to ``[B, T, D]``. Outside the knots the end pieces go on."""
        coefficients, elapsed = self._at(times)
        value = coefficients[..., -1, :]
        for degree in reversed(range(coefficients.shape[-2] - 1)):
            value = value * elapsed + coefficients[..., degree, :]
        return value

    def derivative(self, times: Tensor) -> Tensor:
        """``dx/dt``, ``[B, T, D]``; at a knot, of the piece that begins there."""
        coefficients, elapsed = self._at(times)
        degrees = coefficients.shape[-2] - 1
        value = degrees * coefficients[..., degrees, :]
        for degree in reversed(range(1, degrees)):
            value = value * elapsed + degree * coefficients[..., degree, :]
        return value

    def piece(self, times: Tensor) -> Tensor:
        """The number of the piece that holds each time, ``[B, T]``; of two at a knot, the later."""
        expect_floating("times", times)
        expect_rank("times", times, "[T] or [B, T]", 1, 2)
        if times.ndim == 2 and times.shape[0] not in (1, self.knots.shape[0]):
            raise ValueError(f"times: got shape {show(times)}, expected [T] or [B, T] with B = {self.knots.shape[0]}")
        times = times.expand(self.knots.shape[0], -1).contiguous()
        found = torch.searchsorted(self.knots.detach().contiguous(), times.detach(), right=True) - 1
        return found.clamp(0, self.coefficients.shape[1] - 1)

    def _at(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """The coefficients ``[B, T, degree + 1, D]`` of each time's piece, and the time since its knot."""
        piece = self.piece(times)
        rows = torch.arange(piece.shape[0], device=piece.device)[:, None]
        return self.coefficients[rows, piece], (times - self.knots[rows, piece]).unsqueeze(-1)


def linear(times: Tensor, values: Tensor) -> Path:
    """Straight lines between observations; a missing value lies on the line between its neighbours.

    ``times [L]`` or ``[B, L]`` increase; ``values [B, L, D]``, NaN where missing. Before its first observation a
    channel is constant, after its last too; one that is never observed is 0. A sequence is padded by repeating its last
    time with NaN for values. Not causal: a missing value looks ahead.

    Raises:
        TypeError, ValueError: for shapes that do not fit, times that decrease, and values that jump at equal times.
    """
    times, values = _checked(times, values)
    points = torch.cat((times.unsqueeze(-1), _filled_linearly(times, values)), -1)
    slopes = _slopes(times, points)
    return Path(times, torch.stack((points[:, :-1], slopes), 2))


def hermite(times: Tensor, values: Tensor) -> Path:
    """Cubic pieces with a continuous derivative, which at each observation is the slope that led there.

    ``times``, ``values [B, L, D]`` and errors as for ``linear``, whose values it takes for missing ones. Where none
    is missing a piece depends on its two ends and the observation before them (the first piece is straight), never on
    later ones.
    Source: Morrill, Kidger, Yang and Lyons 2021, *Neural controlled differential equations for online prediction
    tasks*, arXiv 2106.11028: cubic Hermite splines with backward differences.
    """
    times, values = _checked(times, values)
    points = torch.cat((times.unsqueeze(-1), _filled_linearly(times, values)), -1)
    slopes = _slopes(times, points)
    before = torch.cat((slopes[:, :1], slopes[:, :-1]), 1)
    length = times.diff(dim=1)[..., None]
    safe = torch.where(length > 0, length, 1)
    bend = torch.where(length > 0, (slopes - before) / safe, 0)
    return Path(times, torch.stack((points[:, :-1], before, 2 * bend, -bend / safe), 2))


def rectilinear(times: Tensor, values: Tensor) -> Path:
    """Time first, values then: between observations the values hold while time passes, at each they jump.

    ``times``, ``values [B, L, D]`` and errors as for ``linear``; a missing value is the last one observed, 0 before
    the first. Causal. The path's own parameter is not time but counts half-steps, ``0 … 2L - 2``: observation l is at
    parameter 2l.
    Source: Morrill, Kidger, Yang and Lyons 2021, arXiv 2106.11028.
    """
    times, values = _checked(times, values)
    values = _filled_forward(values)
    clock = times.repeat_interleave(2, 1)[:, 1:]  # t0 t1 t1 t2 t2 …
    held = values.repeat_interleave(2, 1)[:, :-1]  # x0 x0 x1 x1 …
    points = torch.cat((clock.unsqueeze(-1), held), -1)
    knots = torch.arange(points.shape[1], dtype=times.dtype, device=times.device).expand(points.shape[0], -1)
    return Path(knots, torch.stack((points[:, :-1], points.diff(dim=1)), 2))


def _checked(times: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    expect_floating("times", times)
    expect_floating("values", values)
    expect_rank("values", values, "[B, L, D]", 3)
    expect_rank("times", times, "[L] or [B, L]", 1, 2)
    batch, length, _ = values.shape
    if length < 2:
        raise ValueError(f"values: got shape {show(values)}, expected at least two observations")
    expect_shape("times", times, "[L] or [B, L]", (batch, length)[-times.ndim :])
    times = times.expand(batch, length)
    if not bool((times.diff(dim=1) >= 0).all()):
        raise ValueError("times: got some that decrease or are NaN, expected increasing times")
    for name, tensor in (("times", times), ("values", values)):
        if bool(tensor.isinf().any()):
            raise ValueError(f"{name}: got infinite ones, expected finite numbers (NaN for a value that is missing)")
    return times, values


def _slopes(times: Tensor, points: Tensor) -> Tensor:
    """``Δx / Δt [B, L - 1, D]``; 0 on pieces of length 0, where nothing may happen."""
    length, change = times.diff(dim=1)[..., None], points.diff(dim=1)
    if bool(((length == 0) & (change != 0)).any()):
        raise ValueError("times: got two equal ones with different values, expected increasing times or rectilinear()")
    return torch.where(length > 0, change / torch.where(length > 0, length, 1), 0)


def _last_observed(observed: Tensor) -> Tensor:
    """The place of the last observation so far ``[B, L, D]``, -1 before the first."""
    places = torch.arange(observed.shape[1], device=observed.device)[None, :, None]
    return torch.where(observed, places, -1).cummax(1).values


def _filled_forward(values: Tensor) -> Tensor:
    observed = ~values.isnan()
    last = _last_observed(observed)
    return values.nan_to_num(0.0).gather(1, last.clamp(min=0))  # a missing first value is 0 itself


def _filled_linearly(times: Tensor, values: Tensor) -> Tensor:
    observed = ~values.isnan()
    end = values.shape[1] - 1
    before = _last_observed(observed)
    after = end - _last_observed(observed.flip(1)).flip(1)  # end + 1: none follows
    none_before, none_after = before < 0, after > end
    before, after = (
        torch.where(none_before, after, before).clamp(max=end),
        torch.where(none_after, before, after).clamp(min=0),
    )
    known, clock = values.nan_to_num(0.0), times.unsqueeze(-1).expand_as(values)
    left, right = known.gather(1, before), known.gather(1, after)
    start, stop = clock.gather(1, before), clock.gather(1, after)
    share = torch.where(stop > start, (clock - start) / torch.where(stop > start, stop - start, 1), 0)
    return torch.where(observed, known, left + (right - left) * share.clamp(0, 1))
