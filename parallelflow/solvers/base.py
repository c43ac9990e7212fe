"""What every solver provides."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor


class Factorisation(ABC):
    """``(I - G)``, ready to be solved with, in ``dtype``. All leading axes are batch axes."""

    dtype: torch.dtype

    @abstractmethod
    def solve(self, right: Tensor) -> Tensor:
        """``X`` with ``(I - G) X = right``; ``right [..., n, D]``."""

    @abstractmethod
    def solve_transposed(self, right: Tensor) -> Tensor:
        """``Y`` with ``(I - G)ᵀ Y = right``; ``right [..., n, D]``."""

    @abstractmethod
    def __getitem__(self, index: slice | Tensor) -> Factorisation:
        """The factorisation of some of the chunks (an index of the first axis)."""

    def apply(self, right: Tensor) -> Tensor:
        """``solve`` in ``dtype``, rounded to that of ``right [..., n, D]``."""
        return self.solve(right.to(self.dtype)).to(right.dtype)

    def transposed(self) -> Factorisation:
        """``(I - G)ᵀ``."""
        return Transposed(self)


class Transposed(Factorisation):
    """A factorisation with its two solves exchanged."""

    def __init__(self, of: Factorisation) -> None:
        self.of, self.dtype = of, of.dtype

    def solve(self, right: Tensor) -> Tensor:
        return self.of.solve_transposed(right)

    def solve_transposed(self, right: Tensor) -> Tensor:
        return self.of.solve(right)

    def __getitem__(self, index: slice | Tensor) -> Transposed:
        return Transposed(self.of[index])


class Stepwise(Factorisation):
    """A factorisation that is ``G`` itself: everything happens in the solve.

    The transposed system, its rows taken backwards, is again strictly lower triangular: one recursion serves both.
    """

    def __init__(self, gram: Tensor, block: int) -> None:
        self.gram = gram
        self.block = block
        self.dtype = gram.dtype

    @staticmethod
    @abstractmethod
    def recursion(gram: Tensor, right: Tensor, block: int) -> Tensor:
        """``X`` with ``(I - G) X = right``; ``G``'s diagonal blocks of ``block`` rows are zero."""

    def solve(self, right: Tensor) -> Tensor:
        return self.recursion(self.gram, self._broadcast(right), self.block)

    def solve_transposed(self, right: Tensor) -> Tensor:
        backwards = self.gram.transpose(-1, -2).flip(-1, -2)
        return self.recursion(backwards, self._broadcast(right).flip(-2), self.block).flip(-2)

    def _broadcast(self, right: Tensor) -> Tensor:
        batch = torch.broadcast_shapes(self.gram.shape[:-2], right.shape[:-2])
        return right.expand(*batch, *right.shape[-2:])

    def __getitem__(self, index: slice | Tensor) -> Stepwise:
        return type(self)(self.gram[index], self.block)


Solver = Callable[[Tensor, int], Factorisation]
