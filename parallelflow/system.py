"""The linear system of every chunk of a window: built from the tokens, and gradients pulled back to the tokens.

A chunk has *readers*, rows that see its entry state: the rows that read and, after them, the queries; and *writers*,
rows whose values go into its exit state: the rows that read and, after them, those that only write. In the notation of
docs/theory.md, section 3, with u the values of the rows that only write:

    seen  = [Ā; Q ⊙ e^c] S_0                       the readers
    X     = T (U + seen_reads + G_lone u),         T = (I - G)⁻¹
    O     = seen_queries + Cq [X; u]
    S_1   = Λ S_0 + B̂ᵀ [X; u]                      the writers

``gram`` is ``[[G, G_lone], [Cq]]``, how the readers see the writers. Turned around in time, with the two exchanged and
the matrices transposed, the same equations carry the adjoints (docs/theory.md, section 6).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from parallelflow.decays import (
    Decay,
    Family,
    NoDecay,
    Rows,
    ScalarDecay,
    Scaled,
    VectorDecay,
    accurate,
    dots,
    product_onto,
    scale_rows,
    sum_to_heads,
    to_heads,
)
from parallelflow.problem import Inputs, Sizes, Traits
from parallelflow.solvers import Factorisation
from parallelflow.windows import Window


@dataclass(frozen=True)
class System:
    """The equations above for M chunks; n rows read, C are queries, m only write.

    ``readers [M, HV, n + C, K]``, ``writers [M, HV, n + m, K]``, ``gram [M, HV, n + C, n + m]``; ``factors`` solves
    with I - G (None: n = 0); ``source`` U ``[M, HV, n, V]`` (None is 0); ``given`` u ``[M, HV, m, V]`` (None: m = 0);
    ``total`` Λ is None (1), ``[M, HV]`` or ``[M, HV, K]``.
    """

    readers: Scaled
    writers: Scaled
    gram: Tensor
    factors: Factorisation | None
    source: Scaled | None
    given: Tensor | None
    total: Tensor | None

    @property
    def solved(self) -> int:
        """n: rows whose values are solved for."""
        return self.gram.shape[-1] - (0 if self.given is None else self.given.shape[-2])

    def answer(self, seen: Tensor | None, index: slice | Tensor) -> tuple[Tensor, Tensor | None]:
        """What the chunks at ``index`` write, ``[X; u]``, and O (None without queries), from what their readers see
        (None is 0; given up). Where there is neither source nor given, something must be seen."""
        n, gram = self.solved, self.gram[index]
        given = None if self.given is None else self.given[index]
        written = given
        if self.factors is not None:
            right = None if seen is None else seen[:, :, :n]
            if given is not None:
                right = product_onto(right, gram[:, :, :n, n:], given)
            if self.source is not None:
                right = self.source.at(index).onto(right)
            assert right is not None
            solution = self.factors[index].apply(right)
            written = solution if given is None else torch.cat((solution, given), -2)
        assert written is not None
        if gram.shape[-2] == n:
            return written, None
        return written, product_onto(None if seen is None else seen[:, :, n:], gram[:, :, n:], written)

    def without_queries(self) -> System:
        """The same states with nothing said."""
        return replace(self, readers=self.readers.first(self.solved), gram=self.gram[:, :, : self.solved])

    def transposed(self, d_output: Tensor) -> System:
        """The equations of the adjoints, dO given ``[M, HV, C, V]``: they write ``[dU; dO]`` and say du."""
        return System(
            readers=self.writers,
            writers=self.readers,
            gram=self.gram.transpose(-1, -2),
            factors=None if self.factors is None else self.factors.transposed(),
            source=None,
            given=d_output,
            total=self.total,
        )

    def take(self, index: Tensor) -> System:
        """The same chunks in another order."""

        def taken(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[index]

        return System(
            readers=self.readers.at(index),
            writers=self.writers.at(index),
            gram=self.gram[index],
            factors=None if self.factors is None else self.factors[index],
            source=None if self.source is None else self.source.at(index),
            given=taken(self.given),
            total=taken(self.total),
        )


class Gradients(NamedTuple):
    """What the tokens' gradients are pulled from: those of the dense readers and writers, of ``gram``, of ``source``
    and ``given``, and ``diag(dS_out S_0ᵀ) [M, HV, K]``."""

    readers: Tensor
    writers: Tensor
    gram: Tensor
    source: Tensor | None
    given: Tensor | None
    total: Tensor | None


class Factored:
    """A factor as rows: ``vectors [M, heads, n, D]``, and ``sign · coefficient`` as ``scalars [M, HV, n]`` or as
    ``channels [M, HV, n, D]``."""

    def __init__(
        self, window: Window, vector: Tensor, coefficient: Tensor | None, sign: int, heads: int, dtype: torch.dtype
    ) -> None:
        self.sign, self.heads = sign, heads
        self.coefficient = coefficient
        self.vectors = window.cut(vector).to(dtype)
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
    def scaled(self) -> Scaled:
        """``[M, HV, n, D]``, the scalars kept apart."""
        return Scaled(to_heads(self.rows, self.heads), self.scalars)

    def pull_rows(self, d_rows: Tensor, d_scalars: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Gradients of vector and coefficient, as rows, from those of ``rows`` and ``scalars``."""
        d_coefficient = d_scalars
        if self.channels is not None:
            d_coefficient = d_rows * to_heads(self.vectors, self.heads)
            d_rows = sum_to_heads(d_rows * self.channels, self.vectors.shape[1])
        if self.coefficient is None or d_coefficient is None:
            return d_rows, None
        heads = self.coefficient.shape[3]
        return d_rows, sum_to_heads(d_coefficient if self.sign == 1 else -d_coefficient, heads)

    def pull_values(self, gradient: Tensor) -> tuple[Tensor, Tensor | None]:
        """Gradients of vector and coefficient, as rows, from that of all multiplied in."""
        if self.channels is not None:
            return self.pull_rows(gradient, None)
        d_scalars = None if self.coefficient is None else dots(gradient, self.vectors)
        return self.pull_rows(sum_to_heads(scale_rows(self.scalars, gradient), self.vectors.shape[1]), d_scalars)


class Chunks:
    """A window's tokens arranged as the rows of its chunks, with their decay."""

    def __init__(self, inputs: Inputs, traits: Traits, sizes: Sizes, window: Window, scale: float) -> None:
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

        size, reads, lone = window.chunk_size, len(traits.positions), len(traits.lone_positions)
        reading = () if self.read is None else (Family(reads, traits.raw),)
        writing = () if self.read is None else (Family(reads),)
        self.of = Rows(size, (*reading, Family(1)), device)
        self.to = Rows(size, (*writing, *(() if self.lone_write is None else (Family(lone),))), device)
        self.solved = size * reads if self.read is not None else 0
        self.readers = _stack([None if self.read is None else self.read.rows, query.vectors])
        self.tied = self.read is not None and self.write is self.read and self.read.channels is None and not lone
        if self.tied:
            self.writers = self.readers[:, :, : self.solved]
        else:
            self.writers = _stack([None if each is None else each.vectors for each in (self.write, self.lone_write)])
        self.scalars = self._scalars(scale)

        # Who precedes whom: by token, or by place in the order of all rows; a query comes after all rows of its token.
        early, late = self.to.tokens, self.of.tokens
        if traits.sequential:
            places = _places([*traits.positions, *traits.lone_positions], device)
            early = early * traits.rank + torch.cat([part.repeat(size) for part in places.split([reads, lone])])
            late = torch.cat((early[: self.solved], late[self.solved :] * traits.rank + traits.rank))
        else:
            late = torch.cat((late[: self.solved], late[self.solved :] + 1))
        self.precedes = late[:, None] > early

    def _scalars(self, scale: float) -> Tensor | None:
        """Of the readers: the reads' own, and ``scale`` of the queries."""
        own, size = None if self.read is None else self.read.scalars, self.window.chunk_size
        if own is None and scale == 1:
            return None
        if own is None:
            own = self.readers.new_ones(self.readers.shape[0], self.sizes.value_heads, self.solved)
        return torch.nn.functional.pad(own, (0, size), value=scale)

    def _decay(self) -> Decay:
        log_decay, dtype = self.inputs.log_decay, self.sizes.compute_dtype
        if log_decay is None:
            return NoDecay(self.sizes.value_heads)
        if log_decay.ndim == 3:
            return ScalarDecay(self.window.cut(log_decay[:, :, None, :, None]).squeeze(-1).to(dtype))
        return VectorDecay(self.window.cut(log_decay.unsqueeze(2)).to(dtype))

    def gram(self) -> Tensor:
        """How the readers see the writers, ``[M, HV, n + C, n + m]``."""
        return self.decay.gram(self.readers, self.scalars, self.writers, self.of, self.to, self.precedes)

    def accurate_gram(self) -> Tensor:
        """G ``[M, HV, n, n]`` in the widest dtype, for chunks whose solutions would magnify its rounding."""
        assert self.read is not None
        n, wide = self.solved, accurate(self.readers.device)
        read, write = self.readers[:, :, :n].to(wide), self.writers[:, :, :n].to(wide)
        scalars = None if self.scalars is None else self.scalars[:, :, :n].to(wide)
        of, to = self.of.of(self.of.families[0]), self.to.of(self.to.families[0])
        return self.decay.gram(read, scalars, write, of, to, self.precedes[:n, :n])

    def system(self, gram: Tensor, factors: Factorisation | None) -> System:
        """The chunks' equations, from ``gram`` and what solves with it."""
        readers, writers = self.decay.from_start(self.of, self.readers, self.scalars), self.writers
        if self.tied and self.decay.rowwise:
            writers = readers.vectors[:, :, : self.solved]  # spread over the value heads already
        return System(
            readers=readers,
            writers=self.decay.to_end(self.to, writers),
            gram=gram,
            factors=factors,
            source=None if self.value is None else self.value.scaled,
            given=None if self.lone_value is None else self.lone_value.scaled.dense(),
            total=self.decay.total(),
        )

    def pull(self, of: Gradients) -> Inputs:
        """Gradients of the window's tokens, as rows of its chunks: ``[M, heads, C·R(, D)]``."""
        decay, n = self.decay, self.solved
        order = (self.of, self.to, self.precedes)
        d_readers, d_scalars = decay.pull_from_start(self.of, self.readers, self.scalars, of.readers)
        d_writers = decay.pull_to_end(self.to, self.writers, of.writers)
        left, scalars, right = decay.pull_gram(self.readers, self.scalars, self.writers, *order, of.gram)
        d_readers, d_writers = d_readers.add_(left), d_writers.add_(right)
        if d_scalars is not None and scalars is not None:
            d_scalars = (d_scalars + scalars)[:, :, :n]
        if of.total is not None:
            decay.pull_total(of.total)

        d_query = sum_to_heads(d_readers[:, :, n:], self.query.vectors.shape[1])
        gradients = Inputs(query=d_query, log_decay=decay.pull())
        if self.read is not None and self.write is not None:
            d_read = sum_to_heads(d_readers[:, :, :n], self.read.rows.shape[1])
            d_write = sum_to_heads(d_writers[:, :, :n], self.write.vectors.shape[1])
            read, coefficient = self.read.pull_rows(d_read, d_scalars)
            gradients = gradients._replace(read=read, read_coefficient=coefficient, write=d_write)
        if self.value is not None and of.source is not None:
            value, coefficient = self.value.pull_values(of.source)
            gradients = gradients._replace(value=value, value_coefficient=coefficient)
        if self.lone_write is not None and self.lone_value is not None and of.given is not None:
            d_lone = sum_to_heads(d_writers[:, :, n:], self.lone_write.vectors.shape[1])
            value, coefficient = self.lone_value.pull_values(of.given)
            gradients = gradients._replace(lone_write=d_lone, lone_value=value, lone_coefficient=coefficient)
        return gradients


def _stack(parts: list[Tensor | None]) -> Tensor:
    """Families one after another along the rows, with the heads of the one that has most."""
    present = [part for part in parts if part is not None]
    heads = max(part.shape[1] for part in present)
    wide = [to_heads(part, heads) for part in present]
    if torch.is_grad_enabled():
        return torch.cat(wide, -2)
    sizes = [part.shape[2] for part in wide]  # rows of strided views: copied by all threads, which cat does not do
    stacked = wide[0].new_empty(*wide[0].shape[:2], sum(sizes), wide[0].shape[3])
    for rows, part in zip(stacked.split(sizes, 2), wide, strict=True):
        rows.copy_(part)
    return stacked


def _places(numbers: list[int], device: torch.device) -> Tensor:
    """A short list of integers; the usual one, 0 to its end, without a copy from the host, which waits for a GPU."""
    if numbers == list(range(len(numbers))):
        return torch.arange(len(numbers), device=device)
    return torch.tensor(numbers, device=device)
