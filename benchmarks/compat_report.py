"""The table of compat.fla beside FLA itself, from ``check_fla``'s rows."""

from __future__ import annotations

from benchmarks.tables import Result, Row, markdown, number, versions

REFUSALS = {
    "Triton >= 3.4.0": "its gated backward refuses this Triton on Hopper",
    "not implemented": "no backward",
    "does not require grad": "no backward",
    "not finite": "final state infinite or NaN",
}


def compat_table(result: Result) -> str:
    """A line a function: how many calls agree, and the errors of its worst output or state and its worst gradient."""
    found: dict[str, list[Row]] = {}
    for row in result["rows"]:
        found.setdefault(row["function"], []).append(row)
    header = ["function", "FLA", "calls that agree", "output or state", "FLA's", "gradient", "FLA's"]
    lines = []
    for name, rows in found.items():
        notes = {said for row in rows for words, said in REFUSALS.items() if words in row.get("fla", "")}
        agree = f"{sum(row['agrees'] is True for row in rows)} of {len(rows)}"
        errors = [*_worst(rows, "forward"), *_worst(rows, "gradient")]
        lines.append([f"`{name}`", "; ".join(sorted(notes)), agree, *errors])
    sizes = (
        f"{result['batch']}×{result['time']} tokens, {result['key_heads']}/{result['value_heads']} heads of "
        f"{result['key_dim']}"
    )
    apart = [row for row in result["rows"] if row["agrees"] is not True]
    farther = sorted({row["gradient"]["of"] for row in apart if "gradient" in row})
    note = (
        f"One {result['card']}, bfloat16, {sizes}, {versions(result)}, commit {result['commit']}; relative errors "
        "against float64, of the call where this library is farthest beside FLA. "
        f"{len(result['rows']) - len(apart)} of {len(result['rows'])} calls agree: each error is at most twice the "
        "larger of FLA's and of what rounding inputs and results to bfloat16 makes."
    )
    note += f" In the others it is {', '.join(farther)} that is farther from it." if apart else ""
    return f"{note}\n\n{markdown(header, lines)}"


def _worst(rows: list[Row], part: str) -> list[str]:
    """This library's error and FLA's, where theirs compare worst."""
    parts = [row[part] for row in rows if part in row]
    if not parts:
        return ["–", "–"]
    worst = max(parts, key=lambda each: each["ours"] / max(each["fla"], 2**-9))
    name = worst["of"].removesuffix(" 0")
    return [f"{name} {worst['ours']:.1e}", f"{worst['fla']:.1e}"]


def accelerate_table(result: Result) -> str:
    """Transformers' models as they are and accelerated: milliseconds and ratios, layers and whole models."""
    found: dict[tuple[str, str], dict[str, Row]] = {}
    for row in result["rows"]:
        found.setdefault((row["model"], row["part"]), {})[row["kind"]] = row
    kinds = ("prefill", "training step", "token")
    header = ["model", "", *(f"{kind}, ms" for kind in kinds)]
    lines = []
    for (model, part), rows in found.items():
        cells = []
        for kind in kinds:
            row = rows.get(kind)
            if row is None:
                cells.append("–")
                continue
            theirs, ours = (number(row[f"{library}_ms"]) for library in ("transformers", "parallelflow"))
            cells.append(f"{theirs} → {ours}, {row['ratio']:.2f} ×")
        lines.append([f"`{model}`", "a layer" if part == "layer" else "whole", *cells])
    farthest = max(row["difference"] for row in result["rows"])
    note = (
        f"{result['cores']} cores, {versions(result)}, float32, random weights, one sequence of "
        f"{result['rows'][0]['time']} tokens: Transformers → accelerated; × is the median of pairs that take turns. "
        f"The models' logits differ by {farthest:.0e}."
    )
    return f"{note}\n\n{markdown(header, lines)}"
