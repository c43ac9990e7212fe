"""The signature kernel of two straight lines, three ways: the stencil, a chunk's triangular system, and a flow."""

from __future__ import annotations

import torch
from torch import Tensor

from parallelflow import functional
from parallelflow.solvers import SOLVERS

PRODUCT = 0.42
"""``<x, y>`` of the lines' ends."""
EXACT = float(torch.special.i0(torch.tensor(2 * PRODUCT**0.5, dtype=torch.float64)))
"""``k(x, y) = I0(2 √<x, y>)``, a Bessel function."""
ROUTES = ("stencil", *SOLVERS, "flow")


def kernel(route: str, steps: int) -> float:
    """``k_ij = 1 + Σ_{p<i, q<j} <dx_p, dy_q> k_pq`` at the far corner of a grid of ``steps`` × ``steps`` cells."""
    product = PRODUCT / steps**2
    if route == "stencil":
        return _stencil(product, steps)
    return float(_flow(product, steps) if route == "flow" else _system(product, steps, route))


def _stencil(product: float, steps: int) -> float:
    """``k_{i+1,j+1} = k_{i+1,j} + k_{i,j+1} - k_ij + <dx_i, dy_j> k_ij``, cell by cell."""
    above = [1.0] * (steps + 1)
    for _ in range(steps):
        here = [1.0]
        for j in range(steps):
            here.append(here[j] + above[j + 1] - above[j] + product * above[j])
        above = here
    return above[-1]


def _system(product: float, steps: int, solver: str) -> Tensor:
    """``(I - G) k = 1`` with a row a cell: what a chunk's solver solves."""
    cells = torch.cartesian_prod(torch.arange(steps), torch.arange(steps))
    gram = product * (cells[:, None] > cells[None]).all(-1).double()
    ones = torch.ones(1, len(cells), 1, dtype=torch.float64)
    return 1 + product * SOLVERS[solver](gram[None], 1).solve(ones).sum()


def _flow(product: float, steps: int) -> Tensor:
    """The column ``k_i`` is the state, and token i has a row ``(<dx_i, dy_q> e_q, Σ_{j>q} e_j, 0)`` for each q."""
    rows = (1, steps, steps, 1, steps + 1)
    read = product * torch.eye(steps, steps + 1, dtype=torch.float64)[:, None].expand(rows)
    write = torch.ones(steps, steps + 1, dtype=torch.float64).triu(1)[:, None].expand(rows)
    query = torch.eye(steps + 1, dtype=torch.float64)[-1].expand(1, steps, 1, -1)
    value = torch.zeros(1, steps, steps, 1, 1, dtype=torch.float64)
    start = torch.ones(1, 1, steps + 1, 1, dtype=torch.float64)
    result = functional.low_rank_flow(
        query, value, read=read, write=write, initial_state=start, scale=1.0, chunk_size=4, backend="torch"
    )
    return result.output[0, -1, 0, 0]
