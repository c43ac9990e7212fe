"""The table and the plot of what ``benchmarks.context_parallel`` measured."""

from __future__ import annotations

from pathlib import Path

from benchmarks.tables import Result, Row, markdown, number, pyplot, versions

COMMAND = "torchrun --nproc-per-node 8 -m benchmarks.context_parallel --out benchmarks/results/context_parallel.json"
MODES = {"total": "the same tokens on all", "per rank": "as many tokens on each"}


def timed(result: Result) -> list[Row]:
    return [row for row in result["rows"] if "forward_ms" in row]


def times(rows: list[Row]) -> str:
    """Milliseconds, and the ratio to perfect scaling."""
    header = ["model", "mode", "ranks", "tokens", "forward ms", "efficiency", "forward + backward ms", "efficiency",
              "exchange ms", "MiB received", "way"]  # fmt: skip
    lines = []
    for row in rows:
        ratios = [
            f"{row[f'{name}_efficiency']:.2f}" if f"{name}_efficiency" in row else "–"
            for name in ("forward", "forward_backward")
        ]
        lines.append([
            f"`{row['op']}`", row["mode"], str(row["ranks"]), f"{row['tokens']:,}",
            number(row["forward_ms"]), ratios[0], number(row["forward_backward_ms"]), ratios[1],
            number(row["exchange_ms"]), f"{row['bytes'] / 2**20:.2f}", row["method"].replace("_", "-"),
        ])  # fmt: skip
    return markdown(header, lines)


def gradients(rows: list[Row]) -> str:
    """The largest relative error of output and gradients."""
    header = [
        "model",
        "ranks",
        "tokens",
        "from one rank's",
        "from float64",
        "one rank's from float64",
        "same bits twice",
    ]
    lines = [
        [f"`{row['op']}`", str(row["ranks"]), f"{row['check_tokens']:,}", *(f"{row[name]:.1e}" for name in
         ("from_one_rank", "from_float64", "one_rank_from_float64")), "yes" if row["same_bits"] else "no"]
        for row in rows
    ]  # fmt: skip
    return markdown(header, lines)


def context_table(result: Result) -> str:
    """Times and efficiencies, then gradients, with the plot; what to run, where nothing has been."""
    if not result["rows"]:
        return f"No machine with several GPUs has run it yet: `{COMMAND}`."
    note = (
        f"{result['card']}, {result['dtype']}, {result['heads']} heads of {result['size']}, {versions(result)}. "
        "Efficiency is the time of one rank over that of W, in the mode `total` divided by W: 1 is perfect. Exchanges "
        "and received bytes are of one direction."
    )
    checked = [row for row in result["rows"] if "from_one_rank" in row]
    errors = ["Output and gradients, the largest relative error of any:", gradients(checked)] if checked else []
    picture = f"![Efficiency by ranks](performance/{result['name']}.svg)"
    return "\n\n".join((note, times(timed(result)), picture, *errors))


def context_plot(result: Result, path: Path) -> None:
    """Efficiency, forward and backward, by the number of ranks."""
    plt = pyplot()
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
    rows = [row for row in timed(result) if "forward_efficiency" in row]
    for panel, (mode, title) in zip(panels, MODES.items(), strict=True):
        for colour, op in enumerate(dict.fromkeys(row["op"] for row in rows)):
            mine = sorted((r for r in rows if r["op"] == op and r["mode"] == mode), key=lambda row: row["ranks"])
            for name, line in (("forward", ":"), ("forward_backward", "-")):
                label = f"{op}, {name.replace('_', ' and ')}"
                ranks, ratios = [r["ranks"] for r in mine], [r[f"{name}_efficiency"] for r in mine]
                panel.plot(ranks, ratios, f"o{line}", color=f"C{colour}", ms=4, label=label)
        panel.set(xscale="log", xlabel="ranks", title=title, ylim=(0, 1.1))
        panel.set_xticks(sorted({row["ranks"] for row in rows}), sorted({row["ranks"] for row in rows}), minor=False)
        panel.minorticks_off()
    panels[0].set_ylabel("efficiency")
    panels[0].legend(fontsize="x-small", frameon=False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
