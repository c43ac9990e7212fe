"""The recursion across chunks that every aggregate runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from parallelflow.decay import Scaled
from parallelflow.flow import Flow
from parallelflow.lanes import Lanes


class Trajectory(NamedTuple):
    """``entries [M, H, G, K, V]``: the state at each chunk's entry; ``solutions [M, H, G, n, V]``: each chunk's X (None
    where no row reads); ``final [lanes, H, G, K, V]``: the state after each lane's last chunk."""

    entries: Tensor
    solutions: Tensor | None
    final: Tensor


@dataclass(frozen=True)
class Recursion:
    """One affine map a chunk, ``S ← Λ S + leftᵀ X + extra`` with ``X = T (source + right S)``.

    Forward in time, ``right`` are the rows that read, ``left`` those that write and T is ``(I - G)⁻¹``. The adjoint is the
    same recursion backwards with the two exchanged and T transposed: one implementation serves both.
    ``left``, ``right``, ``solve`` and ``source`` are None where no row reads; ``extra`` is ``[M, H, G, K, V]`` or None.
    """

    total: Tensor | None
    left: Scaled | None
    right: Scaled | None
    solve: Callable[[Tensor, slice | Tensor], Tensor] | None
    source: Tensor | None
    extra: Tensor | None
    chunks: int

    def step(self, state: Tensor, index: slice | Tensor) -> tuple[Tensor, Tensor | None]:
        """The state after the chunks at ``index``, and their X."""
        new = self._decay(state, index)
        solution = None
        if self.right is not None:
            assert self.left is not None and self.solve is not None
            read = self.right[index].apply(state)
            solution = self.solve(read if self.source is None else self.source[index] + read, index)
            written = self.left[index].apply_transposed(solution)
            new = written if new is None else new + written
        if self.extra is not None:
            new = self.extra[index] if new is None else new + self.extra[index]
        assert new is not None
        return new, solution

    def solutions(self, entries: Tensor) -> Tensor | None:
        """X of all chunks at once, their entry states known."""
        if self.right is None:
            return None
        assert self.solve is not None
        read = self.right.apply(entries)
        return self.solve(read if self.source is None else self.source + read, slice(None))

    def flows(self, like: Tensor) -> Flow:
        """Each chunk's flow: ``P = Λ + leftᵀ W`` and ``H = leftᵀ Y + extra`` with ``W = T right``, ``Y = T source``;
        states are as ``like [lanes, H, G, K, V]``."""
        if self.right is None:
            assert self.extra is not None
            total = self.extra.new_ones(self.extra.shape[:3]) if self.total is None else self.total
            return Flow(total, self.extra)
        assert self.left is not None and self.solve is not None
        dense = self.right.dense()
        transition = self.left.apply_transposed(self.solve(dense, slice(None)))
        width = transition.shape[-1]
        eye = torch.eye(width, dtype=transition.dtype, device=transition.device)
        if self.total is None:
            transition = transition + eye
        else:
            diagonal = self.total.unsqueeze(-1) if self.total.ndim == 3 else self.total
            transition = transition + eye * diagonal.unsqueeze(-1)
        source = None if self.source is None else self.left.apply_transposed(self.solve(self.source, slice(None)))
        if self.extra is not None:
            source = self.extra if source is None else source + self.extra
        if source is None:
            source = like.new_zeros(self.chunks, *like.shape[1:])
        return Flow(transition.expand(*source.shape[:3], width, width), source)

    def _decay(self, state: Tensor, index: slice | Tensor) -> Tensor:
        if self.total is None:
            return state
        total = self.total[index]
        return state * (total[..., None, None] if total.ndim == 3 else total.unsqueeze(-1))


Aggregate = Callable[[Recursion, Lanes, Tensor, bool], Trajectory]
