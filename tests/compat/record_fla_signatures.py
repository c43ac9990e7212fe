"""Writes fla_signatures.json: what FLA's functions take, read from its source.

    python tests/compat/record_fla_signatures.py FOLDER     # of an unpacked or installed fla-core: it has fla/ in it

FLA need not be importable: the source is parsed, not run.
"""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path

from parallelflow.compat.fla import FAMILIES

RECORD = Path(__file__).with_name("fla_signatures.json")


def parameters(function: ast.FunctionDef) -> dict:
    """Names in order, those with a default and that default, and whether further keywords are taken."""
    arguments = function.args
    names = [argument.arg for argument in [*arguments.posonlyargs, *arguments.args]]
    defaults = [ast.literal_eval(default) for default in arguments.defaults]
    assert not arguments.kwonlyargs
    return {
        "parameters": names,
        "defaults": dict(zip(names[len(names) - len(defaults) :], defaults, strict=True)),
        "further_keywords": arguments.kwarg is not None,
    }


def record(folder: Path) -> dict:
    version = next(folder.glob("fla_core-*.dist-info")).name.removeprefix("fla_core-").removesuffix(".dist-info")
    functions = {}
    for family, names in FAMILIES.items():
        found = {}
        for path in sorted((folder / "fla" / "ops" / family.replace(".", "/")).glob("*.py")):
            for node in ast.parse(path.read_text()).body:
                if isinstance(node, ast.FunctionDef):
                    found[node.name] = node
                elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Name) and node.value.id in found:
                    found |= {
                        target.id: found[node.value.id] for target in node.targets if isinstance(target, ast.Name)
                    }
        functions |= {name: parameters(found[name]) for name in names}
    return {"source": f"fla-core {version}", "functions": functions}


if __name__ == "__main__":
    found = record(Path(sys.argv[1]))
    lines = [f"{json.dumps(name)}: {json.dumps(taken)}" for name, taken in found["functions"].items()]
    RECORD.write_text(f'{{"source": {json.dumps(found["source"])}, "functions": {{\n' + ",\n".join(lines) + "\n}}\n")
