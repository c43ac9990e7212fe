"""Results of benchmarks: JSON files, and the tables and plots that are made from them and nothing else.

    python -m benchmarks.report           # README's tables and docs/performance/*.svg from benchmarks/results/*.json
    python -m benchmarks.report --check   # exit status 1 where a document is not what the results say

A result is ``{card, versions, commit, ceilings, rows}``; a row ``{op, batch, time, key_heads, value_heads, key_dim,
value_dim, rank, library, forward_ms, forward_backward_ms, extra_mib, first_call_s, error, …}``.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.compat_report import accelerate_table, compat_table
from benchmarks.context_parallel_report import context_plot, context_table
from benchmarks.solvers_report import solvers_table
from benchmarks.tables import Result, Row, markdown, number, pyplot, versions

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
DOCUMENTS = (
    README, ROOT / "docs" / "context_parallel.md", ROOT / "docs" / "coming_from_fla.md",
    ROOT / "docs" / "performance" / "sigdelta.md",
)  # fmt: skip

PROBLEM = ("op", "batch", "time", "key_heads", "value_heads", "key_dim", "value_dim", "rank")
OURS = "parallelflow"
NAMES = {OURS: "ParallelFlow", "fla": "FLA", "flash_qla": "FlashQLA", "transformers": "Transformers"}


def commit(named: str = "") -> str:
    """The commit that is measured: the one that is named, or the one that is checked out."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    return named or subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False).stdout.strip()


def load(path: Path) -> Result:
    """A result; an empty one where there is none."""
    return json.loads(path.read_text()) if path.exists() else {"rows": []}


def save(result: Result, path: Path) -> None:
    """Writes a result, one row a line, so that a new run is a small difference."""
    path.parent.mkdir(parents=True, exist_ok=True)
    head = json.dumps({key: value for key, value in result.items() if key != "rows"}, indent=1)[:-2]
    rows = ",\n  ".join(json.dumps(row) for row in result["rows"])
    path.write_text(f'{head},\n "rows": [\n  {rows}\n ]\n}}\n')


def merge(result: Result, rows: list[Row]) -> None:
    """Rows join the result; one of the same problem and library is replaced, and what stays names its commit."""
    for row in result["rows"]:
        row.setdefault("commit", result["commit"])
    key = lambda row: tuple(row.get(name) for name in (*PROBLEM, "state", "library"))  # noqa: E731
    kept = {key(row): row for row in result["rows"]} | {key(row): row for row in rows}
    result["rows"] = list(kept.values())


def problems(result: Result) -> dict[tuple, dict[str, Row]]:
    """The rows by problem, then by library."""
    found: dict[tuple, dict[str, Row]] = {}
    for row in result["rows"]:
        found.setdefault(tuple(row[name] for name in PROBLEM), {})[row["library"]] = row
    return found


def title_of(problem: tuple) -> tuple[str, str]:
    """A problem's model, and its sizes as far as they are not the usual ones."""
    shape = dict(zip(PROBLEM, problem, strict=True))
    rest = f"{shape['batch']}×{shape['time']}, {shape['key_heads']}/{shape['value_heads']}"
    rest += "" if shape["key_dim"] == 128 else f" of {shape['key_dim']}"
    return shape["op"], rest + ("" if shape["rank"] == 1 else f", R = {shape['rank']}")


def gpu_table(result: Result) -> str:
    """Every library beside this one: milliseconds, ratio, memory, time to the first gradient, error."""
    header = ["model, batch × tokens, heads", "library", "forward ms", "", "forward + backward ms", "", "extra MiB",
              "first gradient s", "error"]  # fmt: skip
    lines = []
    for problem, rows in problems(result).items():
        op, rest = title_of(problem)
        title = f"`{op}` {rest}"
        ours = rows.get(OURS)
        for library in (name for name in NAMES if name in rows):
            row = rows[library]
            commit = row.get("commit", result["commit"])
            cells = [title, NAMES[library] + (f" ({commit})" if commit != result["commit"] else "")]
            for name in ("forward_ms", "forward_backward_ms"):
                comparable = library != OURS and ours is not None and row[name] and ours[name]
                cells += [number(row[name]), f"{row[name] / ours[name]:.2f} ×" if comparable else ""]
            error = "–" if row["error"] is None else f"{row['error']:.1e}"
            lines.append([*cells, number(row["extra_mib"]), number(row["first_call_s"], 2), error])
            title = ""
    ceilings = result["ceilings"]
    apart = any(row.get("commit", result["commit"]) != result["commit"] for row in result["rows"])
    other = " A row that names a commit is of an earlier run, on another card of the kind." if apart else ""
    note = (
        f"One {result['card']}, bfloat16, K = V = 128 unless said, {versions(result)}; copy "
        f"{ceilings['copy_gb_s'] / 1000:.2f} TB/s, bf16 matrix product {ceilings['bf16_tflop_s']:.0f} TFLOP/s. "
        "× is a library's time over ParallelFlow's. The first gradient, from empty caches, is made by all processes at "
        f"once.{other}"
    )
    modes = {row.get("batch_invariant") for row in result["rows"] if row["library"] == OURS}
    if modes == {True}:
        note += " ParallelFlow gives a sequence the same bits in any batch (`batch_invariant=True`, its default)."
    return f"{note}\n\n{markdown(header, lines)}"


def cpu_table(result: Result) -> str:
    """Training shapes and one token beside Transformers; then every model at one size."""
    theirs = {name: row for row in result["rows"] if row["library"] == "transformers" for name in [_case(row)]}
    ours = [row for row in result["rows"] if row["library"] == OURS]
    beside = [row for row in ours if "forward_ratio" in row]
    header = ["batch × tokens, heads of size", "", "forward ms", "", "forward + backward ms", "", "extra MiB", ""]
    lines = []
    for row in beside:
        cells = [_shape(row) + (", one token" if row["op"] == "decode" else ""), row["dtype"]]
        for name in ("forward", "forward_backward"):
            ratio = row.get(f"{name}_ratio")
            cells += [number(row.get(f"{name}_ms")), f"{ratio:.2f} ×" if ratio else ""]
        memory, other = row.get("extra_mib"), theirs[_case(row)].get("extra_mib")
        cells += [number(memory), f"{memory / other:.2f} of it" if memory and other else ""]
        lines.append(cells)
    every = ["model", "R", "forward ms", "forward + backward ms", "share of the products' rate"]
    alone = [
        [f"`{row['op']}`", str(row["rank"]), number(row["forward_ms"]), number(row["forward_backward_ms"]),
         f"{100 * row['share_of_products']:.0f} %"]
        for row in ours if "share_of_products" in row and "forward_ratio" not in row
    ]  # fmt: skip
    shares = ", ".join(f"{100 * row['share_of_products']:.0f} %" for row in beside if row["dtype"] == "float32"
                       and "share_of_products" in row)  # fmt: skip
    slopes = result["slopes"]
    note = (
        f"{result['card']}, {result['threads']} threads, {versions(result)}. × is the time of Transformers' reference "
        "(`torch_chunk_gated_delta_rule`, for one token `torch_recurrent_gated_delta_rule`) over ParallelFlow's, the "
        "median of pairs that take turns; memory is what forward and backward add to a process of their own. Of the "
        f"rate that batched matrix products reach on the same cores the chunked algorithm's products reach {shares} "
        "(float32, forward). From 1,024 to 65,536 tokens the logarithm of time grows with that of length at a slope of "
        f"{slopes['forward_ms']:.2f} forward and {slopes['forward_backward_ms']:.2f} with backward."
    )
    then = "Every model, 1×2048, 8 heads of 64, float32:"
    return "\n\n".join((note, markdown(header, lines), then, markdown(every, alone)))


def _shape(row: Row) -> str:
    return f"{row['batch']}×{row['time']}, {row['key_heads']}/{row['value_heads']} of {row['key_dim']}"


def _case(row: Row) -> tuple:
    """A problem and its dtype."""
    return tuple(row.get(name) for name in (*PROBLEM, "dtype"))


def decode_table(result: Result) -> str:
    """A step of every library beside this one, by batch: microseconds on the card, part of the copy rate, ratio."""
    batches = sorted({row["batch"] for row in result["rows"]})
    header = ["model, heads, state", "library", *(f"batch {batch}" for batch in batches), "host µs"]
    found: dict[str, dict[str, dict[int, Row]]] = {}
    for row in result["rows"]:
        title = f"`{row['op']}` {row['value_heads']} × {row['key_dim']}×{row['value_dim']}, {row['state']}"
        found.setdefault(title, {}).setdefault(row["library"], {})[row["batch"]] = row
    lines = []
    for title, libraries in found.items():
        for library in (name for name in NAMES if name in libraries):
            cells = []
            for batch in batches:
                row, ours = libraries[library].get(batch), libraries.get(OURS, {}).get(batch)
                if row is None:
                    cells.append("–")
                    continue
                ratio = "" if library == OURS or ours is None else f", {row['step_us'] / ours['step_us']:.2f} ×"
                cells.append(f"{number(row['step_us'])} µs, {100 * row['of_copy']:.0f} %{ratio}")
            host = [row["host_us"] for row in libraries[library].values() if row["host_us"] is not None]
            lines.append([title, NAMES[library], *cells, number(max(host, default=None))])
            title = ""
    note = (
        f"One {result['card']}, one token a sequence, bfloat16, {versions(result)}; % of the rate of a large copy, "
        f"{result['ceilings']['copy_gb_s'] / 1000:.2f} TB/s; × is a library's time over ParallelFlow's."
    )
    return f"{note}\n\n{markdown(header, lines)}"


TABLES: dict[str, Callable[[Result], str]] = {
    "gpu": gpu_table,
    "cpu": cpu_table,
    "decode": decode_table,
    "compat": compat_table,
    "accelerate": accelerate_table,
    "context_parallel": context_table,
    "solvers": solvers_table,
}
"""What makes a table of a result, by the name after ``benchmarks:`` in a document's markers."""


def render(document: str) -> str:
    """The document with its tables made anew: ``<!-- benchmarks: KIND FILE -->`` … ``<!-- /benchmarks -->``."""

    def table(match: re.Match[str]) -> str:
        kind, name = match["kind"], match["name"]
        return f"{match['open']}\n{TABLES[kind](load(RESULTS / name))}\n{match['close']}"

    pattern = r"(?P<open><!-- benchmarks: (?P<kind>\w+) (?P<name>\S+) -->)\n.*?(?P<close><!-- /benchmarks -->)"
    return re.sub(pattern, table, document, flags=re.DOTALL)


def plot(result: Result, path: Path) -> None:
    """Speeds at each problem that another library was measured at, one bar a library."""
    plt = pyplot()
    found = {problem: rows for problem, rows in problems(result).items() if len(rows) > 1}
    libraries = [name for name in NAMES if any(name in rows for rows in found.values())]
    figure, panels = plt.subplots(1, 2, figsize=(11, 0.6 * len(found) + 1.2), sharey=True)
    titles = [" ".join(title_of(problem)) for problem in found]
    for panel, name in zip(panels, ("forward_ms", "forward_backward_ms"), strict=True):
        for place, library in enumerate(libraries):
            ratios = [
                rows[OURS][name] / rows[library][name] if library in rows and OURS in rows else 0.0
                for rows in found.values()
            ]
            height = 0.8 / len(libraries)
            panel.barh([y + place * height for y in range(len(found))], ratios, height, label=NAMES[library])
        panel.set_yticks([y + 0.4 - height / 2 for y in range(len(found))], titles)
        panel.set_xlabel(f"speed relative to ParallelFlow, {name.removesuffix('_ms').replace('_', ' and ')}")
        panel.invert_yaxis() if panel is panels[0] else None
    panels[0].legend(fontsize="small", loc="lower left", bbox_to_anchor=(0, 1), ncols=len(libraries), frameon=False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def plot_cpu(result: Result, path: Path) -> None:
    """Ratios to Transformers, and time against length."""
    plt = pyplot()
    ours = [row for row in result["rows"] if row["library"] == OURS]
    beside = [row for row in ours if "forward_ratio" in row]
    line = (1, 4, 4, 64, 64, 1)
    lengths = [row for row in ours if row["op"] == "gated_delta_rule" and _lane(row) == line]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6))
    titles = [f"{_shape(row)}, {row['dtype']}" for row in beside]
    for place, name in enumerate(("forward", "forward_backward")):
        ratios = [row.get(f"{name}_ratio", 0.0) for row in beside]
        bars = left.barh([y + 0.4 * place for y in range(len(beside))], ratios, 0.4, label=name.replace("_", " and "))
        left.bar_label(bars, [f"{ratio:.1f} ×" if ratio else "" for ratio in ratios], fontsize="small")
        times = [row[f"{name}_ms"] for row in lengths]
        right.loglog([row["time"] for row in lengths], times, "o-", base=2, label=name.replace("_", " and "))
    left.set_yticks([y + 0.2 for y in range(len(beside))], titles, fontsize="small")
    left.invert_yaxis()
    left.set_xlabel("times as fast as the reference in Transformers")
    left.margins(x=0.15)
    right.set_xlabel("tokens (gated delta rule, 4 heads of 64)")
    right.set_ylabel("ms")
    for panel in (left, right):
        panel.legend(fontsize="small", frameon=False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _lane(row: Row) -> tuple:
    """A problem's sizes but its length."""
    return tuple(row[name] for name in PROBLEM if name not in ("op", "time"))


PLOTS: dict[str, Callable[[Result, Path], None]] = {
    "gpu": plot,
    "cpu": plot_cpu,
    "context_parallel": context_plot,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a table is out of date")
    arguments = parser.parse_args()
    stale = [path for path in DOCUMENTS if render(path.read_text()) != path.read_text()]
    if arguments.check:
        for path in stale:
            print(f"{path.name}: its tables are not those of benchmarks/results; run python -m benchmarks.report")
        return int(bool(stale))
    for path in stale:
        path.write_text(render(path.read_text()))
    for path in RESULTS.glob("*.json"):
        result = load(path)
        if result.get("kind") in PLOTS:
            PLOTS[result["kind"]](result, ROOT / "docs" / "performance" / f"{path.stem}.svg")
    return 0


if __name__ == "__main__":
    sys.exit(main())
