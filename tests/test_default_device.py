"""What is made on the way is made where the tensors are, or on the host: the default device has no say.

The default is ``meta`` here, from which nothing can be brought back; it is ``cuda`` in many a notebook.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import parallelflow as pf
from parallelflow import paths
from parallelflow.nn import LAYERS, LinearCDE, make_layer
from parallelflow.tasks import TASKS, make_task
from parallelflow.testing import Sizes
from tests.cases import AGGREGATES, BACKENDS, SOLVERS, STRUCTURES, by_name, token

SIZES = Sizes(batch=1, length=11, heads=1, value_heads=2, key_size=4, value_size=3)


def elsewhere():
    return torch.device("meta")


@pytest.mark.parametrize("model", STRUCTURES, ids=by_name)
def test_models(model):
    inputs, state = model.inputs(SIZES), model.initial_state(SIZES, sequences=2)
    tensors = {name: x.float().requires_grad_() for name, x in inputs.items()}
    bounds, slots, positions = torch.tensor([0, 5, 11]), torch.tensor([1, 0]), [3, 7]
    with elsewhere():
        for backend in BACKENDS:
            result = model(tensors, cu_seqlens=bounds, return_final_state=True, backend=backend)
            (result.output.sum() + result.final_state.sum()).backward()
        model(tensors, discretization=None, state_positions=positions)
        with torch.no_grad():
            model(tensors, initial_state=state.float(), cu_seqlens=bounds, state_indices=slots, in_place=True)
            model.step(token(inputs, 0), state=state[:1])
        output = model(tensors).output
        (gradient,) = torch.autograd.grad(output.square().sum(), tensors["query"], create_graph=True)
        gradient.sum().backward()
    assert output.device.type == gradient.device.type == "cpu"


def test_choices():
    model = next(model for model in STRUCTURES if model.name == "kimi_delta_attention")
    inputs = {name: x.requires_grad_() for name, x in model.inputs(SIZES).items()}
    with elsewhere():
        for solver in SOLVERS:
            for aggregate in AGGREGATES:
                model(inputs, solver=solver, aggregate=aggregate, chunk_size=3).output.sum().backward()
        for scheme in ("backward_euler", "cayley", "rk4", "exact", pf.Discretization("exact", "strang", step=0.5)):
            model(inputs, discretization=scheme).output.sum().backward()


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name):
    options = {"rwkv7": {"head_dim": 8}, "mamba2": {"head_dim": 8, "state_size": 6}}.get(name, {"num_heads": 2})
    layer, hidden_states = make_layer(name, 16, **options), torch.randn(2, 5, 16)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    line, bounds = torch.randn(1, 5, 16), torch.tensor([0, 2, 5])
    with elsewhere():
        for arguments in ({}, {"attention_mask": mask}):
            mixed = layer(hidden_states, **arguments)
            more = layer(hidden_states[:, :1], memory=mixed.memory)
            (mixed.output.sum() + more.output.sum()).backward()
        layer(line, cu_seqlens=bounds)


def test_paths():
    times, values, query = torch.rand(2, 9).sort(1).values, torch.randn(2, 9, 2), torch.randn(2, 8, 1, 4)
    draw = lambda *shape: torch.randn(*shape) / 4  # noqa: E731
    field = paths.LinearField(draw(3, 1, 1, 4), draw(3, 1, 1, 4), draw(3, 1, 1, 3))
    layer = LinearCDE(2, 5, num_heads=1, head_dim=4, discretization="log_ode")
    with elsewhere():
        for make in (paths.linear, paths.hermite, paths.rectilinear):
            path = make(times, values)
        path = paths.linear(times, values)
        pf.integrate(paths.log_ode(path, field, times), query)
        paths.solve(paths.controlled(path, field), query, relative_tolerance=1e-3)
        layer(times, values).sum().backward()


@pytest.mark.parametrize("name", TASKS)
def test_tasks(name):
    generator = torch.Generator().manual_seed(0)
    with elsewhere():
        drawn = make_task(name).draw(2, 9, generator)
    assert drawn.tokens.device.type == drawn.labels.device.type == "cpu"


def test_flash_linear_attention_names():
    from parallelflow.compat import fla

    q, k = torch.randn(2, 1, 11, 1, 4)
    v, bounds = torch.randn(1, 11, 1, 3), torch.tensor([0, 5, 11])
    g, beta = -torch.rand(1, 11, 1), torch.rand(1, 11, 1)
    with elsewhere():
        fla.chunk_gated_delta_rule(q, k, v, g, beta, cu_seqlens=bounds, output_final_state=True)
        fla.fused_recurrent_simple_gla(q, k, v, g, reverse=True, cu_seqlens=bounds)


def test_training(tmp_path: Path):
    pytest.importorskip("transformers")
    from parallelflow.training import Bytes, Recipe, open_text

    (tmp_path / "text").write_text("a text that is long enough " * 20, encoding="utf-8")
    recipe = Recipe(model={}, length=8, batch=2, steps=2)
    with elsewhere():
        text = open_text(tmp_path / "text", Bytes(), recipe, tmp_path / "cache")
        assert text.batch(recipe, 0).device.type == "cpu"


def test_tables_of_the_kernels():
    chunks = pytest.importorskip("parallelflow.kernels.chunks")
    with elsewhere():
        tables = chunks.to_device([[0, 3, 5], [7]], torch.device("cpu"))
    assert [table.tolist() for table in tables] == [[0, 3, 5], [7]]
