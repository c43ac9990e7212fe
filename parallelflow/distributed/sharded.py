"""The aggregate ``distributed``: local flow, exchange, local run; and the same backwards, with the flow transposed.

Forward, every rank finds the flow of its tokens, the exchange turns the flows into the states that enter the ranks, and
every rank runs its tokens from there, as it would alone. Backward, the gradient of the state that enters a rank is
``dS = Pᵀ dS_out + h``, an affine map of the gradient of the state that leaves, whose h is one product with what the
forward pass kept (``pull_back``). So the second exchange comes first, and then one ordinary backward pass.

The first rank of a sequence needs no flow, and its run tells what leaves; the last one's flow nobody needs, and it
makes what its backward pass wants while the flows of others are under way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from parallelflow.autograd import SLOTS, Setting
from parallelflow.distributed import exchange
from parallelflow.distributed.context import Context
from parallelflow.distributed.flows import pull_back, shard_flow, transition_shape
from parallelflow.distributed.shards import Shard
from parallelflow.flow import Flow
from parallelflow.problem import Inputs, sizes_of


@dataclass(frozen=True, eq=False)
class Job:
    """One call on one rank. ``passing`` tells of every rank whether what enters also leaves; ``base`` is the setting of
    all parts but for sequences and backend, which ``choose`` names for inputs; ``sequences`` is N of the whole line;
    ``summed``: final states come together from several ranks (they are on one alone otherwise)."""

    context: Context
    shard: Shard
    passing: tuple[bool, ...]
    base: Setting
    choose: Callable[[Inputs], str]
    sequences: int
    summed: bool
    recording: bool

    def setting(self, untied: Inputs, starts: tuple[int, ...] | None = None) -> Setting:
        """The engine for a part of the tokens."""
        backend = self.choose(self.base.tied(untied)) if untied.query.numel() else "torch"
        return self.base._replace(sequence_starts=None if starts is None else list(starts), backend=backend)

    def head(self, untied: Inputs, entry: Tensor) -> Inputs:
        """The tokens that go on with sequences of the rank before, from the states that enter."""
        return _cut(untied, 0, self.shard.head)._replace(initial_state=entry)

    def rest(self, untied: Inputs) -> Inputs:
        """The tokens of sequences that begin here, whose initial states the inputs have."""
        return _cut(untied, self.shard.head, untied.query.shape[1])

    def run(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """The engine without a backward pass, on inputs whose ties are in place."""
        backend = self.choose(inputs) if inputs.query.numel() else "torch"
        setting = Setting(self.base.traits, self.base.plan, None, backend)
        output, final, _ = setting.forward(inputs, keep=False)
        assert final is not None
        return output, final


def run(inputs: Inputs, job: Job) -> tuple[Tensor, Tensor]:
    """This rank's output, and final states ``[N, HV, K, V]``; if not ``job.summed``, of the sequences that end here.

    ``inputs.initial_state`` is of the sequences that begin here. Differentiable once, with respect to everything; the
    backward pass must run on all ranks or on none.
    """
    if torch._C._are_functorch_transforms_active():
        raise NotImplementedError("aggregate: got 'distributed' under torch.func, expected plain calls")
    anchor = torch.zeros(0, requires_grad=True) if job.recording else None  # where no input here has a gradient
    return _Sharded.apply(job, anchor, *job.base.untied(inputs))


class _Sharded(torch.autograd.Function):
    """``(job, anchor, *inputs) -> (output, final states)``."""

    @staticmethod
    def forward(ctx: Any, job: Job, anchor: Tensor | None, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        untied, shard = Inputs(*tensors), job.shard  # type: ignore[arg-type]
        tied = job.base.tied(untied)
        outputs: list[Tensor] = []
        finals: list[Tensor] = []
        kept_rest: list[Tensor] = []
        kept_head: list[Tensor] = []
        entry = transition = entry_queries = None
        flow = _nothing(tied, shard.lanes)
        if shard.begins:
            rest = job.rest(untied)
            output, final, kept_rest = job.setting(rest, shard.rest_starts).forward(rest, job.recording)
            assert final is not None
            outputs, finals = [output], [final]
            if shard.unfinished:
                finals, flow = [final[: -shard.lanes]], flow._replace(source=final[-shard.lanes :])
        if shard.passing:
            wanted = shard_flow(_cut(tied, 0, shard.head), job.run, source=True, entry_queries=job.recording)
            flow, entry_queries = wanted
        finish = exchange.start(job.context, flow, job.passing)
        if shard.continued:
            if shard.passing:
                transition = flow.transition
            elif job.recording:
                wanted = shard_flow(_cut(tied, 0, shard.head), job.run, source=False, entry_queries=True)
                transition, entry_queries = wanted.flow.transition, wanted.entry_queries
        entry = finish()
        if shard.continued:
            head = job.head(untied, entry)
            output, final, kept_head = job.setting(head).forward(head, job.recording)
            assert final is not None
            outputs.insert(0, output)
            if shard.head_ends:
                finals.insert(0, final)
        if job.recording:
            ctx.job, ctx.counts = job, (len(kept_head), len(kept_rest))
            ctx.save_for_backward(*tensors, entry, transition, entry_queries, *kept_head, *kept_rest)
            ctx.set_materialize_grads(False)
        return _join(outputs, partial(_no_output, tied)), _collect(job, finals, flow.source)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_output: Tensor | None, d_final: Tensor | None) -> tuple:
        job, (count, _) = ctx.job, ctx.counts
        saved = ctx.saved_tensors  # unpacked once: checkpointing allows no second time
        tensors, (entry, transition, entry_queries, *kept) = saved[:SLOTS], saved[SLOTS:]
        untied, shard = Inputs(*tensors), job.shard
        tied = job.base.tied(untied)
        if d_output is None:  # the others wait all the same
            d_output = _no_output(tied)
        d_ends = _spread(job, d_final, entry)
        d_head_end = d_ends[: shard.lanes] if shard.head_ends else None
        d_ends = d_ends[shard.lanes :] if shard.head_ends else d_ends
        d_output_head, d_output_rest = d_output.split([shard.head, d_output.shape[1] - shard.head], 1)

        flow = _nothing(tied, shard.lanes)
        if shard.continued:
            adjoint = _transposed(transition, entry.ndim)
            pulled = pull_back(_cut(tied, 0, shard.head), job.base.traits, entry_queries, d_output_head)
            flow = Flow(adjoint, pulled)
            if d_head_end is not None:
                flow = flow._replace(source=exchange.apply(flow, d_head_end))
        finish = exchange.start(job.context, flow, job.passing, reverse=True)

        def of_head(d_exit: Tensor) -> Inputs:
            head = job.head(untied, entry)
            return job.setting(head).backward(head, list(kept[:count]), d_output_head.contiguous(), d_exit)

        found_head = of_head(d_head_end) if d_head_end is not None else None
        d_exit = finish()
        if shard.passing:
            found_head = of_head(d_exit)
        found_rest = None
        if shard.begins:
            rest = job.rest(untied)
            d_finals = torch.cat([d_ends, d_exit]) if shard.unfinished else d_ends
            setting = job.setting(rest, shard.rest_starts)
            found_rest = setting.backward(rest, list(kept[count:]), d_output_rest.contiguous(), d_finals)
        return None, None, *_gradients(untied, found_head, found_rest)


def _gradients(untied: Inputs, head: Inputs | None, rest: Inputs | None) -> list[Tensor | None]:
    """Of the tokens of both parts, and of the initial states that the rest has."""
    found: list[Tensor | None] = []
    for slot, tensor in enumerate(untied[:-1]):
        parts = [part[slot] for part in (head, rest) if part is not None]
        if tensor is None:
            found.append(None)
        else:
            found.append(_join([part for part in parts if part is not None], partial(torch.zeros_like, tensor)))
    return [*found, None if rest is None else rest.initial_state]


def _join(parts: list[Tensor], nothing: Callable[[], Tensor]) -> Tensor:
    """Along time; what has no tokens adds nothing."""
    filled = [part for part in parts if part.shape[1]]
    if not filled:
        return nothing()
    return filled[0] if len(filled) == 1 else torch.cat(filled, 1)


def _cut(inputs: Inputs, start: int, stop: int) -> Inputs:
    """Tokens ``start`` to ``stop``; ties stay ties."""
    if start == 0 and stop == inputs.query.shape[1]:
        return inputs
    views: dict[int, Tensor] = {}
    for tensor in inputs[:-1]:
        if tensor is not None:
            views.setdefault(id(tensor), tensor[:, start:stop])
    cut = [None if tensor is None else views[id(tensor)] for tensor in inputs[:-1]]
    return Inputs(*cut, inputs.initial_state)  # type: ignore


def _nothing(tied: Inputs, lanes: int) -> Flow:
    """The flow of a rank that says nothing, in the shape of those that do."""
    _, heads, key_dim, value_dim, dtype = sizes_of(tied)
    zeros = tied.query.new_zeros
    return Flow(
        zeros(lanes, *transition_shape(tied), dtype=dtype), zeros(lanes, heads, key_dim, value_dim, dtype=dtype)
    )


def _no_output(tied: Inputs) -> Tensor:
    sizes = sizes_of(tied)
    return tied.query.new_zeros(*tied.query.shape[:2], sizes.value_heads, sizes.value_dim)


def _transposed(transition: Tensor, rank: int) -> Tensor:
    return transition.mT if transition.ndim == rank else transition


def _collect(job: Job, finals: list[Tensor], like: Tensor) -> Tensor:
    """The final states of the sequences that end here; summed: of all, on every rank."""
    local = torch.cat(finals) if finals else like[:0]
    if not job.summed:
        return local
    everyone = local.new_zeros(job.sequences, *local.shape[1:])
    everyone[job.shard.ends.start : job.shard.ends.stop] = local
    return job.context.sum(everyone, "the final states")


def _spread(job: Job, d_final: Tensor | None, like: Tensor) -> Tensor:
    """``_collect`` transposed: the gradients of the final states of the sequences that end here."""
    ends = job.shard.ends
    if not job.summed:
        return like.new_zeros(len(ends), *like.shape[1:]) if d_final is None else d_final.to(like.dtype)
    everyone = like.new_zeros(job.sequences, *like.shape[1:])
    if d_final is not None:
        everyone += d_final
    return job.context.sum(everyone, "the gradients of the final states")[ends.start : ends.stop]
