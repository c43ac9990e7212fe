"""One decay a key channel."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from parallelflow.decays.base import SummedDecay
from parallelflow.decays.rows import Rows, Scaled, scale_rows, sum_to_heads, to_heads


class VectorDecay(SummedDecay):
    """One log-decay a key channel, ``[M, HV, C, K]``.

    A Gram matrix is built by halving: for two neighbouring runs of tokens the pairs (late row, early row) share the
    boundary between them, ``e^{c_p - c_q} = e^{c_p - c_mid} e^{c_mid - c_q}`` with both factors at most 1, so each
    level is one product over all pairs of runs.
    """

    axis = -2
    rowwise = False

    @property
    def size(self) -> int:
        """Tokens a chunk."""
        return self.sums.shape[-2] - 1

    @property
    def width(self) -> int:
        """Tokens a chunk, filled up to a power of two."""
        return 1 << (self.size - 1).bit_length()

    def _tokens(self, rows: Tensor) -> Tensor:
        """Rows ``[M, HV, C·R, D]`` in the order of their tokens as ``[M, HV, width, R, D]``, filled with zeros."""
        return pad(rows.unflatten(-2, (self.size, -1)), (0, 0, 0, 0, 0, self.width - self.size))

    def _levels(self, left: Tensor, right: Tensor, of: Rows, to: Rows) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """For runs of 1, 2, 4, … tokens: the late rows and the early rows, each already decayed to their boundary, and
        the two factors that did it; ``[M, HV, pairs, run·R, K]``."""
        of_sums, to_sums = (by_token(self.exponent(rows), rows) for rows in (of, to))
        rows = [self._tokens(each) for each in (left, right, of_sums, to_sums, self.sums[..., 1:, :])]
        levels, run = [], 1
        while run < self.width:
            late, early, late_sums, early_sums, ends = (each.unflatten(2, (-1, 2, run)) for each in rows)
            boundary = ends[:, :, :, 0, -1:]  # c at the end of the early run
            # Tokens that fill up have c = 0 but zero vectors; their factors are only kept from overflowing.
            late_factor = self.rounded_exp((late_sums[:, :, :, 1] - boundary).clamp(max=0)).to(left.dtype)
            early_factor = self.rounded_exp((boundary - early_sums[:, :, :, 0]).clamp(max=0)).to(left.dtype)
            parts = (late[:, :, :, 1] * late_factor, early[:, :, :, 0] * early_factor, late_factor, early_factor)
            levels.append(tuple(part.flatten(3, 4) for part in parts))
            run *= 2
        return levels  # type: ignore[return-value]

    def gram(self, left: Tensor, scalars: Tensor | None, right: Tensor, of: Rows, to: Rows, mask: Tensor) -> Tensor:
        left = by_token(scale_rows(scalars, to_heads(left, self.heads)), of)
        right = by_token(to_heads(right, self.heads), to)
        blocks = self._tokens(left) @ self._tokens(right).transpose(-1, -2)  # a token with itself: e^0
        for late, early, _, _ in self._levels(left, right, of, to):
            first, second = blocks[:, :, 0::2], blocks[:, :, 1::2]
            top = torch.cat((first, torch.zeros_like(first)), -1)
            blocks = torch.cat((top, torch.cat((late @ early.transpose(-1, -2), second), -1)), -2)
        found = blocks.squeeze(2)[..., : left.shape[-2], : right.shape[-2]]
        return by_family(by_family(found, of).transpose(-1, -2), to).transpose(-1, -2).masked_fill(~mask, 0)

    def pull_gram(
        self, left: Tensor, scalars: Tensor | None, right: Tensor, of: Rows, to: Rows, mask: Tensor, gradient: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        left_heads, right_heads = left.shape[1], right.shape[1]
        plain = to_heads(left, self.heads)
        left = by_token(scale_rows(scalars, plain), of)
        right = by_token(to_heads(right, self.heads), to)
        tokens, width = self.size, self.width
        rows, columns = left.shape[-2] // tokens, right.shape[-2] // tokens
        missing = width - tokens
        gradient = gradient.masked_fill(~mask, 0)
        gradient = by_token(by_token(gradient, of).transpose(-1, -2), to).transpose(-1, -2)
        blocks = pad(gradient, (0, missing * columns, 0, missing * rows)).unsqueeze(2)
        d_late = blocks.new_zeros(*blocks.shape[:2], width, rows, left.shape[-1])
        d_early = blocks.new_zeros(*blocks.shape[:2], width, columns, right.shape[-1])
        run = width
        for late, early, late_factor, early_factor in reversed(self._levels(left, right, of, to)):
            run //= 2
            lower = blocks[..., run * rows :, : run * columns]
            moved = (lower @ early * late_factor).unflatten(3, (run, rows))
            d_late.unflatten(2, (-1, 2, run))[:, :, :, 1] += moved
            moved = (lower.transpose(-1, -2) @ late * early_factor).unflatten(3, (run, columns))
            d_early.unflatten(2, (-1, 2, run))[:, :, :, 0] += moved
            first = blocks[..., : run * rows, : run * columns]
            second = blocks[..., run * rows :, run * columns :]
            blocks = torch.stack((first, second), 3).flatten(2, 3)
        d_left = d_late[:, :, :tokens].flatten(2, 3)
        d_right = d_early[:, :, :tokens].flatten(2, 3)
        self.gather(of, by_family(d_left * left, of))
        self.gather(to, by_family(-d_right * right, to))
        # A token with itself: no decay between, hence no adjoint of it.
        own = blocks[:, :, :tokens]
        d_left = d_left + (own @ right.unflatten(2, (tokens, columns))).flatten(2, 3)
        d_right = d_right + (own.transpose(-1, -2) @ left.unflatten(2, (tokens, rows))).flatten(2, 3)
        d_left, d_right = by_family(d_left, of), by_family(d_right, to)
        d_scalars = None if scalars is None else (d_left * plain).sum(-1)
        d_left = sum_to_heads(scale_rows(scalars, d_left), left_heads)
        return d_left, d_scalars, sum_to_heads(d_right, right_heads)

    def from_start(self, rows: Rows, vectors: Tensor, scalars: Tensor | None) -> Scaled:
        return Scaled(to_heads(vectors, self.heads) * self.rounded_exp(self.exponent(rows)), scalars)

    def pull_from_start(
        self, rows: Rows, vectors: Tensor, scalars: Tensor | None, gradient: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        wide = to_heads(vectors, self.heads)
        moved = gradient * self.rounded_exp(self.exponent(rows))
        d_scalars = None if scalars is None else (moved * wide).sum(-1)
        d_vectors = scale_rows(scalars, moved)
        self.gather(rows, d_vectors * wide)
        return sum_to_heads(d_vectors, vectors.shape[1]), d_scalars

    def to_end(self, rows: Rows, vectors: Tensor) -> Scaled:
        return Scaled(to_heads(vectors, self.heads) * self.rounded_exp(self.last - self.exponent(rows)))

    def pull_to_end(self, rows: Rows, vectors: Tensor, gradient: Tensor) -> Tensor:
        d_vectors = gradient * self.rounded_exp(self.last - self.exponent(rows))
        d_exponent = d_vectors * to_heads(vectors, self.heads)
        self.gather(rows, -d_exponent)
        self.gather_last(d_exponent.sum(-2))
        return sum_to_heads(d_vectors, vectors.shape[1])

    def total(self) -> Tensor:
        return self.rounded_exp(self.last.squeeze(-2))

    def pull_total(self, diagonal: Tensor) -> None:
        self.gather_last(self.total() * diagonal)


def by_token(array: Tensor, rows: Rows) -> Tensor:
    """``[..., n, D]`` from the order of families to the order of tokens."""
    return array if len(rows.families) == 1 else array.index_select(-2, rows.by_token)


def by_family(array: Tensor, rows: Rows) -> Tensor:
    """The inverse of ``by_token``."""
    return array if len(rows.families) == 1 else array.index_select(-2, rows.by_token.argsort())
