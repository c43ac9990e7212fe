"""The engine in plain tensor algebra: any device, any float dtype. The specification that kernels are tested against.

Time is walked in windows of chunks, so that what is live beside inputs and outputs is one window's; the backward pass
starts each window again from the state that entered it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from parallelflow.aggregate import AGGREGATES, Coupling, Recursion, Trajectory
from parallelflow.decays import Scaled
from parallelflow.problem import Inputs, Sizes, Traits, sizes_of, without_autocast
from parallelflow.solvers import SOLVERS, Factorisation
from parallelflow.system import Chunks, Lone, Reading, System
from parallelflow.windows import Window, plan_windows


@dataclass(frozen=True)
class Plan:
    """The independent choices, by name: how time is cut, chunks are solved, and chunks are joined."""

    chunk_size: int
    solver: str
    aggregate: str

    def window_tokens(self, value_heads: int, time: int) -> int:
        """Tokens a window: never a matter of the batch. Flows are composed over the whole line at once."""
        if self.aggregate != "sequential":
            return max(-(-time // self.chunk_size), 1) * self.chunk_size
        return max(2, 128 // value_heads) * self.chunk_size


def read_out(system: System, trajectory: Trajectory, scale: float) -> Tensor:
    """``O = scale · ((Q ⊙ e^c) S_0 + Cq X)``, ``[M, HV, C, V]``."""
    output = system.queries.apply(trajectory.entries)
    if system.reading is not None:
        assert trajectory.solutions is not None
        output = output + system.reading.scores @ trajectory.solutions
    if system.lone is not None:
        output = output + system.lone.scores @ system.lone.values
    return output * scale


def forward_recursion(system: System, factors: Factorisation | None) -> Recursion:
    """The recursion of a window's states in forward time."""
    reading, lone = system.reading, system.lone
    extra = None if lone is None else lone.writes.apply_transposed(lone.values)
    if reading is None or factors is None:
        return Recursion(system.total, None, extra)
    source = reading.source
    if lone is not None and lone.gram is not None:
        seen = lone.gram @ lone.values
        source = seen if source is None else source + seen
    return Recursion(system.total, Coupling(reading.writes, reading.reads, _solver(factors, False), source), extra)


def adjoint_recursion(system: System, factors: Factorisation | None, d_output: Tensor) -> Recursion:
    """The recursion of the states' adjoints, backwards: reads and writes exchanged, the solve transposed."""
    extra, reading = system.queries.apply_transposed(d_output), system.reading
    if reading is None or factors is None:
        return Recursion(system.total, None, extra)
    source = reading.scores.transpose(-1, -2) @ d_output
    return Recursion(system.total, Coupling(reading.reads, reading.writes, _solver(factors, True), source), extra)


def _solver(factors: Factorisation, transposed: bool) -> Callable[[Tensor, slice | Tensor], Tensor]:
    """``T Z`` or ``Tᵀ Z`` of chosen chunks, in the accurate dtype of G, rounded to that of Z."""

    def solve(right: Tensor, index: slice | Tensor) -> Tensor:
        chosen, wide = factors[index], right.to(factors.dtype)
        return (chosen.solve_transposed(wide) if transposed else chosen.solve(wide)).to(right.dtype)

    return solve


def factor(system: System, traits: Traits, plan: Plan) -> Factorisation | None:
    """Each chunk's triangular system, ready to be solved with."""
    if system.reading is None:
        return None
    block = 1 if traits.sequential else len(traits.positions)
    return SOLVERS[plan.solver](system.reading.gram, block)


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

    def forward_window(self, inputs: Inputs, window: Window, entry: Tensor) -> tuple[Tensor, Tensor]:
        """One window's output ``[B, stop - start, HV, V]`` and the states after its pieces ``[pieces, HV, K, V]``."""
        system = Chunks(inputs, self.traits, self.sizes, window).system()
        recursion = forward_recursion(system, factor(system, self.traits, self.plan))
        trajectory = self.aggregate(recursion, window, entry, False)
        return window.join(read_out(system, trajectory, self.scale)).squeeze(2), trajectory.final

    def backward_window(
        self, inputs: Inputs, window: Window, entry: Tensor, d_output: Tensor, d_exit: Tensor
    ) -> tuple[Inputs, Tensor]:
        """Gradients of one window's tokens and of its entry states (THEORY, section 6).

        ``d_output [B, T, HV, V]`` of the whole line, ``d_exit [pieces, HV, K, V]``.
        """
        chunks = Chunks(inputs, self.traits, self.sizes, window)
        system = chunks.system()
        factors = factor(system, self.traits, self.plan)
        entries, solutions, _ = self.aggregate(forward_recursion(system, factors), window, entry, False)
        d_rows = window.cut(d_output.unsqueeze(2)).to(self.sizes.compute_dtype) * self.scale
        d_exits, d_source, d_entry = self.aggregate(adjoint_recursion(system, factors, d_rows), window, d_exit, True)

        entries_transposed, d_exits_transposed = entries.transpose(-1, -2), d_exits.transpose(-1, -2)
        reading, lone = None, None
        if system.reading is not None:
            assert solutions is not None
            assert d_source is not None
            solutions_transposed = solutions.transpose(-1, -2)
            reading = Reading(
                reads=Scaled(d_source @ entries_transposed),
                writes=Scaled(solutions @ d_exits_transposed),
                gram=d_source @ solutions_transposed,
                scores=d_rows @ solutions_transposed,
                source=d_source,
            )
        if system.lone is not None:
            values = system.lone.values
            d_values = system.lone.writes.apply(d_exits, system.lone.scores.transpose(-1, -2) @ d_rows)
            d_gram = None
            if system.lone.gram is not None:
                assert d_source is not None
                d_values = d_values + system.lone.gram.transpose(-1, -2) @ d_source
                d_gram = d_source @ values.transpose(-1, -2)
            lone = Lone(
                writes=Scaled(values @ d_exits_transposed),
                scores=d_rows @ values.transpose(-1, -2),
                values=d_values,
                gram=d_gram,
            )
        d_total = None if system.total is None else (d_exits * entries).sum(-1)
        return chunks.pull(System(Scaled(d_rows @ entries_transposed), reading, lone, d_total)), d_entry

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
    inputs: Inputs, traits: Traits, plan: Plan, sequence_starts: list[int] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Output ``[B, T, HV, V]``, final states ``[N, HV, K, V]``, and the states carried into windows that continue a
    sequence, ``[windows, B, HV, K, V]``."""
    batch, time = inputs.query.shape[:2]
    engine = Engine(traits, sizes_of(inputs), plan)
    with without_autocast(inputs.query.device):
        initial = engine.initial(inputs, batch if sequence_starts is None else len(sequence_starts) - 1)
        outputs: list[Tensor] = []
        carries: list[Tensor] = []
        finals: list[Tensor] = []
        carry = initial[:0]
        for window in engine.windows(batch, time, sequence_starts):
            output, exits = engine.forward_window(inputs, window, _enter(window, carry, initial))
            outputs.append(output.to(inputs.query.dtype))
            finals.append(exits[: len(window.ends)])
            carry = exits[len(window.ends) :]
            if window.unfinished:
                carries.append(carry)
        if not outputs:
            outputs.append(inputs.query.new_zeros(batch, time, engine.sizes.value_heads, engine.sizes.value_dim))
        final = torch.cat(finals) if finals else initial.clone()
        if final.shape[0] < initial.shape[0]:  # empty sequences keep their state
            final = initial.index_copy(0, _filled(sequence_starts, initial.device), final)
        blank = carry_count(plan, engine.sizes.value_heads, time) - len(carries)
        unused = initial.new_zeros(blank, batch, *initial.shape[1:])
        saved = torch.cat((torch.stack(carries), unused)) if carries else unused
        return _cat(outputs).contiguous(), final.contiguous(), saved


def backward(
    inputs: Inputs,
    traits: Traits,
    plan: Plan,
    sequence_starts: list[int] | None,
    saved: Tensor,
    d_output: Tensor,
    d_final: Tensor,
) -> Inputs:
    """Gradients of all inputs, each in its dtype."""
    batch, time = inputs.query.shape[:2]
    engine = Engine(traits, sizes_of(inputs), plan)
    with without_autocast(inputs.query.device):
        d_final = d_final.to(engine.sizes.compute_dtype)
        initial = engine.initial(inputs, d_final.shape[0])
        windows = engine.windows(batch, time, sequence_starts)
        carries = list(saved[: sum(window.unfinished for window in windows)])
        pieces: list[Inputs] = []
        d_initial: list[Tensor] = []
        d_carry = d_final[:0]
        for window in reversed(windows):
            entry = _enter(window, carries.pop() if window.continued else initial[:0], initial)
            d_exit = torch.cat((d_final[_range(window.ends)], d_carry))
            gradients, d_entry = engine.backward_window(inputs, window, entry, d_output, d_exit)
            pieces.append(_rounded(gradients, inputs))
            carried = d_entry.shape[0] - len(window.begins)
            d_carry = d_entry[:carried]
            d_initial.append(d_entry[carried:])
        pieces.reverse()
        gradients = Inputs(*(_assemble(slot, pieces, tensor) for slot, tensor in enumerate(inputs)))  # type: ignore[arg-type]
        if inputs.initial_state is None:
            return gradients
        d_states = torch.cat(d_initial[::-1]) if d_initial else d_final.clone()
        if d_states.shape[0] < d_final.shape[0]:
            d_states = d_final.index_copy(0, _filled(sequence_starts, d_final.device), d_states)
        return gradients._replace(initial_state=d_states.to(inputs.initial_state.dtype))


def _rounded(gradients: Inputs, inputs: Inputs) -> Inputs:
    """Each gradient in its input's dtype."""
    pairs = zip(inputs, gradients, strict=True)
    return Inputs(*(None if tensor is None or found is None else found.to(tensor.dtype) for tensor, found in pairs))  # type: ignore[arg-type]


def _assemble(slot: int, pieces: list[Inputs], like: Tensor | None) -> Tensor | None:
    """One input's gradient from those of all windows."""
    if like is None:
        return None
    parts = [piece[slot] for piece in pieces]
    return torch.zeros_like(like) if not parts or parts[0] is None else _cat(parts)  # type: ignore[arg-type]


def _enter(window: Window, carry: Tensor, initial: Tensor) -> Tensor:
    """The entry states of a window's lanes: carried, or a sequence's first."""
    begun = initial[_range(window.begins)]
    return torch.cat((carry, begun)) if window.continued else begun


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


def _cat(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)
