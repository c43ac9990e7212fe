"""A chunk's decays: every factor ``e^{c_p - c_q}`` with ``q`` before ``p``, none of them above 1, and their adjoints.

``c`` is the sum of log-decays from the chunk's start. A difference of such sums loses the small terms beside large ones
(a decay of -100 beside one of -1e-6), so the sums are kept in float64, where 64 tokens at the floor below leave an
error of 1e-11, and are rounded only after the subtraction. ``e^{-c}`` alone, which overflows, is never formed.

Notation: rows p, q belong to tokens; M chunks, HV value heads, C tokens a chunk, n rows. Vectors may have fewer heads
than HV where value heads share them: value head h reads head ``h // (HV // H)``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

FLOOR = -800.0  # e^-800 is 0 in float64 too: a reset (-inf) is clamped here so that differences stay finite


def accurate(device: torch.device) -> torch.dtype:
    """The widest dtype there is: float64, but float32 on Apple's GPUs, which have none."""
    return torch.float32 if device.type == "mps" else torch.float64


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


class Decay(ABC):
    """The decay inside chunks. Gradients with respect to the log-decay gather in ``pulled`` as adjoints of ``c``."""

    def __init__(self, heads: int) -> None:
        self.heads = heads  # HV

    @abstractmethod
    def gram(self, left: Tensor, scalars: Tensor | None, right: Tensor, of: Rows, to: Rows, mask: Tensor) -> Tensor:
        """``M[p, q] = mask · scalar_p Σ_k left_p[k] right_q[k] e^{r_p[k] - c_q[k]}``, ``[M, HV, n, m]``."""

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
        """``Λ = e^{c_C}``: None (no decay), ``[M, HV]``, or ``[M, HV, K]``."""

    @abstractmethod
    def pull_total(self, diagonal: Tensor) -> None:
        """Adjoint of ``total`` given ``diag(dS_out S_0ᵀ) [M, HV, K]``."""

    @abstractmethod
    def pull(self) -> Tensor | None:
        """The gradient of the log-decay, from all adjoints gathered so far."""


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


class SummedDecay(Decay):
    """A decay with its sums ``c``, inclusive and exclusive, over the tokens' axis."""

    axis: int

    def __init__(self, log_decay: Tensor) -> None:
        super().__init__(log_decay.shape[1])
        self.dtype = log_decay.dtype
        wide = log_decay.to(accurate(log_decay.device)).clamp(min=FLOOR)
        self.sums = wide.cumsum(self.axis)
        # The exclusive sums are shifted, not subtracted.
        shorter = self.sums.narrow(self.axis, 0, self.sums.shape[self.axis] - 1)
        self.before = torch.cat((torch.zeros_like(wide.narrow(self.axis, 0, 1)), shorter), self.axis)
        self.last = self.sums.select(self.axis, -1).unsqueeze(self.axis)
        self.pulled = torch.zeros_like(log_decay)

    def exponent(self, rows: Rows) -> Tensor:
        """``r_p`` of each row, in the accurate dtype."""
        return (self.before if rows.raw else self.sums).index_select(self.axis, rows.tokens)

    def rounded_exp(self, exponent: Tensor) -> Tensor:
        """``e^x`` in the compute dtype of an exponent ≤ 0 in the accurate one."""
        return exponent.to(self.dtype).exp()

    def gather(self, rows: Rows, gradient: Tensor) -> None:
        """Adds adjoints of the rows' exponents to those of ``c``; ``c⁻_t`` is ``c_{t-1}``, and ``c⁻_0`` is 0."""
        if not rows.raw:
            self.pulled.index_add_(self.axis, rows.tokens, gradient)
            return
        late = rows.tokens.nonzero().squeeze(1)
        self.pulled.index_add_(self.axis, rows.tokens[late] - 1, gradient.index_select(self.axis, late))

    def gather_last(self, gradient: Tensor) -> None:
        """Adds an adjoint of ``c_C``."""
        self.pulled.select(self.axis, -1).add_(gradient)

    def pull(self) -> Tensor:
        wide = self.pulled.to(accurate(self.pulled.device))
        return wide.flip(self.axis).cumsum(self.axis).flip(self.axis).to(self.dtype)


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


class VectorDecay(SummedDecay):
    """One log-decay a key channel, ``[M, HV, C, K]``.

    A Gram matrix is built by halving: for two neighbouring runs of tokens the pairs (late row, early row) share the
    boundary between them, ``e^{c_p - c_q} = e^{c_p - c_mid} e^{c_mid - c_q}`` with both factors at most 1, so each
    level is one product over all pairs of runs.
    """

    axis = -2

    @property
    def width(self) -> int:
        """Tokens a chunk, filled up to a power of two."""
        return 1 << (self.sums.shape[-2] - 1).bit_length()

    def _tokens(self, rows: Tensor) -> Tensor:
        """Rows ``[M, HV, C·R, D]`` as tokens ``[M, HV, width, R, D]``, filled with zeros."""
        tokens = self.sums.shape[-2]
        return pad(rows.unflatten(-2, (tokens, -1)), (0, 0, 0, 0, 0, self.width - tokens))

    def _levels(self, left: Tensor, right: Tensor, of: Rows, to: Rows) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """For runs of 1, 2, 4, … tokens: the late rows and the early rows, each already decayed to their boundary, and
        the two factors that did it; ``[M, HV, pairs, run·R, K]``."""
        rows = [self._tokens(each) for each in (left, right, self.exponent(of), self.exponent(to), self.sums)]
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
        left, right = scale_rows(scalars, to_heads(left, self.heads)), to_heads(right, self.heads)
        blocks = self._tokens(left) @ self._tokens(right).transpose(-1, -2)  # a token with itself: e^0
        for late, early, _, _ in self._levels(left, right, of, to):
            first, second = blocks[:, :, 0::2], blocks[:, :, 1::2]
            top = torch.cat((first, torch.zeros_like(first)), -1)
            blocks = torch.cat((top, torch.cat((late @ early.transpose(-1, -2), second), -1)), -2)
        return blocks.squeeze(2)[..., : left.shape[-2], : right.shape[-2]].masked_fill(~mask, 0)

    def pull_gram(
        self, left: Tensor, scalars: Tensor | None, right: Tensor, of: Rows, to: Rows, mask: Tensor, gradient: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        left_heads, right_heads = left.shape[1], right.shape[1]
        plain = to_heads(left, self.heads)
        left, right = scale_rows(scalars, plain), to_heads(right, self.heads)
        tokens, width = self.sums.shape[-2], self.width
        rows, columns = left.shape[-2] // tokens, right.shape[-2] // tokens
        missing = width - tokens
        blocks = pad(gradient.masked_fill(~mask, 0), (0, missing * columns, 0, missing * rows)).unsqueeze(2)
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
        self.gather(of, d_left * left)
        self.gather(to, -d_right * right)
        # A token with itself: no decay between, hence no adjoint of it.
        own = blocks[:, :, :tokens]
        d_left = d_left + (own @ right.unflatten(2, (tokens, columns))).flatten(2, 3)
        d_right = d_right + (own.transpose(-1, -2) @ left.unflatten(2, (tokens, rows))).flatten(2, 3)
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
