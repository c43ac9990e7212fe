"""What is told of benchmarks is what their results say."""

import pytest

from benchmarks import report

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
