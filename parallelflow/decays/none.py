"""No decay."""

from __future__ import annotations

from torch import Tensor

from parallelflow.decays.base import Decay
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


class NoDecay(Decay):
    """``e^0`` everywhere."""

    rowwise = True

    def gram(self, left: Tensor, scalars: Tensor | None, right: Tensor, of: Rows, to: Rows, mask: Tensor) -> Tensor:
        return scale_fresh(scalars, to_heads(product(left, right).masked_fill(~mask, 0), self.heads))

    def pull_gram(
        self, left: Tensor, scalars: Tensor | None, right: Tensor, of: Rows, to: Rows, mask: Tensor, gradient: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        gradient = gradient.masked_fill_(~mask, 0)
        d_scalars = None
        if scalars is not None:
            d_scalars = (gradient * to_heads(product(left, right), self.heads)).sum(-1)
            gradient = scale_fresh(scalars, gradient)
        d_left, d_right = pull_product(left, right, gradient)
        return d_left, d_scalars, d_right

    def from_start(self, rows: Rows, vectors: Tensor, scalars: Tensor | None) -> Scaled:
        return Scaled(to_heads(vectors, self.heads), scalars)

    def pull_from_start(
        self, rows: Rows, vectors: Tensor, scalars: Tensor | None, gradient: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        d_scalars = None if scalars is None else dots(gradient, vectors)
        return sum_to_heads(scale_fresh(scalars, gradient), vectors.shape[1]), d_scalars

    def to_end(self, rows: Rows, vectors: Tensor) -> Scaled:
        return Scaled(to_heads(vectors, self.heads))

    def pull_to_end(self, rows: Rows, vectors: Tensor, gradient: Tensor) -> Tensor:
        return sum_to_heads(gradient, vectors.shape[1])

    def total(self) -> None:
        return None

    def pull_total(self, diagonal: Tensor) -> None:
        return None

    def pull(self) -> None:
        return None
