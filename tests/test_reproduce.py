"""`parallelflow reproduce`: what it counts is what runs, what is finished is kept, and a miss is a failure."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("matplotlib")

from typer.testing import CliRunner

from parallelflow.cli import app
from parallelflow.cli.reproduce import parts, report, run
from parallelflow.cli.reproduce.counting import Counter, count
from parallelflow.cli.reproduce.inverses import neumann_doubling
from parallelflow.cli.reproduce.systems import chunk_system
from parallelflow.solvers import SOLVERS
from tests.cases import assert_close


def test_a_product_a_sum_and_a_chain():
    a, b, c = torch.randn(3, 5, 5)
    assert vars(count(lambda: a @ b)) == {"operations": 250, "stages": 1, "serial": 5}
    assert vars(count(lambda: a @ b + c)) == {"operations": 275, "stages": 2, "serial": 6}
    assert vars(count(lambda: (a @ b, c @ b))) == {"operations": 500, "stages": 1, "serial": 5}
    assert vars(count(lambda: (a @ b).T.reshape(-1))) == {"operations": 250, "stages": 1, "serial": 5}
    assert vars(count(lambda: a.clone()[1:].addcmul_(b[1:], c[1:]))) == {"operations": 40, "stages": 1, "serial": 1}


def test_an_operation_of_unknown_cost_is_refused():
    with pytest.raises(NotImplementedError, match="exp"), Counter():
        torch.ones(3).exp()


@pytest.mark.parametrize(("chunk", "rows"), [(8, 1), (8, 3), (21, 2)])
def test_counts_of_the_solvers(chunk, rows):
    """The theory's counts: products C(C-1)R²D, and stages that grow with C as the theory says."""
    columns = 6
    gram, right = chunk_system(chunk, rows, columns)
    found = {name: count(lambda s=solver: s(gram, rows).solve(right)) for name, solver in SOLVERS.items()}
    products = chunk * (chunk - 1) * rows**2 * columns
    assert found["sequential"].operations == products + (chunk - 1) * rows * columns
    assert found["substitution"].operations == products + chunk * (chunk - 1) // 2 * rows * columns
    assert found["substitution"].stages == found["sequential"].stages == 2 * (chunk - 1)
    assert found["sequential"].serial == rows * chunk * (chunk - 1) // 2 + chunk - 1
    assert found["sigdelta"].stages == 3 * (2 * chunk - 3) - 3
    assert found["sigdelta"].operations > found["substitution"].operations


@pytest.mark.parametrize("n", [1, 2, 3, 16, 37])
def test_neumann_doubling_is_exact_where_nothing_cancels(n):
    gram, right = chunk_system(n, 1, 3)
    wide = torch.eye(n, dtype=torch.float64) - gram
    assert_close(neumann_doubling(gram, 1).solve(right), torch.linalg.solve(wide, right), 1e-12)
    assert_close(neumann_doubling(gram, 1).solve_transposed(right), torch.linalg.solve(wide.mT, right), 1e-12)


def test_neumann_doubling_is_not_for_correlated_keys():
    gram, right = (x.float() for x in chunk_system(64, 1, 3, correlated=True))
    exact = torch.linalg.solve(torch.eye(64, dtype=torch.float64) - gram.double(), right.double())
    error = lambda solver: float((solver(gram, 1).solve(right).double() - exact).norm() / exact.norm())  # noqa: E731
    assert error(neumann_doubling) > 1e3
    assert error(SOLVERS["tensor_inverse"]) < 1e-5


@pytest.fixture
def small(monkeypatch):
    """Every part with a few of its figures."""
    first = lambda part, some: lambda quick: (row for n, row in enumerate(part(quick)) if n < some)  # noqa: E731
    some = {"complexity": 48, "equivalence": 12, "accuracy": 10, "runtime": 4, "aggregation": 3, "convergence": 6}
    monkeypatch.setattr(run, "PARTS", {name: first(part, some[name]) for name, part in parts.PARTS.items()})


def test_the_command_writes_a_report_and_keeps_what_is_finished(small, tmp_path, monkeypatch):
    invoke = lambda *more: CliRunner().invoke(app, ["reproduce", "--quick", "--output", str(tmp_path), *more])  # noqa: E731
    done = invoke()
    assert done.exit_code == 0, done.output
    text = (tmp_path / "report.md").read_text()
    for part, (title, _) in report.SECTIONS.items():
        assert f"## {title}" in text
        assert (tmp_path / f"{part}.png").stat().st_size > 5000
        assert json.loads((tmp_path / f"{part}.json").read_text())["rows"]
    assert text.rstrip().endswith("Nothing.")

    def forbidden(quick):
        raise AssertionError("measured twice")

    kept = dict(run.PARTS)
    monkeypatch.setattr(run, "PARTS", dict.fromkeys(kept, forbidden))
    assert invoke().exit_code == 0
    assert isinstance(invoke("--only", "accuracy", "--fresh").exception, AssertionError)


def test_a_miss_is_a_failure(tmp_path, monkeypatch):
    wrong = {
        "rows": 1, "chunk_size": 4, "solver": "sigdelta", "aggregate": "sequential", "dtype": "float64",
        "error": 1e-6, "unavoidable": 0.0,
    }  # fmt: skip
    monkeypatch.setattr(run, "PARTS", parts.PARTS | {"equivalence": lambda quick: iter([wrong])})
    done = CliRunner().invoke(app, ["reproduce", "--only", "equivalence", "--output", str(tmp_path)])
    assert done.exit_code == 1
    assert "sigdelta" in (tmp_path / "report.md").read_text().split("did not")[1]
    nan = wrong | {"error": float("nan")}
    assert report.failures({"equivalence": {"rows": [nan]}})


def test_a_folder_that_is_a_file(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    done = CliRunner().invoke(app, ["reproduce", "--output", str(file)])
    assert done.exit_code == 2
    assert "expected a folder" in " ".join(done.output.replace("│", " ").split())
