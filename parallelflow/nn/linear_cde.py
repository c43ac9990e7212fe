"""A layer for observations at irregular times: a linear controlled differential equation of their path."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from parallelflow.checks import expect_choice, expect_floating, expect_positive_integer, show
from parallelflow.discretizations import Discretization
from parallelflow.discretizations.discretize import SCHEMES
from parallelflow.discretizations.source import check_grid
from parallelflow.integrate import integrate
from parallelflow.nn.engine import check_engine
from parallelflow.paths import LinearField, Path, controlled, hermite, linear, log_ode, rectilinear

INTERPOLATIONS = {"linear": linear, "hermite": hermite, "rectilinear": rectilinear}


class LinearCDE(nn.Module):
    """``dS = Σ_i (g_i + B_i A_iᵀ) S dX^i + B_i U_iᵀ dX^i`` along the path X of the observations, channel 0 of which is
    time; ``W_o norm(Sᵀ q(X))``.

    Args:
        channels: observed ones, D - 1.
        hidden_size: of the output.
        num_heads: H, each with its own equation.
        head_dim: K, and V unless ``value_head_dim`` is given.
        value_head_dim: V.
        rank: R, rows a channel: the equation has (channels + 1) · R of them.
        interpolation: ``linear``, ``hermite`` or ``rectilinear`` (causal), see ``parallelflow.paths``.
        discretization: how the equation is stepped: any that ``integrate`` takes for a source, or ``log_ode``, whose
            steps are windows of many observations.
        engine: options of ``integrate`` for every call, as a ``Layer`` takes them but for ``discretization``.

    Called with ``times [L]`` or ``[B, L]`` and ``values [B, L, channels]`` (NaN where missing; a sequence is padded by
    repeating its last time) and, if steps are not to go from observation to observation, ``grid [T + 1]`` or
    ``[B, T + 1]`` in the parameter of the path. Returns ``[B, T, hidden_size]``: the output at the end of every step.
    Time decays the state, ``g_0 = -softplus``; the other channels do not.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is expected.

    Source: Walker et al. 2025, *Structured linear CDEs*, arXiv 2505.17761; Kidger, Morrill, Foster and Lyons 2020,
    *Neural controlled differential equations for irregular time series*, arXiv 2005.08926.
    """

    def __init__(
        self,
        channels: int,
        hidden_size: int,
        *,
        num_heads: int,
        head_dim: int,
        value_head_dim: int | None = None,
        rank: int = 1,
        interpolation: Literal["linear", "hermite", "rectilinear"] = "linear",
        discretization: Discretization | str = "exact",
        engine: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        value_head_dim = head_dim if value_head_dim is None else value_head_dim
        sizes = {"channels": channels, "hidden_size": hidden_size, "num_heads": num_heads, "head_dim": head_dim}
        for name, size in (sizes | {"value_head_dim": value_head_dim, "rank": rank}).items():
            expect_positive_integer(name, size)
        expect_choice("interpolation", interpolation, INTERPOLATIONS)
        if not isinstance(discretization, Discretization):
            expect_choice("discretization", discretization, (*SCHEMES, "log_ode"))
        if isinstance(discretization, str) and discretization != "log_ode":
            discretization = Discretization(discretization)
        self.channels, self.head_dim = channels, head_dim
        self.interpolation, self.discretization = interpolation, discretization
        self.engine = check_engine(engine, taken=("discretization",))
        rows = (channels + 1, rank, num_heads)
        self.read = nn.Parameter(torch.randn(*rows, head_dim) / head_dim**0.5)
        self.write = nn.Parameter(torch.randn(*rows, head_dim) / head_dim**0.5)
        self.value = nn.Parameter(torch.randn(*rows, value_head_dim) / rank**0.5)
        self.decay = nn.Parameter(torch.linspace(-4.0, 2.0, num_heads))  # rates from 1/50 to 2 per unit of time
        self.q_proj = nn.Linear(channels + 1, num_heads * head_dim)
        self.o_norm = nn.RMSNorm(value_head_dim, eps=1e-6)
        self.o_proj = nn.Linear(num_heads * value_head_dim, hidden_size, bias=False)

    def field(self) -> LinearField:
        """The equation."""
        rates = -nn.functional.softplus(self.decay)
        decay = torch.cat((rates[None], rates.new_zeros(self.channels, rates.shape[0])))
        return LinearField(self.read, self.write, self.value, decay)

    def path(self, times: Tensor, values: Tensor) -> Path:
        """The observations as a path."""
        expect_floating("values", values)
        if values.ndim == 3 and values.shape[-1] != self.channels:
            raise ValueError(f"values: got shape {show(values)}, expected [B, L, channels = {self.channels}]")
        return INTERPOLATIONS[self.interpolation](times, values)

    def forward(self, times: Tensor, values: Tensor, grid: Tensor | None = None) -> Tensor:
        path, field = self.path(times, values), self.field()
        grid = path.knots if grid is None else grid
        check_grid(grid, "[T + 1] or [B, T + 1]")
        seen = path.evaluate(grid[..., 1:]).to(self.q_proj.weight.dtype)
        query = self.q_proj(seen).unflatten(-1, (-1, self.head_dim)).to(self.read.dtype)
        if self.discretization == "log_ode":
            output = integrate(log_ode(path, field, grid), query, **self.engine).output
        else:
            source = controlled(path, field, grid)
            output = integrate(source, query, discretization=self.discretization, **self.engine).output
        return self.o_proj(self.o_norm(output.to(self.o_norm.weight.dtype)).flatten(-2))
