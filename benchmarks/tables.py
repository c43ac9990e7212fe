"""What every table and plot of results is made with."""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]
Result = dict[str, Any]


def versions(result: Result) -> str:
    """What was measured with, in words."""
    return ", ".join(f"{name} {version}" for name, version in result["versions"].items())


def pyplot() -> Any:
    """Matplotlib's, drawing to files that are the same in every run."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "parallelflow"
    import matplotlib.pyplot as plt

    return plt


def markdown(header: list[str], lines: list[list[str]]) -> str:
    """A table; all columns but the first two are numbers."""
    rule = ["---" if place < 2 else "---:" for place in range(len(header))]
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, rule, *lines))


def number(value: float | None, digits: int = 3) -> str:
    """Significant digits, a dash for nothing."""
    if value is None:
        return "–"
    return f"{value:.0f}" if value >= 10 ** (digits - 1) else f"{value:#.{digits}g}".rstrip(".")
