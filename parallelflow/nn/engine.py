"""Options of ``integrate`` that a layer takes once, for all its calls."""

from __future__ import annotations

from typing import Any

from parallelflow.aggregate import AGGREGATES
from parallelflow.checks import expect_flag, nearest
from parallelflow.discretizations import Discretization
from parallelflow.integrate import check_choices

USUAL: dict[str, Any] = {
    "scale": None,
    "chunk_size": 64,
    "solver": "tensor_inverse",
    "aggregate": "sequential",
    "backend": "auto",
}
NAMES = (*USUAL, "batch_invariant", "validate", "discretization")
"""The others say where a call begins and ends, which is the layer's to say."""


def check_engine(engine: Any, taken: tuple[str, ...] = ()) -> dict[str, Any]:
    """The options, checked; none for None. ``taken`` has those that the layer has arguments for.

    Raises:
        TypeError, ValueError: for an option that is none of ``NAMES``, or has a value that it cannot have.
    """
    if engine is None:
        return {}
    if not isinstance(engine, dict):
        raise TypeError(f"engine: got {engine!r}, expected a dictionary of options of parallelflow.integrate")
    known = [name for name in NAMES if name not in taken]
    for name in engine:
        if name not in known:
            raise TypeError(f"engine: got {name!r}{nearest(name, known)}; expected only {', '.join(known)}")
    try:
        chosen = USUAL | {name: value for name, value in engine.items() if name in USUAL}
        check_choices(**chosen, aggregates=[*AGGREGATES, "distributed"])
        for name in ("batch_invariant", "validate"):
            if engine.get(name) is not None:
                expect_flag(name, engine[name])
        if isinstance(engine.get("discretization"), str):
            Discretization(engine["discretization"])
    except (TypeError, ValueError) as error:
        raise type(error)(f"engine: got a {error}") from None
    return engine
