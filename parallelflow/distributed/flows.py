"""The flow of one rank's tokens, from any backend: a basis of states is carried beside the state itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from parallelflow.flow import Flow
from parallelflow.problem import Inputs, Traits, sizes_of, without_autocast

Run = Callable[[Inputs], tuple[Tensor, Tensor]]
"""The engine: output and final states of a regular batch."""


class ShardFlow(NamedTuple):
    """``S ↦ P S + H`` over a shard, and ``entry_queries`` ``[B, T, HV, K]``, ``scale · P_tᵀ q_t`` with P_t the
    transition from the shard's entry to token t: what each output says of the state that enters (None: not asked for).
    """

    flow: Flow
    entry_queries: Tensor | None


def only_writes(inputs: Inputs) -> bool:
    """Whether no row reads: transitions are then decays, one number or a diagonal."""
    return inputs.write is None


def transition_shape(inputs: Inputs) -> tuple[int, ...]:
    """Of P without its batch axis: ``[HV]``, ``[HV, K]`` or ``[HV, K, K]``."""
    _, heads, key_dim, _, _ = sizes_of(inputs)
    if not only_writes(inputs):
        return heads, key_dim, key_dim
    return (heads,) if inputs.log_decay is None or inputs.log_decay.ndim == 3 else (heads, key_dim)


def shard_flow(inputs: Inputs, run: Run, *, source: bool, entry_queries: bool) -> ShardFlow:
    """The flow over the tokens of ``inputs``, whose ``initial_state`` is not looked at.

    Rows act on the columns of the state one by one. So ``[0 | I] ↦ [H | P]`` under rows whose values have K more
    channels, all 0, and the outputs of those channels are the entry queries: one run of any backend. Where no row
    reads, P is the product of the decays.

    Args:
        source: whether H is wanted; it is 0 otherwise, and only the K channels are run.
        entry_queries: whether they are; where no row reads they are not made here (see ``pull_back``).
    """
    _, heads, key_dim, value_dim, dtype = sizes_of(inputs)
    batch, time = inputs.query.shape[:2]
    state = inputs.query.new_zeros(batch, heads, key_dim, value_dim, dtype=dtype)
    if only_writes(inputs):
        if inputs.log_decay is None:
            transition = state.new_ones(batch, heads)
        else:
            transition = inputs.log_decay.to(dtype).sum(1).exp()
        return ShardFlow(Flow(transition, run(inputs._replace(initial_state=state))[1] if source else state), None)
    identity = torch.eye(key_dim, dtype=dtype, device=state.device).expand(batch, heads, -1, -1)
    if not time:
        return ShardFlow(Flow(identity, state), inputs.query.new_zeros(batch, 0, heads, key_dim))
    width = value_dim if source else 0
    output, final = run(_widened(inputs, width, key_dim, pad(identity, (width, 0))))
    flow = Flow(final[..., width:], final[..., :width] if source else state)
    return ShardFlow(flow, output[..., width:].contiguous() if entry_queries else None)


def pull_back(inputs: Inputs, traits: Traits, entry_queries: Tensor | None, d_output: Tensor) -> Tensor:
    """``Σ_t (scale · P_tᵀ q_t) dO_tᵀ  [B, HV, K, V]``: the gradient of the state that enters, as far as it reaches the
    shard's outputs. At least float32; one product, no second pass over time."""
    _, heads, key_dim, value_dim, dtype = sizes_of(inputs)
    batch, time = inputs.query.shape[:2]
    if not time:
        return d_output.new_zeros(batch, heads, key_dim, value_dim, dtype=dtype)
    with without_autocast(d_output.device):
        if entry_queries is None:
            query = inputs.query.to(dtype).repeat_interleave(heads // inputs.query.shape[2], 2)
            query = query * (key_dim**-0.5 if traits.scale is None else traits.scale)
            if inputs.log_decay is not None:
                decay = inputs.log_decay.to(dtype).cumsum(1).exp()
                query = query * (decay.unsqueeze(-1) if decay.ndim == 3 else decay)
            entry_queries = query
        left, right = entry_queries.permute(0, 2, 3, 1).flatten(0, 1), d_output.transpose(1, 2).flatten(0, 1)
        if left.is_cuda and left.dtype == right.dtype and left.dtype.itemsize == 2:  # summed in float32, and kept so
            return torch.bmm(left, right, out_dtype=torch.float32).unflatten(0, (batch, heads))
        return (left.to(dtype) @ right.to(dtype)).unflatten(0, (batch, heads))


def _widened(inputs: Inputs, width: int, more: int, initial_state: Tensor) -> Inputs:
    """The same rows with the first ``width`` value channels (all or none) and ``more`` without a value."""

    def wide(tensor: Tensor | None, channelwise: bool) -> Tensor | None:
        if tensor is None or not channelwise:
            return tensor
        return pad(tensor, (0, more)) if width else tensor.new_zeros(*tensor.shape[:-1], more)

    def beside(coefficient: Tensor | None, value: Tensor | None) -> Tensor | None:
        return wide(coefficient, coefficient is not None and value is not None and coefficient.ndim == value.ndim)

    return inputs._replace(
        value=wide(inputs.value, True),
        value_coefficient=beside(inputs.value_coefficient, inputs.value),
        lone_value=wide(inputs.lone_value, True),
        lone_coefficient=beside(inputs.lone_coefficient, inputs.lone_value),
        initial_state=initial_state,
    )
