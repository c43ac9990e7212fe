"""An inverse that nobody should use, to show why: Neumann doubling."""

from __future__ import annotations

import torch
from torch import Tensor

from parallelflow.solvers.base import Factorisation


class neumann_doubling(Factorisation):
    """``(I - G)⁻¹ = (I + G)(I + G²)(I + G⁴)…``, exact in log2(n) products, because G is nilpotent.

    The powers of G grow as binomials for correlated keys, while the inverse does not: the terms cancel, and floating
    point loses what they cancel to (docs/theory.md, section 3). Not a solver of the library.
    """

    def __init__(self, gram: Tensor, block: int) -> None:
        size = gram.shape[-1]
        identity = torch.eye(size, dtype=gram.dtype, device=gram.device)
        inverse, power, reach = identity + gram, gram, 2
        while reach < size:
            power = power @ power
            inverse = inverse + inverse @ power
            reach *= 2
        self.inverse, self.dtype = inverse, gram.dtype

    def solve(self, right: Tensor) -> Tensor:
        return self.inverse @ right

    def solve_transposed(self, right: Tensor) -> Tensor:
        return self.inverse.transpose(-1, -2) @ right

    def __getitem__(self, index: slice | Tensor) -> neumann_doubling:
        part = object.__new__(neumann_doubling)
        part.inverse, part.dtype = self.inverse[index], self.dtype
        return part
