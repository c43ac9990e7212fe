"""The aggregate ``distributed``: local run, exchange, one product; and the same backwards, with the flow transposed.

Forward, every rank runs its tokens at once, before it knows the state that enters: the run gives the outputs from a
zero state, the flow, and what every output says of the state that enters (``Passage``). The exchange turns the flows
into the states that enter the ranks, and one product adds what those do to the outputs. Backward, the gradient of the
state that enters a rank is ``dS = Pᵀ dS_out + h``, an affine map of the gradient of the state that leaves, whose h is
one product with what the forward pass kept (``pull_back``). So the second exchange comes first, and then one ordinary
backward pass. No rank's pass over its tokens waits for another's.

The first rank of a sequence knows the state that enters, and its run tells what leaves: where another sequence ends on
it, that one runs while the exchange is under way. The last one sends nothing, and asks for its state once it has run:
what waits on a GPU takes multiprocessors from what runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from parallelflow.autograd import SLOTS, Setting
from parallelflow.distributed import exchange
from parallelflow.distributed.context import Context
from parallelflow.distributed.flows import InHalves, Passage, first_half, pass_through, transition_shape
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

    def passage(self, untied: Inputs) -> Passage:
        """The head's run, before its states are known."""
        head = self.base.tied(_cut(untied, 0, self.shard.head))
        return pass_through(head, self.plain(head), self.choose, self.recording)

    def beginning(self, rest: Inputs) -> InHalves | None:
        """The first half of a regular batch that begins here and goes on elsewhere, where runs come in halves."""
        if self.shard.rest_starts is not None or not self.shard.unfinished:
            return None
        tied = self.base.tied(rest)
        return first_half(tied, self.plain(tied))

    def plain(self, tied: Inputs) -> Setting:
        """The engine for tokens of a regular batch whose ties are in place."""
        return Setting(self.base.traits, self.base.plan, None, self.choose(tied) if tied.query.numel() else "torch")


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
        seen: list[Tensor] = []
        passage = beginning = None
        flow = _nothing(tied, shard.lanes)
        if shard.begins:
            rest = job.rest(untied)
            beginning = job.beginning(rest)
        if beginning is not None:  # what leaves is known before the run
            started = flow.source if untied.initial_state is None else untied.initial_state
            flow = flow._replace(source=exchange.apply(beginning.flow, started))
        elif shard.begins:
            output, final, kept_rest = job.setting(rest, shard.rest_starts).forward(rest, job.recording)
            assert final is not None
            outputs, finals = [output], [final]
            if shard.unfinished:
                finals, flow = [final[: -shard.lanes]], flow._replace(source=final[-shard.lanes :])
        if shard.continued and (shard.passing or not shard.unfinished):
            passage = job.passage(untied)
            flow = passage.flow
        finish = exchange.start(job.context, flow, job.passing)
        if shard.continued and passage is None:  # what leaves is known: it goes first
            passage = job.passage(untied)
        if beginning is not None:
            output, kept_rest, _ = beginning.enter(started, job.recording)
            outputs = [output]
        entry = finish()
        if passage is not None:
            output, kept_head, seen = passage.enter(entry, job.recording)
            outputs.insert(0, output)
            if shard.head_ends:
                finals.insert(0, exchange.apply(passage.flow, entry))
        if job.recording:
            transition = None if passage is None else passage.flow.transition
            ctx.job, ctx.counts = job, (len(seen), len(kept_head))
            ctx.pull = None if passage is None else passage.pull
            ctx.save_for_backward(*tensors, entry, transition, *seen, *kept_head, *kept_rest)
            ctx.set_materialize_grads(False)
        return _join(outputs, partial(_no_output, tied)), _collect(job, finals, flow.source)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_output: Tensor | None, d_final: Tensor | None) -> tuple:
        job, (count, stop) = ctx.job, accumulate(ctx.counts)
        saved = ctx.saved_tensors  # unpacked once: checkpointing allows no second time
        tensors, (entry, transition, *kept) = saved[:SLOTS], saved[SLOTS:]
        seen, kept_head, kept_rest = kept[:count], kept[count:stop], kept[stop:]
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
            head = _cut(tied, 0, shard.head)
            flow = Flow(adjoint, ctx.pull(head, job.plain(head), kept_head, seen, d_output_head))
            if d_head_end is not None:
                flow = flow._replace(source=exchange.apply(flow, d_head_end))
        finish = exchange.start(job.context, flow, job.passing, reverse=True)

        def of_head(d_exit: Tensor) -> Inputs:
            head = job.head(untied, entry)
            return job.setting(head).backward(head, kept_head, d_output_head.contiguous(), d_exit)

        found_head = of_head(d_head_end) if d_head_end is not None else None
        d_exit = finish()
        if shard.passing:
            found_head = of_head(d_exit)
        found_rest = None
        if shard.begins:
            rest = job.rest(untied)
            d_finals = torch.cat([d_ends, d_exit]) if shard.unfinished else d_ends
            setting = job.setting(rest, shard.rest_starts)
            found_rest = setting.backward(rest, kept_rest, d_output_rest.contiguous(), d_finals)
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
    return inputs.each(range(len(inputs) - 1), lambda tensor: tensor[:, start:stop])


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
