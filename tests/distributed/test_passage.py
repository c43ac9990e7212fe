"""A rank runs its tokens once, before anything has come: that run is enough, and nobody waits for another's."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from parallelflow import functional
from parallelflow.autograd import Setting
from parallelflow.distributed import Context, flows
from parallelflow.distributed.exchange import apply
from parallelflow.kernels.cpu import build
from parallelflow.problem import Inputs, canonical
from parallelflow.testing import Sizes, make_inputs
from parallelflow.torch_backend import Plan
from tests.cases import STRUCTURES, assert_close, by_name
from tests.distributed.test_sharded import LENGTHS, STARTS, model

SIZES = Sizes(2, 300, 1, 2, 6, 5)
"""Several windows, of the torch backend (256 tokens here) and of the CPU's."""

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5}


class Reached(Exception):
    """A model's function has put its driver together."""


def setting_of(case, tensors, backend):
    """The inputs of a model's call, and the engine for them."""

    def reached(driver, query, **options):
        raise Reached(driver, query, options.get("scale"))

    with mock.patch.object(functional, "integrate", reached), pytest.raises(Reached) as found:
        getattr(functional, case.function)(**tensors, **case.options)
    driver, query, scale = found.value.args
    inputs, traits, _ = canonical(driver, query, None, scale)
    plan = Plan(chunk_size=4) if backend == "torch" else Plan()
    return inputs, Setting(traits, plan, None, backend).with_ties(inputs)


def differ(found, expected, tolerance, what):
    assert (found is None) == (expected is None), what
    if expected is not None:
        assert_close(found, expected, tolerance, what)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("case", STRUCTURES, ids=by_name)
def test_one_run_tells_all_about_the_state_that_enters(case, backend):
    """Output, final state, what is kept for the backward pass, its gradients, and that of the state that enters."""
    if backend == "cpu" and build.COMPILER is None:
        pytest.skip("no C++ compiler")
    dtype = torch.float64 if backend == "torch" else torch.float32
    tolerance = TOLERANCE[dtype]
    sizes = case.sizes(SIZES)
    inputs, setting = setting_of(case, {name: x.to(dtype) for name, x in case.inputs(sizes).items()}, backend)
    state = case.initial_state(sizes).to(dtype)
    started = Inputs(*setting.untied(inputs))._replace(initial_state=state)
    expected, final, kept = setting.forward(started, keep=True)
    d_output, d_final = torch.randn_like(expected), torch.randn_like(state)

    plain = Setting(setting.traits, setting.plan, None, backend)
    passage = flows.pass_through(inputs, plain, lambda wide: backend, keep=True)
    output, found, seen = passage.enter(state, keep=True)
    assert_close(output, expected, tolerance, "output")
    assert_close(apply(passage.flow, state), final, tolerance, "final state")
    assert kept
    assert len(found) == (0 if flows.only_writes(inputs) else len(kept))
    for ours, theirs in zip(found, kept, strict=False):
        assert_close(ours, theirs, tolerance, "kept")
    gradients = setting.backward(started, list(kept), d_output, d_final)
    for name, ours, theirs in zip(
        Inputs._fields, setting.backward(started, list(found), d_output, d_final), gradients, strict=True
    ):
        differ(ours, theirs, tolerance, name)
    pulled = passage.pull(inputs, plain, found, seen, d_output)
    transition = passage.flow.transition
    adjoint = flows.Flow(transition.mT if transition.ndim == 4 else transition, pulled)
    assert_close(apply(adjoint, d_final), gradients.initial_state, tolerance, "gradient of the state that enters")


@pytest.mark.skipif(build.COMPILER is None, reason="no C++ compiler")
def test_a_backend_that_takes_no_more_channels_gives_way():
    """K + V beyond what kernels take: the run is the torch backend's, the backward pass the kernels'."""
    case, sizes = model("gated_delta_rule"), Sizes(1, 9, 1, 1, 300, 300)
    inputs, setting = setting_of(case, {name: x.float() for name, x in case.inputs(sizes).items()}, "cpu")
    state = case.initial_state(sizes).float()
    started = Inputs(*setting.untied(inputs))._replace(initial_state=state)
    expected, _, kept = setting.forward(started, keep=True)
    asked = []
    plain = Setting(setting.traits, setting.plan, None, "cpu")
    passage = flows.pass_through(inputs, plain, lambda wide: asked.append(wide.value.shape[-1]) or "torch", keep=True)
    assert asked == [600]
    output, found, _ = passage.enter(state, keep=True)
    assert found == []
    assert_close(output, expected, 2e-5)
    d_output, d_final = torch.randn_like(expected), torch.randn_like(state)
    pairs = (setting.backward(started, each, d_output, d_final) for each in (found, list(kept)))
    for name, ours, theirs in zip(Inputs._fields, *pairs, strict=True):
        differ(ours, theirs, 2e-5, name)


def again_on_rank(group):
    """The same call without gradients, several times: its outputs."""
    first = 10 * group.rank()
    inputs = make_inputs("gated_delta_rule", Sizes(1, 20, 1, 2, 4, 3))
    mine = {name: x[:, first : first + 10].float() for name, x in inputs.items()}
    with torch.no_grad():
        return [
            functional.gated_delta_rule(**mine, aggregate="distributed", context_group=group).output for _ in range(3)
        ]


def test_calls_over_ranks_are_made_anew(ranks):
    """What is remembered of a call is its launch, which would leave the other ranks waiting."""
    for first, *others in ranks.run(2, again_on_rank):
        assert all(torch.equal(first, other) for other in others)


def traced_on_rank(group, call, inputs, starts, lengths):
    """What this rank does, in order: runs of the engine over its tokens, messages, and waiting for some."""
    events = []

    def noting(name, function):
        def noted(self, *arguments, **options):
            if name in ("wait", "post") and not arguments[0]:
                return function(self, *arguments, **options)  # for nothing
            tokens = arguments[0].query.shape[1] if name in ("forward", "backward") else None
            events.append((name, tokens))
            return function(self, *arguments, **options)

        return noted

    with (
        mock.patch.object(Setting, "forward", noting("forward", Setting.forward)),
        mock.patch.object(Setting, "backward", noting("backward", Setting.backward)),
        mock.patch.object(Context, "wait", noting("wait", Context.wait)),
    ):
        options = {"validate": False, "context_lengths": lengths}
        name, chosen = call
        first = sum(lengths[: group.rank()])
        mine = {key: x[:, first : first + lengths[group.rank()]].clone().requires_grad_() for key, x in inputs.items()}
        cu_seqlens = None if starts is None else torch.tensor(starts)
        output, _ = getattr(functional, name)(
            **mine, **chosen, cu_seqlens=cu_seqlens, aggregate="distributed", context_group=group, **options
        )
        events.append(("loss", None))
        output.sum().backward()
    return events


@pytest.mark.parametrize("starts", [None, STARTS], ids=["batch", "packed"])
@pytest.mark.parametrize("name", ["gated_delta_rule", "ssd"])
def test_no_rank_waits_before_it_has_run(ranks, name, starts):
    """One run over each token, forward and backward, and forward every one of them before the first wait."""
    inputs = make_inputs(name, Sizes(1, 23, 1, 2, 4, 3))
    for size in (2, 4, 7):
        lengths = LENGTHS[size]
        found = ranks.run(size, traced_on_rank, (name, {"chunk_size": 4}), inputs, starts, lengths)
        for rank, events in enumerate(found):
            kinds = [kind for kind, _ in events]
            loss = kinds.index("loss")
            before, after = events[:loss], events[loss + 1 :]
            for kind, part in (("forward", before), ("backward", after)):
                assert sum(tokens for name, tokens in part if name == kind) == lengths[rank], (rank, events)
            assert all(kind != "forward" for kind, _ in after), (rank, events)
            if "wait" in kinds[:loss]:
                assert "forward" not in kinds[kinds.index("wait") : loss], (rank, events)
            elif size > 1 and starts is None:
                assert rank == 0, events  # everyone else has a state to wait for
