"""A new model is one short file: the example is the recurrence it states, and it trains."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import oracles
from tests.cases import assert_close, gradients, require_grad

EXAMPLE = Path(__file__).parents[1] / "examples" / "new_model.py"


@pytest.fixture(scope="module")
def example():
    return runpy.run_path(str(EXAMPLE))


def test_it_is_short():
    assert len(EXAMPLE.read_text().splitlines()) <= 40


def test_it_is_the_recurrence_it_states(example):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    names = ("query", "key", "eraser", "value", "beta", "decay")
    values = (draw(2, 70, 1, 4), draw(2, 70, 1, 4) / 2, draw(2, 70, 1, 4) / 2, draw(2, 70, 1, 3))
    inputs = require_grad(dict(zip(names, (*values, draw(2, 70, 1).sigmoid(), draw(2, 70, 1).sigmoid()), strict=True)))
    query, key, eraser, value, beta, decay = inputs.values()
    actual = example["oblique_delta_rule"](*inputs.values())

    def step(state, t):
        strength = beta[:, t, :, None, None]
        transition = oracles.identity_like(key) - strength * oracles.outer(key[:, t], eraser[:, t])
        return decay[:, t, :, None, None] * (transition @ state) + strength * oracles.outer(key[:, t], value[:, t])

    expected = oracles.read_out(step, query, value, 0.5, None).output
    assert_close(actual, expected)
    wanted = gradients([expected], inputs)
    for name, got in gradients([actual], inputs).items():
        assert_close(got, wanted[name], what=name)


def test_it_trains(example):
    torch.manual_seed(0)
    losses = list(example["train"](example["Memory"](), steps=100))
    assert losses[0] > 1.9  # log 8: knows nothing
    assert sum(losses[-5:]) / 5 < 0.5, losses[::10]


def test_it_runs():
    done = subprocess.run(
        [sys.executable, str(EXAMPLE)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env=os.environ | {"PYTHONPATH": str(EXAMPLE.parents[1])},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip(), "the example says nothing"
