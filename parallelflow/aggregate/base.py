"""The recursion across chunks that every aggregate runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from parallelflow.decays import Scaled
from parallelflow.flow import Flow
from parallelflow.lanes import Lanes


class Trajectory(NamedTuple):
    """``entries [M, HV, K, V]``: the state at each chunk's entry; ``solutions [M, HV, n, V]``: each chunk's X (None
    where no row reads); ``final [lanes, HV, K, V]``: the state after each lane's last chunk, lanes in their order."""

    entries: Tensor
    solutions: Tensor | None
    final: Tensor


class Coupling(NamedTuple):
    """How the rows of a chunk answer the state: ``leftᵀ T (source + right S)``.

    ``solve(Z, index)`` is T Z for the chunks at ``index``; ``source [M, HV, n, V]`` None is 0.
    """

    left: Scaled
    right: Scaled
    solve: Callable[[Tensor, slice | Tensor], Tensor]
    source: Tensor | None


@dataclass(frozen=True)
class Recursion:
    """One affine map a chunk: ``S ← Λ S + leftᵀ X + extra`` with ``X = T (source + right S)``.

    Forward in time, ``right`` are the rows that read, ``left`` those that write and T is ``(I - G)⁻¹``. The adjoint is
    the same recursion backwards with the two exchanged and T transposed: one implementation serves both.
    ``total`` (Λ) is None, ``[M, HV]`` or ``[M, HV, K]``; ``coupling`` is None where no row reads; ``extra`` is
    ``[M, HV, K, V]`` or None.
    """

    total: Tensor | None
    coupling: Coupling | None
    extra: Tensor | None

    def step(self, state: Tensor, index: slice) -> tuple[Tensor, Tensor | None]:
        """The state after the chunks at ``index``, and their X."""
        base, solution = self.extra, None
        if self.total is not None:
            base = state * self._decay(index) if base is None else torch.addcmul(base[index], state, self._decay(index))
        else:
            base = state if base is None else base[index] + state
        if self.coupling is not None:
            left, right, solve, source = self.coupling
            solution = solve(right.at(index).apply(state, None if source is None else source[index]), index)
            base = left.at(index).apply_transposed(solution, base)
        return base, solution

    def solutions(self, entries: Tensor) -> Tensor | None:
        """X of all chunks at once, their entry states known."""
        if self.coupling is None:
            return None
        _, right, solve, source = self.coupling
        return solve(right.apply(entries, source), slice(None))

    def flows(self, like: Tensor) -> Flow:
        """Each chunk's flow: ``P = Λ + leftᵀ W`` and ``H = leftᵀ Y + extra`` with ``W = T right``, ``Y = T source``;
        states are as ``like [lanes, HV, K, V]``."""
        if self.coupling is None:
            assert self.extra is not None
            total = self.extra.new_ones(self.extra.shape[:2]) if self.total is None else self.total
            return Flow(total, self.extra)
        left, right, solve, source = self.coupling
        dense = right.dense()
        identity = torch.eye(dense.shape[-1], dtype=dense.dtype, device=dense.device)
        if self.total is not None:
            identity = identity * self._decay(slice(None))
        everything = slice(None)
        transition = left.apply_transposed(solve(dense, everything), identity)
        if source is None:
            shape = (transition.shape[0], *like.shape[1:])
            return Flow(transition, like.new_zeros(shape) if self.extra is None else self.extra)
        return Flow(transition, left.apply_transposed(solve(source, everything), self.extra))

    def take(self, index: Tensor) -> Recursion:
        """The same maps with the chunks in another order."""
        coupling = self.coupling
        if coupling is not None:
            left, right, solve, source = coupling
            coupling = Coupling(
                left.at(index),
                right.at(index),
                lambda rows, chosen: solve(rows, index[chosen]),
                None if source is None else source[index],
            )
        return Recursion(
            None if self.total is None else self.total[index],
            coupling,
            None if self.extra is None else self.extra[index],
        )

    def _decay(self, index: slice) -> Tensor:
        """Λ as it multiplies states, ``[M, HV, 1 or K, 1]``."""
        assert self.total is not None
        total = self.total[index]
        return total[..., None, None] if total.ndim == 2 else total.unsqueeze(-1)


Aggregate = Callable[[Recursion, Lanes, Tensor, bool], Trajectory]
