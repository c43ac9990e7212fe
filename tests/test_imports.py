"""The parts depend on each other one way only, on torch alone, and cost next to nothing to import."""

from __future__ import annotations

import ast
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "parallelflow"

LADDER: tuple[tuple[str, ...], ...] = (
    ("checks", "lanes", "decays"),  # errors; runs of chunks; exponents inside a chunk
    ("flow", "windows", "solvers"),
    ("drivers",),
    ("problem",),
    ("system", "discretizations"),
    ("aggregate",),
    ("kernels", "torch_backend", "recurrence"),
    ("autograd",),
    ("serving", "distributed"),
    ("integrate",),
    ("again",),
    ("functional",),
    ("step", "paths"),
    ("nn",),
    ("models",),
    ("training", "tasks"),
    ("compat", "cli"),
)
"""flow <- drivers <- discretizations <- system <- aggregate <- kernels <- integrate <- functional <- nn <- models
<- {compat, cli}, with the small parts between: a part imports from the steps before its own only, and never from a part
beside it."""

FREE = ("__init__", "testing", "__main__")
"""Not on the ladder: the public names, and what only tests and benchmarks use (nothing imports it)."""

LEVEL = {part: level for level, parts in enumerate(LADDER) for part in parts}


def module_name(path: Path) -> str:
    names = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(names[:-1] if names[-1] == "__init__" else names)


def part(module: str) -> str:
    """The part of the package that a module belongs to: the first name below the package."""
    names = module.split(".")
    return names[1] if len(names) > 1 else "__init__"


def imports(path: Path) -> list[tuple[str, int, bool]]:
    """Every module that a file imports, with its line, and whether the import is for type checkers only."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for child in ast.walk(node)
    }
    found = []
    package = module_name(path).split(".") if path.name == "__init__.py" else module_name(path).split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno, id(node) in typing_only) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, node.module] if node.module else base)
            whole = [f"{module}.{alias.name}" for alias in node.names]
            isolated = [name if exists(name) else module for name in whole]
            found += [(name, node.lineno, id(node) in typing_only) for name in isolated]
    return found


def exists(module: str) -> bool:
    path = ROOT / Path(*module.split("."))
    return path.with_suffix(".py").exists() or path.is_dir()


def files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def test_every_part_is_on_the_ladder():
    known = set(LEVEL) | set(FREE)
    parts = {part(module_name(path)) for path in files()}
    assert parts <= known, f"not on the ladder: {sorted(parts - known)}"


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down_the_ladder(path):
    own = part(module_name(path))
    for module, line, _ in imports(path):
        if not module.startswith("parallelflow"):
            continue
        other = part(module)
        assert other != "testing" or own == "testing", f"{path}:{line}: testing is for tests and benchmarks only"
        if own in FREE or other == own:
            continue
        assert other != "__init__", f"{path}:{line}: import the part, not the whole package"
        assert LEVEL[other] < LEVEL[own], f"{path}:{line}: {own} imports {other}, which is not below it"


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_only_kernels_name_triton(path):
    """Only the kernels import triton; nothing below the command line needs more than torch."""
    optional = {
        "cli": {"typer", "rich", "matplotlib", "numpy", "transformers"},
        "models": {"transformers", "safetensors"},
    }
    optional |= {"training": {"safetensors", "tokenizers", "yaml"}}
    optional |= {"compat": {"transformers", "safetensors", "fla"}, "kernels": {"triton"}}
    own = part(module_name(path))
    for module, line, typing_only in imports(path):
        root = module.split(".")[0]
        if root in sys.stdlib_module_names or root in ("torch", "parallelflow") or typing_only:
            continue
        assert root in optional.get(own, set()), f"{path}:{line}: {own} imports {root}"


def test_the_heart_has_no_cycles():
    """Within a part, too: the files of a folder import each other one way."""
    graph = {module_name(path): {m for m, _, typing_only in imports(path) if not typing_only} for path in files()}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail[trail.index(module) :], module))
        if module in done or module not in graph:
            return
        for other in graph[module]:
            visit(other, (*trail, module))
        done.add(module)

    for module in graph:
        visit(module, ())


def python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_without_optional_packages():
    """With everything optional blocked the package imports and computes, forward and backward."""
    blocked = ("triton", "transformers", "safetensors", "typer", "rich", "matplotlib", "fla", "pytest")
    code = f"""
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {blocked!r}:
            raise ImportError(name + ' is blocked')
sys.meta_path.insert(0, Block())
import torch, parallelflow as pf
q, k = torch.randn(2, 1, 9, 1, 4)
v = torch.randn(1, 9, 2, 4, requires_grad=True)
pf.delta_rule(q, k, v, torch.rand(1, 9, 2)).output.sum().backward()
assert v.grad.isfinite().all()
import parallelflow.functional, parallelflow.step, parallelflow.testing
"""
    python(code)


def test_import_leaves_optional_packages_alone():
    """Where they are installed, importing the package does not load them."""
    loaded = python(
        "import torch, sys; before = set(sys.modules); import parallelflow;"
        "print(*sorted({m.split('.')[0] for m in set(sys.modules) - before}))"
    ).split()
    assert not set(loaded) & {"triton", "transformers", "typer", "rich", "matplotlib", "pytest", "hypothesis"}, loaded


def test_import_is_quick():
    """At most 0.3 s more than torch itself, the median of several fresh processes."""
    code = "import torch, time; start = time.perf_counter(); import parallelflow; print(time.perf_counter() - start)"
    times = [float(python(code)) for _ in range(5)]
    assert statistics.median(times) <= 0.3, times


def test_import_has_no_side_effects():
    """Default dtype, threads, seeds and warnings are as they were."""
    code = """
import warnings, torch
torch.manual_seed(0)
state, threads, dtype = torch.get_rng_state(), torch.get_num_threads(), torch.get_default_dtype()
precision, filters = torch.get_float32_matmul_precision(), list(warnings.filters)
import parallelflow
assert torch.equal(torch.get_rng_state(), state)
assert (torch.get_num_threads(), torch.get_default_dtype()) == (threads, dtype)
assert torch.get_float32_matmul_precision() == precision and warnings.filters == filters
"""
    python(code)
