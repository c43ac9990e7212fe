"""The triangular systems of a window's chunks: built from the tokens, and gradients pulled back to the tokens.

In the notation of THEORY, section 3: G (``gram``), Cq (``scores``), Ā (``reads``), B̂ (``writes``), Q ⊙ e^c (``queries``),
Λ (``total``), U (``source``). Rows that only write need no place in the triangular solve: theirs are ``lone_*``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from parallelflow.decay import Decay, NoDecay, Rows, ScalarDecay, Scaled, VectorDecay, scale_rows, sum_to_heads
from parallelflow.problem import Inputs, Sizes, Traits


class System(NamedTuple):
    """What a window's chunks need to be solved, ``M`` chunks, ``n = C·R`` reading rows, ``m`` lone rows.

    ``gram [M,H,G,n,n]``, ``gram_lone [M,H,G,n,m]``, ``scores [M,H,G,C,n]``, ``scores_lone [M,H,G,C,m]``,
    ``source [M,H,G,n,V]``, ``lone [M,H,G,m,V]``, ``total [M,H,G]`` or ``[M,H,G,K]``. G is 1 where value heads share.
    """

    queries: Scaled
    reads: Scaled | None
    writes: Scaled | None
    lone_writes: Scaled | None
    gram: Tensor | None
    gram_lone: Tensor | None
    scores: Tensor | None
    scores_lone: Tensor | None
    source: Tensor | None
    lone: Tensor | None
    total: Tensor | None


class Cotangents(NamedTuple):
    """Gradients of a system's parts, those of ``Scaled`` parts in their dense form ``[M, H, G, n, K]``;
    ``total`` is ``diag(dS_out S_0ᵀ) [M, H, G, K]``."""

    queries: Tensor
    reads: Tensor | None
    writes: Tensor | None
    lone_writes: Tensor | None
    gram: Tensor | None
    gram_lone: Tensor | None
    scores: Tensor | None
    scores_lone: Tensor | None
    source: Tensor | None
    lone: Tensor | None
    total: Tensor


class Chunks:
    """A window's tokens ``[M, C, …]`` (an ``Inputs`` in the compute dtype) arranged as rows, with their decay."""

    def __init__(self, tokens: Inputs, traits: Traits, sizes: Sizes) -> None:
        self.tokens, self.traits = tokens, traits
        heads = sizes.heads
        device = tokens.query.device
        self.size = tokens.query.shape[1]
        self.query = _rows(tokens.query.unsqueeze(2), heads)
        self.decay = _decay(tokens.log_decay, heads, sizes.compute_dtype)

        self.of_query = Rows(torch.arange(self.size, device=device))
        self.of_reads, reads_place = _places(self.size, traits.positions, traits.rank, traits.raw, device)
        self.of_writes = self.of_reads._replace(raw=False)
        self.of_lone, lone_place = _places(self.size, traits.lone_positions, traits.rank, False, device)

        self.read, self.read_scalar, self.read_channel = _factor(
            tokens.read, tokens.read_coefficient, traits.read_sign, heads
        )
        self.write = self.read if tokens.write is tokens.read else _optional_rows(tokens.write, heads)
        self.tied = self.write is self.read
        self.value, self.value_scalar, self.value_channel = _factor(
            tokens.value, tokens.value_coefficient, traits.value_sign, heads
        )
        self.lone_write = _optional_rows(tokens.lone_write, heads)
        self.lone_value, self.lone_scalar, self.lone_channel = _factor(
            tokens.lone_value, tokens.lone_coefficient, traits.lone_sign, heads
        )

        # Who precedes whom: by token, or by place in the order of all rows.
        if traits.sequential:
            self.precedes = reads_place[:, None] > reads_place[None, :]
            self.lone_precedes = reads_place[:, None] > lone_place[None, :]
        else:
            self.precedes = self.of_reads.tokens[:, None] > self.of_reads.tokens[None, :]
            self.lone_precedes = self.of_reads.tokens[:, None] > self.of_lone.tokens[None, :]
        self.seen = self.of_query.tokens[:, None] >= self.of_reads.tokens[None, :]
        self.lone_seen = self.of_query.tokens[:, None] >= self.of_lone.tokens[None, :]

    @property
    def reading(self) -> Tensor | None:
        """The rows' read vectors, a coefficient a channel multiplied in."""
        return self.read if self.read_channel is None else self.read * self.read_channel

    def system(self) -> System:
        """The chunks' systems."""
        decay, query, read, write, lone = self.decay, self.query, self.reading, self.write, self.lone_write
        reads = writes = lone_writes = gram = gram_lone = scores = scores_lone = None
        if read is not None:
            assert write is not None
            reads = decay.from_start(self.of_reads, read, self.read_scalar)
            writes = decay.to_end(self.of_writes, write)
            gram = decay.gram(read, self.read_scalar, write, self.of_reads, self.of_writes, self.precedes)
            scores = decay.gram(query, None, write, self.of_query, self.of_writes, self.seen)
        if lone is not None:
            lone_writes = decay.to_end(self.of_lone, lone)
            scores_lone = decay.gram(query, None, lone, self.of_query, self.of_lone, self.lone_seen)
            if read is not None:
                gram_lone = decay.gram(
                    read, self.read_scalar, lone, self.of_reads, self.of_lone, self.lone_precedes
                )
        return System(
            queries=decay.from_start(self.of_query, query, None),
            reads=reads,
            writes=writes,
            lone_writes=lone_writes,
            gram=gram,
            gram_lone=gram_lone,
            scores=scores,
            scores_lone=scores_lone,
            source=_value(self.value, self.value_scalar, self.value_channel),
            lone=_value(self.lone_value, self.lone_scalar, self.lone_channel),
            total=decay.total(),
        )

    def pull(self, of: Cotangents) -> Inputs:
        """Gradients of the tokens ``[M, C, …]`` from those of the system: the chain rule through ``system``."""
        decay, query, read, write, lone = self.decay, self.query, self.reading, self.write, self.lone_write
        d_query, _ = decay.pull_from_start(self.of_query, query, None, of.queries)
        d_read = d_write = d_read_scalar = d_lone = None
        if read is not None:
            assert write is not None and of.reads is not None and of.writes is not None
            assert of.gram is not None and of.scores is not None
            d_read, d_read_scalar = decay.pull_from_start(self.of_reads, read, self.read_scalar, of.reads)
            d_write = decay.pull_to_end(self.of_writes, write, of.writes)
            left, scalar, right = decay.pull_gram(
                read, self.read_scalar, write, self.of_reads, self.of_writes, self.precedes, of.gram
            )
            d_read, d_write, d_read_scalar = d_read + left, d_write + right, _add(d_read_scalar, scalar)
            left, _, right = decay.pull_gram(query, None, write, self.of_query, self.of_writes, self.seen, of.scores)
            d_query, d_write = d_query + left, d_write + right
        if lone is not None:
            assert of.lone_writes is not None and of.scores_lone is not None
            d_lone = decay.pull_to_end(self.of_lone, lone, of.lone_writes)
            left, _, right = decay.pull_gram(
                query, None, lone, self.of_query, self.of_lone, self.lone_seen, of.scores_lone
            )
            d_query, d_lone = d_query + left, d_lone + right
            if read is not None:
                assert d_read is not None and of.gram_lone is not None
                left, scalar, right = decay.pull_gram(
                    read, self.read_scalar, lone, self.of_reads, self.of_lone, self.lone_precedes, of.gram_lone
                )
                d_read, d_lone, d_read_scalar = d_read + left, d_lone + right, _add(d_read_scalar, scalar)
        decay.pull_total(of.total)
        d_log_decay = decay.pull()

        traits, size = self.traits, self.size
        sign = traits.read_sign
        d_read_coefficient = None
        if self.read_channel is not None:
            assert d_read is not None and self.read is not None
            d_channel, d_read = sum_to_heads(d_read * self.read, self.read_channel), d_read * self.read_channel
            d_read_coefficient = sign * _tokens(d_channel, size)
            d_read = sum_to_heads(d_read, self.read)
        elif d_read_scalar is not None and self.tokens.read_coefficient is not None:
            d_read_coefficient = sign * _token_scalars(d_read_scalar, size)
        d_value, d_value_coefficient = self._pull_value(
            self.value, self.value_scalar, self.value_channel, traits.value_sign, of.source
        )
        d_lone_value, d_lone_coefficient = self._pull_value(
            self.lone_value, self.lone_scalar, self.lone_channel, traits.lone_sign, of.lone
        )
        return Inputs(
            query=_tokens(d_query, size).squeeze(2),
            read=None if d_read is None else _tokens(d_read, size),
            read_coefficient=d_read_coefficient,
            write=None if d_write is None else _tokens(d_write, size),
            value=d_value,
            value_coefficient=d_value_coefficient,
            lone_write=None if d_lone is None else _tokens(d_lone, size),
            lone_value=d_lone_value,
            lone_coefficient=d_lone_coefficient,
            log_decay=None if d_log_decay is None else _decay_tokens(d_log_decay),
        )


    def _pull_value(
        self, rows: Tensor | None, scalar: Tensor | None, channel: Tensor | None, sign: int, gradient: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Adjoint of ``_value``: gradients of the value's tokens and of its coefficient."""
        if rows is None or gradient is None:
            return None, None
        if channel is not None:
            d_channel = sum_to_heads(gradient * rows, channel)
            d_rows = sum_to_heads(gradient * channel, rows)
            return _tokens(d_rows, self.size), sign * _tokens(d_channel, self.size)
        d_rows = _tokens(sum_to_heads(scale_rows(scalar, gradient), rows), self.size)
        if scalar is None:
            return d_rows, None
        return d_rows, sign * _token_scalars(sum_to_heads((gradient * rows).sum(-1), scalar), self.size)


# Tokens [M, C, R, heads, D] as rows [M, H, 1 or G, C·R, D], and back.


def _rows(tokens: Tensor, heads: int) -> Tensor:
    rows = tokens.permute(0, 3, 1, 2, 4)
    rows = rows.reshape(*rows.shape[:2], -1, rows.shape[-1])
    return rows.unflatten(1, (heads, -1))


def _optional_rows(tokens: Tensor | None, heads: int) -> Tensor | None:
    return None if tokens is None else _rows(tokens, heads)


def _tokens(rows: Tensor, size: int) -> Tensor:
    return rows.flatten(1, 2).unflatten(2, (size, -1)).permute(0, 2, 3, 1, 4)


def _token_scalars(scalars: Tensor, size: int) -> Tensor:
    return _tokens(scalars.unsqueeze(-1), size).squeeze(-1)


def _decay_tokens(log_decay: Tensor) -> Tensor:
    """``[M, H, G, C(, K)] -> [M, C, HV(, K)]``."""
    return log_decay.flatten(1, 2).transpose(1, 2)


def _decay(log_decay: Tensor | None, heads: int, dtype: torch.dtype) -> Decay:
    if log_decay is None:
        return NoDecay()
    by_head = log_decay.transpose(1, 2).unflatten(1, (heads, -1))
    return ScalarDecay(by_head, dtype) if log_decay.ndim == 3 else VectorDecay(by_head, dtype)


def _places(size: int, positions: tuple[int, ...], rank: int, raw: bool, device: torch.device) -> tuple[Rows, Tensor]:
    """A family's rows, and the place of each in the order of all rows of the chunk."""
    tokens = torch.arange(size, device=device).repeat_interleave(len(positions))
    places = torch.tensor(positions, dtype=torch.long, device=device).repeat(size)
    return Rows(tokens, raw), tokens * rank + places


def _factor(
    vector: Tensor | None, coefficient: Tensor | None, sign: int, heads: int
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """A factor's vectors as rows, and ``sign · coefficient`` as one scalar a row or one a channel."""
    if vector is None:
        return None, None, None
    rows = _rows(vector, heads)
    if coefficient is None:
        if sign == 1:
            return rows, None, None
        return rows, rows.new_full((1, 1, 1, 1), -1.0).expand(rows.shape[0], 1, 1, rows.shape[3]), None
    signed = coefficient if sign == 1 else -coefficient
    if coefficient.ndim == vector.ndim:
        return rows, None, _rows(signed, heads)
    return rows, _rows(signed.unsqueeze(-1), heads).squeeze(-1), None


def _value(rows: Tensor | None, scalar: Tensor | None, channel: Tensor | None) -> Tensor | None:
    if rows is None:
        return None
    return rows * channel if channel is not None else scale_rows(scalar, rows)


def _add(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    if first is None or second is None:
        return second if first is None else first
    return first + second
