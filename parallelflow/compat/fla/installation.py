"""``import fla.ops…`` on this engine, and back."""

from __future__ import annotations

import functools
import importlib
import sys
from importlib.machinery import ModuleSpec
from types import FunctionType, ModuleType, TracebackType
from typing import Any

from parallelflow.compat.fla import delta, linear, low_rank
from parallelflow.compat.fla.signatures import FAMILIES

FUNCTIONS: dict[str, Any] = {
    name: next(getattr(module, name) for module in (delta, linear, low_rank) if hasattr(module, name))
    for names in FAMILIES.values()
    for name in names
}
_PLACES = ("", ".chunk", ".fused_recurrent", ".fused_chunk")  # modules of a family that hold functions of it


class Installation:
    """What ``install`` changed. ``uninstall()``, or leaving ``with install():``, puts everything back."""

    def __init__(self) -> None:
        self.provided: list[str] = []
        """Modules made here, where FLA is not installed or does not import."""
        self.originals: dict[Any, Any] = {}
        """Where FLA is installed: what stands in for its functions → them."""

    def uninstall(self) -> None:
        """FLA's own functions under every name that held them, or has been given ours by ``fla.ops`` since."""
        global _installed
        if _installed is not self:
            return
        _installed = None
        _rebind(self.originals)
        for name in self.provided:
            sys.modules.pop(name, None)

    def __enter__(self) -> Installation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.uninstall()


_installed: Installation | None = None


def install() -> Installation:
    """From here on ``fla.ops.<family>`` and ``fla.ops`` hold this package's functions.

    Where FLA is installed its modules are imported and the functions in them replaced, under every name in any module
    that holds one of them: ``from fla.ops.gated_delta_rule import chunk_gated_delta_rule`` works before as after. A
    function that sits elsewhere (a default argument, a list, a local variable) stays FLA's. Where FLA is not installed,
    or does not import (no Triton), ``fla`` and ``fla.ops.<family>`` are provided, with these functions and no others.

    Returns:
        The ``Installation``, whose ``uninstall()`` undoes it; also a context manager. Installing twice is once.
    """
    global _installed
    if _installed is not None:
        return _installed
    _installed = Installation()
    if _imports_fla():
        _installed.originals = _stand_ins()
        _rebind({original: ours for ours, original in _installed.originals.items()})
    else:
        _provide(_installed)
    return _installed


def uninstall() -> None:
    """Undoes ``install``; nothing where nothing is installed."""
    if _installed is not None:
        _installed.uninstall()


def _imports_fla() -> bool:
    """Whether FLA's own modules are there, all imported."""
    before = set(sys.modules)
    try:
        for family in FAMILIES:
            importlib.import_module(f"fla.ops.{family}")
    except Exception:  # not installed, or whatever its import raises on a machine that it does not support
        for name in set(sys.modules) - before:
            if name.partition(".")[0] == "fla":
                del sys.modules[name]
        return False
    return True


def _stand_ins() -> dict[Any, Any]:
    """For each of FLA's functions one that calls ours and is found nowhere else: ``uninstall`` knows it again."""
    names = {getattr(sys.modules[f"fla.ops.{family}"], name): name for family in FAMILIES for name in FAMILIES[family]}
    return {_stand_in(FUNCTIONS[name]): original for original, name in names.items()}


def _stand_in(ours: Any) -> Any:
    @functools.wraps(ours)
    def call(*args: Any, **keywords: Any) -> Any:
        return ours(*args, **keywords)

    return call


def _rebind(functions: dict[Any, Any]) -> None:
    """Under every name of every loaded module, what a function is to be replaced by."""
    for module in [module for module in sys.modules.values() if functions and isinstance(module, ModuleType)]:
        for name, value in list(vars(module).items()):
            if type(value) is FunctionType and value in functions:  # isinstance would ask odd objects for their class
                setattr(module, name, functions[value])


def _provide(installation: Installation) -> None:
    """``fla``, ``fla.ops``, ``fla.ops.<family>`` and the files below, as modules made here."""
    functions: dict[str, list[str]] = {"fla": [], "fla.ops": [name for names in FAMILIES.values() for name in names]}
    for family, names in FAMILIES.items():
        parents = family.split(".")[:-1]
        if parents:
            functions.setdefault(f"fla.ops.{parents[0]}", []).extend(names)
        for place in _PLACES:
            prefix = place.removeprefix(".")
            there = [name for name in names if name.startswith(prefix)]
            if there:
                functions[f"fla.ops.{family}{place}"] = there
    for title, held in functions.items():
        module = ModuleType(title, "Provided by parallelflow.compat.fla.")
        module.__spec__ = ModuleSpec(title, None, is_package=True)
        module.__path__ = []
        module.__dict__.update({name: FUNCTIONS[name] for name in held}, __all__=held)
        sys.modules[title] = module
        installation.provided.append(title)
        parent, _, child = title.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
    sys.modules["fla"].__version__ = "0.6.0"  # type: ignore[attr-defined]
