"""Rows of chunks: kept apart from their scalars, shared by value heads, multiplied in pairs.

Vectors may have fewer heads than HV where value heads share them: value head h reads head ``h // (HV // H)``.
"""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor


class Scaled(NamedTuple):
    """Rows ``vectors [M, HV, n, K]``, each times ``scalars [M, HV, n]`` (None: 1), kept apart."""

    vectors: Tensor
    scalars: Tensor | None = None

    def apply(self, state: Tensor) -> Tensor:
        """``A S``: ``state [M, HV, K, V]`` read by every row, ``[M, HV, n, V]``."""
        return scale_fresh(self.scalars, self.vectors @ state)

    def onto(self, rows: Tensor | None) -> Tensor:
        """``rows + A``, ``[M, HV, n, K]`` (None is 0)."""
        if rows is None:
            return self.dense()
        return (
            rows + self.vectors
            if self.scalars is None
            else torch.addcmul(rows, self.scalars.unsqueeze(-1), self.vectors)
        )

    def apply_transposed(self, solution: Tensor, onto: Tensor | None = None) -> Tensor:
        """``onto + Aᵀ X``: rows ``[M, HV, n, V]`` written into states ``[M, HV, K, V]`` (None is 0; given up)."""
        return product_onto(onto, self.vectors.transpose(-1, -2), scale_rows(self.scalars, solution))

    def dense(self) -> Tensor:
        """``[M, HV, n, K]`` with the scalars multiplied in."""
        return scale_rows(self.scalars, self.vectors)

    def at(self, index: slice | Tensor) -> Scaled:
        """The rows of some chunks."""
        return Scaled(self.vectors[index], None if self.scalars is None else self.scalars[index])

    def first(self, count: int) -> Scaled:
        """The first rows of every chunk."""
        return Scaled(self.vectors[:, :, :count], None if self.scalars is None else self.scalars[:, :, :count])


def scale_rows(scalars: Tensor | None, rows: Tensor) -> Tensor:
    """Each row of ``rows [..., n, D]`` times its scalar ``[..., n]``."""
    return rows if scalars is None else scalars.unsqueeze(-1) * rows


def scale_fresh(scalars: Tensor | None, rows: Tensor) -> Tensor:
    """``scale_rows`` of rows that are given up: where no gradient is recorded the result takes their memory."""
    if scalars is None or torch.is_grad_enabled():
        return scale_rows(scalars, rows)
    return rows.mul_(scalars.unsqueeze(-1))


def product_onto(onto: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """``onto + left right``, all ``[M, HV, ., .]`` (None is 0). ``onto`` is given up: where no gradient is recorded the
    sum may take its memory."""
    if onto is None:
        return left @ right
    if torch.is_grad_enabled():
        return onto + left @ right
    parts = onto.flatten(0, 1), left.flatten(0, 1), right.flatten(0, 1)
    if not onto.is_contiguous():
        return torch.baddbmm(*parts).unflatten(0, onto.shape[:2])
    parts[0].baddbmm_(*parts[1:])
    return onto


def to_heads(shared: Tensor, heads: int) -> Tensor:
    """``[M, H, ...]`` repeated for the value heads of each head, ``[M, HV, ...]``."""
    return shared if shared.shape[1] == heads else shared.repeat_interleave(heads // shared.shape[1], 1)


def sum_to_heads(gradient: Tensor, heads: int) -> Tensor:
    """The adjoint of ``to_heads``: summed over the value heads of each head."""
    return gradient if gradient.shape[1] == heads else gradient.unflatten(1, (heads, -1)).sum(2)


def dots(wide: Tensor, shared: Tensor) -> Tensor:
    """Row by row, ``Σ_k wide[p, k] shared[p, k]``: ``[M, HV, n, K]`` and ``[M, H | HV, n, K]`` give ``[M, HV, n]``."""
    return (wide.unflatten(1, (shared.shape[1], -1)) * shared.unsqueeze(2)).sum(-1).flatten(1, 2)


class Family(NamedTuple):
    """Rows of one kind: how many a token has, and whether they read before the token's decay."""

    each: int
    raw: bool = False


class Rows:
    """Which rows a chunk of ``size`` tokens has: family after family, within each token after token.

    ``tokens [n]`` is each row's token; ``places [n]`` is where its exponent stands in the sums of log-decays that begin
    with 0: after its token's decay, or before it.
    """

    def __init__(self, size: int, families: tuple[Family, ...], device: torch.device) -> None:
        self.size, self.families, self.device = size, families, device

    def __len__(self) -> int:
        return self.size * sum(family.each for family in self.families)

    def of(self, family: Family) -> Rows:
        """The rows of one family alone."""
        return Rows(self.size, (family,), self.device)

    @cached_property
    def tokens(self) -> Tensor:
        tokens = torch.arange(self.size, device=self.device)
        return torch.cat([tokens.repeat_interleave(family.each) for family in self.families])

    @cached_property
    def places(self) -> Tensor:
        late = [torch.full((self.size * f.each,), int(not f.raw), device=self.device) for f in self.families]
        return self.tokens + torch.cat(late)

    @cached_property
    def by_token(self) -> Tensor:
        """The rows in the order of their tokens, those of a token by family."""
        return torch.sort(self.tokens, stable=True).indices


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
