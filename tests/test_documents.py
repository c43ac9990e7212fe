"""What the documents say is so: their code runs, and the map of the code is of this code."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_the_code_of_the_readme_runs():
    names: dict[str, object] = {}
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert names["value"].grad.isfinite().all()
    assert names["output"].shape == names["value"].shape


def test_the_quick_start_runs():
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "quickstart.py")],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_every_model_is_in_the_readme():
    from parallelflow.cli.demo.recurrences import MODELS

    for model in MODELS:
        assert f"`{model.__name__}`" in README


def test_the_map_is_of_this_code():
    there = {path.name + "/" * path.is_dir() for path in (ROOT / "parallelflow").iterdir()}
    there -= {"__pycache__/", "py.typed"}
    mapped = set(re.findall(r"^  (\w+(?:\.py|/)) ", CONTRIBUTING, flags=re.MULTILINE))
    assert mapped == there


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_lead_somewhere(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("https://") or (ROOT / target).exists(), target
