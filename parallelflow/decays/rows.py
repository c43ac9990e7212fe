"""Rows of chunks: kept apart from their scalars, shared by value heads, multiplied in pairs.

Vectors may have fewer heads than HV where value heads share them: value head h reads head ``h // (HV // H)``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Scaled(NamedTuple):
    """Rows ``vectors [M, HV, n, K]``, each times ``scalars [M, HV, n]`` (None: 1), kept apart."""

    vectors: Tensor
    scalars: Tensor | None = None

    def apply(self, state: Tensor, onto: Tensor | None = None) -> Tensor:
        """``onto + A S``: ``state [M, HV, K, V]`` read by every row, ``[M, HV, n, V]``."""
        read = self.vectors @ state
        if self.scalars is None:
            return read if onto is None else onto + read
        scalars = self.scalars.unsqueeze(-1)
        return scalars * read if onto is None else torch.addcmul(onto, scalars, read)

    def apply_transposed(self, solution: Tensor, onto: Tensor | None = None) -> Tensor:
        """``onto + Aᵀ X``: rows ``[M, HV, n, V]`` written into a state ``[M, HV, K, V]``."""
        transposed, solution = self.vectors.transpose(-1, -2), scale_rows(self.scalars, solution)
        if onto is None:
            return transposed @ solution
        if onto.ndim < 4:
            return onto + transposed @ solution
        onto = onto.expand(*solution.shape[:2], *onto.shape[2:])
        product = torch.baddbmm(onto.flatten(0, 1), transposed.flatten(0, 1), solution.flatten(0, 1))
        return product.unflatten(0, solution.shape[:2])

    def dense(self) -> Tensor:
        """``[M, HV, n, K]`` with the scalars multiplied in."""
        return scale_rows(self.scalars, self.vectors)

    def at(self, index: slice | Tensor) -> Scaled:
        """The rows of some chunks."""
        return Scaled(self.vectors[index], None if self.scalars is None else self.scalars[index])


def scale_rows(scalars: Tensor | None, rows: Tensor) -> Tensor:
    """Each row of ``rows [..., n, D]`` times its scalar ``[..., n]``."""
    return rows if scalars is None else scalars.unsqueeze(-1) * rows


def to_heads(shared: Tensor, heads: int) -> Tensor:
    """``[M, H, ...]`` repeated for the value heads of each head, ``[M, HV, ...]``."""
    return shared if shared.shape[1] == heads else shared.repeat_interleave(heads // shared.shape[1], 1)


def sum_to_heads(gradient: Tensor, heads: int) -> Tensor:
    """The adjoint of ``to_heads``: summed over the value heads of each head."""
    return gradient if gradient.shape[1] == heads else gradient.unflatten(1, (heads, -1)).sum(2)


class Rows(NamedTuple):
    """Which rows a family has in every chunk: ``tokens [n]`` is each row's token, ``raw`` whether it reads before the
    token's decay."""

    tokens: Tensor
    raw: bool = False


def product(left: Tensor, right: Tensor) -> Tensor:
    """``left rightᵀ``, once for all value heads that share both."""
    heads = max(left.shape[1], right.shape[1])
    return to_heads(left, heads) @ to_heads(right, heads).transpose(-1, -2)


def pull_product(left: Tensor, right: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Adjoint of ``left rightᵀ``; the value heads that share both are summed before the products."""
    heads = max(left.shape[1], right.shape[1])
    gradient = sum_to_heads(gradient, heads)
    d_left = gradient @ to_heads(right, heads)
    d_right = gradient.transpose(-1, -2) @ to_heads(left, heads)
    return sum_to_heads(d_left, left.shape[1]), sum_to_heads(d_right, right.shape[1])
