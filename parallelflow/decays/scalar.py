"""One decay a head and token."""

from __future__ import annotations

import torch
from torch import Tensor

from parallelflow.decays.base import SummedDecay
from parallelflow.decays.rows import Rows, Scaled, product, pull_product, scale_rows, sum_to_heads, to_heads


class ScalarDecay(SummedDecay):
    """One log-decay a head and token, ``[M, HV, C]``: factors of rows, or of entries of a Gram matrix."""

    axis = -1

    def weights(self, of: Rows, to: Rows, mask: Tensor, dtype: torch.dtype) -> Tensor:
        """``mask · e^{r_p - c_q}``, ``[M, HV, n, m]``."""
        difference = self.exponent(of).unsqueeze(-1) - self.exponent(to).unsqueeze(-2)
        return difference.to(dtype).masked_fill(~mask, -torch.inf).exp()

    def gram(self, left: Tensor, scalars: Tensor | None, right: Tensor, of: Rows, to: Rows, mask: Tensor) -> Tensor:
        pairs = product(left, right)
        weights = self.weights(of, to, mask, pairs.dtype)
        if pairs.shape[1] == self.heads:
            return scale_rows(scalars, pairs * weights)
        return scale_rows(scalars, (pairs.unsqueeze(2) * weights.unflatten(1, (pairs.shape[1], -1))).flatten(1, 2))

    def pull_gram(
        self, left: Tensor, scalars: Tensor | None, right: Tensor, of: Rows, to: Rows, mask: Tensor, gradient: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        gradient = gradient * self.weights(of, to, mask, gradient.dtype)
        pairs = gradient * to_heads(product(left, right), self.heads)
        d_scalars, d_exponent = None, pairs.sum(-1)
        if scalars is not None:
            d_scalars, d_exponent = d_exponent, scalars * d_exponent
            pairs, gradient = scale_rows(scalars, pairs), scale_rows(scalars, gradient)
        self.gather(of, d_exponent)
        self.gather(to, -pairs.sum(-2))
        d_left, d_right = pull_product(left, right, gradient)
        return d_left, d_scalars, d_right

    def from_start(self, rows: Rows, vectors: Tensor, scalars: Tensor | None) -> Scaled:
        factor = self.rounded_exp(self.exponent(rows))
        return Scaled(to_heads(vectors, self.heads), factor if scalars is None else factor * scalars)

    def pull_from_start(
        self, rows: Rows, vectors: Tensor, scalars: Tensor | None, gradient: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        factor = self.rounded_exp(self.exponent(rows))
        weight = factor if scalars is None else factor * scalars
        dot = (gradient * to_heads(vectors, self.heads)).sum(-1)
        self.gather(rows, weight * dot)
        d_scalars = None if scalars is None else factor * dot
        return sum_to_heads(scale_rows(weight, gradient), vectors.shape[1]), d_scalars

    def to_end(self, rows: Rows, vectors: Tensor) -> Scaled:
        return Scaled(to_heads(vectors, self.heads), self.rounded_exp(self.last - self.exponent(rows)))

    def pull_to_end(self, rows: Rows, vectors: Tensor, gradient: Tensor) -> Tensor:
        factor = self.rounded_exp(self.last - self.exponent(rows))
        d_exponent = factor * (gradient * to_heads(vectors, self.heads)).sum(-1)
        self.gather(rows, -d_exponent)
        self.gather_last(d_exponent.sum(-1))
        return sum_to_heads(scale_rows(factor, gradient), vectors.shape[1])

    def total(self) -> Tensor:
        return self.rounded_exp(self.last.squeeze(-1))

    def pull_total(self, diagonal: Tensor) -> None:
        self.gather_last(self.total() * diagonal.sum(-1))
