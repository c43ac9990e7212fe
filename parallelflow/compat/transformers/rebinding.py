"""The same method with other functions under the global names that it calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import CellType, FunctionType
from typing import Any


def called_names(method: FunctionType) -> set[str]:
    """The global names in a function's code, decorators (``functools.wraps``) looked through."""
    within = vars(method).get("__wrapped__")
    names = {name for name in method.__code__.co_names if name in method.__globals__}
    return names | called_names(within) if isinstance(within, FunctionType) else names


def rebound(method: FunctionType, replacements: Mapping[str, Callable[[Any], Any]]) -> FunctionType:
    """A copy of ``method`` that calls, for each name of ``replacements``, what is made from the function of that name.

    Decorators are copied around it. The module and the class keep theirs: only who holds the copy calls the new ones.
    """
    within = vars(method).get("__wrapped__")
    space = method.__globals__
    closure = method.__closure__
    if isinstance(within, FunctionType):
        inner = rebound(within, replacements)
        closure = tuple(CellType(inner) if cell.cell_contents is within else cell for cell in closure or ())
    else:
        own = {name: make(space[name]) for name, make in replacements.items() if name in space}
        # Without __name__ the compiler reads these globals; with it, it would read the module of that name.
        space = {name: value for name, value in space.items() if name != "__name__"} | own
    copy = FunctionType(method.__code__, space, method.__name__, method.__defaults__, closure)
    copy.__kwdefaults__ = method.__kwdefaults__
    copy.__dict__.update(vars(method))
    copy.__qualname__, copy.__doc__, copy.__module__ = method.__qualname__, method.__doc__, method.__module__
    if isinstance(within, FunctionType):
        copy.__wrapped__ = inner  # type: ignore[attr-defined]
    return copy
