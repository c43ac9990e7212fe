"""What the documents say is so: their code runs, and the map of the code is of this code."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")

DOCUMENTS = [
    path.relative_to(ROOT).as_posix()
    for folder, pattern in ((ROOT, "*.md"), (ROOT / "docs", "**/*.md"))
    for path in sorted(folder.glob(pattern))
]


def runs(page: str) -> bool:
    """Has code, and is not the page whose code loads other libraries' models: tests/compat runs that."""
    return page != "docs/coming_from_fla.md" and "```python\n" in (ROOT / page).read_text(encoding="utf-8")


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


@pytest.mark.parametrize("page", [page for page in DOCUMENTS if page.startswith("docs/") and runs(page)])
def test_the_code_of_a_page_runs(page):
    run_code((ROOT / page).read_text(encoding="utf-8"), page)


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


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document):
    path = ROOT / document
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (path.parent / target).exists(), target


def test_the_theory_names_tests_that_there_are():
    text = (ROOT / "docs" / "theory.md").read_text(encoding="utf-8")
    named = re.findall(r"\[`(test_\w+)`\]\(\.\./(tests/[\w/]+\.py)\)", text)
    assert len(named) >= 15
    for test, file in named:
        assert f"\ndef {test}(" in (ROOT / file).read_text(encoding="utf-8"), f"{file}: {test}"


def test_every_statement_of_the_theory_has_a_function_and_a_test():
    text = (ROOT / "docs" / "theory.md").read_text(encoding="utf-8")
    table = [line.strip("|").split(" | ") for line in text.split("\n## ")[0].splitlines() if line.startswith("| ")]
    statements = table[2:]  # below the headings
    assert len(statements) >= 15
    for _, statement, function, test, _ in statements:
        assert "](" in function and "](" in test, statement


def test_the_theory_quotes_the_report():
    """The numbers in the text of the page are those of the committed results."""
    results = ROOT / "docs" / "results" / "reproduce"
    text = " ".join((ROOT / "docs" / "theory.md").read_text(encoding="utf-8").split())
    counts = json.loads((results / "complexity.json").read_text(encoding="utf-8"))["rows"]
    at = {(row["solver"], row["rows"], row["chunk"]): row for row in counts}
    for quantity, digits in (("operations", 2), ("stages", 1)):
        ratios = [
            row[quantity] / at["substitution", *size][quantity]
            for (solver, *size), row in at.items()
            if solver == "sigdelta"
        ]
        assert f"{min(ratios):.{digits}f} to {max(ratios):.{digits}f} times its" in text
    errors = json.loads((results / "accuracy.json").read_text(encoding="utf-8"))["rows"]
    for inverse in ("sigdelta", "substitution"):
        worst = max(
            row["error"]
            for row in errors
            if (row["inverse"], row["keys"], row["dtype"], row["chunk"]) == (inverse, "random", "float32", 256)
        )
        assert f"{worst:.1e}" in text


def test_the_page_on_solvers_quotes_the_report():
    results = ROOT / "docs" / "results" / "reproduce"
    counts, errors = (
        json.loads((results / f"{part}.json").read_text(encoding="utf-8"))["rows"]
        for part in ("complexity", "accuracy")
    )
    text = (ROOT / "docs" / "solvers.md").read_text(encoding="utf-8")
    for solver in ("tensor_inverse", "substitution", "sequential", "sigdelta"):
        operations = next(
            row["operations"] for row in counts if (row["solver"], row["rows"], row["chunk"]) == (solver, 1, 64)
        )
        worst = [
            max(
                row["error"]
                for row in errors
                if (row["inverse"], row["dtype"], row["chunk"], row["keys"]) == (solver, "float32", 64, keys)
            )
            for keys in ("random", "correlated")
        ]
        assert f"| `{solver}` | {operations / 1e6:.2f} | {worst[0]:.1e} | {worst[1]:.1e} |" in text
