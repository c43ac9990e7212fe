"""Whether each statement holds, in the figures' own numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from parallelflow.cli.reproduce.structure import ROWS
from parallelflow.cli.reproduce.turning import ORDERS

Rows = list[dict[str, Any]]
Verdict = tuple[str, str, str]
"""Statement, verdict, and the figures that say so."""


AGREEMENT = 1e-10
"""The largest error at which float64 results count as the recurrence's."""
ORDER = 0.15
"""How far a measured order may be from the scheme's, and an exponent of growth from the claimed one."""


def _structure(rows: Rows) -> list[Verdict]:
    worst = {name: max(r["error"] for r in rows if r["property"] == name) for name in names(rows, "property")}
    least = min(row["error"] for row in rows if row["property"] == "exponential, minus")
    ranks = {row["size"]: row["rank"] for row in rows if row["property"] == "low rank"}
    plus = worst["exponential, plus"]
    return [
        ("flows compose: Chen's relation, at any cuts", _said(worst["composition"] <= AGREEMENT),
         f"float64: {worst['composition']:.0e}"),
        ("the transition of t tokens is a decay and a rank of t·R",
         _said(worst["low rank"] <= AGREEMENT and all(rank == size * ROWS for size, rank in ranks.items())),
         f"R = {ROWS}: ranks {listed(ranks.values())} after {listed(ranks)} tokens"),
        ("the adjoint of a flow is its transpose", _said(worst["adjoint"] <= AGREEMENT),
         f"float64: {worst['adjoint']:.0e}"),
        ("a step of rank 1 is one factor of a product of exponentials",
         _said(plus <= AGREEMENT < least, "holds, with a plus sign"),
         f"I + ((e^tr - 1)/tr) ω is e^ω to {plus:.0e}; with a minus it is off by {least:.1f} and more"),
    ]  # fmt: skip


def _signatures(rows: Rows) -> list[Verdict]:
    kernels: dict[int, list[float]] = {}
    for row in rows:
        kernels.setdefault(row["steps"], []).append(row["kernel"])
    apart = max(max(found) / min(found) - 1 for found in kernels.values())
    before, last = sorted(kernels)[-2:]
    errors = {row["steps"]: row["error"] for row in rows if row["route"] == "sigdelta"}
    order = math.log(errors[before] / errors[last]) / math.log(last / before)
    return [
        (
            "what solves a chunk solves a signature kernel's equation",
            _said(apart <= AGREEMENT and abs(order - 1) <= ORDER),
            f"stencil, triangular system and flow agree to {apart:.0e}; of order {order:.2f} to a Bessel function, the "
            "kernel of two straight lines",
        )
    ]


def _equivalence(rows: Rows) -> list[Verdict]:
    exact = [row for row in rows if row["dtype"] == "float64"]
    error = max(row["error"] for row in exact)
    gradient = max(row["gradient_error"] for row in exact)
    return [
        (
            "tensorInv, sigDelta and the scans compute the recurrence",
            _said(max(error, gradient) <= AGREEMENT),
            f"float64: outputs to {error:.0e}, gradients to {gradient:.0e}, over every solver, aggregate, R and C",
        )
    ]


def _complexity(rows: Rows) -> list[Verdict]:
    at = {(row["solver"], row["rows"], row["chunk"]): row for row in rows}
    sizes = [key[1:] for key in at if key[0] == "sigdelta"]

    def times(quantity: str) -> str:
        found = [at["sigdelta", *size][quantity] / at["substitution", *size][quantity] for size in sizes]
        return f"{min(found):.2f} to {max(found):.2f} times its {quantity}"

    def grown(quantity: str, solver: str) -> float:
        return growth(rows, solver, quantity, "chunk")

    rank, largest = max(sizes)
    left, right, sig = (grown("serial", solver) for solver in ("sequential", "substitution", "sigdelta"))
    work, inverse = (grown("operations", solver) for solver in ("sigdelta", "tensor_inverse"))
    kept = {
        solver: at[solver, rank, largest]["memory"] / (rank * largest) ** 2 for solver in ("sigdelta", "tensor_inverse")
    }
    ahead = all(
        at["substitution", *size][quantity] <= at["sigdelta", *size][quantity]
        for size in sizes
        for quantity in ("operations", "stages", "serial")
    )
    return [
        (
            "sigDelta's chain of dependent sums is of O(C), that of substitution of O(C²)",
            _said(abs(sig - 1) <= ORDER and abs(left - 2) <= ORDER, "holds against sums taken one by one"),
            f"R = {rank}: the chain grows as C^{sig:.2f}, that of left-looking substitution as C^{left:.2f}",
        ),
        (
            "sigDelta's operations are of O(C²), those of an explicit inverse of O(C³)",
            _said(work <= 2 + ORDER < inverse),
            f"R = {rank}, C to {largest}: operations grow as C^{work:.2f}, against C^{inverse:.2f}",
        ),
        (
            "it takes the anti-diagonals to get there",
            _said(not ahead),
            f"right-looking substitution's chain grows as C^{right:.2f} too; sigDelta takes "
            f"{times('operations')} and {times('stages')}",
        ),
        (
            "both hold O((CR)²) numbers",
            _said(max(grown("memory", solver) for solver in kept) <= 2 + ORDER),
            f"at C = {largest}, R = {rank}, beside G and Z: "
            + ", ".join(f"`{solver}` {share:.1f} (CR)²" for solver, share in kept.items()),
        ),
    ]


def _accuracy(rows: Rows) -> list[Verdict]:
    chunk = max(row["chunk"] for row in rows)

    def worst(inverse: str, **where: str) -> float:
        some = [r for r in rows if r["inverse"] == inverse and all(r[key] == value for key, value in where.items())]
        return max(math.inf if r["error"] is None else r["error"] for r in some if r["chunk"] == chunk)

    single = {"dtype": "float32"}
    sig, right = (worst(name, keys="random", **single) for name in ("sigdelta", "substitution"))
    stable = {name: worst(name, **single) for name in ("tensor_inverse", "substitution", "sequential", "sigdelta")}
    return [
        (
            "every solver is stable, for correlated keys too",
            _said(max(stable.values()) < 1e-4),
            f"float32, C = {chunk}: " + ", ".join(f"`{name}` {error:.0e}" for name, error in stable.items()),
        ),
        (
            "sigDelta rounds as substitution does",
            _said(sig <= 2 * right),
            f"random keys, C = {chunk}: {sig:.0e} in float32 and "
            f"{worst('sigdelta', keys='random', dtype='bfloat16'):.0e} in bfloat16, where right-looking substitution "
            f"has {right:.0e} and {worst('substitution', keys='random', dtype='bfloat16'):.0e}: differences of "
            "neighbouring sums cancel",
        ),
    ]


def _convergence(rows: Rows) -> list[Verdict]:
    found = orders(rows)
    return [
        (
            "a discretisation of the flow is a choice of its own, and converges with its order",
            _said(all(abs(measured - expected) <= ORDER for expected, measured in found.values())),
            ", ".join(f"`{scheme}` {measured:.2f}" for scheme, (_, measured) in found.items()),
        )
    ]


def _runtime(rows: Rows) -> list[Verdict]:
    verdicts = []
    for device in names(rows, "device"):
        here = {(r["solver"], r["rows"], r["chunk"]): r["milliseconds"] for r in rows if r["device"] == device}
        best = {key[1:]: min(here[solver, *key[1:]] for solver in {k[0] for k in here}) for key in here}
        slower = [here["sigdelta", *size] / time for size, time in best.items()]
        verdicts.append(
            (
                f"sigDelta is the faster way in practice, {device}, as tensor operations",
                _said(max(slower) <= 1),
                f"{min(slower):.0f} to {max(slower):.0f} times the fastest solver's time",
            )
        )
    return verdicts


def _aggregation(rows: Rows) -> list[Verdict]:
    worst = max(row["difference"] for row in rows)
    found = [
        (
            "flows compose associatively: time can be cut anywhere",
            _said(worst <= 1e-6),
            f"float32: at most {worst:.0e} from carrying the state",
        )
    ]
    for device in names(rows, "device"):
        length = max(row["length"] for row in rows)
        time = {r["aggregate"]: r["milliseconds"] for r in rows if (r["device"], r["length"]) == (device, length)}
        ratio = time["sequential"] / time["associative"]
        found.append(
            (
                f"a scan in log depth is ahead of carrying the state, {device}, one head",
                _said(ratio > 1),
                f"{ratio:.1f} times as fast at T = {length:,}",
            )
        )
    return found


def orders(rows: Rows) -> dict[str, tuple[int, float]]:
    """Of each scheme: the order that it should have, and the one between the fewest and the most steps."""
    found = {}
    for scheme in names(rows, "scheme"):
        errors = {row["steps"]: row["error"] for row in rows if row["scheme"] == scheme}
        few, many = min(errors), max(errors)
        found[scheme] = ORDERS[scheme], math.log(errors[few] / errors[many]) / math.log(many / few)
    return found


def listed(values: Iterable[object]) -> str:
    return ", ".join(map(str, values))


def names(rows: Rows, key: str) -> list[Any]:
    """The values of ``key``, in order, each once."""
    return list(dict.fromkeys(row[key] for row in rows))


def growth(rows: Rows, solver: str, quantity: str, over: str) -> float:
    """The exponent with which a quantity grows over ``chunk`` or ``rows``: between the two largest values, at the
    largest of the other."""
    other = "rows" if over == "chunk" else "chunk"
    largest = max(row[other] for row in rows)
    at = {row[over]: row[quantity] for row in rows if row["solver"] == solver and row[other] == largest}
    before, last = sorted(at)[-2:]
    return math.log(at[last] / at[before]) / math.log(last / before)


def _said(holds: bool, how: str = "holds") -> str:
    return how if holds else "does not hold"


VERDICTS: dict[str, Callable[[Rows], list[Verdict]]] = {
    "structure": _structure,
    "equivalence": _equivalence,
    "complexity": _complexity,
    "accuracy": _accuracy,
    "signatures": _signatures,
    "convergence": _convergence,
    "runtime": _runtime,
    "aggregation": _aggregation,
}
