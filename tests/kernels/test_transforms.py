"""What PyTorch does with functions, done with the kernels: compiled, captured, cast, checkpointed, exported, mapped.

Without a GPU in Triton's interpreter, what needs no GPU.
"""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton")

import parallelflow as pf
from benchmarks.gpu import captured
from parallelflow.testing import Sizes
from tests.cases import STRUCTURES, by_name, gradients, token

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
BACKEND = "auto" if GPU else "triton"
COMPILER = "inductor" if GPU else "aot_eager"
SERVED = tuple(m for m in STRUCTURES if m.name in {"gated_delta_rule", "delta_rule", "retention"})
"""Of those whose chunks the kernels compute."""
DELTA = next(model for model in STRUCTURES if model.name == "gated_delta_rule")
SIZES = Sizes(2, 200, 2, 4, 64, 64) if GPU else Sizes(1, 70, 1, 2, 16, 16)
SHORT = SIZES._replace(batch=2, length=3)
needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="needs a CUDA device")]


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def draw(model, sizes=SIZES, seed=0, dtype=torch.float32):
    """Inputs, vectors in ``dtype``, and an initial state."""
    wide = ("beta", "log_decay", "erase")
    inputs = model.inputs(sizes, seed=seed)
    tensors = {n: x.to(device=DEVICE, dtype=torch.float32 if n in wide else dtype) for n, x in inputs.items()}
    return tensors, model.initial_state(sizes, seed=seed).float().to(DEVICE)


def leaves(inputs, state):
    return {n: x.clone().requires_grad_() for n, x in (inputs | {"initial_state": state}).items()}


def run(model, tensors, **options):
    inputs = {name: x for name, x in tensors.items() if name != "initial_state"}
    state = tensors.get("initial_state")
    result = model(inputs, initial_state=state, return_final_state=True, backend=BACKEND, **options)
    return result.output, result.final_state


def assert_same(found, wanted, allowed=2e-5):
    """Equal up to the order of float32 sums."""
    for got, reference in zip(found, wanted, strict=True):
        assert got.dtype == reference.dtype
        assert (got.double() - reference.double()).norm() <= allowed * reference.double().norm()


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16] if GPU else [torch.float32], ids=str)


@DTYPES
@pytest.mark.parametrize("model", SERVED, ids=by_name)
def test_compiled_in_one_graph(model, dtype):
    tensors = leaves(*draw(model, dtype=dtype))
    compiled = torch.compile(lambda tensors: run(model, tensors), fullgraph=True, backend=COMPILER)
    wanted, found = run(model, tensors), compiled(tensors)
    assert_same(found, wanted)
    allowed = 2e-5 if dtype == torch.float32 else 1e-2  # what the backward pass makes again may be made in other tiles
    assert_same(gradients(found, tensors).values(), gradients(wanted, tensors).values(), allowed)


@pytest.mark.parametrize("model", STRUCTURES if GPU else SERVED, ids=by_name)
def test_steps_compiled_in_one_graph(model):
    """On a store, in place."""
    inputs, store = draw(model, SHORT)
    indices = torch.tensor([1, -1], device=DEVICE)

    def call(inputs, store, indices):
        options = {"state_indices": indices, "in_place": True, "backend": BACKEND, "validate": False}
        return model.step(inputs, state=store, **options).output

    compiled = torch.compile(call, fullgraph=True, backend=COMPILER)
    stores = [store.clone(), store.clone()]
    for t in range(SHORT.length):
        one = token(inputs, t)
        with torch.no_grad():
            assert_same([compiled(one, stores[0], indices)], [call(one, stores[1], indices)])
    assert_same(stores[:1], stores[1:])


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("model", SERVED, ids=by_name)
def test_activation_checkpointing(model, reentrant):
    tensors = leaves(*draw(model))
    names = list(tensors)

    def forward(*values):
        return run(model, dict(zip(names, values, strict=True)))

    wanted = gradients(forward(*tensors.values()), tensors)
    found = gradients(checkpoint(forward, *tensors.values(), use_reentrant=reentrant), tensors) if not reentrant else {}
    if reentrant:  # takes .backward() only
        generator = torch.Generator().manual_seed(3)
        outputs = checkpoint(forward, *tensors.values(), use_reentrant=True)
        sum(
            (torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) * x).sum() for x in outputs
        ).backward()
        found = {name: x.grad for name, x in tensors.items()}
    for name, got in found.items():
        assert torch.equal(got, wanted[name]), name


@pytest.mark.parametrize("model", SERVED, ids=by_name)
def test_autocast(model):
    """Vectors in the autocast dtype, coefficients, decays and states in float32; gradients in the inputs' dtypes."""
    inputs, state = draw(model)
    rounded = {n: x if n in ("beta", "log_decay") else x.bfloat16() for n, x in inputs.items()}
    tensors, halves = leaves(inputs, state), leaves(rounded, state)
    with torch.autocast(DEVICE, torch.bfloat16):
        found = run(model, tensors)
    wanted = run(model, halves)
    for got, reference in zip(found, wanted, strict=True):
        assert got.dtype == reference.dtype
        assert torch.equal(got, reference)
    expected = gradients(wanted, halves)
    for name, got in gradients(found, tensors).items():
        assert got.dtype == torch.float32
        assert torch.equal(got, expected[name].float()), name


@pytest.mark.parametrize("model", SERVED, ids=by_name)
def test_functional_gradients(model):
    inputs, state = draw(model)
    tensors = leaves(inputs, state)
    plain = {name: x.detach() for name, x in tensors.items()}

    def loss(tensors):
        output, final = run(model, tensors)
        return output.square().sum() + final.square().sum()

    wanted = torch.autograd.grad(loss(tensors), list(tensors.values()))
    found = torch.func.grad(loss)(plain)
    for (name, got), reference in zip(found.items(), wanted, strict=True):
        assert torch.equal(got, reference), name


def test_functional_maps():
    """A mapped axis joins the batch: outputs and gradients for each sample, at once."""
    samples = [draw(DELTA, seed=seed) for seed in range(2)]
    stacked = {n: torch.stack([inputs[n] for inputs, _ in samples]) for n in samples[0][0]}

    def loss(inputs):
        return run(DELTA, inputs)[0].square().sum()

    outputs = torch.func.vmap(lambda inputs: run(DELTA, inputs))(stacked)
    found = torch.func.vmap(torch.func.grad(loss))(stacked)
    for number, (inputs, _) in enumerate(samples):
        assert_same([x[number] for x in outputs], run(DELTA, inputs))
        assert_same([x[number] for x in found.values()], torch.func.grad(loss)(inputs).values())


@pytest.mark.parametrize("model", STRUCTURES if GPU else SERVED, ids=by_name)
def test_export(model):
    """A program that is exported computes what the function does, at another length too; and so does a step."""
    names = list(draw(model)[0])

    class Chunked(torch.nn.Module):
        def forward(self, *tensors):
            return run(model, dict(zip(names, tensors, strict=True)))

    class Step(torch.nn.Module):
        def forward(self, state, *tensors):
            result = model.step(dict(zip(names, tensors, strict=True)), state=state, backend=BACKEND)
            return result.output, result.final_state

    length = torch.export.Dim("length", min=2, max=4096)
    inputs, state = draw(model)
    shapes = (tuple(None if x.dim() == 1 else {1: length} for x in inputs.values()),)
    program = torch.export.export(Chunked(), tuple(inputs.values()), dynamic_shapes=shapes).module()
    other, _ = draw(model, SIZES._replace(length=101), seed=1)
    with torch.no_grad():
        assert_same(program(*other.values()), run(model, other), 1e-4)
        one = token(inputs, 0)
        step = torch.export.export(Step(), (state, *one.values())).module()
        last = token(other, 5)
        found = step(state, *last.values())
        assert_same(found, Step()(state, *last.values()))


class TestOnAGPU:
    pytestmark = needs_gpu

    @DTYPES
    @pytest.mark.parametrize("model", SERVED, ids=by_name)
    def test_graphs_of_forward_and_backward(self, model, dtype):
        tensors = leaves(*draw(model, dtype=dtype))
        weights = [torch.randn_like(x) for x in run(model, tensors)]

        def both():
            outputs = run(model, tensors)
            return *outputs, *torch.autograd.grad(outputs, list(tensors.values()), weights)

        graph, kept = captured(both)
        for seed in (1, 2):
            inputs, state = draw(model, dtype=dtype, seed=seed)
            with torch.no_grad():
                for name, x in (inputs | {"initial_state": state}).items():
                    tensors[name].copy_(x)
            graph.replay()
            found = [x.clone() for x in kept]
            for got, reference in zip(found, both(), strict=True):
                assert torch.equal(got, reference)

    @pytest.mark.parametrize("model", STRUCTURES, ids=by_name)
    def test_a_graph_of_a_step_serves_whoever_comes(self, model):
        """Slots, numbers of accepted tokens and padding are read from the card at each replay."""
        inputs, _ = draw(model, SHORT)
        store = model.initial_state(SHORT, sequences=5).float().to(DEVICE)
        first = store.clone()
        indices = torch.tensor([0, 1], device=DEVICE)
        accepted = torch.tensor([3, 3], device=DEVICE)

        def call(state):
            options = {"state_indices": indices, "accepted_tokens": accepted, "in_place": True}
            return model(inputs, initial_state=state, **options).output

        with torch.no_grad():
            graph, output = captured(lambda: call(store))
            store.copy_(first)
            for slots, counts in (([4, 2], [3, 0]), ([-1, 3], [1, 2]), ([0, -1], [1, 1])):
                indices.copy_(torch.tensor(slots))
                accepted.copy_(torch.tensor(counts))
                graph.replay()
                assert torch.equal(output, call(first))
                assert torch.equal(store, first)

    @pytest.mark.parametrize("bounds", [[0, 3, 3, 40, 60], [0, 100, 130]], ids=str)
    def test_graphs_of_packed_lines(self, bounds):
        """Up to 64 tokens the boundaries are read on the card; beyond, their copy on the host decides."""
        inputs, _ = draw(DELTA, SIZES._replace(batch=1, length=bounds[-1]))
        host = torch.tensor(bounds, dtype=torch.int32)
        where = host.to(DEVICE)
        options = {"cu_seqlens": where, "cu_seqlens_cpu": host if bounds[-1] > 64 else None}
        with torch.no_grad():
            graph, output = captured(lambda: run(DELTA, inputs, **options)[0])
            other, _ = draw(DELTA, SIZES._replace(batch=1, length=bounds[-1]), seed=4)
            for name, x in other.items():
                inputs[name].copy_(x)
            graph.replay()
            assert torch.equal(output, run(DELTA, inputs, **options)[0])

    def test_nobody_waits_for_the_card(self):
        inputs, state = draw(DELTA, dtype=torch.bfloat16)
        tensors = leaves(inputs, state)
        short, _ = draw(DELTA, SHORT)
        indices = torch.tensor([1, 0], device=DEVICE)
        line, _ = draw(DELTA, SIZES._replace(batch=1))
        host = torch.tensor([0, 90, 200], dtype=torch.int32)
        where = host.to(DEVICE)

        def everything():
            run(DELTA, tensors)[0].sum().backward()
            run(DELTA, line, cu_seqlens=where, cu_seqlens_cpu=host)
            with torch.no_grad():
                DELTA.step(token(short, 0), state=state, state_indices=indices, in_place=True)
                DELTA(short, initial_state=state, state_indices=indices, accepted_tokens=indices, in_place=True)
                DELTA(short, initial_state=state, state_indices=indices, in_place=True, backend="torch")

        everything()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            everything()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def test_a_store_of_more_than_32_bits(self):
        """The last slot of more than 2^31 numbers."""
        sizes = Sizes(1, 3, 2, 16, 128, 128)
        inputs, state = draw(DELTA, sizes)
        slots = 2**31 // state.numel() + 2
        store = torch.zeros(slots, *state.shape[1:], device=DEVICE, dtype=torch.bfloat16)
        store[-1] = state[0]
        index = torch.tensor([slots - 1], device=DEVICE)
        wanted = DELTA(inputs, initial_state=store[-1:].float(), return_final_state=True)
        found = DELTA(inputs, initial_state=store, state_indices=index, in_place=True)
        assert torch.equal(found.output, wanted.output)
        assert torch.equal(store[-1:], wanted.final_state.bfloat16())
        assert not store[:-1].any()

    def test_compiled_steps_in_graphs(self):
        """torch.compile's own CUDA graphs, around a store that is written in place."""
        inputs, store = draw(DELTA, SHORT, dtype=torch.bfloat16)
        other = store.clone()
        call = lambda inputs, state: pf.step.gated_delta_rule(**inputs, state=state, in_place=True).output  # noqa: E731
        compiled = torch.compile(call, fullgraph=True, mode="reduce-overhead")
        with torch.no_grad():
            for t in (0, 1, 2, 0, 1, 2):
                one = token(inputs, t)
                torch.compiler.cudagraph_mark_step_begin()
                found = compiled(one, store).clone()
                assert torch.equal(found, call(one, other))
        assert torch.equal(store, other)
