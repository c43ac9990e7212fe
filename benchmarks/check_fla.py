"""compat.fla beside FLA itself on one GPU: the outputs, states and gradients of every function, both against float64.

    python -m benchmarks.check_fla                          # benchmarks/results/compat_<card>.json; 1 if any differs
    python -m benchmarks.check_fla chunk_kda chunk_comba    # some; the others' rows stay as they are

What is compared, and how, is said in ``benchmarks/beside_fla.py``. FLA would tune itself for a minute or two a
function; here a rule takes the place of its timings. It chooses a launch configuration among FLA's own, which changes
no result. Each function runs in a process of its own, many at once, and its rows are written as they come.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import report
from benchmarks.beside_fla import SIZES, check, variants
from parallelflow.compat import fla as ours

ALIASES = ("chunk_gdn", "fused_recurrent_gdn")  # other names of the same function, in FLA as here
NAMES = {
    name: family
    for start in ("chunk", "fused")  # the chunked forms first: the recurrent ones find their kernels compiled
    for family, names in ours.FAMILIES.items()
    for name in names
    if name.startswith(start) and name not in ALIASES
}


def without_tuning() -> None:
    """Triton's autotuner takes the configuration nearest four warps, of the fewest stages and smallest tiles."""
    from triton.runtime.autotuner import Autotuner

    def rank(self: Any, *args: Any, config: Any, **meta: Any) -> list[float]:
        tiles = sum(size for size in config.kwargs.values() if isinstance(size, int))
        return [abs(config.num_warps - 4) * 1e6 + config.num_stages * 1e4 + tiles] * 3

    Autotuner._bench = rank


def worker(name: str, path: Path) -> None:
    """The rows of one function, a line each."""
    without_tuning()
    theirs = getattr(importlib.import_module(f"fla.ops.{NAMES[name]}"), name)
    with path.open("a") as file:
        for options in variants(name):
            print(json.dumps(check(name, options, theirs)), file=file, flush=True)


def run(names: list[str], patience: float, at_once: int, found: Callable[[list[report.Row]], None]) -> None:
    """Workers, ``at_once`` side by side; ``found`` gets the rows of each that has ended, or was too slow."""
    until = time.monotonic() + patience
    waiting = list(names)
    running: dict[str, subprocess.Popen[bytes]] = {}
    with tempfile.TemporaryDirectory() as folder:
        while waiting or running:
            late = time.monotonic() > until
            while waiting and len(running) < at_once and not late:
                name = waiting.pop(0)
                command = [sys.executable, "-m", "benchmarks.check_fla", "--worker", name, folder]
                log = (Path(folder) / f"{name}.log").open("w")
                # what the rule chose must not be taken for a timing by another program
                environment = {**os.environ, "FLA_CACHE_RESULTS": "0", "FLA_FLASH_QLA": "0"}
                running[name] = subprocess.Popen(command, stdout=log, stderr=log, cwd=report.ROOT, env=environment)
            for name, process in list(running.items()):
                if process.poll() is None and not late:
                    continue
                process.kill()
                process.wait()
                del running[name]
                lines = (Path(folder) / f"{name}.rows").read_text() if (Path(folder) / f"{name}.rows").exists() else ""
                rows = [json.loads(line) for line in lines.splitlines() if line.endswith("}")]
                found(rows)
                if len(rows) < len(variants(name)):
                    log_lines = (Path(folder) / f"{name}.log").read_text().strip().splitlines()
                    why = "too slow" if late else log_lines[-1] if log_lines else "no row"
                    print(f"{name}: {len(rows)} of {len(variants(name))} rows: {why}", flush=True)
            if late and waiting:
                print(f"too late for {', '.join(waiting)}", flush=True)
                return
            time.sleep(0.2)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="function", help="some functions; all, unless given")
    parser.add_argument("--patience", type=float, default=190, help="seconds for all")
    parser.add_argument("--at-once", type=int, default=os.cpu_count() or 1, help="processes side by side")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/compat_<card>.json")
    parser.add_argument("--commit", default="", help="the commit that is measured; default: asked of git")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.worker[0], Path(arguments.worker[1]) / f"{arguments.worker[0]}.rows")
        return 0
    if not torch.cuda.is_available():
        print("needs a CUDA device, with flash-linear-attention installed")
        return 2
    names = arguments.names or list(NAMES)
    card = torch.cuda.get_device_name()
    path = arguments.out or report.RESULTS / f"compat_{card.removeprefix('NVIDIA ').lower().replace(' ', '-')}.json"
    versions = {"PyTorch": str(torch.__version__)}
    versions |= {name: importlib.metadata.version(key) for name, key in (("Triton", "triton"), ("FLA", "fla-core"))}
    kept = [row for row in report.load(path)["rows"] if row["function"] not in names]
    head = {"kind": "compat", "card": card, "versions": versions, "commit": report.commit(arguments.commit)}
    rows: list[report.Row] = []

    def found(more: list[report.Row]) -> None:
        rows.extend(more)
        for row in more:
            print(json.dumps(row), flush=True)
        order = [*NAMES]
        report.save(
            {**head, **SIZES._asdict(), "rows": sorted(kept + rows, key=lambda row: order.index(row["function"]))}, path
        )

    run(names, arguments.patience, arguments.at_once, found)
    agreeing = [row for row in rows if row["agrees"]]
    print(f"{len(agreeing)} of {len(rows)} calls agree, {sum(row['agrees'] is None for row in rows)} FLA does not run")
    return 0 if rows and not any(row["agrees"] is False for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
