"""One decay a head and token."""

from __future__ import annotations

from torch import Tensor

from parallelflow.decays.base import SummedDecay
from parallelflow.decays.rows import (
    Rows,
    Scaled,
    dots,
    product,
    pull_product,
    scale_fresh,
    sum_to_heads,
    to_heads,
)


class ScalarDecay(SummedDecay):
    """One log-decay a head and token, ``[M, HV, C]``: factors of rows, or of entries of a Gram matrix."""

    axis = -1
    rowwise = True

    def __init__(self, log_decay: Tensor) -> None:
        super().__init__(log_decay)
        self._weights: dict[tuple, Tensor] = {}

    def weighted(self, pairs: Tensor, of: Rows, to: Rows) -> Tensor:
        """``pairs[p, q] · e^{r_p - c_q}``; ``pairs [M, H | HV, n, m]`` are 0 where q does not precede p.

        Families that see the sums alike share one array of exponentials.
        """
        alike = len({*of.families}) == 1 and len({*to.families}) == 1
        rows, columns = (of.of(of.families[0]), to.of(to.families[0])) if alike else (of, to)
        key = (of.families, to.families, pairs.dtype)
        if key not in self._weights:
            difference = self.exponent(rows).unsqueeze(-1) - self.exponent(columns).unsqueeze(-2)
            later = rows.places[:, None] < columns.places
            self._weights[key] = difference.to(pairs.dtype).masked_fill_(later, 0).exp_()
        weights = self._weights[key].unflatten(1, (pairs.shape[1], -1))[:, :, :, None, :, None]
        blocks = pairs.unflatten(-1, (-1, len(columns))).unflatten(-3, (-1, len(rows))).unsqueeze(2)
        return (blocks * weights).flatten(5, 6).flatten(3, 4).flatten(1, 2)

    def gram(self, left: Tensor, scalars: Tensor | None, right: Tensor, of: Rows, to: Rows, mask: Tensor) -> Tensor:
        return scale_fresh(scalars, self.weighted(product(left, right).masked_fill(~mask, 0), of, to))

    def pull_gram(
        self, left: Tensor, scalars: Tensor | None, right: Tensor, of: Rows, to: Rows, mask: Tensor, gradient: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        gradient = self.weighted(gradient.masked_fill_(~mask, 0), of, to)
        pairs = gradient * to_heads(product(left, right), self.heads)
        d_scalars, d_exponent = None, pairs.sum(-1)
        if scalars is None:
            d_columns = pairs.sum(-2)
        else:
            d_columns = (scalars.unsqueeze(-2) @ pairs).squeeze(-2)
            d_scalars, d_exponent = d_exponent, scalars * d_exponent
            gradient = scale_fresh(scalars, gradient)
        self.gather(of, d_exponent)
        self.gather(to, -d_columns)
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
        dot = dots(gradient, vectors)
        self.gather(rows, weight * dot)
        d_scalars = None if scalars is None else factor * dot
        return sum_to_heads(scale_fresh(weight, gradient), vectors.shape[1]), d_scalars

    def to_end(self, rows: Rows, vectors: Tensor) -> Scaled:
        return Scaled(to_heads(vectors, self.heads), self.rounded_exp(self.last - self.exponent(rows)))

    def pull_to_end(self, rows: Rows, vectors: Tensor, gradient: Tensor) -> Tensor:
        factor = self.rounded_exp(self.last - self.exponent(rows))
        d_exponent = factor * dots(gradient, vectors)
        self.gather(rows, -d_exponent)
        self.gather_last(d_exponent.sum(-1))
        return sum_to_heads(scale_fresh(factor, gradient), vectors.shape[1])

    def total(self) -> Tensor:
        return self.rounded_exp(self.last.squeeze(-1))

    def pull_total(self, diagonal: Tensor) -> None:
        self.gather_last(self.total() * diagonal.sum(-1))
