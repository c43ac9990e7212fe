"""The triangular systems of a window's chunks: built from the tokens, and gradients pulled back to the tokens.

In the notation of THEORY, section 3: G (``gram``), Cq (``scores``), Ā (``reads``), B̂ (``writes``), Q ⊙ e^c
(``queries``), Λ (``total``), U (``source``). Rows that only write need no place in the triangular solve: theirs is a
family of its own, ``Lone``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from parallelflow.decays import (
    Decay,
    NoDecay,
    Rows,
    ScalarDecay,
    Scaled,
    VectorDecay,
    accurate,
    scale_rows,
    sum_to_heads,
    to_heads,
)
from parallelflow.problem import Inputs, Sizes, Traits
from parallelflow.windows import Window


class Reading(NamedTuple):
    """The rows that read, n = C·R a chunk: ``gram [M, HV, n, n]`` in the accurate dtype, ``scores [M, HV, C, n]``,
    ``source [M, HV, n, V]`` (None is 0). ``reads`` and ``writes`` of a gradient are in their dense form."""

    reads: Scaled
    writes: Scaled
    gram: Tensor
    scores: Tensor
    source: Tensor | None


class Lone(NamedTuple):
    """The rows that only write, m = C·R a chunk: ``scores [M, HV, C, m]``, ``values [M, HV, m, V]``, and ``gram
    [M, HV, n, m]``, how the reading rows see them (None where there are none)."""

    writes: Scaled
    scores: Tensor
    values: Tensor
    gram: Tensor | None


class System(NamedTuple):
    """What a window's chunks need to be solved; the same type holds the gradients of all that.

    ``total`` is Λ, ``[M, HV]`` or ``[M, HV, K]``; of a gradient, ``diag(dS_out S_0ᵀ) [M, HV, K]``.
    """

    queries: Scaled
    reading: Reading | None
    lone: Lone | None
    total: Tensor | None


class Factored:
    """A factor as rows: ``vectors [M, heads, n, D]``, and ``sign · coefficient`` as ``scalars [M, HV, n]`` or as
    ``channels [M, HV, n, D]``."""

    def __init__(
        self, window: Window, vector: Tensor, coefficient: Tensor | None, sign: int, heads: int, dtype: torch.dtype
    ) -> None:
        self.sign, self.heads = sign, heads
        self.coefficient = coefficient
        self.vectors = window.cut(vector).to(dtype).contiguous()
        self.scalars: Tensor | None = None
        self.channels: Tensor | None = None
        if coefficient is None:
            if sign != 1:
                self.scalars = self.vectors.new_full((1, 1, 1), sign).expand(self.vectors.shape[0], heads, -1)
                self.scalars = self.scalars.expand(-1, -1, self.vectors.shape[2])
            return
        channelwise = coefficient.ndim == vector.ndim
        rows = window.cut(coefficient if channelwise else coefficient.unsqueeze(-1)).to(dtype)
        rows = to_heads(rows if sign == 1 else -rows, heads)
        if channelwise:
            self.channels = rows
        else:
            self.scalars = rows.squeeze(-1)

    @property
    def rows(self) -> Tensor:
        """The vectors with a coefficient a channel multiplied in."""
        return self.vectors if self.channels is None else to_heads(self.vectors, self.heads) * self.channels

    @property
    def values(self) -> Tensor:
        """``[M, HV, n, D]`` with everything multiplied in."""
        return scale_rows(self.scalars, to_heads(self.rows, self.heads))

    def pull_rows(self, window: Window, d_rows: Tensor, d_scalars: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Gradients of vector and coefficient as tokens, from those of ``rows`` and ``scalars``."""
        d_coefficient = None
        if self.channels is not None:
            d_coefficient = d_rows * to_heads(self.vectors, self.heads)
            d_rows = sum_to_heads(d_rows * self.channels, self.vectors.shape[1])
        elif d_scalars is not None:
            d_coefficient = d_scalars.unsqueeze(-1)
        if self.coefficient is None or d_coefficient is None:
            return window.join(d_rows), None
        joined = window.join(self.sign * sum_to_heads(d_coefficient, self.coefficient.shape[3]))
        return window.join(d_rows), joined if self.channels is not None else joined.squeeze(-1)

    def pull_values(self, window: Window, gradient: Tensor) -> tuple[Tensor, Tensor | None]:
        """Gradients of vector and coefficient as tokens, from that of ``values``."""
        if self.channels is not None:
            return self.pull_rows(window, gradient, None)
        d_scalars = None
        if self.coefficient is not None:
            d_scalars = (gradient * to_heads(self.vectors, self.heads)).sum(-1)
        d_rows = sum_to_heads(scale_rows(self.scalars, gradient), self.vectors.shape[1])
        return self.pull_rows(window, d_rows, d_scalars)


class Chunks:
    """A window's tokens arranged as the rows of its chunks, with their decay."""

    def __init__(self, inputs: Inputs, traits: Traits, sizes: Sizes, window: Window) -> None:
        self.window, self.inputs, self.traits, self.sizes = window, inputs, traits, sizes
        dtype, device = sizes.compute_dtype, inputs.query.device

        def factored(vector: Tensor | None, coefficient: Tensor | None, sign: int) -> Factored | None:
            if vector is None:
                return None
            return Factored(window, vector, coefficient, sign, sizes.value_heads, dtype)

        query = factored(inputs.query.unsqueeze(2), None, 1)
        assert query is not None
        self.query = query
        self.decay = self._decay()
        self.read = factored(inputs.read, inputs.read_coefficient, traits.read_sign)
        self.write = self.read if inputs.write is inputs.read else factored(inputs.write, None, 1)
        self.value = factored(inputs.value, inputs.value_coefficient, traits.value_sign)
        self.lone_write = factored(inputs.lone_write, None, 1)
        self.lone_value = factored(inputs.lone_value, inputs.lone_coefficient, traits.lone_sign)

        size = window.chunk_size
        tokens = torch.arange(size, device=device)
        self.of_query = Rows(tokens)
        self.of_reads = Rows(tokens.repeat_interleave(len(traits.positions)), traits.raw)
        self.of_writes = self.of_reads._replace(raw=False)
        self.of_lone = Rows(tokens.repeat_interleave(len(traits.lone_positions)))
        # Who precedes whom: by token, or by place in the order of all rows.
        rows, lone = self.of_reads.tokens, self.of_lone.tokens
        self.seen, self.lone_seen = tokens[:, None] >= rows, tokens[:, None] >= lone
        if traits.sequential:
            rows = rows * traits.rank + torch.tensor(traits.positions, dtype=torch.long, device=device).repeat(size)
            places = torch.tensor(traits.lone_positions, dtype=torch.long, device=device)
            lone = lone * traits.rank + places.repeat(size)
        self.precedes, self.lone_precedes = rows[:, None] > rows, rows[:, None] > lone

    def _decay(self) -> Decay:
        log_decay, dtype = self.inputs.log_decay, self.sizes.compute_dtype
        if log_decay is None:
            return NoDecay(self.sizes.value_heads)
        if log_decay.ndim == 3:
            return ScalarDecay(self.window.cut(log_decay[:, :, None, :, None]).squeeze(-1).to(dtype))
        return VectorDecay(self.window.cut(log_decay.unsqueeze(2)).to(dtype))

    def system(self) -> System:
        """The chunks' systems."""
        decay, query = self.decay, self.query.vectors
        reading = lone = None
        if self.read is not None:
            assert self.write is not None
            read, write, scalars = self.read.rows, self.write.vectors, self.read.scalars
            reading = Reading(
                reads=decay.from_start(self.of_reads, read, scalars),
                writes=decay.to_end(self.of_writes, write),
                gram=self._gram(read, scalars, write),
                scores=decay.gram(query, None, write, self.of_query, self.of_writes, self.seen),
                source=None if self.value is None else self.value.values,
            )
        if self.lone_write is not None:
            assert self.lone_value is not None
            write, gram = self.lone_write.vectors, None
            if self.read is not None:
                order = (self.of_reads, self.of_lone, self.lone_precedes)
                gram = decay.gram(self.read.rows, self.read.scalars, write, *order)
            lone = Lone(
                writes=decay.to_end(self.of_lone, write),
                scores=decay.gram(query, None, write, self.of_query, self.of_lone, self.lone_seen),
                values=self.lone_value.values,
                gram=gram,
            )
        return System(decay.from_start(self.of_query, query, None), reading, lone, decay.total())

    def _gram(self, read: Tensor, scalars: Tensor | None, write: Tensor) -> Tensor:
        """G in the accurate dtype: with β near 2 and correlated keys the entries of ``(I - G)⁻¹`` alternate and do not
        decay, so that an error of G in float32 would be n times that of the recurrence."""
        wide = accurate(read.device)
        wide_scalars = None if scalars is None else scalars.to(wide)
        order = (self.of_reads, self.of_writes, self.precedes)
        return self.decay.gram(read.to(wide), wide_scalars, write.to(wide), *order)

    def pull(self, of: System) -> Inputs:
        """Gradients of the window's tokens, ``[B, stop - start, …]``, from those of the system."""
        decay, window, query = self.decay, self.window, self.query.vectors
        d_query, _ = decay.pull_from_start(self.of_query, query, None, of.queries.vectors)
        d_read = d_read_scalars = d_write = d_lone = None
        if of.reading is not None:
            assert self.read is not None
            assert self.write is not None
            read, write, scalars = self.read.rows, self.write.vectors, self.read.scalars
            d_read, d_read_scalars = decay.pull_from_start(self.of_reads, read, scalars, of.reading.reads.vectors)
            d_write = decay.pull_to_end(self.of_writes, write, of.reading.writes.vectors)
            order = (self.of_reads, self.of_writes, self.precedes)
            left, scalar, right = decay.pull_gram(read, scalars, write, *order, of.reading.gram)
            d_read, d_read_scalars, d_write = d_read + left, _add(d_read_scalars, scalar), d_write + right
            order = (self.of_query, self.of_writes, self.seen)
            left, _, right = decay.pull_gram(query, None, write, *order, of.reading.scores)
            d_query, d_write = d_query + left, d_write + right
        if of.lone is not None:
            assert self.lone_write is not None
            write = self.lone_write.vectors
            d_lone = decay.pull_to_end(self.of_lone, write, of.lone.writes.vectors)
            order = (self.of_query, self.of_lone, self.lone_seen)
            left, _, right = decay.pull_gram(query, None, write, *order, of.lone.scores)
            d_query, d_lone = d_query + left, d_lone + right
            if of.lone.gram is not None:
                assert self.read is not None
                order = (self.of_reads, self.of_lone, self.lone_precedes)
                left, scalar, right = decay.pull_gram(
                    self.read.rows, self.read.scalars, write, *order, of.lone.gram
                )  # fmt: skip
                d_read, d_read_scalars, d_lone = _add(d_read, left), _add(d_read_scalars, scalar), d_lone + right
        if of.total is not None:
            decay.pull_total(of.total)

        gradients = Inputs(query=window.join(d_query).squeeze(2))
        if self.read is not None and d_read is not None and d_write is not None:
            read_tokens, coefficient = self.read.pull_rows(window, d_read, d_read_scalars)
            gradients = gradients._replace(read=read_tokens, read_coefficient=coefficient, write=window.join(d_write))
        if self.value is not None and of.reading is not None and of.reading.source is not None:
            value, coefficient = self.value.pull_values(window, of.reading.source)
            gradients = gradients._replace(value=value, value_coefficient=coefficient)
        if self.lone_value is not None and of.lone is not None and d_lone is not None:
            value, coefficient = self.lone_value.pull_values(window, of.lone.values)
            gradients = gradients._replace(
                lone_write=window.join(d_lone), lone_value=value, lone_coefficient=coefficient
            )  # fmt: skip
        d_log_decay = decay.pull()
        if d_log_decay is None:
            return gradients
        if d_log_decay.ndim == 3:
            return gradients._replace(log_decay=window.join(d_log_decay.unsqueeze(-1)).squeeze(-1).squeeze(2))
        return gradients._replace(log_decay=window.join(d_log_decay).squeeze(2))


def _add(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    if first is None or second is None:
        return second if first is None else first
    return first + second
