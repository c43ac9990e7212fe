"""Solutions in the compute dtype, and in a wider one where that would not do."""

from __future__ import annotations

import torch
from torch import Tensor

from parallelflow.solvers.base import Factorisation


class Guarded(Factorisation):
    """``plain`` for every chunk, but ``wide`` for those with ``rank [M, HV]`` ≥ 0, which number ``wide``'s systems."""

    def __init__(self, plain: Factorisation, wide: Factorisation, rank: Tensor) -> None:
        self.plain, self.wide, self.rank = plain, wide, rank
        self.dtype = plain.dtype

    @staticmethod
    def mend(plain: Factorisation, wide: Factorisation, chosen: Tensor) -> Guarded:
        """``wide`` holds the systems of the chunks and heads that ``chosen [M, HV]`` marks, in order."""
        rank = torch.full(chosen.shape, -1, device=chosen.device)
        rank[chosen] = torch.arange(int(chosen.sum()), device=chosen.device)
        return Guarded(plain, wide, rank)

    def solve(self, right: Tensor) -> Tensor:
        return self._mended(right, self.plain.solve(right), False)

    def solve_transposed(self, right: Tensor) -> Tensor:
        return self._mended(right, self.plain.solve_transposed(right), True)

    def _mended(self, right: Tensor, solution: Tensor, transposed: bool) -> Tensor:
        chosen = self.rank >= 0
        if chosen.any():
            wide = self.wide[self.rank[chosen]]
            some = right[chosen].to(wide.dtype)
            some = wide.solve_transposed(some) if transposed else wide.solve(some)
            solution[chosen] = some.to(solution.dtype)
        return solution

    def __getitem__(self, index: slice | Tensor) -> Guarded:
        return Guarded(self.plain[index], self.wide, self.rank[index])
