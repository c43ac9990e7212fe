"""Every model, with every solver, aggregate and chunk size, is its recurrence: output and state, float64, 1e-10."""

from __future__ import annotations

import inspect
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import parallelflow as pf
from parallelflow.testing import Sizes
from tests import oracles
from tests.cases import (
    AGGREGATES,
    CHUNK_SIZES,
    LENGTHS,
    MODELS,
    PUBLISHED,
    SOLVERS,
    STRUCTURES,
    Model,
    assert_close,
    by_name,
)

ORDER = ("query", "key", "value", "beta", "erase", "write", "log_decay")
"""Of positional arguments; ``erase`` and ``write`` are the two β of Gated DeltaNet-2."""
TINY = Sizes(batch=2, heads=1, value_heads=2, key_size=3, value_size=2)


@cache
def problem(model: Model, sizes: Sizes, stated: bool = True):
    inputs = model.inputs(sizes)
    state = model.initial_state(sizes) if stated else None
    return inputs, state, model.oracle(inputs, initial_state=state)


def check(model: Model, sizes: Sizes, stated: bool = True, tolerance: float = 1e-10, **options) -> None:
    inputs, state, expected = problem(model, sizes, stated)
    result = model(inputs, initial_state=state, return_final_state=True, **options)
    assert result.output.dtype == torch.float64
    assert result.final_state.dtype == torch.float64
    assert_close(result.output, expected.output, tolerance, f"output, {options}")
    assert_close(result.final_state, expected.final_state, tolerance, f"final state, {options}")


@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("model", MODELS, ids=by_name)
def test_every_choice_is_the_recurrence(model, solver, aggregate):
    for length in LENGTHS:
        for chunk_size in CHUNK_SIZES:
            check(model, TINY._replace(length=length), solver=solver, aggregate=aggregate, chunk_size=chunk_size)


@pytest.mark.parametrize("model", MODELS, ids=by_name)
def test_defaults_over_several_chunks(model):
    check(model, Sizes(batch=1, length=150, heads=1, value_heads=1, key_size=4, value_size=3), stated=False)


@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("solver", SOLVERS)
def test_large_chunks(solver, aggregate):
    """Chunk sizes 64 and 128, where the inverse is merged from blocks over several levels, on and off their grid."""
    for model in STRUCTURES:
        if model.function in ("kimi_delta_attention", "delta_product", "low_rank_flow"):
            for chunk_size, length in ((64, 130), (100, 101), (128, 200)):
                check(
                    model,
                    Sizes(length=length, key_size=5, value_size=2),
                    solver=solver,
                    aggregate=aggregate,
                    chunk_size=chunk_size,
                )
                if solver in ("sequential", "sigdelta"):
                    break


@pytest.mark.parametrize("sizes", [(1, 1), (1, 5), (48, 80), (80, 48), (80, 1)], ids=str)
@pytest.mark.parametrize("model", MODELS, ids=by_name)
def test_any_size(model, sizes):
    key_size, value_size = sizes
    sizes = Sizes(length=7, heads=1, value_heads=1, key_size=key_size, value_size=value_size)
    check(model, sizes, chunk_size=4)


@pytest.mark.parametrize("model", STRUCTURES, ids=by_name)
def test_size_576(model):
    check(model, Sizes(length=5, key_size=576, value_size=8), chunk_size=4)
    check(model, Sizes(length=5, key_size=8, value_size=576), chunk_size=4)


@pytest.mark.parametrize("heads", [(1, 1), (1, 3), (3, 3), (2, 4), (2, 6)], ids=str)
@pytest.mark.parametrize("model", MODELS, ids=by_name)
def test_grouped_heads(model, heads):
    """Value head h reads key head h // (HV / H)."""
    sizes = Sizes(batch=2, length=6, heads=heads[0], value_heads=heads[1], key_size=3, value_size=2)
    check(model, sizes, chunk_size=4)


@pytest.mark.parametrize("model", MODELS, ids=by_name)
def test_long_sequence(model):
    """Many chunks: rounding does not pile up, in any aggregate."""
    for aggregate in AGGREGATES:
        check(model, Sizes(length=257, key_size=3, value_size=2), aggregate=aggregate, chunk_size=8)


@pytest.mark.parametrize("model", STRUCTURES, ids=by_name)
def test_many_heads(model):
    """Where time may be walked in windows to bound memory: few tokens at once, so every window edge is met."""
    check(model, Sizes(batch=2, length=21, heads=16, value_heads=64, key_size=2, value_size=1), chunk_size=2)
    check(model, Sizes(batch=1, length=150, heads=2, value_heads=4, key_size=2, value_size=1), chunk_size=1)


@pytest.mark.parametrize("model", PUBLISHED, ids=by_name)
def test_positional_order(model):
    """query, key, value, beta, log_decay, as far as a model has them; the other tensors are keyword-only or a β."""
    inputs = model.inputs(TINY)
    function = getattr(pf, model.function)
    parameters = inspect.signature(function).parameters.values()
    keywords = {x.name for x in parameters if x.kind is x.KEYWORD_ONLY}
    positional = [x.name for x in parameters if x.kind is x.POSITIONAL_OR_KEYWORD]
    assert positional == [name for name in ORDER if name in positional]
    named = {name: x for name, x in inputs.items() if name in keywords}
    result = function(*(inputs[name] for name in positional if name in inputs), **named, **model.options)
    assert_close(result.output, model.oracle(inputs).output)


@pytest.mark.parametrize("model", MODELS, ids=by_name)
def test_scale(model):
    inputs = model.inputs(TINY)
    result = model(inputs, scale=0.37, chunk_size=4)
    assert_close(result.output, model.oracle(inputs, scale=0.37).output)


@pytest.mark.parametrize("model", PUBLISHED, ids=by_name)
def test_normalize_query_key(model):
    inputs = model.inputs(TINY)
    inputs |= {name: 3.0 * inputs[name] for name in model.normalized}
    for name in model.normalized:
        inputs[name][:, 3] *= 1e-3  # where the 1e-6 under the root is seen
    result = model(inputs, normalize_query_key=True, chunk_size=4, return_final_state=True)
    expected = model.oracle(inputs, normalized=model.normalized)
    assert_close(result.output, expected.output)
    assert_close(result.final_state, expected.final_state)


@pytest.mark.parametrize("model", MODELS, ids=by_name)
def test_final_state_only_when_asked(model):
    assert model(model.inputs(TINY)).final_state is None


@pytest.mark.parametrize("model", MODELS, ids=by_name)
def test_no_tokens(model):
    """T = 0: no output, the state as it was."""
    sizes = TINY._replace(length=0)
    state = model.initial_state(sizes)
    result = model(model.inputs(sizes), initial_state=state, return_final_state=True)
    assert result.output.shape == (2, 0, 2, 2)
    assert_close(result.final_state, state)


@pytest.mark.parametrize("model", MODELS, ids=by_name)
def test_strides_do_not_matter(model):
    """Transposed storage, and tensors expanded over the batch."""
    inputs = model.inputs(TINY)
    twisted = {name: x if x.dim() < 3 else x.transpose(1, 2).contiguous().transpose(1, 2) for name, x in inputs.items()}
    expected = model(inputs, chunk_size=4).output
    assert_close(model(twisted, chunk_size=4).output, expected, 1e-12)
    expanded = {name: x if x.dim() < 3 else x[:1].expand_as(x) for name, x in inputs.items()}
    assert_close(model(expanded, chunk_size=4).output[1], expected[0], 1e-12)


@pytest.mark.parametrize("model", MODELS, ids=by_name)
def test_inputs_are_left_alone(model):
    inputs, state = model.inputs(TINY), model.initial_state(TINY)
    before = {name: x.clone() for name, x in inputs.items()}
    kept = state.clone()
    result = model(inputs, initial_state=state, return_final_state=True, chunk_size=4)
    result.final_state.zero_()
    assert torch.equal(state, kept)
    assert all(torch.equal(inputs[name], before[name]) for name in inputs)


@settings(max_examples=60)
@given(data=st.data())
def test_any_shape(data):
    model = data.draw(st.sampled_from(MODELS))
    heads = data.draw(st.integers(1, 3))
    sizes = Sizes(
        batch=data.draw(st.integers(1, 3)),
        length=data.draw(st.integers(1, 40)),
        heads=heads,
        value_heads=heads * data.draw(st.integers(1, 3)),
        key_size=data.draw(st.integers(1, 9)),
        value_size=data.draw(st.integers(1, 9)),
    )
    check(
        model,
        sizes,
        stated=data.draw(st.booleans()),
        solver=data.draw(st.sampled_from(SOLVERS)),
        aggregate=data.draw(st.sampled_from(AGGREGATES)),
        chunk_size=data.draw(st.integers(1, 48)),
    )


# Drivers that no model has: what the engine's normal form allows beyond the functions.


def rows_of(*parts):
    """The oracle's stacked rows [B, T, R, HV, .] from materialised (read, write, value) triples."""
    heads = max(x.shape[-2] for part in parts for x in part if x is not None)
    spread = lambda x: oracles.per_value_head(x if x.dim() == 5 else x[:, :, None], heads)  # noqa: E731
    reads, writes, values = [], [], []
    value_like = next(value for _, _, value in parts if value is not None)
    for read, write, value in parts:
        write = spread(write)
        writes.append(write)
        reads.append(torch.zeros_like(write) if read is None else spread(read))
        blank = write.new_zeros(*write.shape[:-1], value_like.shape[-1])
        values.append(blank if value is None else spread(value))
    return {"read": torch.cat(reads, 2), "write": torch.cat(writes, 2), "value": torch.cat(values, 2)}


def draw(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("decay", ["none", "scalar", "vector"])
@pytest.mark.parametrize("kind", ["simultaneous-decayed", "simultaneous-raw", "sequential-decayed"])
def test_rows_of_every_kind_together(solver, aggregate, decay, kind):
    """One token with a row that only writes, one that only transforms, a channel-wise one and a stack of two."""
    order, reads = kind.split("-")
    batch, length, heads, value_heads, key_size, value_size = 2, 7, 1, 2, 4, 3
    a, b, c, d = (draw(batch, length, heads, key_size, seed=i) / 2 for i in range(4))
    u, v = (draw(batch, length, value_heads, value_size, seed=i) for i in (5, 6))
    stack_write = draw(batch, length, 2, heads, key_size, seed=7) / 2
    stack_value = draw(batch, length, 2, value_heads, value_size, seed=8)
    per_row = draw(batch, length, value_heads, seed=9).sigmoid()
    per_channel = draw(batch, length, value_heads, key_size, seed=10).sigmoid()
    per_value = draw(batch, length, value_heads, value_size, seed=11).sigmoid()
    per_stacked = draw(batch, length, 2, value_heads, seed=12).sigmoid()
    query = draw(batch, length, heads, key_size, seed=13)
    gate = {
        "none": None,
        "scalar": -draw(batch, length, value_heads, seed=14).abs(),
        "vector": -draw(batch, length, value_heads, key_size, seed=15).abs(),
    }[decay]
    driver = pf.LowRankDriver(
        rows=(
            pf.Row(read=None, write=a, value=pf.Factor(u)),
            pf.Row(read=pf.Factor(b, per_channel, -1), write=b, value=None),
            pf.Row(
                read=pf.Factor(stack_write, per_stacked, -1),
                write=stack_write,
                value=pf.Factor(stack_value, per_stacked),
            ),
            pf.Row(read=pf.Factor(c, per_row), write=d, value=pf.Factor(v, per_value, -1)),
        ),
        log_decay=gate,
        order=order,
        reads=reads,
    )
    spread = lambda x: oracles.per_value_head(x, value_heads)  # noqa: E731
    rows = rows_of(
        (None, spread(a), u),
        (-per_channel * spread(b), spread(b), None),
        (-per_stacked[..., None] * spread(stack_write), spread(stack_write), per_stacked[..., None] * stack_value),
        (per_row[..., None] * spread(c), spread(d), -per_value * v),
    )
    inputs = {"query": query, **rows} | ({} if gate is None else {"log_decay": gate})
    state = draw(batch, value_heads, key_size, value_size, seed=16)
    expected = oracles.evaluate(oracles.low_rank_flow, inputs, initial_state=state, order=order, reads=reads)
    for chunk_size in (2, 5, 16):
        result = pf.integrate(
            driver,
            query,
            solver=solver,
            aggregate=aggregate,
            chunk_size=chunk_size,
            initial_state=state,
            return_final_state=True,
        )
        assert_close(result.output, expected.output, what=f"output, {chunk_size}")
        assert_close(result.final_state, expected.final_state, what=f"final state, {chunk_size}")
