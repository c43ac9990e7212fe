"""A chunk's decays: every factor ``e^{c_p - c_q}`` with ``q`` before ``p``, none of them above 1, and their adjoints.

``c`` is the sum of log-decays from the chunk's start. A difference of such sums loses the small terms beside large ones
(a decay of -100 beside one of -1e-6), so the sums are kept in float64, where 64 tokens at the floor below leave an error
of 1e-11, and are rounded only after the subtraction. ``e^{-c}`` alone, which overflows, is never formed.

Notation: rows p, q belong to tokens; M chunks, H key heads, G value heads a key head, C tokens a chunk, n rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

FLOOR = -800.0  # e^-800 is 0 in float64 too: a reset (-inf) is clamped here so that differences stay finite


class Scaled(NamedTuple):
    """Rows ``vectors [M, H, 1 or G, n, K]``, each times ``scalars [M, H, 1 or G, n]`` (None: 1), kept apart."""

    vectors: Tensor
    scalars: Tensor | None = None

    def apply(self, state: Tensor) -> Tensor:
        """``A S``: ``state [M, H, G, K, V]`` read by every row, ``[M, H, G, n, V]``."""
        return scale_rows(self.scalars, self.vectors @ state)

    def apply_transposed(self, solution: Tensor) -> Tensor:
        """``Aᵀ X``: rows ``[M, H, G, n, V]`` written into a state ``[M, H, G, K, V]``."""
        return self.vectors.transpose(-1, -2) @ scale_rows(self.scalars, solution)

    def dense(self) -> Tensor:
        """``[M, H, 1 or G, n, K]`` with the scalars multiplied in."""
        return scale_rows(self.scalars, self.vectors)

    def __getitem__(self, index) -> Scaled:  # type: ignore[override]
        return Scaled(self.vectors[index], None if self.scalars is None else self.scalars[index])


def scale_rows(scalars: Tensor | None, rows: Tensor) -> Tensor:
    """Each row of ``rows [..., n, D]`` times its scalar ``[..., n]``."""
    return rows if scalars is None else scalars.unsqueeze(-1) * rows


def sum_to_heads(gradient: Tensor, like: Tensor) -> Tensor:
    """Summed over the value heads of a key head where ``like`` has one entry for all of them."""
    return gradient.sum(2, keepdim=True) if like.shape[2] == 1 and gradient.shape[2] != 1 else gradient


class Rows(NamedTuple):
    """Which rows a family has, in every chunk: ``tokens [n]`` each row's token, ``raw`` whether it reads before decay."""

    tokens: Tensor
    raw: bool = False


class Decay(ABC):
    """The decay inside chunks. Gradients with respect to the log-decay gather in ``pulled`` as adjoints of ``c``."""

    @abstractmethod
    def gram(self, left: Tensor, scalars: Tensor | None, right: Tensor, of: Rows, to: Rows, mask: Tensor) -> Tensor:
        """``M[p, q] = mask · scalar_p Σ_k left_p[k] right_q[k] e^{r_p[k] - c_q[k]}``, ``[M, H, 1 or G, n, m]``."""

    @abstractmethod
    def pull_gram(
        self, left: Tensor, scalars: Tensor | None, right: Tensor, of: Rows, to: Rows, mask: Tensor, gradient: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Adjoint of ``gram``: gradients of ``left``, ``scalars`` and ``right``."""

    @abstractmethod
    def from_start(self, rows: Rows, vectors: Tensor, scalars: Tensor | None) -> Scaled:
        """``scalar · vector ⊙ e^{r_p}``: rows as they see the state at the chunk's start."""

    @abstractmethod
    def pull_from_start(
        self, rows: Rows, vectors: Tensor, scalars: Tensor | None, gradient: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Adjoint of ``from_start`` given that of its dense form: gradients of ``vectors`` and ``scalars``."""

    @abstractmethod
    def to_end(self, rows: Rows, vectors: Tensor) -> Scaled:
        """``vector ⊙ e^{c_C - c_q}``: rows as the state at the chunk's end keeps them."""

    @abstractmethod
    def pull_to_end(self, rows: Rows, vectors: Tensor, gradient: Tensor) -> Tensor:
        """Adjoint of ``to_end`` given that of its dense form."""

    @abstractmethod
    def total(self) -> Tensor | None:
        """``Λ = e^{c_C}``: None (no decay), ``[M, H, G]``, or ``[M, H, G, K]``."""

    @abstractmethod
    def pull_total(self, diagonal: Tensor) -> None:
        """Adjoint of ``total`` given ``diag(dS_out S_0ᵀ) [M, H, G, K]``."""

    @abstractmethod
    def pull(self) -> Tensor | None:
        """The gradient of the log-decay, from all adjoints gathered so far."""


class NoDecay(Decay):
    """``e^0`` everywhere."""

    def gram(self, left, scalars, right, of, to, mask):
        return scale_rows(scalars, (left @ right.transpose(-1, -2)).masked_fill(~mask, 0))

    def pull_gram(self, left, scalars, right, of, to, mask, gradient):
        gradient = gradient.masked_fill(~mask, 0)
        d_scalars = None
        if scalars is not None:
            d_scalars = sum_to_heads((gradient * (left @ right.transpose(-1, -2))).sum(-1), scalars)
            gradient = scale_rows(scalars, gradient)
        d_left, d_right = _pull_product(left, right, gradient)
        return d_left, d_scalars, d_right

    def from_start(self, rows, vectors, scalars):
        return Scaled(vectors, scalars)

    def pull_from_start(self, rows, vectors, scalars, gradient):
        if scalars is None:
            return sum_to_heads(gradient, vectors), None
        d_scalars = (gradient * vectors).sum(-1)
        return sum_to_heads(scale_rows(scalars, gradient), vectors), sum_to_heads(d_scalars, scalars)

    def to_end(self, rows, vectors):
        return Scaled(vectors)

    def pull_to_end(self, rows, vectors, gradient):
        return sum_to_heads(gradient, vectors)

    def total(self):
        return None

    def pull_total(self, diagonal):
        return None

    def pull(self):
        return None


class ScalarDecay(Decay):
    """One log-decay a head and token, ``[M, H, G, C]``: factors of rows, or of entries of a Gram matrix."""

    def __init__(self, log_decay: Tensor, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.sums, self.before = _sums(log_decay, -1)
        self.pulled = torch.zeros_like(self.sums, dtype=dtype)

    def _exponent(self, rows: Rows) -> Tensor:
        return (self.before if rows.raw else self.sums)[..., rows.tokens]

    def _weights(self, of: Rows, to: Rows, mask: Tensor) -> Tensor:
        difference = self._exponent(of).unsqueeze(-1) - self._exponent(to).unsqueeze(-2)
        return difference.to(self.dtype).masked_fill(~mask, -torch.inf).exp()

    def _gather(self, rows: Rows, gradient: Tensor) -> None:
        """Adds adjoints of the rows' exponents ``[M, H, G, n]`` to those of ``c``."""
        if not rows.raw:
            self.pulled.index_add_(-1, rows.tokens, gradient)
        else:  # c⁻_t = c_{t-1}, and c⁻_0 = 0
            late = rows.tokens > 0
            self.pulled.index_add_(-1, rows.tokens[late] - 1, gradient[..., late])

    def gram(self, left, scalars, right, of, to, mask):
        return scale_rows(scalars, (left @ right.transpose(-1, -2)) * self._weights(of, to, mask))

    def pull_gram(self, left, scalars, right, of, to, mask, gradient):
        gradient = gradient * self._weights(of, to, mask)
        pairs = gradient * (left @ right.transpose(-1, -2))
        d_scalars, d_exponent = None, pairs.sum(-1)
        if scalars is not None:
            d_scalars = sum_to_heads(d_exponent, scalars)
            d_exponent = scalars * d_exponent
            pairs, gradient = scale_rows(scalars, pairs), scale_rows(scalars, gradient)
        self._gather(of, d_exponent)
        self._gather(to, -pairs.sum(-2))
        d_left, d_right = _pull_product(left, right, gradient)
        return d_left, d_scalars, d_right

    def from_start(self, rows, vectors, scalars):
        factor = self._exponent(rows).to(self.dtype).exp()
        return Scaled(vectors, factor if scalars is None else factor * scalars)

    def pull_from_start(self, rows, vectors, scalars, gradient):
        factor = self._exponent(rows).to(self.dtype).exp()
        weight = factor if scalars is None else factor * scalars
        dot = (gradient * vectors).sum(-1)
        self._gather(rows, weight * dot)
        d_scalars = None if scalars is None else sum_to_heads(factor * dot, scalars)
        return sum_to_heads(scale_rows(weight, gradient), vectors), d_scalars

    def _to_end(self, rows: Rows) -> Tensor:
        return (self.sums[..., -1:] - self._exponent(rows)).to(self.dtype).exp()

    def to_end(self, rows, vectors):
        return Scaled(vectors, self._to_end(rows))

    def pull_to_end(self, rows, vectors, gradient):
        factor = self._to_end(rows)
        d_exponent = factor * (gradient * vectors).sum(-1)
        self._gather(rows, -d_exponent)
        self.pulled[..., -1] += d_exponent.sum(-1)
        return sum_to_heads(scale_rows(factor, gradient), vectors)

    def total(self):
        return self.sums[..., -1].to(self.dtype).exp()

    def pull_total(self, diagonal):
        self.pulled[..., -1] += self.total() * diagonal.sum(-1)

    def pull(self):
        return _pull_sums(self.pulled, -1)


class VectorDecay(Decay):
    """One log-decay a key channel, ``[M, H, G, C, K]``.

    A Gram matrix is built by halving: for two neighbouring runs of tokens the pairs (late row, early row) share the
    boundary between them, ``e^{c_p - c_q} = e^{c_p - c_mid} e^{c_mid - c_q}`` with both factors at most 1, so each level is
    one product over all pairs of runs.
    """

    def __init__(self, log_decay: Tensor, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.sums, self.before = _sums(log_decay, -2)
        self.pulled = torch.zeros_like(self.sums, dtype=dtype)

    def _exponent(self, rows: Rows) -> Tensor:
        return (self.before if rows.raw else self.sums)[..., rows.tokens, :]

    def _gather(self, rows: Rows, gradient: Tensor) -> None:
        if not rows.raw:
            self.pulled.index_add_(-2, rows.tokens, gradient)
        else:
            late = rows.tokens > 0
            self.pulled.index_add_(-2, rows.tokens[late] - 1, gradient[..., late, :])

    def _runs(self, values: Tensor, width: int) -> Tensor:
        """Rows ``[..., C·R, D]`` as tokens ``[..., tokens, R, D]``, the tokens padded to ``width``."""
        tokens = self.sums.shape[-2]
        values = values.unflatten(-2, (tokens, -1))
        return torch.nn.functional.pad(values, (0, 0, 0, 0, 0, width - tokens))

    def _levels(self, left: Tensor, right: Tensor, of: Rows, to: Rows):
        """For runs of 1, 2, 4, … tokens: the late rows and the early rows, each already decayed to their boundary, and the
        two factors that did it; ``[..., pairs, run·R, K]``."""
        width = 1 << (self.sums.shape[-2] - 1).bit_length()
        late, early = self._runs(left, width), self._runs(right, width)
        late_sums, early_sums = self._runs(self._exponent(of), width), self._runs(self._exponent(to), width)
        ends = self._runs(self.sums, width)  # c after each token
        run = 1
        while run < width:
            boundary = ends.unflatten(-3, (-1, 2, run))[..., 0, -1:, :, :]  # c at the end of the early run
            late_factor = late_sums.unflatten(-3, (-1, 2, run))[..., 1, :, :, :] - boundary
            early_factor = boundary - early_sums.unflatten(-3, (-1, 2, run))[..., 0, :, :, :]
            # Padded tokens have c = 0 but zero vectors; their factors are only kept from overflowing.
            late_factor = late_factor.clamp(max=0).to(self.dtype).exp().flatten(-3, -2)
            early_factor = early_factor.clamp(max=0).to(self.dtype).exp().flatten(-3, -2)
            yield (
                late.unflatten(-3, (-1, 2, run))[..., 1, :, :, :].flatten(-3, -2) * late_factor,
                early.unflatten(-3, (-1, 2, run))[..., 0, :, :, :].flatten(-3, -2) * early_factor,
                late_factor,
                early_factor,
            )
            run *= 2

    def gram(self, left, scalars, right, of, to, mask):
        left = scale_rows(scalars, left)
        tokens = self.sums.shape[-2]
        width = 1 << (tokens - 1).bit_length()
        blocks = self._runs(left, width) @ self._runs(right, width).transpose(-1, -2)  # a token with itself: e^0
        if left.shape[2] == right.shape[2] == 1:
            blocks = blocks.expand(*blocks.shape[:2], self.sums.shape[2], *blocks.shape[3:])
        for late, early, _, _ in self._levels(left, right, of, to):
            lower = late @ early.transpose(-1, -2)
            first, second = blocks[..., 0::2, :, :], blocks[..., 1::2, :, :]
            top = torch.cat((first, torch.zeros_like(first)), -1)
            blocks = torch.cat((top, torch.cat((lower, second), -1)), -2)
        return blocks.squeeze(-3)[..., : left.shape[-2], : right.shape[-2]].masked_fill(~mask, 0)

    def pull_gram(self, left, scalars, right, of, to, mask, gradient):
        plain, left = left, scale_rows(scalars, left)
        tokens = self.sums.shape[-2]
        rows, columns = left.shape[-2] // tokens, right.shape[-2] // tokens
        width = 1 << (tokens - 1).bit_length()
        gradient = gradient.masked_fill(~mask, 0)
        gradient = torch.nn.functional.pad(gradient, (0, (width - tokens) * columns, 0, (width - tokens) * rows))
        d_late = gradient.new_zeros(*gradient.shape[:3], width, rows, left.shape[-1])
        d_early = gradient.new_zeros(*gradient.shape[:3], width, columns, right.shape[-1])
        blocks = gradient.unsqueeze(-3)
        run = width
        for late, early, late_factor, early_factor in reversed(list(self._levels(left, right, of, to))):
            run //= 2
            lower = blocks[..., run * rows :, : run * columns]
            d_late.unflatten(-3, (-1, 2, run))[..., 1, :, :, :] += (lower @ early * late_factor).unflatten(-2, (run, rows))
            d_early.unflatten(-3, (-1, 2, run))[..., 0, :, :, :] += (
                lower.transpose(-1, -2) @ late * early_factor
            ).unflatten(-2, (run, columns))
            first = blocks[..., : run * rows, : run * columns]
            second = blocks[..., run * rows :, run * columns :]
            blocks = torch.stack((first, second), -3).flatten(-4, -3)
        d_left = d_late[..., :tokens, :, :].flatten(-3, -2)
        d_right = d_early[..., :tokens, :, :].flatten(-3, -2)
        self._gather(of, d_left * left)
        self._gather(to, -d_right * right)
        # A token with itself: no decay between, hence no adjoint of it.
        own = blocks[..., :tokens, :, :]
        left_runs, right_runs = left.unflatten(-2, (tokens, rows)), right.unflatten(-2, (tokens, columns))
        d_left = d_left + (own @ right_runs).flatten(-3, -2)
        d_right = d_right + (own.transpose(-1, -2) @ left_runs).flatten(-3, -2)
        d_scalars = None
        if scalars is not None:
            d_scalars = sum_to_heads((d_left * plain).sum(-1), scalars)
            d_left = scale_rows(scalars, d_left)
        return sum_to_heads(d_left, plain), d_scalars, sum_to_heads(d_right, right)

    def from_start(self, rows, vectors, scalars):
        return Scaled(vectors * self._exponent(rows).to(self.dtype).exp(), scalars)

    def pull_from_start(self, rows, vectors, scalars, gradient):
        factor = self._exponent(rows).to(self.dtype).exp()
        moved = gradient * factor
        d_scalars = None if scalars is None else sum_to_heads((moved * vectors).sum(-1), scalars)
        d_vectors = scale_rows(scalars, moved)
        self._gather(rows, d_vectors * vectors)
        return sum_to_heads(d_vectors, vectors), d_scalars

    def _to_end(self, rows: Rows) -> Tensor:
        return (self.sums[..., -1:, :] - self._exponent(rows)).to(self.dtype).exp()

    def to_end(self, rows, vectors):
        return Scaled(vectors * self._to_end(rows))

    def pull_to_end(self, rows, vectors, gradient):
        d_vectors = gradient * self._to_end(rows)
        d_exponent = d_vectors * vectors
        self._gather(rows, -d_exponent)
        self.pulled[..., -1, :] += d_exponent.sum(-2)
        return sum_to_heads(d_vectors, vectors)

    def total(self):
        return self.sums[..., -1, :].to(self.dtype).exp()

    def pull_total(self, diagonal):
        self.pulled[..., -1, :] += self.total() * diagonal

    def pull(self):
        return _pull_sums(self.pulled, -2)


def _pull_product(left: Tensor, right: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Adjoint of ``left rightᵀ``; the value heads of a shared key head are summed before the products."""
    if left.shape[2] == right.shape[2] == 1:
        gradient = gradient.sum(2, keepdim=True)
    return sum_to_heads(gradient @ right, left), sum_to_heads(gradient.transpose(-1, -2) @ left, right)


def _sums(log_decay: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Inclusive and exclusive sums over tokens, float64; the exclusive ones are shifted, not subtracted."""
    sums = log_decay.double().clamp(min=FLOOR).cumsum(axis)
    start = torch.zeros_like(sums.narrow(axis, 0, 1))
    return sums, torch.cat((start, sums.narrow(axis, 0, sums.shape[axis] - 1)), axis)


def _pull_sums(gradient: Tensor, axis: int) -> Tensor:
    """Adjoint of the inclusive sum: the sum from each token to the chunk's end."""
    return gradient.double().flip(axis).cumsum(axis).flip(axis).to(gradient.dtype)
