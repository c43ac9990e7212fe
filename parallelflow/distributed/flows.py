"""What one rank's tokens do to the state that enters, found before it is known: one run of any backend.

Outputs and final state are affine in the state that enters,

    o_t = o_t(0) + S_inᵀ y_t,   y_t = scale · P_tᵀ q_t,        S_out = P S_in + H,

with P_t the transition from the shard's entry to token t. Rows act on the columns of the state one by one, so a run on
``[values | 0]`` from ``[0 | I]``, with K value channels more, gives all of it: its outputs are ``[o_t(0) | y_t]``, and
it ends at ``[H | P]``. Where no row reads, P_t is the product of the decays, and no channel is added.

The delta rule's kernels on a GPU cut time into segments, find those segments' flows, and then run them. They do it in
two halves, with the exchange between, and need no product.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from parallelflow.autograd import Setting
from parallelflow.decays import accurate
from parallelflow.distributed.exchange import apply
from parallelflow.flow import Flow
from parallelflow.kernels import backend
from parallelflow.problem import Inputs, sizes_of, without_autocast

BLOCK = 256  # tokens

STATES_KEPT = ("torch", "cpu")
"""Backends whose forward pass leaves states alone to the backward pass, those that enter windows of the shard."""


class Entered(NamedTuple):
    """The output, what a run from the state that entered leaves to its backward pass, and what the outputs say of that
    state, from which ``Passage.pull`` starts."""

    output: Tensor
    kept: list[Tensor]
    seen: list[Tensor]


@dataclass(frozen=True)
class Passage:
    """A shard's tokens on their way: the ``flow`` is known, the state that enters is not."""

    inputs: Inputs
    setting: Setting
    flow: Flow

    def enter(self, state: Tensor, keep: bool) -> Entered:
        """What a run from this state ``[B, HV, K, V]`` gives; ``keep``: and what backward passes start from."""
        raise NotImplementedError

    @staticmethod
    def pull(inputs: Inputs, setting: Setting, kept: list[Tensor], seen: list[Tensor], d_output: Tensor) -> Tensor:
        """``Σ_t y_t dO_tᵀ  [B, HV, K, V]``: the gradient of the state that enters, as far as it reaches the shard's
        outputs; at least float32."""
        raise NotImplementedError


@dataclass(frozen=True)
class AtOnce(Passage):
    """All of it from one run.

    ``output [B, T, HV, V]`` is o_t(0); ``entry_queries`` are ``y_t [B, T, HV, K]``, None where no row reads
    (``decayed_queries`` makes them); ``kept`` is what the run left to a backward pass: states of the shard's ``[H_t |
    P_t]`` where ``affine``, else what does not depend on states.
    """

    output: Tensor
    entry_queries: Tensor | None
    kept: list[Tensor]
    affine: bool

    def enter(self, state: Tensor, keep: bool) -> Entered:
        dtype = self.inputs.query.dtype
        if not self.output.shape[1]:
            return Entered(self.output.to(dtype), [], [])
        queries = decayed_queries(self.inputs, self.setting) if self.entry_queries is None else self.entry_queries
        output, seen = add_read(self.output, queries, state, dtype, keep and self.entry_queries is not None)
        kept = self.kept if keep else []
        if self.affine:  # [B · windows, HV, K, V + K]
            sizes, batch = (state.shape[-1], state.shape[-2]), state.shape[0]
            parts = [states.unflatten(0, (batch, -1)).split(sizes, -1) for states in kept]
            kept = [apply(Flow(second, first), state.unsqueeze(1)).flatten(0, 1) for first, second in parts]
        return Entered(output, kept, seen)

    @staticmethod
    def pull(inputs: Inputs, setting: Setting, kept: list[Tensor], seen: list[Tensor], d_output: Tensor) -> Tensor:
        """One product, no second pass over time."""
        _, heads, key_dim, value_dim, dtype = sizes_of(inputs)
        batch, time = inputs.query.shape[:2]
        if not time:
            return d_output.new_zeros(batch, heads, key_dim, value_dim, dtype=dtype)
        with without_autocast(d_output.device):
            queries = seen[0] if seen else decayed_queries(inputs, setting)
            left, right = queries.permute(0, 2, 3, 1).flatten(0, 1), d_output.transpose(1, 2).flatten(0, 1)
            if left.is_cuda and left.dtype == right.dtype and left.dtype.itemsize == 2:  # summed and left in float32
                return torch.bmm(left, right, out_dtype=torch.float32).unflatten(0, (batch, heads))
            return (left.to(dtype) @ right.to(dtype)).unflatten(0, (batch, heads))


@dataclass(frozen=True)
class InHalves(Passage):
    """The first half of kernels that find flows before they run."""

    half: Any

    def enter(self, state: Tensor, keep: bool) -> Entered:
        output, kept = backend.finish(self.half, state)
        return Entered(output, kept, [self.half.flows]) if keep else Entered(output, [], [])

    @staticmethod
    def pull(inputs: Inputs, setting: Setting, kept: list[Tensor], seen: list[Tensor], d_output: Tensor) -> Tensor:
        """A pass over the outputs' gradients alone."""
        return backend.pull(inputs, setting.traits, setting.backend, kept, seen[0], d_output)


def only_writes(inputs: Inputs) -> bool:
    """Whether no row reads: transitions are then decays, one number or a diagonal."""
    return inputs.write is None


def transition_shape(inputs: Inputs) -> tuple[int, ...]:
    """Of P without its batch axis: ``[HV]``, ``[HV, K]`` or ``[HV, K, K]``."""
    _, heads, key_dim, _, _ = sizes_of(inputs)
    if not only_writes(inputs):
        return heads, key_dim, key_dim
    return (heads,) if inputs.log_decay is None or inputs.log_decay.ndim == 3 else (heads, key_dim)


def first_half(inputs: Inputs, setting: Setting) -> InHalves | None:
    """The first half of a run that comes in halves; None of one that does not."""
    half = backend.begin(inputs, setting.traits, setting.backend) if inputs.query.numel() else None
    return None if half is None else InHalves(inputs, setting, half.flow, half)


def pass_through(inputs: Inputs, setting: Setting, choose: Callable[[Inputs], str], keep: bool) -> Passage:
    """One run over the tokens of ``inputs``, whose ``initial_state`` is not looked at.

    Args:
        setting: the engine of these tokens; a backend that does not take the K channels more gives way to ``choose``'s.
        keep: whether for a backward pass.
    """
    halves = first_half(inputs, setting)
    if halves is not None:
        return halves
    _, heads, key_dim, value_dim, dtype = sizes_of(inputs)
    batch = inputs.query.shape[0]
    start = inputs.query.new_zeros(batch, heads, key_dim, value_dim, dtype=dtype)
    if only_writes(inputs):
        transition = start.new_ones(batch, heads)
        if inputs.log_decay is not None:
            transition = inputs.log_decay.to(dtype).sum(1).exp()
        begun, keep = inputs._replace(initial_state=start), keep and setting.backend not in STATES_KEPT
        found = backend.widened(begun, setting.traits, setting.backend, keep) if begun.query.numel() else None
        output, final, kept = setting.forward(begun, keep, unrounded=True) if found is None else found
        assert final is not None
        return AtOnce(inputs, setting, Flow(transition, final), output, None, kept, False)
    identity = torch.eye(key_dim, dtype=dtype, device=start.device).expand(batch, heads, -1, -1)
    entered = torch.cat([start, identity], -1)
    output, final, kept, affine = _wide_run(inputs._replace(initial_state=entered), setting, choose, keep)
    output, queries = output.split([value_dim, key_dim], -1)
    source, transition = final.split([value_dim, key_dim], -1)
    return AtOnce(inputs, setting, Flow(transition, source), output, queries, kept, affine)


def _wide_run(
    inputs: Inputs, setting: Setting, choose: Callable[[Inputs], str], keep: bool
) -> tuple[Tensor, Tensor, list[Tensor], bool]:
    """Output, final states, and ``kept`` and ``affine`` of the passage, on states with K channels more than values."""
    _, heads, key_dim, value_dim, _ = sizes_of(inputs)
    state = inputs.initial_state
    assert state is not None
    if not inputs.query.shape[1]:
        return inputs.query.new_zeros(*inputs.query.shape[:2], heads, value_dim + key_dim), state, [], False
    if setting.backend not in STATES_KEPT:
        found = backend.widened(inputs, setting.traits, setting.backend, keep)
        if found is not None:
            return *found, False
    wide = _widened(inputs, key_dim)
    runs = setting._replace(backend=choose(wide))
    affine = runs.backend == setting.backend in STATES_KEPT
    output, final, kept = runs.forward(wide, keep and affine, unrounded=True)
    assert final is not None
    return output, final, kept, affine


def decayed_queries(inputs: Inputs, setting: Setting) -> Tensor:
    """The entry queries where no row reads: ``scale · e^{g_1 + … + g_t} ⊙ q_t``, in 16 bits for a GPU's products of 16
    bits, else at least float32."""
    _, heads, key_dim, _, dtype = sizes_of(inputs)
    query = inputs.query.to(dtype).repeat_interleave(heads // inputs.query.shape[2], 2)
    scale = setting.traits.scale
    query = query * (key_dim**-0.5 if scale is None else scale)
    if inputs.log_decay is not None:
        decay = _decays_from_entry(inputs.log_decay.to(dtype))
        query = query * (decay.unsqueeze(-1) if decay.ndim == 3 else decay)
    return query.to(inputs.query.dtype) if query.is_cuda else query


def _decays_from_entry(log_decay: Tensor) -> Tensor:
    """``e^{g_1 + … + g_t}``. Sums of a block, and of the blocks before, are apart, so that a long line's small decays
    are not lost in a sum of many."""
    time = log_decay.shape[1]
    blocks = pad(log_decay, (0, 0) * (log_decay.ndim - 2) + (0, -time % BLOCK)).unflatten(1, (-1, BLOCK))
    inside = blocks.cumsum(2)
    sums = pad(inside[:, :-1, -1].to(accurate(log_decay.device)), (0, 0) * (log_decay.ndim - 2) + (1, 0)).cumsum(1)
    return (inside.exp() * sums.exp().to(inside.dtype).unsqueeze(2)).flatten(1, 2)[:, :time]


def add_read(
    output: Tensor, entry_queries: Tensor, state: Tensor, dtype: torch.dtype, keep: bool
) -> tuple[Tensor, list[Tensor]]:
    """``output + Sᵀ y_t  [B, T, HV, V]``, summed in at least float32 and rounded once, to ``dtype``; and the entry
    queries in ``dtype``, if wanted: not a view, that would keep more than them."""
    found = backend.add_read(output, entry_queries, state, keep) if output.dtype == dtype else None
    if found is not None:
        read, queries = found
        return read, [] if queries is None else [queries]
    with without_autocast(output.device):
        read = (entry_queries.to(state.dtype).transpose(1, 2) @ state).transpose(1, 2)
        return read.add_(output).to(dtype), [entry_queries.to(dtype).contiguous()] if keep else []


def _widened(inputs: Inputs, more: int) -> Inputs:
    """The same rows with ``more`` value channels that are 0, beside the model's."""

    def wide(tensor: Tensor | None, channelwise: bool) -> Tensor | None:
        return pad(tensor, (0, more)) if tensor is not None and channelwise else tensor

    def beside(coefficient: Tensor | None, value: Tensor | None) -> Tensor | None:
        return wide(coefficient, coefficient is not None and value is not None and coefficient.ndim == value.ndim)

    return inputs._replace(
        value=wide(inputs.value, True),
        value_coefficient=beside(inputs.value_coefficient, inputs.value),
        lone_value=wide(inputs.lone_value, True),
        lone_coefficient=beside(inputs.lone_coefficient, inputs.lone_value),
    )
