"""The recursion across chunks that every aggregate runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from parallelflow.flow import Flow
from parallelflow.lanes import Lanes
from parallelflow.system import System


class Trajectory(NamedTuple):
    """Along a window: ``entries [M, HV, K, V]``, the state at each chunk's entry, and ``written [M, HV, n + m, V]``
    (both None where they were not to be kept); ``said [M, HV, C, V]`` (None without queries); ``final
    [lanes, HV, K, V]``: the state after each lane's last chunk, lanes in their order."""

    entries: Tensor | None
    written: Tensor | None
    said: Tensor | None
    final: Tensor


@dataclass(frozen=True)
class Recursion:
    """One affine map a chunk: ``S ← Λ S + B̂ᵀ [X; u]`` with ``[X; u]`` the answer of the chunk's system to S.

    The adjoint is the recursion of the transposed system backwards: one implementation serves both. ``keep``: entry
    states and what was written are wanted.
    """

    system: System
    keep: bool

    def step(self, state: Tensor, index: slice, owned: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """The state ``[chunks, HV, K, V]`` after the chunks at ``index``, what they write and what they say.
        A state that is ``owned`` is given up: nobody else holds it."""
        written, said = self.answers(state, index)
        decayed = self._decayed(state, index, owned and not torch.is_grad_enabled())
        return self.system.writers.at(index).apply_transposed(written, decayed), written, said

    def answers(self, entries: Tensor, index: slice) -> tuple[Tensor, Tensor | None]:
        """What chunks write and say, their entry states ``[chunks, HV, K, V]`` known."""
        readers = self.system.readers.at(index)
        return self.system.answer(readers.apply(entries) if readers.vectors.shape[2] else None, index)

    def flows(self, like: Tensor) -> Flow:
        """Each chunk's flow, ``P = Λ + B̂ᵀ T Ā`` and ``H = B̂ᵀ [X; u]`` at entry state 0; states are as
        ``like [lanes, HV, K, V]``."""
        system = self.system.without_queries()
        everything, shape = slice(None), system.gram.shape[:2]
        if system.source is None and system.given is None:
            source = like.new_zeros(shape[0], *like.shape[1:])
        else:
            source = system.writers.apply_transposed(system.answer(None, everything)[0])
        if system.factors is None:
            return Flow(source.new_ones(shape) if system.total is None else system.total, source)
        identity = torch.eye(like.shape[2], dtype=like.dtype, device=like.device).expand(*shape, -1, -1)
        solution = system.factors.apply(system.readers.dense())
        writers = system.writers.first(system.solved)
        return Flow(writers.apply_transposed(solution, self._decayed(identity, everything, False)), source)

    def _decayed(self, state: Tensor, index: slice, owned: bool) -> Tensor:
        """``Λ S``, in memory of its own."""
        if self.system.total is None:
            return state if owned else state.clone(memory_format=torch.contiguous_format)
        total = self.system.total[index]
        total = total[..., None, None] if total.ndim == 2 else total.unsqueeze(-1)
        return state.mul_(total) if owned else state * total


Aggregate = Callable[[Recursion, Lanes, Tensor, bool], Trajectory]
