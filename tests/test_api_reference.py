"""The API reference says what there is to say: formula, shapes, dtypes, errors, source, for every public name."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import parallelflow

pytest.importorskip("transformers")

PAGES = Path(__file__).parents[1] / "docs" / "api"
DIRECTIVE = re.compile(r"^::: (parallelflow[\w.]*)", flags=re.MULTILINE)
PUBLIC = (
    *("functional", "integrate", "drivers", "step", "discretizations", "flow", "solvers", "aggregate", "paths", "nn"),
    *("models", "tasks", "training", "compat.fla", "compat.transformers"),
)
"""What users import from; the rest of the package is the engine's own."""
MODELS = ("functional", "drivers")


def modules_on_pages() -> set[str]:
    return {name for page in PAGES.glob("*.md") for name in DIRECTIVE.findall(page.read_text(encoding="utf-8"))}


def names_of(module) -> list[str]:
    """What a page shows of a module."""
    own = [name for name, x in vars(module).items() if getattr(x, "__module__", None) == module.__name__]
    return getattr(module, "__all__", [name for name in own if not name.startswith("_")])


def documented() -> Iterator[tuple[str, str, object, str]]:
    """Part, name, object, and all that is said of it: by itself, its class, the method it overrides, its module and the
    packages that it is in."""
    seen = set()
    for part in PUBLIC:
        module = importlib.import_module(f"parallelflow.{part}")
        for name in names_of(module):
            thing = getattr(module, name)
            if id(thing) in seen or not (inspect.isclass(thing) or inspect.isroutine(thing)):
                continue
            seen.add(id(thing))
            around = "\n".join(packages_above(thing.__module__))
            yield part, name, thing, f"{thing.__doc__ or ''}\n{around}"
            for inner, method in methods(thing):
                said = f"{overridden(thing, inner)}\n{thing.__doc__}"
                yield part, f"{name}.{inner}", method, f"{said}\n{around}"


def packages_above(module: str) -> list[str]:
    names = module.split(".")
    return [importlib.import_module(".".join(names[:n])).__doc__ or "" for n in range(2, len(names) + 1)]


def methods(thing) -> Iterator[tuple[str, object]]:
    if inspect.isclass(thing):
        for name, x in vars(thing).items():
            method = x.fget if isinstance(x, property) else inspect.unwrap(getattr(x, "__func__", x))
            if not name.startswith("_") and inspect.isfunction(method):
                yield name, method


def overridden(thing: type, name: str) -> str:
    """The docstring of a method or, where it has none, of the one that it overrides; a module's forward is what its
    class says."""
    if name == "forward" and not vars(thing)[name].__doc__:
        return thing.__doc__ or ""
    found = [inspect.getdoc(vars(base)[name]) for base in thing.__mro__ if name in vars(base)]
    return next((text for text in found if text), "")


def own_text(name: str, thing, said: str) -> str:
    return said.split("\n", 1)[0] if "." in name else (thing.__doc__ or "")


def takes_tensors(thing) -> bool:
    return inspect.isroutine(thing) and "Tensor" in str(inspect.signature(thing))


ENTRIES = list(documented())


def entries(wanted) -> list:
    return [pytest.param(*entry, id=f"{entry[0]}.{entry[1]}") for entry in ENTRIES if wanted(entry)]


def test_every_public_module_has_a_page():
    shown = modules_on_pages()
    assert {f"parallelflow.{part}" for part in PUBLIC} <= shown
    navigation = (PAGES.parents[1] / "mkdocs.yml").read_text(encoding="utf-8")
    assert all(f"api/{page.name}" in navigation for page in PAGES.glob("*.md"))


def test_every_name_of_the_package_is_in_a_public_module():
    there = {name for part in PUBLIC for name in names_of(importlib.import_module(f"parallelflow.{part}"))}
    assert set(parallelflow.__all__) - {"step"} <= there


def test_there_is_something_to_check():
    assert len(ENTRIES) > 150


@pytest.mark.parametrize(("part", "name", "thing", "said"), entries(lambda entry: True))
def test_it_is_described(part, name, thing, said):
    assert own_text(name, thing, said).strip()


@pytest.mark.parametrize(("part", "name", "thing", "said"), entries(lambda entry: takes_tensors(entry[2])))
def test_shapes_and_dtypes(part, name, thing, said):
    assert re.search(r"\[[\w.…, +()|·-]+\]", said), "no shape"
    assert re.search(r"dtype|float(16|32|64)|int(32|64)|bool", said), "no dtype"


def raises(entry) -> bool:
    part, name, thing, said = entry
    try:
        source = inspect.getsource(inspect.unwrap(thing)) if inspect.isroutine(thing) else ""
    except (OSError, TypeError):
        return False
    return bool(re.search(r"\braise [A-Z]|check_layouts\(|expect_\w+\(", source))


@pytest.mark.parametrize(("part", "name", "thing", "said"), entries(raises))
def test_errors(part, name, thing, said):
    assert re.search(r"[Rr]aises?\b|\w+Error", said)


@pytest.mark.parametrize(
    ("part", "name", "thing", "said"),
    entries(lambda entry: entry[0] in MODELS and "." not in entry[1] and inspect.isfunction(entry[2])),
)
def test_models_have_a_formula_and_a_source(part, name, thing, said):
    text = thing.__doc__ or ""
    assert re.search(r"``[^`]*(=|←)[^`]*``", text), "no formula"
    assert re.search(r"Source: .*(arXiv \d{4}\.\d{5}|implemented in)", text.replace("\n", " ")), "no source"


@pytest.mark.parametrize(
    ("part", "name", "thing", "said"),
    entries(lambda entry: entry[0] == "functional" and "." not in entry[1] and inspect.isfunction(entry[2])),
)
def test_a_model_says_itself_what_each_tensor_is(part, name, thing, said):
    """``help`` of a function shows no more than its own docstring."""
    for argument in inspect.signature(thing).parameters:
        assert re.search(rf"``[^`]*\b{argument}\b[^`]*``", thing.__doc__), argument
