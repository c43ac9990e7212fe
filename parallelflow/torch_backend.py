"""The engine in plain tensor algebra: any device, any float dtype. The specification that kernels are tested against.

Time is walked in windows of chunks, so that what is live beside inputs and outputs is one window's; the backward pass
starts each window again from the state that entered it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
from torch import Tensor

from parallelflow.aggregate import AGGREGATES, Recursion, Trajectory
from parallelflow.problem import Inputs, Sizes, Traits, may_read, sizes_of, without_autocast
from parallelflow.solvers import SOLVERS, Factorisation, cuda, tensor_inverse
from parallelflow.solvers.guarded import Guarded
from parallelflow.system import Chunks, Gradients, System
from parallelflow.windows import Assembly, Window, plan_windows

# What the C library gives back to the system it must clear again, page by page, when it is next asked for. glibc keeps
# blocks up to the size of the largest one ever freed, but at most 32 MB; other libraries do not mind.
torch.empty(33_000_000, dtype=torch.uint8)

GROWTH = 24.0  # of ‖T‖ beyond which a chunk is solved in the widest dtype: to 30, errors stay those of the recurrence


@dataclass(frozen=True)
class Plan:
    """The independent choices, by name: how time is cut, chunks are solved, and chunks are joined. ``compiled``: the
    solver's CUDA kernel solves."""

    chunk_size: int = 64
    solver: str = "tensor_inverse"
    aggregate: str = "sequential"
    compiled: bool = field(default=False, repr=False)

    def interpreted(self) -> Plan:
        """The same with the solver as tensor algebra, which autograd can follow."""
        return replace(self, compiled=False)

    def window_tokens(self, value_heads: int, time: int) -> int:
        """Tokens a window: never a matter of the batch. Flows are composed over the whole line at once."""
        if self.aggregate != "sequential":
            return max(-(-time // self.chunk_size), 1) * self.chunk_size
        return max(2, 128 // value_heads) * self.chunk_size


@dataclass(frozen=True)
class Engine:
    """One problem's choices and sizes, and what they do to its tensors."""

    traits: Traits
    sizes: Sizes
    plan: Plan

    @property
    def scale(self) -> float:
        return self.sizes.key_dim**-0.5 if self.traits.scale is None else self.traits.scale

    def aggregate(self, recursion: Recursion, window: Window, states: Tensor, reverse: bool) -> Trajectory:
        """The states along a window, from one a piece, in the order of the pieces."""
        lanes = window.lanes
        found = AGGREGATES[self.plan.aggregate](recursion, lanes, lanes.sort(states), reverse)
        return found._replace(final=lanes.unsort(found.final))

    def system(self, chunks: Chunks) -> System:
        """The chunks' equations, ready to be solved."""
        gram = chunks.gram()
        return chunks.system(gram, self.factor(chunks, gram) if chunks.solved else None)

    def factor(self, chunks: Chunks, gram: Tensor) -> Factorisation:
        """``I - G`` of every chunk.

        With β near 2 and correlated keys the entries of T = (I - G)⁻¹ alternate and do not decay: the rounding of G
        then reaches X about ‖T‖ times magnified, which the recurrence's own does not. Such chunks, told by their ‖T‖,
        are solved in the widest dtype from G on; all chunks, where values cannot be looked at or T is not formed.
        """
        solver, block = SOLVERS[self.plan.solver], 1 if self.traits.sequential else len(self.traits.positions)
        if self.plan.compiled:
            return cuda.COMPILED[self.plan.solver](chunks.accurate_gram(), block)
        if solver is not tensor_inverse or not may_read(gram):
            return solver(chunks.accurate_gram(), block)
        plain = tensor_inverse(gram[:, :, : chunks.solved, : chunks.solved], block)
        magnified = ~(plain.growth() <= GROWTH)  # a NaN too
        if not magnified.any():
            return plain
        return Guarded.mend(plain, solver(chunks.accurate_gram()[magnified], block), magnified)

    def forward_window(self, inputs: Inputs, window: Window, entry: Tensor) -> tuple[Tensor, Tensor]:
        """One window's output as rows ``[M, HV, C, V]`` and the states after its pieces ``[pieces, HV, K, V]``."""
        system = self.system(Chunks(inputs, self.traits, self.sizes, window, self.scale))
        trajectory = self.aggregate(Recursion(system, keep=False), window, entry, False)
        assert trajectory.said is not None
        return trajectory.said, trajectory.final

    def backward_window(
        self, inputs: Inputs, window: Window, entry: Tensor, d_output: Tensor, d_exit: Tensor
    ) -> tuple[Inputs, Tensor]:
        """Gradients of one window's tokens and of its entry states (docs/theory.md, section 6).

        ``d_output [B, T, HV, V]`` of the whole line, ``d_exit [pieces, HV, K, V]``.
        """
        chunks = Chunks(inputs, self.traits, self.sizes, window, self.scale)
        system = self.system(chunks)
        entries, written, _, _ = self.aggregate(Recursion(system.without_queries(), keep=True), window, entry, False)
        d_said = window.cut(d_output.unsqueeze(2)).to(self.sizes.compute_dtype)
        adjoint = Recursion(system.transposed(d_said), keep=True)
        d_exits, d_seen, d_given, d_entry = self.aggregate(adjoint, window, d_exit, True)
        assert entries is not None and written is not None and d_exits is not None and d_seen is not None
        gradients = Gradients(
            readers=d_seen @ entries.transpose(-1, -2),
            writers=written @ d_exits.transpose(-1, -2),
            gram=d_seen @ written.transpose(-1, -2),
            source=d_seen[:, :, : chunks.solved],
            given=d_given,
            total=None if system.total is None else (d_exits * entries).sum(-1),
        )
        return chunks.pull(gradients), d_entry

    def windows(self, batch: int, time: int, sequence_starts: list[int] | None) -> list[Window]:
        """The windows of a problem; a chunk is never longer than the longest sequence."""
        longest = time
        if sequence_starts is not None:
            longest = max((last - first for first, last in pairwise(sequence_starts)), default=0)
        chunk_size = max(1, min(self.plan.chunk_size, longest))
        window_tokens = self.plan.window_tokens(self.sizes.value_heads, time)
        window_tokens = -(-window_tokens // chunk_size) * chunk_size
        return plan_windows(batch, time, sequence_starts, chunk_size, window_tokens) if batch else []

    def initial(self, inputs: Inputs, lanes: int) -> Tensor:
        """The entry state of every sequence ``[lanes, HV, K, V]``."""
        _, value_heads, key_dim, value_dim, dtype = self.sizes
        if inputs.initial_state is None:
            return inputs.query.new_zeros((lanes, value_heads, key_dim, value_dim), dtype=dtype)
        return inputs.initial_state.to(dtype)


def carry_count(plan: Plan, value_heads: int, time: int) -> int:
    """At most so many windows continue a sequence: the states that the backward pass restarts from. Two are added, for
    a compiled graph is specialised on axes of 0 and 1."""
    return max(time - 1, 0) // plan.window_tokens(value_heads, time) + 2


def forward(
    inputs: Inputs, traits: Traits, plan: Plan, sequence_starts: list[int] | None, unrounded: bool = False
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Output ``[B, T, HV, V]`` (in the dtype of states if ``unrounded``), final states ``[N, HV, K, V]``, and the
    states carried into the windows that continue sequences, ``[B, HV, K, V]`` each."""
    batch, time = inputs.query.shape[:2]
    engine = Engine(traits, sizes_of(inputs), plan)
    with without_autocast(inputs.query.device):
        initial = engine.initial(inputs, batch if sequence_starts is None else len(sequence_starts) - 1)
        _, value_heads, _, value_dim, wide = engine.sizes
        dtype = wide if unrounded else inputs.query.dtype
        output = Assembly(inputs.query.new_empty(batch, time, value_heads, value_dim, dtype=dtype))
        carries: list[Tensor] = []
        finals: list[Tensor] = []
        carry = initial[:0]
        for window in engine.windows(batch, time, sequence_starts):
            piece, exits = engine.forward_window(inputs, window, _enter(window, carry, initial))
            output.put(window, piece)
            finals.append(exits[: len(window.ends)])
            carry = exits[len(window.ends) :]
            if window.unfinished:
                carries.append(carry)
        final = _cat(finals) if finals else initial.clone()
        if final.shape[0] < initial.shape[0]:  # empty sequences keep their state
            final = initial.index_copy(0, _filled(sequence_starts, initial.device), final)
        return output.whole(), final.contiguous(), carries


def backward(
    inputs: Inputs,
    traits: Traits,
    plan: Plan,
    sequence_starts: list[int] | None,
    saved: list[Tensor],
    d_output: Tensor,
    d_final: Tensor,
) -> Inputs:
    """Gradients of all inputs, each in its dtype; ``saved`` are the carries, made again where there are none."""
    batch, time = inputs.query.shape[:2]
    engine = Engine(traits, sizes_of(inputs), plan)
    with without_autocast(inputs.query.device):
        d_final = d_final.to(engine.sizes.compute_dtype)
        initial = engine.initial(inputs, d_final.shape[0])
        windows = engine.windows(batch, time, sequence_starts)
        carried = sum(window.unfinished for window in windows)
        if len(saved) < carried:
            saved = forward(inputs, traits, plan, sequence_starts)[2]
        carries = list(saved[:carried])
        whole = [None if tensor is None else Assembly(torch.empty_like(tensor)) for tensor in inputs[:-1]]
        d_initial: list[Tensor] = []
        d_carry = d_final[:0]
        for window in reversed(windows):
            entry = _enter(window, carries.pop() if window.continued else initial[:0], initial)
            d_exit = _cat([d_final[_range(window.ends)], d_carry])
            found, d_entry = engine.backward_window(inputs, window, entry, d_output, d_exit)
            for assembly, piece in zip(whole, found, strict=False):
                if assembly is not None and piece is not None:
                    assembly.put(window, piece)
            carried = d_entry.shape[0] - len(window.begins)
            d_carry = d_entry[:carried]
            d_initial.append(d_entry[carried:])
        gradients = Inputs(*(None if assembly is None else assembly.whole() for assembly in whole))  # type: ignore[arg-type]
        if inputs.initial_state is None:
            return gradients
        d_states = torch.cat(d_initial[::-1]) if d_initial else d_final.clone()
        if d_states.shape[0] < d_final.shape[0]:
            d_states = d_final.index_copy(0, _filled(sequence_starts, d_final.device), d_states)
        return gradients._replace(initial_state=d_states.to(inputs.initial_state.dtype))


def _enter(window: Window, carry: Tensor, initial: Tensor) -> Tensor:
    """The entry states of a window's lanes: carried, or a sequence's first."""
    begun = initial[_range(window.begins)]
    return _cat([carry, begun]) if window.continued else begun


def _cat(parts: list[Tensor]) -> Tensor:
    """Along the first axis; a single part that is not empty stays what it is."""
    filled = [part for part in parts if part.shape[0]]
    return filled[0] if len(filled) == 1 else torch.cat(parts)


def _range(numbers: tuple[int, ...]) -> slice | list[int]:
    if not numbers:
        return slice(0, 0)
    if numbers[-1] - numbers[0] == len(numbers) - 1:
        return slice(numbers[0], numbers[-1] + 1)
    return list(numbers)


def _filled(sequence_starts: list[int] | None, device: torch.device) -> Tensor:
    """The sequences that have tokens."""
    lengths = [last - first for first, last in pairwise(sequence_starts or ())]
    return torch.tensor([n for n, length in enumerate(lengths) if length], dtype=torch.long, device=device)
