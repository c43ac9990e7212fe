"""A call with ``aggregate="distributed"``: its arguments checked on all ranks, and made into this rank's job."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from parallelflow.autograd import Setting
from parallelflow.checks import show
from parallelflow.distributed import agreement, sharded
from parallelflow.distributed.context import Context
from parallelflow.distributed.shards import Shard
from parallelflow.problem import Inputs, Traits, sizes_of
from parallelflow.torch_backend import Plan

FINAL_STATE_ON = ("last", "all")
NAMES = {"write": "key or write", "lone_write": "key", "lone_value": "value", "lone_coefficient": "beta"}


def run(
    context: Context,
    inputs: Inputs,
    traits: Traits,
    plan: Plan,
    choose: Callable[[Inputs], str],
    *,
    cu_seqlens: Sequence[int] | None,
    context_lengths: Sequence[int] | None,
    return_final_state: bool,
    final_state_on: str,
    settings: agreement.Settings,
    checking: bool,
) -> tuple[Tensor, Tensor | None]:
    """This rank's output, and the final states where they are wanted and come.

    ``inputs`` are its tokens, with the initial states of all sequences or None; ``cu_seqlens`` are of the whole line;
    ``settings`` are what else all ranks must have alike. Unless ``checking``, nothing is exchanged beforehand but what
    the call needs.
    """
    batch, time = inputs.query.shape[:2]
    recording = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs)
    lengths = None if context_lengths is None else list(context_lengths)
    if checking or (cu_seqlens is not None and lengths is None):
        everything = {
            **settings,
            **_shapes(inputs),
            "cu_seqlens": None if cu_seqlens is None else tuple(cu_seqlens),
            "context_lengths": None if lengths is None else tuple(lengths),
            "final_state_on": (return_final_state, final_state_on),
            "torch.is_grad_enabled()": torch.is_grad_enabled(),
            "the driver": traits,
        }
        if cu_seqlens is not None:
            everything["initial_state"] = "none" if inputs.initial_state is None else "one"
        found = agreement.agree(context, everything, time, recording, inputs.query.device)
        if lengths is not None and lengths != found.lengths:
            raise ValueError(f"context_lengths: got {lengths}, expected the ranks' tokens, {found.lengths}")
        lengths, recording = found.lengths, found.recording
    if cu_seqlens is None:
        shards = [Shard.regular(rank, context.size, batch, time) for rank in range(context.size)]
        sequences = batch
    else:
        assert lengths is not None
        if cu_seqlens[-1] != sum(lengths):
            raise ValueError(
                f"cu_seqlens: got {cu_seqlens[-1]} tokens in all, expected those of all ranks, {sum(lengths)}"
            )
        shards = [Shard.packed(rank, lengths, cu_seqlens) for rank in range(context.size)]
        sequences = len(cu_seqlens) - 1
    shard = shards[context.rank]
    if inputs.initial_state is not None:
        own = inputs.initial_state[shard.begins.start : shard.begins.stop] if shard.begins else None
        inputs = inputs._replace(initial_state=own)
    everywhere = final_state_on == "all"
    job = sharded.Job(
        context,
        shard,
        tuple(each.passing for each in shards),
        Setting(traits, plan, None, "torch").with_ties(inputs),
        choose,
        sequences,
        summed=return_final_state and context.size > 1 and (everywhere or cu_seqlens is not None),
        recording=recording,
    )
    output, final = sharded.run(inputs, job)
    here = everywhere or context.rank == context.size - 1
    return output, final if return_final_state and here else None


def check(
    context: Context,
    inputs: Inputs,
    cu_seqlens: Sequence[int] | None,
    context_lengths: Sequence[int] | None,
) -> None:
    """What one rank sees alone.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is expected.
    """
    batch, time = inputs.query.shape[:2]
    if cu_seqlens is not None:
        if batch != 1:
            raise ValueError(f"cu_seqlens: got a query with batch {batch}, expected packed sequences in a batch of 1")
        if len(cu_seqlens) < 2 or cu_seqlens[0] != 0 or any(last < first for first, last in pairwise(cu_seqlens)):
            raise ValueError("cu_seqlens: got other numbers, expected [N + 1] that never decrease from 0, of all ranks")
    if context_lengths is not None:
        if len(context_lengths) != context.size or any(length < 0 for length in context_lengths):
            raise ValueError(f"context_lengths: got {list(context_lengths)}, expected tokens of {context.size} ranks")
        if context_lengths[context.rank] != time:
            raise ValueError(
                f"context_lengths: got {context_lengths[context.rank]} for rank {context.rank}, expected its T = {time}"
            )
    state = inputs.initial_state
    if state is not None:
        sequences = batch if cu_seqlens is None else len(cu_seqlens) - 1
        if state.shape[0] != sequences:
            raise ValueError(
                f"initial_state: got shape {show(state)}, expected one state a sequence of the whole line, "
                f"N = {sequences}"
            )
        plain = sizes_of(inputs._replace(initial_state=state[:0].float())).compute_dtype
        if state.dtype != plain:
            raise TypeError(f"initial_state: got dtype {state.dtype}, expected {plain}, that of the state on all ranks")


def _shapes(inputs: Inputs) -> agreement.Settings:
    """Of every tensor without its tokens, and its dtype."""
    found: agreement.Settings = {}
    for name, tensor in zip(Inputs._fields[:-1], inputs, strict=False):
        if tensor is not None:
            axes = ", ".join(map(str, (tensor.shape[0], "T", *tensor.shape[2:])))
            found[NAMES.get(name, name)] = f"{tensor.dtype} [{axes}]"
    return found
