"""torch.compile sees one graph, with every length the same; double backward through it raises rather than lies."""

from __future__ import annotations

import time

import pytest
import torch

import parallelflow as pf
from parallelflow.testing import Sizes
from tests.cases import STRUCTURES, assert_close, by_name, gradients, require_grad

SIZES = Sizes(batch=2, length=70, heads=1, value_heads=2, key_size=4, value_size=3)
FEW = tuple(m for m in STRUCTURES if m.name in {"retention", "delta_product-3-scalar", "rwkv7"})
"""Scalar, sequential, vector with raw reads: where compiling every structure would cost a minute."""
DELTA = next(model for model in STRUCTURES if model.name == "gated_delta_rule")


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Counting:
    """A compiler backend that counts the graphs it is given and runs them as they are, gradients included."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, module, examples):
        self.graphs += 1
        from torch._dynamo.backends.debugging import aot_eager

        return aot_eager(module, examples)


def runner(model, **options):
    def run(inputs, state):
        result = model(inputs, initial_state=state, return_final_state=True, **options)
        return result.output, result.final_state

    return run


@pytest.mark.parametrize("model", STRUCTURES, ids=by_name)
def test_fullgraph_is_eager(model):
    inputs, state = model.inputs(SIZES), model.initial_state(SIZES)
    tensors = require_grad(inputs | {"initial_state": state})
    parts = {name: x for name, x in tensors.items() if name != "initial_state"}
    run = runner(model)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    expected, actual = run(parts, tensors["initial_state"]), compiled(parts, tensors["initial_state"])
    for got, wanted in zip(actual, expected, strict=True):
        assert_close(got, wanted, 1e-12)
    wanted = gradients(expected, tensors)
    for name, got in gradients(actual, tensors).items():
        assert_close(got, wanted[name], 1e-12, name)


def test_inductor_is_eager():
    inputs, state = DELTA.inputs(SIZES), DELTA.initial_state(SIZES)
    tensors = require_grad(inputs)
    run = runner(DELTA)
    actual = torch.compile(run, fullgraph=True)(tensors, state)
    expected = run(tensors, state)
    for got, wanted in zip(actual, expected, strict=True):
        assert_close(got, wanted, 1e-12)
    wanted = gradients(expected, tensors)
    for name, got in gradients(actual, tensors).items():
        assert_close(got, wanted[name], 1e-12, name)


@pytest.mark.parametrize(("dynamic", "chunk_size"), [(None, 64), (True, 64), (True, 1)], ids=str)
@pytest.mark.parametrize("model", FEW, ids=by_name)
def test_a_new_length_does_not_recompile(model, dynamic, chunk_size):
    """At most once, when PyTorch learns by the second length that lengths vary; then never.

    With chunks of one token few tokens are walked at once, so that the lengths take different numbers of passes.
    """
    counting = Counting()
    run = runner(model, chunk_size=chunk_size)
    compiled = torch.compile(run, fullgraph=True, backend=counting, dynamic=dynamic)
    for index, length in enumerate((70, 90, 64, 300, 129)):
        sizes = SIZES._replace(length=length)
        inputs, state = model.inputs(sizes), model.initial_state(sizes)
        output, final = compiled(require_grad(inputs), state)
        expected = run(inputs, state)
        assert_close(output, expected[0], 1e-12)
        assert_close(final, expected[1], 1e-12)
        output.sum().backward()
        if index == 1:
            learnt = counting.graphs
    assert counting.graphs == learnt <= 2


def test_a_new_batch_does_not_recompile_a_dynamic_graph():
    counting = Counting()
    compiled = torch.compile(runner(DELTA), fullgraph=True, backend=counting, dynamic=True)
    for batch, length in ((5, 70), (6, 80), (7, 33)):
        sizes = SIZES._replace(batch=batch, length=length)
        compiled(DELTA.inputs(sizes), DELTA.initial_state(sizes))
    assert counting.graphs == 1


def test_long_sequences_compile_soon():
    """T = 4096, forward and backward, through the default compiler: at most 20 s."""
    sizes = Sizes(1, 4096, 1, 1, 16, 16)
    tensors = require_grad(DELTA.inputs(sizes, dtype=torch.float32))
    start = time.perf_counter()
    output, _ = torch.compile(runner(DELTA), fullgraph=True)(tensors, None)
    output.sum().backward()
    assert time.perf_counter() - start < 20


def test_packed_sequences_compile():
    inputs = DELTA.inputs(SIZES._replace(batch=1))
    bounds = torch.tensor([0, 3, 3, 50, 70])

    def run(inputs, bounds):
        return pf.gated_delta_rule(**inputs, cu_seqlens=bounds, chunk_size=16).output

    expected = DELTA.oracle(inputs, cu_seqlens=bounds.tolist()).output
    counting = Counting()
    compiled = torch.compile(run, fullgraph=True, backend=counting)
    assert_close(compiled(inputs, bounds), expected)
    other = torch.tensor([0, 20, 40, 41, 70])
    assert_close(compiled(inputs, other), DELTA.oracle(inputs, cu_seqlens=other.tolist()).output)
    assert counting.graphs == 1


@pytest.mark.parametrize("model", FEW, ids=by_name)
def test_states_at_positions_compile(model):
    inputs = model.inputs(SIZES)
    run = lambda inputs: model(inputs, state_positions=[3, 70]).states  # noqa: E731
    assert_close(torch.compile(run, fullgraph=True, backend="aot_eager")(inputs), run(inputs), 1e-12)


@pytest.mark.parametrize("model", FEW, ids=by_name)
def test_steps_compile(model):
    inputs = {name: x if x.dim() == 1 else x[:, 0] for name, x in model.inputs(SIZES).items()}
    state = model.initial_state(SIZES)
    run = lambda inputs, state: tuple(model.step(inputs, state=state))  # noqa: E731
    actual = torch.compile(run, fullgraph=True, backend="aot_eager")(inputs, state)
    for got, wanted in zip(actual, run(inputs, state), strict=True):
        assert_close(got, wanted, 1e-12)


@pytest.mark.parametrize("model", FEW, ids=by_name)
def test_compiled_double_backward_raises(model):
    """A second derivative that the compiled graph does not have is an error, never a silent zero."""
    tensors = require_grad(model.inputs(SIZES))
    compiled = torch.compile(lambda inputs: model(inputs).output, fullgraph=True, backend="aot_eager")
    output = compiled(tensors)

    def twice():
        (first,) = torch.autograd.grad(output.square().sum(), tensors["value"], create_graph=True)
        return torch.autograd.grad(first.square().sum(), tensors["query"])

    with pytest.raises((RuntimeError, NotImplementedError), match=r"(?i)double backward|twice|higher.order|second"):
        twice()


def test_autocast_compiles():
    inputs = DELTA.inputs(SIZES, dtype=torch.float32)

    def run(inputs):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return DELTA(inputs).output

    expected = run(inputs)
    actual = torch.compile(run, fullgraph=True, backend="aot_eager")(inputs)
    assert actual.dtype == expected.dtype
    assert_close(actual.float(), expected.float(), 1e-5 if actual.dtype == torch.float32 else 1e-2)


def test_bad_arguments_still_raise():
    """What an eager call refuses, a compiled one refuses."""
    inputs = DELTA.inputs(SIZES)
    compiled = torch.compile(lambda inputs: DELTA(inputs).output, backend="aot_eager")
    with pytest.raises(Exception, match="beta"):
        compiled(inputs | {"beta": inputs["beta"][:, :-1]})


def test_export():
    """torch.export traces it too, with a length that may vary."""

    class Module(torch.nn.Module):
        def forward(self, query, key, value, beta, log_decay):
            return pf.gated_delta_rule(query, key, value, beta, log_decay).output

    inputs = DELTA.inputs(SIZES)
    length = torch.export.Dim("length", min=2, max=4096)
    shapes = {name: {1: length} for name in inputs}
    program = torch.export.export(Module(), tuple(inputs.values()), dynamic_shapes=shapes)
    other = DELTA.inputs(SIZES._replace(length=101))
    assert_close(program.module()(*other.values()), DELTA(other).output, 1e-12)


@pytest.mark.parametrize("model", STRUCTURES, ids=by_name)
def test_every_structure_is_exported(model):
    """The chunked form with a length that may vary, and a step on a store."""
    inputs = model.inputs(SIZES)
    names = list(inputs)

    class Chunked(torch.nn.Module):
        def forward(self, *tensors):
            return model(dict(zip(names, tensors, strict=True)), chunk_size=16).output

    class Step(torch.nn.Module):
        def forward(self, store, indices, *tensors):
            one = dict(zip(names, tensors, strict=True))
            return model.step(one, state=store, state_indices=indices, in_place=True).output

    length = torch.export.Dim("length", min=2, max=4096)
    shapes = (tuple(None if x.dim() == 1 else {1: length} for x in inputs.values()),)
    program = torch.export.export(Chunked(), tuple(inputs.values()), dynamic_shapes=shapes).module()
    other = model.inputs(SIZES._replace(length=101))
    assert_close(program(*other.values()), model(other).output, 1e-12)

    store, indices = model.initial_state(SIZES, sequences=3), torch.tensor([2, -1])
    one = {name: x if x.dim() == 1 else x[:, 0] for name, x in inputs.items()}
    stores = [store.clone(), store.clone()]
    program = torch.export.export(Step(), (stores[0].clone(), indices, *one.values())).module()
    last = {name: x if x.dim() == 1 else x[:, 9] for name, x in other.items()}
    for index in (indices, indices.flip(0)):
        found, wanted = (run(stores[place], index, *last.values()) for place, run in enumerate((program, Step())))
        assert_close(found, wanted, 1e-12)
    assert_close(stores[0], stores[1], 1e-12)
