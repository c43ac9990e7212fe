"""No decay."""

from __future__ import annotations

from torch import Tensor

from parallelflow.decays.base import Decay
from parallelflow.decays.rows import Rows, Scaled, product, pull_product, scale_rows, sum_to_heads, to_heads


class NoDecay(Decay):
    """``e^0`` everywhere."""

    def gram(self, left: Tensor, scalars: Tensor | None, right: Tensor, of: Rows, to: Rows, mask: Tensor) -> Tensor:
        return scale_rows(scalars, to_heads(product(left, right).masked_fill(~mask, 0), self.heads))

    def pull_gram(
        self, left: Tensor, scalars: Tensor | None, right: Tensor, of: Rows, to: Rows, mask: Tensor, gradient: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        gradient = gradient.masked_fill(~mask, 0)
        d_scalars = None
        if scalars is not None:
            d_scalars = (gradient * to_heads(product(left, right), self.heads)).sum(-1)
            gradient = scale_rows(scalars, gradient)
        d_left, d_right = pull_product(left, right, gradient)
        return d_left, d_scalars, d_right

    def from_start(self, rows: Rows, vectors: Tensor, scalars: Tensor | None) -> Scaled:
        return Scaled(to_heads(vectors, self.heads), scalars)

    def pull_from_start(
        self, rows: Rows, vectors: Tensor, scalars: Tensor | None, gradient: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        d_scalars = None if scalars is None else (gradient * to_heads(vectors, self.heads)).sum(-1)
        return sum_to_heads(scale_rows(scalars, gradient), vectors.shape[1]), d_scalars

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
