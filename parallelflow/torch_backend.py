"""The engine in plain tensor algebra: any device, any float dtype. The specification that kernels are tested against.

Time is walked in windows of chunks, so that what is live beside inputs and outputs is one window's; the backward pass
starts each window again from the state that entered it.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from parallelflow.aggregate import AGGREGATES, Recursion, Trajectory
from parallelflow.problem import Inputs, Sizes, Traits, sizes_of
from parallelflow.solvers import SOLVERS, Factorisation
from parallelflow.system import Chunks, Cotangents, System
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
    """``O = scale · ((Q ⊙ e^c) S_0 + Cq X)``, ``[M, H, G, C, V]``."""
    output = system.queries.apply(trajectory.entries)
    if system.scores is not None:
        assert trajectory.solutions is not None
        output = output + system.scores @ trajectory.solutions
    if system.scores_lone is not None:
        output = output + system.scores_lone @ system.lone
    return output * scale


def forward_recursion(system: System, factors: Factorisation | None, chunks: int) -> Recursion:
    """The recursion of a window's states in forward time."""
    source, extra = system.source, None
    if system.lone_writes is not None:
        assert system.lone is not None
        extra = system.lone_writes.apply_transposed(system.lone)
        if system.gram_lone is not None:
            source = system.gram_lone @ system.lone if source is None else source + system.gram_lone @ system.lone
    solve = None if factors is None else lambda right, index: factors[index].solve(right)
    return Recursion(system.total, system.writes, system.reads, solve, source, extra, chunks)


def adjoint_recursion(system: System, factors: Factorisation | None, d_output: Tensor, chunks: int) -> Recursion:
    """The recursion of the states' adjoints, backwards: reads and writes exchanged, the solve transposed."""
    source = None
    if system.scores is not None:
        source = system.scores.transpose(-1, -2) @ d_output
    solve = None if factors is None else lambda right, index: factors[index].solve_transposed(right)
    extra = system.queries.apply_transposed(d_output)
    return Recursion(system.total, system.reads, system.writes, solve, source, extra, chunks)


def factor(system: System, traits: Traits, plan: Plan) -> Factorisation | None:
    """Each chunk's triangular system, ready to be solved with."""
    if system.gram is None:
        return None
    block = 1 if traits.sequential else len(traits.positions)
    return SOLVERS[plan.solver](system.gram, block)


@dataclass(frozen=True)
class Engine:
    """One problem's choices and sizes, and what they do to its tensors."""

    traits: Traits
    sizes: Sizes
    plan: Plan

    @property
    def scale(self) -> float:
        return self.sizes.key_dim**-0.5 if self.traits.scale is None else self.traits.scale

    def forward_window(self, tokens: Inputs, window: Window, entry: Tensor) -> tuple[Tensor, Tensor]:
        """One window's output ``[M, C, HV, V]`` and the states after its pieces ``[lanes, H, G, K, V]``."""
        system = Chunks(tokens, self.traits, self.sizes).system()
        recursion = forward_recursion(system, factor(system, self.traits, self.plan), window.lanes.chunks)
        trajectory = AGGREGATES[self.plan.aggregate](recursion, window.lanes, entry, False)
        output = read_out(system, trajectory, self.scale)
        return output.flatten(1, 2).transpose(1, 2), trajectory.final

    def backward_window(
        self, tokens: Inputs, window: Window, entry: Tensor, d_output: Tensor, d_exit: Tensor
    ) -> tuple[Inputs, Tensor]:
        """Gradients of one window's tokens ``[M, C, …]`` and of its entry states (THEORY, section 6).

        ``d_output [M, C, HV, V]``, ``d_exit [lanes, H, G, K, V]``.
        """
        lanes, aggregate = window.lanes, AGGREGATES[self.plan.aggregate]
        chunks = Chunks(tokens, self.traits, self.sizes)
        system = chunks.system()
        factors = factor(system, self.traits, self.plan)
        entries, solutions, _ = aggregate(forward_recursion(system, factors, lanes.chunks), lanes, entry, False)
        d_rows = d_output.transpose(1, 2).unflatten(1, (self.sizes.heads, -1)) * self.scale
        adjoint = adjoint_recursion(system, factors, d_rows, lanes.chunks)
        d_exits, d_source, d_entry = aggregate(adjoint, lanes, d_exit, True)

        d_reads = d_writes = d_gram = d_scores = d_gram_lone = d_scores_lone = d_lone = d_lone_writes = None
        if system.reads is not None:
            assert solutions is not None and d_source is not None
            d_reads = d_source @ entries.transpose(-1, -2)
            d_writes = solutions @ d_exits.transpose(-1, -2)
            d_gram = d_source @ solutions.transpose(-1, -2)
            d_scores = d_rows @ solutions.transpose(-1, -2)
        if system.lone is not None:
            assert system.lone_writes is not None and system.scores_lone is not None
            d_lone = system.scores_lone.transpose(-1, -2) @ d_rows + system.lone_writes.apply(d_exits)
            d_lone_writes = system.lone @ d_exits.transpose(-1, -2)
            d_scores_lone = d_rows @ system.lone.transpose(-1, -2)
            if system.gram_lone is not None:
                assert d_source is not None
                d_lone = d_lone + system.gram_lone.transpose(-1, -2) @ d_source
                d_gram_lone = d_source @ system.lone.transpose(-1, -2)
        cotangents = Cotangents(
            queries=d_rows @ entries.transpose(-1, -2),
            reads=d_reads,
            writes=d_writes,
            lone_writes=d_lone_writes,
            gram=d_gram,
            gram_lone=d_gram_lone,
            scores=d_scores,
            scores_lone=d_scores_lone,
            source=d_source if system.source is not None else None,
            lone=d_lone,
            total=(d_exits * entries).sum(-1),
        )
        return chunks.pull(cotangents), d_entry

    def windows(self, batch: int, time: int, sequence_starts: list[int] | None) -> list[Window]:
        """The windows of a problem; a chunk is never longer than the longest sequence."""
        longest = time
        if sequence_starts is not None:
            longest = max((last - first for first, last in pairwise(sequence_starts)), default=0)
        chunk_size = max(1, min(self.plan.chunk_size, longest))
        window_tokens = self.plan.window_tokens(self.sizes.value_heads, time)
        window_tokens = -(-window_tokens // chunk_size) * chunk_size
        return plan_windows(batch, time, sequence_starts, chunk_size, window_tokens) if batch else []

    def tokens(self, inputs: Inputs, window: Window) -> Inputs:
        """A window's tokens in chunks, in the compute dtype; ties stay ties."""
        cut: list[Tensor | None] = []
        for slot, tensor in enumerate(inputs[:-1]):
            twin = next((earlier for earlier in range(slot) if tensor is not None and inputs[earlier] is tensor), None)
            if tensor is None or twin is not None:
                cut.append(None if twin is None else cut[twin])
            else:
                cut.append(window.cut(tensor).to(self.sizes.compute_dtype))
        return Inputs(*cut)  # type: ignore[arg-type]

    def initial(self, inputs: Inputs, lanes: int) -> Tensor:
        """The entry state of every sequence ``[lanes, H, G, K, V]``."""
        heads, _, key_dim, value_dim, dtype = self.sizes
        if inputs.initial_state is None:
            return inputs.query.new_zeros((lanes, heads, self.sizes.groups, key_dim, value_dim), dtype=dtype)
        return inputs.initial_state.to(dtype).unflatten(1, (heads, self.sizes.groups))


def carry_count(plan: Plan, value_heads: int, time: int) -> int:
    """At most so many windows continue a sequence: the states that the backward pass restarts from."""
    return max(time - 1, 0) // plan.window_tokens(value_heads, time)


def forward(
    inputs: Inputs, traits: Traits, plan: Plan, sequence_starts: list[int] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Output ``[B, T, HV, V]``, final states ``[N, HV, K, V]``, and the states carried into windows that continue a
    sequence, ``[windows, B, HV, K, V]``."""
    batch, time = inputs.query.shape[:2]
    engine = Engine(traits, sizes_of(inputs), plan)
    with torch.autocast(inputs.query.device.type, enabled=False):
        initial = engine.initial(inputs, batch if sequence_starts is None else len(sequence_starts) - 1)
        outputs: list[Tensor] = []
        carries: list[Tensor] = []
        finals: list[Tensor] = []
        carry = initial[:0]
        for window in engine.windows(batch, time, sequence_starts):
            output, exits = engine.forward_window(engine.tokens(inputs, window), window, _enter(window, carry, initial))
            outputs.append(window.join(output).to(inputs.query.dtype))
            finals.append(exits[: len(window.ends)])
            carry = exits[len(window.ends) :]
            if window.unfinished:
                carries.append(carry)
        if not outputs:
            outputs.append(inputs.query.new_zeros(batch, time, engine.sizes.value_heads, engine.sizes.value_dim))
        final = torch.cat(finals) if finals else initial
        if final.shape[0] < initial.shape[0]:  # empty sequences keep their state
            final = initial.index_copy(0, _filled(sequence_starts, initial.device), final)
        blank = carry_count(plan, engine.sizes.value_heads, time) - len(carries)
        unused = initial.new_zeros(blank, batch, *initial.shape[1:])
        saved = torch.cat((torch.stack(carries), unused)) if carries else unused
        return _cat(outputs).contiguous(), final.flatten(1, 2).contiguous(), saved.flatten(2, 3).contiguous()


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
    dtype, heads = engine.sizes.compute_dtype, (engine.sizes.heads, engine.sizes.groups)
    with torch.autocast(inputs.query.device.type, enabled=False):
        d_final = d_final.to(dtype).unflatten(1, heads)
        initial = engine.initial(inputs, d_final.shape[0])
        windows = engine.windows(batch, time, sequence_starts)
        carries = list(saved.unflatten(2, heads)[: sum(window.unfinished for window in windows)])
        pieces: list[Inputs] = []
        d_initial: list[Tensor] = []
        d_carry = d_final[:0]
        for window in reversed(windows):
            entry = _enter(window, carries.pop() if window.continued else initial[:0], initial)
            d_exit = torch.cat((d_final[_range(window.ends)], d_carry))
            gradients, d_entry = engine.backward_window(
                engine.tokens(inputs, window), window, entry, window.cut(d_output).to(dtype), d_exit
            )
            pieces.append(_join(window, gradients, inputs))
            carried = d_entry.shape[0] - len(window.begins)
            d_carry = d_entry[:carried]
            d_initial.append(d_entry[carried:])
        pieces.reverse()
        gradients = Inputs(*(_assemble(slot, pieces, tensor) for slot, tensor in enumerate(inputs)))  # type: ignore[arg-type]
        if inputs.initial_state is None:
            return gradients
        d_states = torch.cat(d_initial[::-1]) if d_initial else d_final
        if d_states.shape[0] < d_final.shape[0]:
            d_states = d_final.index_copy(0, _filled(sequence_starts, d_final.device), d_states)
        return gradients._replace(initial_state=d_states.flatten(1, 2).to(inputs.initial_state.dtype))


def _join(window: Window, gradients: Inputs, inputs: Inputs) -> Inputs:
    joined = [
        None if tensor is None or gradient is None else window.join(gradient).to(tensor.dtype)
        for tensor, gradient in zip(inputs, gradients, strict=True)
    ]
    return Inputs(*joined)  # type: ignore[arg-type]


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
