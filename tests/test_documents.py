"""What the documents say is so: their code runs, and the map of the code is of this code."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def run_code(text: str, name: str) -> dict[str, object]:
    """Runs the Python blocks of a document, one after another, and returns their names."""
    names: dict[str, object] = {}
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, name, "exec"), names)
    return names


def test_the_code_of_the_readme_runs():
    names = run_code(README, "README.md")
    assert names["value"].grad.isfinite().all()
    assert names["output"].shape == names["value"].shape


@pytest.mark.parametrize(
    "page",
    [
        "index.md",
        "solvers.md",
        "adding_a_model.md",
        "layers.md",
        "discretizations.md",
        "continuous_time.md",
        "training.md",
        "state_tracking.md",
        "serving.md",
        "context_parallel.md",
    ],
)
def test_the_code_of_a_page_runs(page):
    run_code((ROOT / "docs" / page).read_text(encoding="utf-8"), page)


@pytest.mark.parametrize("example", ["quickstart.py", "train_lm.py", "hf_generate.py"])
def test_an_example_runs(example):
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / example)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip(), "the example says nothing"


def test_every_model_is_in_the_readme():
    from parallelflow.cli.demo.recurrences import MODELS

    for model in MODELS:
        assert f"`{model.__name__}`" in README


def test_the_map_is_of_this_code():
    there = {path.name + "/" * path.is_dir() for path in (ROOT / "parallelflow").iterdir()}
    there -= {"__pycache__/", "py.typed"}
    mapped = set(re.findall(r"^  (\w+(?:\.py|/)) ", CONTRIBUTING, flags=re.MULTILINE))
    assert mapped == there


@pytest.mark.parametrize(
    "document",
    [
        "README.md",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
        "docs/index.md",
        "docs/solvers.md",
        "docs/adding_a_model.md",
        "docs/layers.md",
        "docs/discretizations.md",
        "docs/continuous_time.md",
        "docs/serving.md",
        "docs/theory.md",
        "docs/context_parallel.md",
        "docs/results/reproduce/report.md",
    ],
)
def test_links_lead_somewhere(document):
    path = ROOT / document
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (path.parent / target).exists(), target
