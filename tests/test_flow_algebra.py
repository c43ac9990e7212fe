"""Flows S -> P S + H form a monoid under composition, and a model's flows obey Chen's relation."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parallelflow.flow import Flow, compose, entry_states
from parallelflow.lanes import Lanes
from parallelflow.testing import Sizes
from tests.cases import AGGREGATES, MODELS, assert_close, by_name, slice_time

KINDS = ("scalar", "diagonal", "dense")
K, V = 4, 3


def flow(kind: str, *leading: int, seed: int = 0) -> Flow:
    shape = {"scalar": (), "diagonal": (K,), "dense": (K, K)}[kind]
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.randn(size, generator=generator, dtype=torch.float64)  # noqa: E731
    return Flow(draw(*leading, *shape) * 0.7, draw(*leading, K, V))


def state(*leading: int) -> torch.Tensor:
    return torch.randn(*leading, K, V, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def dense(flow: Flow) -> torch.Tensor:
    """P as a matrix, whatever its kind."""
    extra = flow.source.dim() - flow.transition.dim()
    if extra == 0:
        return flow.transition
    if extra == 1:
        return torch.diag_embed(flow.transition)
    return flow.transition[..., None, None] * torch.eye(K, dtype=torch.float64)


@pytest.mark.parametrize("leading", [(), (2,), (2, 3)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_apply(kind, leading):
    f, s = flow(kind, *leading), state(*leading)
    assert_close(f.apply(s), dense(f) @ s + f.source, 1e-14)


@pytest.mark.parametrize("leading", [(), (2,), (2, 3)], ids=str)
@pytest.mark.parametrize(("first", "second"), list(itertools.product(KINDS, KINDS)))
def test_composition_is_one_after_the_other(first, second, leading):
    f, g, s = flow(first, *leading, seed=1), flow(second, *leading, seed=2), state(*leading)
    both = compose(f, g)
    assert_close(both.apply(s), g.apply(f.apply(s)), 1e-13)
    assert_close(dense(both), dense(g) @ dense(f), 1e-13)
    assert_close(both.source, dense(g) @ f.source + g.source, 1e-13)
    assert_close(f.then(g).source, both.source, 0)


@pytest.mark.parametrize(("first", "second"), list(itertools.product(KINDS, KINDS)))
def test_composition_is_as_small_as_its_parts(first, second):
    both = compose(flow(first, 2), flow(second, 2))
    assert both.transition.dim() == max(flow(first, 2).transition.dim(), flow(second, 2).transition.dim())


@pytest.mark.parametrize("kinds", list(itertools.product(KINDS, KINDS, KINDS)), ids=str)
def test_composition_is_associative(kinds):
    f, g, h = (flow(kind, 2, seed=i) for i, kind in enumerate(kinds))
    left, right = compose(compose(f, g), h), compose(f, compose(g, h))
    assert_close(dense(left), dense(right), 1e-13)
    assert_close(left.source, right.source, 1e-13)


@pytest.mark.parametrize("kind", KINDS)
def test_identity(kind):
    f, s = flow(kind, 2), state(2)
    one = Flow.identity(f)
    assert one.transition.shape == f.transition.shape
    assert one.transition.dtype == f.transition.dtype
    assert torch.equal(one.apply(s), s)
    for both in (compose(one, f), compose(f, one)):
        assert torch.equal(both.transition, f.transition)
        assert torch.equal(both.source, f.source)


def test_composition_does_not_commute():
    f, g = flow("dense", seed=1), flow("dense", seed=2)
    assert not torch.allclose(compose(f, g).source, compose(g, f).source)


def loop(flows: Flow, lengths, initial):
    entries, final, place = [], [], 0
    for lane, length in enumerate(lengths):
        s = initial[lane]
        for _ in range(length):
            entries.append(s)
            s = Flow(flows.transition[place], flows.source[place]).apply(s)
            place += 1
        final.append(s)
    return torch.stack(entries), torch.stack(final)


def scan(flows: Flow, lengths, initial):
    """`entry_states` with everything lane after lane; its own axis is step after step, the longest lanes first."""
    starts = [sum(lengths[:lane]) for lane in range(len(lengths))]
    order = sorted(range(len(lengths)), key=lambda lane: -lengths[lane])
    places = [starts[lane] + step for step in range(max(lengths)) for lane in order if lengths[lane] > step]
    ordered = Flow(flows.transition[places], flows.source[places])
    entries, final = entry_states(ordered, Lanes(lengths), initial[order])
    return entries[torch.tensor(places).argsort()], final[torch.tensor(order).argsort()]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_exclusive_scan_is_the_loop(kind, lengths):
    flows, initial = flow(kind, sum(lengths), 2), state(len(lengths), 2)
    entries, final = scan(flows, lengths, initial)
    expected = loop(flows, lengths, initial)
    assert_close(entries, expected[0], 1e-12)
    assert_close(final, expected[1], 1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_scan_has_the_gradients_of_the_loop(kind):
    lengths = (3, 1, 6)
    flows, initial = flow(kind, sum(lengths), 1), state(len(lengths), 1)
    tensors = [x.clone().requires_grad_() for x in (*flows, initial)]

    def grads(run):
        entries, final = run(Flow(*tensors[:2]))
        return torch.autograd.grad(entries.square().sum() + final.sin().sum(), tensors)

    actual = grads(lambda f: scan(f, lengths, tensors[2]))
    expected = grads(lambda f: loop(f, lengths, tensors[2]))
    for got, wanted in zip(actual, expected, strict=True):
        assert_close(got, wanted, 1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_nan_stays_in_its_lane(kind):
    lengths = (3, 4, 2)
    flows, initial = flow(kind, sum(lengths)), state(len(lengths))
    flows.source[4] = torch.nan
    entries, final = scan(flows, lengths, initial)
    assert final[1].isnan().any()
    assert final[[0, 2]].isfinite().all()
    assert entries[[0, 1, 2, 7, 8]].isfinite().all()


def model_flow(model, inputs, sizes, start, stop, **options):
    """The flow of the tokens [start, stop): H from the zero state, P from what a basis of states adds to it."""
    part = slice_time(inputs, start, stop)
    run = lambda s: model(part, initial_state=s, return_final_state=True, **options).final_state  # noqa: E731
    value_size = model.state_value_size(sizes.value_size)
    source = run(torch.zeros(1, sizes.value_heads, sizes.key_size, value_size, dtype=torch.float64))
    columns = []
    for k in range(sizes.key_size):
        basis = torch.zeros_like(source)
        basis[:, :, k] = 1.0
        columns.append((run(basis) - source)[..., 0])
    return Flow(torch.stack(columns, dim=-1), source)


@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("model", MODELS, ids=by_name)
def test_chens_relation(model, aggregate):
    """The flow over [s, u] is that over [s, t], then that over [t, u]; and it maps the state at s to that at u."""
    sizes = Sizes(1, 13, 1, 2, 3, 2)
    inputs = model.inputs(sizes)
    options = {"chunk_size": 2, "aggregate": aggregate}
    whole = model_flow(model, inputs, sizes, 1, 12, **options)
    for cut in (2, 6, 11):
        parts = compose(
            model_flow(model, inputs, sizes, 1, cut, **options), model_flow(model, inputs, sizes, cut, 12, **options)
        )
        assert_close(parts.transition, whole.transition, 1e-12)
        assert_close(parts.source, whole.source, 1e-12)
    entry = model.initial_state(sizes)
    exit = model.oracle(slice_time(inputs, 1, 12), initial_state=entry).final_state
    assert_close(whole.apply(entry), exit, 1e-12)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda f: f.apply(state()[:2]), ValueError, r"state: got shape \[2, 3\], expected .* = \[4, 3\]"),
        (lambda f: f.apply(state()[:, :2]), ValueError, r"state: got shape \[4, 2\]"),
        (
            lambda f: f.apply(state().float()),
            TypeError,
            "state: got dtype torch.float32, expected the flow's, torch.float64",
        ),
        (lambda f: f.apply([0.0]), TypeError, "state: got list, expected a tensor"),
        (lambda f: Flow(f.transition[:3], f.source).apply(state()), ValueError, r"transition: got shape \[3, 4\]"),
        (lambda f: Flow(f.transition[..., 0, :3], f.source).apply(state()), ValueError, r"transition: got shape \[3\]"),
        (lambda f: compose(f, Flow(f.transition, f.source[:, :2])), ValueError, r"later.source: got shape \[4, 2\]"),
        (
            lambda f: compose(f, Flow(f.transition[:3, :3], f.source[:3])),
            ValueError,
            r"later.source: got shape \[3, 3\]",
        ),
        (lambda f: compose(f, f.source), TypeError, "later: got Tensor, expected a Flow"),
        (lambda f: compose(f.source, f), TypeError, "first: got Tensor, expected a Flow"),
    ],
)
def test_errors_of_flows(call, error, message):
    with pytest.raises(error, match=message):
        call(flow("dense"))
