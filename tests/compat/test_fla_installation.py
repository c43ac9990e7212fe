"""``install``: with FLA there, without it, and back. A small package of FLA's shape plays FLA."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from parallelflow.compat import fla

ROOT = Path(__file__).parents[2]


def forget_fla():
    for name in [name for name in sys.modules if name.partition(".")[0] == "fla"]:
        del sys.modules[name]


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A package ``fla`` with FLA's modules and functions, each of which returns its own name."""
    packages = {".": "", "ops": ""}
    for family, names in fla.FAMILIES.items():
        path = f"ops/{family.replace('.', '/')}"
        if "/" in path.removeprefix("ops/"):
            packages.setdefault(path.rpartition("/")[0], "")
        packages[path] = "from .chunk import *\n"
        folder = tmp_path / "fla" / path
        folder.mkdir(parents=True)
        (folder / "chunk.py").write_text("".join(f"def {name}(*_, **__):\n    return {name!r}\n\n" for name in names))
        packages["ops"] += f"from .{family} import *\n"
    for path, text in packages.items():
        (tmp_path / "fla" / path / "__init__.py").write_text(text)
    forget_fla()
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    yield
    fla.uninstall()
    forget_fla()


def arguments():
    q, k, v = torch.randn(3, 1, 5, 1, 4)
    return q, k, v, -torch.rand(1, 5, 1), torch.rand(1, 5, 1)


def is_ours(function):
    return function(*arguments())[0].shape == (1, 5, 1, 4)


def test_names_imported_before_and_after(library, monkeypatch):
    """Wherever a module holds the function by a name: before, after, at every level of FLA, under another name."""
    user = ModuleType("user_of_fla")
    monkeypatch.setitem(sys.modules, "user_of_fla", user)
    exec("from fla.ops.gated_delta_rule import chunk_gated_delta_rule as gdn", user.__dict__)
    ours_before = fla.chunk_gated_delta_rule
    assert user.gdn(*arguments()) == "chunk_gated_delta_rule"

    fla.install()
    assert is_ours(user.gdn)
    exec("from fla.ops.gated_delta_rule import chunk_gated_delta_rule as later", user.__dict__)
    exec("import fla.ops.gated_delta_rule.chunk as module; from fla.ops import chunk_gdn as top", user.__dict__)
    assert is_ours(user.later)
    assert is_ours(user.module.chunk_gated_delta_rule)
    assert is_ours(user.top)

    fla.uninstall()
    for function in (user.gdn, user.later, user.module.chunk_gated_delta_rule):
        assert function(*arguments()) == "chunk_gated_delta_rule"
    assert user.top(*arguments()) == "chunk_gdn"
    assert fla.chunk_gated_delta_rule is ours_before


def test_every_function_is_replaced(library):
    with fla.install():
        for family, names in fla.FAMILIES.items():
            module = importlib.import_module(f"fla.ops.{family}")
            for name in names:
                assert getattr(module, name).__wrapped__ is getattr(fla, name)
    for family, names in fla.FAMILIES.items():
        for name in names:
            assert getattr(importlib.import_module(f"fla.ops.{family}"), name)() == name


def test_our_own_names_stay_ours(library, monkeypatch):
    """A user who took the function from this package keeps it after ``uninstall``."""
    user = ModuleType("user_of_parallelflow")
    monkeypatch.setitem(sys.modules, "user_of_parallelflow", user)
    user.gdn = fla.chunk_gated_delta_rule
    with fla.install():
        pass
    assert user.gdn is fla.chunk_gated_delta_rule


def test_installing_twice_is_once(library):
    with fla.install() as first:
        assert fla.install() is first
    assert importlib.import_module("fla.ops.kda").chunk_kda() == "chunk_kda"
    first.uninstall()  # again: nothing happens
    fla.uninstall()


def test_a_library_that_does_not_import(library, monkeypatch):
    """FLA without Triton: its modules fail, ours are provided."""
    (Path(sys.path[0]) / "fla" / "ops" / "kda" / "chunk.py").write_text("raise RuntimeError('no driver')")
    with fla.install() as installation:
        assert is_ours(importlib.import_module("fla.ops.gated_delta_rule").chunk_gated_delta_rule)
        assert "fla.ops.kda" in installation.provided
    assert "fla" not in sys.modules
    with pytest.raises(RuntimeError, match="no driver"):
        importlib.import_module("fla.ops.kda")


def test_without_the_library():
    """Modules for every family, gone again afterwards. In a process where nothing can have imported FLA."""
    code = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name == 'fla' and 'fla' not in sys.modules:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Block())
import importlib.util
from parallelflow.compat import fla as compat
with compat.install():
    import fla, fla.ops, fla.ops.gated_delta_rule.chunk
    from fla.ops import chunk_kda
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule
    from fla.ops.gated_delta_rule.fused_recurrent import fused_recurrent_gdn
    from fla.ops.generalized_delta_rule import chunk_iplr_delta_rule
    from fla.ops.generalized_delta_rule.dplr import chunk_dplr_delta_rule
    assert fla.__version__ == '0.6.0'
    assert chunk_gated_delta_rule is compat.chunk_gated_delta_rule is fla.ops.gated_delta_rule.chunk.chunk_gdn
    assert importlib.util.find_spec('fla.ops.kda') is not None
    assert not hasattr(fla.ops.gated_delta_rule.chunk, 'fused_recurrent_gdn')
    try:
        import fla.ops.hgrn
    except ModuleNotFoundError as error:
        assert 'fla.ops.hgrn' in str(error)
    else:
        raise AssertionError('a module that is not provided was imported')
assert not [name for name in sys.modules if name.partition('.')[0] == 'fla']
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
