"""What is told of benchmarks is what their results say."""

import json
import os
import subprocess
import sys
import time
from itertools import pairwise

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import report, state_tracking, state_tracking_report, tracker, turns
from parallelflow.tasks import IGNORED

SHAPE = {"op": "delta_rule", "batch": 4, "time": 4096, "key_heads": 16, "value_heads": 16, "key_dim": 128,
         "value_dim": 128, "rank": 1}  # fmt: skip
FIGURES = {"forward_ms": 0.2, "forward_backward_ms": 0.7, "extra_mib": 713, "first_call_s": 15.2, "error": 3.8e-3}


def result(*rows):
    ceilings = {"copy_gb_s": 4270, "bf16_tflop_s": 790}
    return {"kind": "gpu", "card": "A", "versions": {"X": "1"}, "commit": "c", "ceilings": ceilings, "rows": list(rows)}


@pytest.mark.parametrize("path", report.DOCUMENTS, ids=lambda path: path.name)
def test_a_document_is_rendered_from_the_results(path):
    document = path.read_text()
    assert "<!-- benchmarks:" in document
    assert report.render(document) == document, "run python -m benchmarks.report"


def test_scaling_is_told_as_ratios(tmp_path):
    from benchmarks.context_parallel import efficiencies
    from benchmarks.context_parallel_report import context_plot, context_table

    row = {"op": "ssd", "mode": "total", "tokens": 64, "method": "scan", "bytes": 2**20, "exchange_ms": 0.5}
    rows = [
        {**row, "ranks": 1, "forward_ms": 8.0, "forward_backward_ms": 16.0},
        {**row, "ranks": 4, "forward_ms": 4.0, "forward_backward_ms": 5.0},
        {**row, "ranks": 1, "mode": "per rank", "forward_ms": 2.0, "forward_backward_ms": 4.0},
        {**row, "ranks": 4, "mode": "per rank", "forward_ms": 4.0, "forward_backward_ms": 5.0},
        {"op": "ssd", "ranks": 4, "check_tokens": 64, "from_one_rank": 1e-3, "from_float64": 3e-3,
         "one_rank_from_float64": 2e-3, "same_bits": True},
    ]  # fmt: skip
    efficiencies(rows)
    result = {
        "card": "A",
        "versions": {"X": "1"},
        "dtype": "bfloat16",
        "heads": 16,
        "size": 128,
        "name": "n",
        "rows": rows,
    }
    table = context_table(result)
    assert "| `ssd` | total | 4 | 64 | 4.00 | 0.50 | 5.00 | 0.80 | 0.500 | 1.00 | scan |" in table
    assert "| `ssd` | per rank | 4 | 64 | 4.00 | 0.50 | 5.00 | 0.80 | 0.500 | 1.00 | scan |" in table
    assert "| `ssd` | 4 | 64 | 1.0e-03 | 3.0e-03 | 2.0e-03 | yes |" in table
    context_plot(result, tmp_path / "n.svg")
    assert (tmp_path / "n.svg").stat().st_size > 0


def test_a_row_takes_the_place_of_an_older_one():
    found = result({**SHAPE, **FIGURES, "library": "fla"}, {**SHAPE, **FIGURES, "library": "parallelflow"})
    report.merge(
        found, [{**SHAPE, **FIGURES, "library": "fla", "forward_ms": 0.5}, {**SHAPE, "time": 1, "library": "fla"}]
    )
    assert [(row["time"], row["library"], row.get("forward_ms")) for row in found["rows"]] == [
        (4096, "fla", 0.5), (4096, "parallelflow", 0.2), (1, "fla", None),
    ]  # fmt: skip
    assert [row.get("commit") for row in found["rows"]] == [None, "c", None]


def test_results_are_kept_as_they_are(tmp_path):
    found = result({**SHAPE, **FIGURES, "library": "fla"})
    report.save(found, tmp_path / "card.json")
    assert report.load(tmp_path / "card.json") == found


def test_a_table_sets_libraries_beside_this_one(tmp_path, monkeypatch):
    rows = {**SHAPE, **FIGURES, "library": "fla", "forward_ms": 0.5}, {**SHAPE, **FIGURES, "library": "parallelflow"}
    report.save(result(*rows), tmp_path / "card.json")
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    document = "a\n<!-- benchmarks: gpu card.json -->\nold\n<!-- /benchmarks -->\nb"
    lines = report.render(document).splitlines()
    assert "old" not in lines
    assert (lines[0], lines[-1]) == ("a", "b")
    assert "| `delta_rule` 4×4096, 16/16 | ParallelFlow | 0.200 |  | 0.700 |  | 713 | 15 | 3.8e-03 |" in lines
    assert "|  | FLA | 0.500 | 2.50 × | 0.700 | 1.00 × | 713 | 15 | 3.8e-03 |" in lines
    assert report.render("\n".join(lines)) == "\n".join(lines)
    report.save(result({**rows[0], "commit": "b"}, rows[1]), tmp_path / "card.json")
    assert "|  | FLA (b) | 0.500" in report.render(document)


def test_a_table_says_in_which_mode_all_was_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    for modes, said in (((True, True), True), ((True, None), False), ((False, True), False)):
        rows = [{**SHAPE, **FIGURES, "time": time, "library": "parallelflow", "batch_invariant": mode}
                for time, mode in enumerate(modes)]  # fmt: skip
        report.save(result(*rows), tmp_path / "card.json")
        table = report.render("<!-- benchmarks: gpu card.json -->\n\n<!-- /benchmarks -->")
        assert ("batch_invariant=True" in table) == said


def test_a_table_of_steps(tmp_path, monkeypatch):
    step = {**SHAPE, "time": 1, "state": "float32", "host_us": 20.0}
    rows = [
        {**step, "batch": 1, "library": "fla", "step_us": 8.0, "of_copy": 0.25},
        {**step, "batch": 1, "library": "parallelflow", "step_us": 4.0, "of_copy": 0.5},
        {**step, "batch": 64, "library": "parallelflow", "step_us": 100.0, "of_copy": 0.9, "host_us": None},
    ]
    report.save(result(*rows) | {"kind": "decode"}, tmp_path / "card.json")
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    lines = report.render("<!-- benchmarks: decode card.json -->\n\n<!-- /benchmarks -->").splitlines()
    title = "| `delta_rule` 16 × 128×128, float32 | ParallelFlow | 4.00 µs, 50 % | 100 µs, 90 % | 20.0 |"
    assert title in lines
    assert "|  | FLA | 8.00 µs, 25 %, 2.00 × | – | 20.0 |" in lines


def test_a_table_beside_fla(tmp_path, monkeypatch):
    """A line a function, its worst errors; what disagrees, and what FLA does not run, is said."""
    kda = {"function": "chunk_kda", "options": {}, "forward": {"of": "state 0", "ours": 3e-3, "fla": 2e-3}}
    rows = [
        {**kda, "agrees": True, "gradient": {"of": "d q", "ours": 1e-3, "fla": 1e-3}},
        {**kda, "agrees": False, "gradient": {"of": "d g", "ours": 2e-2, "fla": 1e-3}},
        {**kda, "function": "chunk_comba", "agrees": True, "fla": "RuntimeError: Triton >= 3.4.0 and"},
    ]
    sizes = {"batch": 1, "time": 2, "key_heads": 3, "value_heads": 4, "key_dim": 5}
    report.save({**result(*rows), **sizes, "kind": "compat"}, tmp_path / "card.json")
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    table = report.render("<!-- benchmarks: compat card.json -->\n\n<!-- /benchmarks -->")
    assert "| `chunk_kda` |  | 1 of 2 | state 3.0e-03 | 2.0e-03 | d g 2.0e-02 | 1.0e-03 |" in table
    assert "| `chunk_comba` | its gated backward refuses" in table
    assert "2 of 3 calls agree" in table
    assert "In the others it is d g that is farther from it." in table


def test_a_table_of_accelerated_models(tmp_path, monkeypatch):
    row = {"model": "m", "part": "layer", "time": 64, "transformers_ms": 8.0, "parallelflow_ms": 4.0, "ratio": 2.0,
           "difference": 4e-7}  # fmt: skip
    whole = {**row, "part": "model", "kind": "token", "ratio": 0.5}
    report.save({**result({**row, "kind": "prefill"}, whole), "cores": 2}, tmp_path / "a.json")
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    table = report.render("<!-- benchmarks: accelerate a.json -->\n\n<!-- /benchmarks -->")
    assert "| `m` | a layer | 8.00 → 4.00, 2.00 × | – | – |" in table
    assert "| `m` | whole | – | – | 8.00 → 4.00, 0.50 × |" in table


@pytest.mark.parametrize(
    ("value", "shown"), [(None, "–"), (0.2, "0.200"), (1.234, "1.23"), (99.96, "100"), (4016, "4016")]
)
def test_numbers_have_three_digits(value, shown):
    assert report.number(value) == shown


class HostTensors(TorchDispatchMode):
    """Keeps the operations that touch a tensor on the host."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)]
        self.found += [str(function) for x in tensors if x.device.type == "cpu"]
        return result


@pytest.mark.parametrize("name", state_tracking.LAYERS)
def test_a_training_step_needs_nothing_of_the_host(name):
    """As a recorded step must not: here on the meta device, where looking at a value is an error."""
    sizes, recipe = tracker.Sizes(width=32, heads=2), tracker.Recipe(batch=2)
    with torch.device("meta"):
        training = tracker.Training(*state_tracking.LAYERS[name], sizes, recipe, 90_000, "meta")
    training.optimizer.step = lambda: None  # fused on a GPU; not here
    with HostTensors() as host:
        training._step()
    assert host.found == []
    assert all(parameter.grad is not None for parameter in training.model.parameters())
    assert abs(tracker.count_parameters(training.model) - 90_000) <= 3 * 32


def test_a_training_depends_on_its_task_and_seed_alone():
    """Whatever was trained before; the labels that count grow to all of them, and the rate falls."""
    sizes, recipe = tracker.Sizes(16, depth=1, heads=1), tracker.Recipe(batch=4, tested=50, drawn=16, warm_up=2)
    training = tracker.Training(*state_tracking.LAYERS["Gated DeltaNet"], sizes, recipe, 12_000, "cpu")
    found, rates, counted = [], [], []
    forward = tracker.F.cross_entropy

    def counting(logits, labels, **options):
        counted.append(int((labels != IGNORED).sum()) / recipe.batch)
        return forward(logits, labels, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracker.F, "cross_entropy", counting)
        for task, seed in (("parity", 1), ("S3", 1), ("parity", 1), ("parity", 2), ("associative_recall", 1)):
            training.begin(task, seed, 6)
            while not training.finished:
                training.advance(1)
                rates.append(training.optimizer.param_groups[1]["lr"].item())
            found.append(training.result())
    assert found[0] == found[2] != found[3]
    assert found[0]["steps"] == 6 and found[1]["task"] == "S3"
    assert counted[:6] == counted[6:12] == [3, 22, 40, 40, 40, 40]
    assert counted[-6:] == [13] * 6
    assert rates[:6] == rates[-6:] and rates[0] == pytest.approx(recipe.learning_rate / 2)
    assert all(later < earlier for earlier, later in pairwise(rates[1:6]))


def test_trackers_answer_with_classes_of_the_task():
    sizes, recipe = tracker.Sizes(16, depth=1, heads=1), tracker.Recipe(batch=4, drawn=8)
    training = tracker.Training(*state_tracking.LAYERS["RWKV-7"], sizes, recipe, 12_000, "cpu")
    training.begin("S3", 0, 1)
    assert training.model(training.tokens.long()).argmax(-1).unique().numel() <= 6
    assert not training.model(training.tokens.long())[..., 6:].isfinite().any()


@pytest.mark.parametrize(
    ("seconds", "step", "expected"),
    [(210, 0.02, (7, 1287)), (100, 0.02, (4, 1062)), (10, 0.02, (1, 387)), (1, 0.02, (1, 0))],
)
def test_steps_that_fit_into_the_time(seconds, step, expected):
    """The last tasks are left out where steps would be fewer than a thousand; the first one never is."""
    count, steps = state_tracking.affordable(seconds, step, 7, 14, 1000)
    assert (count, steps) == expected
    assert steps * step * count <= seconds


def test_layers_are_shared_out_evenly():
    cells = [(layer, task, 0) for task in ("parity", "S3") for layer in state_tracking.LAYERS]
    for devices in (1, 2, 4, 8, 20):
        parts = state_tracking.shares(cells, devices)
        assert sorted(cell for part in parts for own in part.values() for cell in own) == sorted(cells)
        assert all([task for _, task, _ in own] == ["parity", "S3"] for part in parts for own in part.values())
        costs = [sum(state_tracking.STEP_COSTS[state_tracking.LAYERS[name][0]] for name in part) for part in parts]
        assert max(costs) <= max(sum(costs) / devices * 1.25, max(state_tracking.STEP_COSTS.values()))


def test_the_plan_is_that_of_the_slowest_device():
    parts = [{"a": [("a", "parity", 0)] * 3}, {"b": [("b", "parity", 0)] * 2}]
    settings = {"steps": None, "least_steps": 100, "most_steps": 500}
    assert state_tracking.plan(parts, {0: 0.01, 1: 0.02}, settings, float("inf")) == (3, 500)
    count, steps = state_tracking.plan(parts, {0: 0.01, 1: 0.02}, settings, time.time() + 10)
    assert count == 3 and 145 <= steps <= 150
    assert state_tracking.plan(parts, {0: 0.01, 1: 0.02}, settings | {"steps": 200}, time.time() + 10) == (2, 200)


def test_state_tracking_runs_and_goes_on(tmp_path, monkeypatch, capsys):
    """As it is called: the file has what was trained, a second run adds the rest, other settings are refused."""
    file = tmp_path / "found.json"
    small = {"width": 16, "depth": 1, "heads": 1, "batch": 2, "drawn": 64, "tested": 60, "seeds": 1, "threads": 1}
    common = ["state_tracking", "--device=cpu", *(f"--{name}={value}" for name, value in small.items())]

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", [*common, *arguments, f"--output={file}"])
        monkeypatch.setattr(state_tracking, "BEGUN", time.time())
        state_tracking.main()
        return json.loads(file.read_text())["runs"]

    one = state_tracking.shares
    monkeypatch.setattr(state_tracking, "shares", lambda cells, _: one(cells, 2))  # as with two GPUs
    trained = call("--layers", "DeltaNet", "--tasks", "parity", "--steps", "3")
    assert [(each["layer"], each["task"], each["steps"]) for each in trained] == [("DeltaNet", "parity", 3)]
    runs = call("--layers", "Mamba-2", "DeltaNet", "--tasks", "parity", "S3", "--seconds", "150")
    assert runs[0] == trained[0] and len(runs) == 4 and {each["steps"] for each in runs} == {3}
    assert "| Mamba-2 |" in capsys.readouterr().out and file.with_suffix(".png").stat().st_size > 10_000
    with pytest.raises(SystemExit):
        call("--steps", "4")
    assert "steps: got 4, but" in capsys.readouterr().err


def test_the_page_of_state_tracking_has_the_results():
    content = json.loads(state_tracking.RESULTS.read_text())
    page = state_tracking.PAGE.read_text()
    rendered = state_tracking_report.rendered(page, content, list(state_tracking.LAYERS))
    assert rendered == page, "run python -m benchmarks.state_tracking --report"
    assert len({run["parameters"] // 1000 for run in content["runs"]}) <= 2, "not of equal sizes"


def test_a_table_of_state_tracking():
    name, runs = "DeltaNet, negative eigenvalues", []
    for task, shares in {"parity": (0.5, 1.0), "even_pairs": (0.8,), "cycle_navigation": (0.3,)}.items():
        runs += [{"layer": name, "task": task, "seed": n, "longer": share} for n, share in enumerate(shares)]
    content = {"published": state_tracking_report.PUBLISHED, "runs": runs}
    lines = state_tracking_report.table(content, list(state_tracking.LAYERS)).splitlines()
    assert f"| {name} | 75 (50–100) | 80 | 30 | – | 77.7 |" in lines
    runs.append({"layer": name, "task": "modular_arithmetic", "seed": 0, "longer": 0.2})
    lines = state_tracking_report.table(content, list(state_tracking.LAYERS)).splitlines()
    assert f"| {name} | 75 (50–100) | 80 | 30 | 20 | 51.2 | 77.7 |" in lines
    assert "| *guessing* | 50 | 50 | 20 | 20 | 35.0 |  |" in lines


def test_a_table_of_solvers(tmp_path, monkeypatch):
    rows = [
        {"chunk": 64, "rank": 1, "dtype": "float32", "systems": systems, "method": method, "error": 1e-7,
         "error_correlated": 2e-7, "same_bits": True, "total_ms": time * systems, "solve_ms": 0.5,
         "transposed_ms": 0.25}
        for systems in (1, 4096)
        for method, time in (("sigdelta", 3e-3), ("substitution", 2e-3), ("blocked_inverse", 1e-3))
    ]  # fmt: skip
    report.save(
        {"kind": "solvers", "card": "A", "versions": {"X": "1"}, "columns": 256, "rows": rows}, tmp_path / "s.json"
    )
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    lines = report.render("<!-- benchmarks: solvers s.json -->\n\n<!-- /benchmarks -->").splitlines()
    assert "| 64 × 1 | float32 | 4,096 | 12.3 | 8.19 | 4.10 | 0.500 | 0.250 | 0.250 | 0.250 |" in lines
    assert "| 64 × 1 | float32 | 1.0e-07 | 1.0e-07 | 1.0e-07 | 2.0e-07 | 2.0e-07 | 2.0e-07 |" in lines
    assert any(line.endswith("Every method gave the same bits twice.") for line in lines)


def test_workers_get_ready_side_by_side_and_are_timed_in_turn(tmp_path, capsys):
    order = tmp_path / "order"
    source = f"""
import sys
from benchmarks import turns
if sys.argv[1] == "broken":
    sys.exit("it broke")
def rows(wait):
    print("what a library prints")
    with open({str(order)!r}, "a") as file:
        file.write("ready ")
    wait()
    for number in range(2):
        with open({str(order)!r}, "a") as file:
            file.write(sys.argv[1] + " ")
        yield {{"of": sys.argv[1], "number": number}}
turns.work(rows)
"""
    jobs = [turns.Job(name, [sys.executable, "-c", source, name], {}) for name in ("one", "broken", "two")]
    rows = turns.run(jobs, 60, tmp_path)
    assert [(row["of"], row["number"]) for row in rows] == [("one", 0), ("one", 1), ("two", 0), ("two", 1)]
    assert order.read_text().split() == ["ready", "ready", "one", "one", "two", "two"]
    assert "no row: broken: it broke" in capsys.readouterr().out
    assert "what a library prints" in (tmp_path / "one.log").read_text()


def test_the_hosts_share_is_measured_without_a_gpu():
    """Launches go nowhere, and a call that goes all the way each time would take five times as long."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "benchmarks.host", "--op", "kimi_delta_attention", "--time", "64", "--heads", "1"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    out = subprocess.run(command, env=environment, cwd=report.ROOT, capture_output=True, text=True, check=True).stdout
    taken = {line[:20].strip(): float(line.split("host")[1].split()[0]) for line in out.splitlines()[1:]}
    assert set(taken) == {"forward", "forward, recorded", "both", "nothing"}
    assert 0 < taken["both"] < 6 * taken["nothing"]
