"""The table of what ``benchmarks.solvers`` measured."""

from __future__ import annotations

from benchmarks.tables import Result, Row, markdown, number, versions

METHODS = {"sigdelta": "sigDelta", "substitution": "substitution", "blocked_inverse": "blocked inverse"}


def solvers_table(result: Result) -> str:
    """Times of the three methods side by side, then their errors."""
    found: dict[tuple, dict[str, Row]] = {}
    for row in result["rows"]:
        found.setdefault((row["chunk"], row["rank"], row["dtype"], row["systems"]), {})[row["method"]] = row
    header = ["C × R", "dtype", "systems", *METHODS.values(), "its solve alone", "transposed: sigDelta",
              "substitution", "blocked inverse"]  # fmt: skip
    times = [
        [f"{chunk} × {rank}", dtype, f"{systems:,}", *(number(rows[method]["total_ms"]) for method in METHODS),
         number(rows["blocked_inverse"]["solve_ms"]), *(number(rows[method]["transposed_ms"]) for method in METHODS)]
        for (chunk, rank, dtype, systems), rows in found.items()
    ]  # fmt: skip
    fewest = min(row["systems"] for row in result["rows"])
    errors = [
        [f"{chunk} × {rank}", dtype, *(f"{rows[method][name]:.1e}" for name in ("error", "error_correlated")
                                       for method in METHODS)]
        for (chunk, rank, dtype, systems), rows in found.items() if systems != fewest
    ]  # fmt: skip
    titles = [f"{keys}: {method}" if not place else method for keys in ("random keys", "correlated keys")
              for place, method in enumerate(METHODS.values())]  # fmt: skip
    note = (
        f"One {result['card']}, {versions(result)}, {result['columns']} columns. Milliseconds of one solve, of the "
        "blocked inverse with the inversion. G in float32, right sides and solutions in the dtype."
    )
    same = "Every method gave the same bits twice." if all(row["same_bits"] for row in result["rows"]) else ""
    second = f"Relative errors against float64 on the same numbers. {same}".strip()
    return "\n\n".join((note, markdown(header, times), second, markdown(["C × R", "dtype", *titles], errors)))
