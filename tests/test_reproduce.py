"""`parallelflow reproduce`: what it counts is what runs, what is finished is kept, and a miss is a failure."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("matplotlib")

from typer.testing import CliRunner

from parallelflow.cli import app
from parallelflow.cli.reproduce import command, parts, plots, report, store, verdicts
from parallelflow.cli.reproduce.counting import Counter, count
from parallelflow.cli.reproduce.inverses import neumann_doubling
from parallelflow.cli.reproduce.memory import peak
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


@pytest.mark.parametrize(("chunk", "rows"), [(64, 1), (32, 4)])
def test_counts_are_those_that_the_theory_states(chunk, rows):
    """The table of docs/theory.md, section 4, whose leading terms are within 5 % of what runs at these sizes."""
    columns, size = 64, chunk * rows
    gram, right = chunk_system(chunk, rows, columns)
    found = {name: count(lambda s=solver: s(gram, rows).solve(right)) for name, solver in SOLVERS.items()}
    products = chunk * (chunk - 1) * rows**2 * columns
    stated = {
        "sequential": products,
        "substitution": products + chunk**2 * rows * columns / 2,
        "tensor_inverse": 2 * size**3 / 3 + 2 * size**2 * columns,
        "sigdelta": (1 + 3 / (2 * rows)) * products,
    }
    for name, operations in stated.items():
        assert found[name].operations == pytest.approx(operations, rel=0.05), name
    assert found["tensor_inverse"].stages == 32 + 2 * math.log2(size / 32)
    assert found["sequential"].serial == pytest.approx(chunk**2 * rows / 2, rel=0.05)


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


def test_memory_is_the_peak_of_what_lives_at_once():
    a, b = torch.randn(2, 10, 10)
    assert peak(lambda: a.T[1:]) == 0
    assert peak(lambda: a @ b) == 100
    assert peak(lambda: a @ b @ a @ b @ a) == 200  # one result beside the one it is made of

    def views():
        first = a @ b
        second = first + 1
        del first
        part = second.T[1:]
        del second  # its storage lives on in the view
        return part @ part.T

    assert peak(views) == 200


@pytest.mark.parametrize("solver", ["sequential", "substitution"])
def test_substitution_holds_no_more_than_a_few_solutions(solver):
    """Not what remains at every stage: that would be n solutions' worth."""
    gram, right = chunk_system(64, 2, 40)
    assert peak(lambda: SOLVERS[solver](gram, 2).solve(right)) <= 12 * right.numel()


PARTS = dict(parts.PARTS)


@pytest.fixture
def small(monkeypatch):
    """Every part with a few of its figures."""
    some = {
        "structure": 28,
        "signatures": 24,
        "complexity": 24,
        "equivalence": 12,
        "accuracy": 80,
        "runtime": 4,
        "aggregation": 3,
        "convergence": 18,
    }
    first = lambda part, number: part._replace(settings=lambda quick: part.settings(quick)[:number])  # noqa: E731
    for name, part in parts.PARTS.items():
        monkeypatch.setitem(parts.PARTS, name, first(part, some[name]))


def invoke(folder: Path, *more: str):
    return CliRunner().invoke(app, ["reproduce", "--quick", "--output", str(folder), *more])


def forbid(monkeypatch, part: str, after: int = 0):
    """``part`` may measure so many figures and no more."""
    known, calls = parts.PARTS[part], []

    def measure(**setting):
        calls.append(setting)
        assert len(calls) <= after, "measured once too often"
        return known.measure(**setting)

    monkeypatch.setitem(parts.PARTS, part, known._replace(measure=measure))


def test_the_command_writes_a_report_and_keeps_what_is_finished(small, tmp_path, monkeypatch):
    done = invoke(tmp_path)
    assert done.exit_code == 0, done.output
    text = (tmp_path / "report.md").read_text()
    for part, (title, _) in report.SECTIONS.items():
        assert f"## {title}" in text
        assert (tmp_path / f"{part}.png").stat().st_size > 5000
        assert json.loads((tmp_path / f"{part}.json").read_text())["rows"]
    assert text.rstrip().endswith("Nothing.")
    assert not list(tmp_path.glob("*.unfinished"))

    for part in parts.PARTS:
        forbid(monkeypatch, part)
    assert invoke(tmp_path).exit_code == 0
    assert isinstance(invoke(tmp_path, "--only", "accuracy", "--fresh").exception, AssertionError)


def test_an_interrupted_part_goes_on_where_it_stopped(tmp_path, monkeypatch):
    with monkeypatch.context() as stopping:
        forbid(stopping, "accuracy", after=30)
        assert isinstance(invoke(tmp_path, "--only", "accuracy").exception, AssertionError)
    unfinished = tmp_path / "accuracy.unfinished"
    assert len(unfinished.read_text().splitlines()) == 31
    unfinished.write_text(unfinished.read_text()[:-40])  # killed while it wrote a line
    forbid(monkeypatch, "accuracy", after=51)
    done = invoke(tmp_path, "--only", "accuracy")
    assert done.exit_code == 0, done.output
    rows = json.loads((tmp_path / "accuracy.json").read_text())["rows"]
    assert [{key: row[key] for key in row if key != "error"} for row in rows] == parts.PARTS["accuracy"].settings(True)
    assert not unfinished.exists()


def test_figures_of_another_machine_size_or_version_are_measured_again(tmp_path, monkeypatch):
    assert invoke(tmp_path, "--only", "convergence").exit_code == 0
    finished = tmp_path / "convergence.json"
    earlier = [{key: row[key] for key in ("scheme", "steps")} for row in store.read(finished)["rows"]]
    for change in ({"quick": False}, {"machine": {"gpu": "another"}}, {"rows": []}, {"rows": earlier}):
        finished.write_text(json.dumps(store.read(finished) | change))
        assert invoke(tmp_path, "--only", "convergence").exit_code == 0
        held = store.read(finished)
        assert held["quick"] and held["machine"] == store.machine() and len(held["rows"]) == 18


def test_a_killed_run_is_taken_up(small, tmp_path):
    """SIGKILL while figures come in, then the same command again."""
    complete = PARTS["complexity"].settings(True)
    command = [sys.executable, "-m", "parallelflow.cli", "reproduce", "--quick", "--only", "complexity"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    run = subprocess.Popen([*command, "--output", str(tmp_path)], env=environment, stdout=subprocess.DEVNULL)
    unfinished, deadline = tmp_path / "complexity.unfinished", time.monotonic() + 120
    while not unfinished.exists() or len(unfinished.read_text().splitlines()) < 3:
        assert run.poll() is None and time.monotonic() < deadline, "it was not caught"
        time.sleep(0.001)
    run.send_signal(signal.SIGKILL)
    run.wait()
    lines = unfinished.read_text().splitlines()
    assert len(lines) < len(complete), "it was killed at the end: figures are not written as they are found"
    before = lines[1:3]
    assert invoke(tmp_path, "--only", "complexity").exit_code == 0
    assert store.read(tmp_path / "complexity.json")["rows"][:2] == [json.loads(line)["row"] for line in before]


def test_a_miss_is_a_failure(tmp_path, monkeypatch):
    part = parts.PARTS["equivalence"]
    wrong = {"error": 1e-6, "unavoidable": 0.0, "gradient_error": 0.0}
    one = part._replace(settings=lambda quick: part.settings(quick)[-1:], measure=lambda **setting: wrong)
    setting = part.settings(True)[-1] | {"dtype": "float64"}
    monkeypatch.setitem(parts.PARTS, "equivalence", one._replace(settings=lambda quick: [setting]))
    done = CliRunner().invoke(app, ["reproduce", "--only", "equivalence", "--output", str(tmp_path)])
    assert done.exit_code == 1
    text = (tmp_path / "report.md").read_text()
    assert "sigdelta" in text.split("did not")[-1]
    assert "| does not hold |" in text
    for figures in ({"error": float("nan")}, {"error": 0.0, "gradient_error": 1e-6}):
        assert report.failures({"equivalence": {"rows": [setting | wrong | figures]}})
    rows = [{"scheme": "cayley", "steps": steps, "error": 1 / steps} for steps in (16, 64)]
    assert report.failures({"convergence": {"rows": rows}}) == ["convergence: cayley is of order 1.00, expected 2"]


def test_verdicts_are_those_of_the_figures():
    """Figures that say the opposite turn every verdict around."""

    def verdict(part: str, number: int, rows: list[dict]) -> str:
        return verdicts.VERDICTS[part](rows)[number][1]

    costs = {  # operations, stages, serial, memory at C = 16, and the exponents with which they grow
        "tensor_inverse": ((4e6, 16, 31, 8e3), (3, 0, 1, 2)),
        "substitution": ((1e6, 30, 30, 4e3), (2, 1, 1, 1)),
        "sequential": ((1e6, 30, 135, 3e3), (2, 1, 2, 1)),
        "sigdelta": ((2e6, 84, 84, 9e3), (2, 1, 1, 2)),
    }

    def counted(**exponents: tuple[int, ...]) -> list[dict]:
        names = ("operations", "stages", "serial", "memory")
        return [
            {"rows": 1, "chunk": chunk, "solver": solver}
            | {
                name: cost * (chunk / 16) ** power
                for name, cost, power in zip(names, at, exponents.get(solver, powers), strict=True)
            }
            for chunk in (16, 32)
            for solver, (at, powers) in costs.items()
        ]

    said = [verdict("complexity", number, counted()) for number in range(4)]
    assert said == ["holds against sums taken one by one", "holds", "does not hold", "holds"]
    assert verdict("complexity", 0, counted(sigdelta=(2, 2, 2, 2))) == "does not hold"
    assert verdict("complexity", 1, counted(sigdelta=(3, 1, 1, 2))) == "does not hold"
    assert verdict("complexity", 2, counted(substitution=(2, 3, 3, 1))) == "holds"
    assert verdict("complexity", 3, counted(sigdelta=(2, 1, 1, 3))) == "does not hold"

    flows = [part | {"property": name, "size": 1} for name, part in {
        "composition": {"error": 1e-15, "rank": None}, "low rank": {"error": 1e-15, "rank": 2},
        "adjoint": {"error": 1e-15, "rank": None}, "exponential, plus": {"error": 1e-15, "rank": None},
        "exponential, minus": {"error": 0.3, "rank": None},
    }.items()]  # fmt: skip
    assert [verdict("structure", n, flows)[:5] for n in range(4)] == ["holds"] * 4
    for number, (place, change) in enumerate(
        [(0, {"error": 1e-3}), (1, {"rank": 3}), (2, {"error": 1e-3}), (4, {"error": 1e-15})]
    ):
        changed = [row | change if n == place else row for n, row in enumerate(flows)]
        assert verdict("structure", number, changed) == "does not hold"

    grid = lambda power, other: [  # noqa: E731
        {"route": route, "steps": steps, "kernel": 1.0 + off, "error": steps**-power}
        for steps in (2, 4)
        for route, off in (("stencil", 0.0), ("sigdelta", other))
    ]
    said = [verdict("signatures", 0, grid(*case)) for case in ((1.0, 0.0), (2.0, 0.0), (1.0, 1e-5))]
    assert said == ["holds", "does not hold", "does not hold"]

    timed = lambda sigdelta: [  # noqa: E731
        {"device": "cpu", "rows": 1, "chunk": 16, "solver": solver, "milliseconds": time}
        for solver, time in (("tensor_inverse", 2.0), ("sigdelta", sigdelta))
    ]
    assert [verdict("runtime", 0, timed(time)) for time in (4.0, 1.0)] == ["does not hold", "holds"]


def test_every_part_can_be_asked_for_and_is_told_of():
    assert [part.value for part in command.Part] == list(parts.PARTS)
    for table in (report.SECTIONS, verdicts.VERDICTS, plots.PLOTS):
        assert list(table) == list(parts.PARTS)


def test_a_folder_that_is_a_file(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    done = CliRunner().invoke(app, ["reproduce", "--output", str(file)])
    assert done.exit_code == 2
    assert "expected a folder" in " ".join(done.output.replace("│", " ").split())
