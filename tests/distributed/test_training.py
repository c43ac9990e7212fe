"""Training over ranks, by torchrun: the numbers of one process; killed and gone on with on fewer ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from parallelflow.training import Bytes, latest, open_text, train
from tests.distributed.child import DATA, RECIPE

ROOT = Path(__file__).parents[2]
ROUNDING = 1e-5
"""Of a loss in float32 after a few steps: sums over tokens in another order."""


def torchrun(count: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(count),
        *arguments,
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=240, check=False)


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def expect_same(found: list[dict], expected: list[dict]) -> None:
    assert [entry["step"] for entry in found] == [entry["step"] for entry in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for name in {"loss", "gradient_norm", "held_out_loss"} & ours.keys():
            assert ours[name] == pytest.approx(theirs[name], rel=ROUNDING), (name, ours, theirs)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The log of one process."""
    folder = tmp_path_factory.mktemp("alone")
    train(RECIPE, open_text(DATA, Bytes(), RECIPE, folder / "tokens"), folder)
    return log_of(folder)


def test_killed_in_a_step_and_gone_on_with_on_two_ranks(tmp_path, alone):
    killed = torchrun(4, "tests/distributed/child.py", str(tmp_path), "5")
    assert killed.returncode != 0
    assert latest(tmp_path / "checkpoints").step == 3
    expect_same(log_of(tmp_path), alone[:4])
    gone_on = torchrun(2, "tests/distributed/child.py", str(tmp_path))
    assert gone_on.returncode == 0, gone_on.stderr[-2000:]
    expect_same(log_of(tmp_path), alone)


def test_the_example_has_the_numbers_of_one_process(tmp_path):
    arguments = ["examples/train_context_parallel.py", "--steps", "8", "--length", "90", "--output"]
    four = torchrun(4, *arguments, str(tmp_path / "four"))
    assert four.returncode == 0, four.stderr[-2000:]
    one = subprocess.run(
        [sys.executable, *arguments, str(tmp_path / "one")],
        capture_output=True, text=True, cwd=ROOT, timeout=240, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert one.returncode == 0, one.stderr[-2000:]
    expect_same(log_of(tmp_path / "four"), log_of(tmp_path / "one"))
