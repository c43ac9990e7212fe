"""One token at a time on one GPU: this library beside flash-linear-attention, same inputs, one run.

    python -m benchmarks.decode                         # all that is installed
    python -m benchmarks.decode --library parallelflow

Every library steps every model in a process of its own. All make their first steps at once, and are then timed one
after another. A step reads and writes each sequence's state; the state's bytes over its time are compared with a large
copy's. The time on the card is that of a CUDA graph of many steps, each
on states of its own that together exceed the cache, as the layers of a model do. The time on the host is a call's,
queued and not awaited, after the first. This library updates states in place in a store; flash-linear-attention returns
new ones, which moves as many bytes.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.metadata
import importlib.util
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import report, turns
from benchmarks.gpu import captured, ceilings, medians, versions_of

HEADS = 32
BATCHES = (1, 8, 64, 512)
COLD = 192 * 2**20  # bytes of states that no cache holds


class Problem(NamedTuple):
    """A model at one size, K = V; ``state`` is the dtype in which states are stored."""

    op: str
    size: int = 128
    state: str = "float32"


PROBLEMS = [
    Problem("gated_delta_rule"),
    Problem("gated_delta_rule", state="bfloat16"),
    Problem("delta_rule"),
    Problem("kimi_delta_attention"),
    Problem("comba"),
    Problem("gated_linear_attention"),
    Problem("ssd"),
    Problem("delta_product"),
    Problem("rwkv7", 64),
    Problem("rwkv7", 64, "bfloat16"),
]


def draw(problem: Problem, batch: int) -> dict[str, Tensor]:
    """One token of each sequence: bfloat16 vectors, float32 coefficients and decays; unit queries and keys."""
    from parallelflow.testing import Sizes, make_inputs

    sizes = Sizes(batch, 1, HEADS, HEADS, problem.size, problem.size)
    inputs = make_inputs(problem.op, sizes, dtype=torch.float32)
    wide = ("beta", "log_decay")
    return {
        name: (x if x.dim() == 1 else x[:, 0]).to("cuda", torch.float32 if name in wide else torch.bfloat16)
        for name, x in inputs.items()
    }


Step = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def ours(problem: Problem, inputs: dict[str, Tensor]) -> Step:
    """``(store, slots) -> output, store``."""
    import parallelflow

    function = getattr(parallelflow.step, problem.op)
    return lambda store, slots: function(**inputs, state=store, state_indices=slots, in_place=True)


THEIRS = {
    "gated_delta_rule": "fused_recurrent_gated_delta_rule",
    "delta_rule": "fused_recurrent_delta_rule",
    "kimi_delta_attention": "fused_recurrent_kda",
    "comba": "fused_recurrent_comba",
    "gated_linear_attention": "fused_recurrent_gla",
    "ssd": "fused_recurrent_simple_gla",
    "rwkv7": "fused_recurrent_rwkv7",
}


def serves(library: str, problem: Problem) -> bool:
    """Whether a library has the model's step, with such states."""
    return library == report.OURS or (problem.op in THEIRS and problem.state == "float32")


def peer(problem: Problem, inputs: dict[str, Tensor]) -> Step:
    """flash-linear-attention's function; it has no slots: a store's slice is its initial state."""
    from fla import ops  # type: ignore[import-not-found]

    names = {"query": "q", "key": "k", "value": "v", "log_decay": "g", "removal_key": "p"}
    if problem.op == "gated_linear_attention":
        names["log_decay"] = "gk"
    if problem.op == "rwkv7":
        names |= {"query": "r", "log_decay": "w", "read": "a", "write": "b"}
    family = {"kimi_delta_attention": "kda", "comba": "comba", "rwkv7": "rwkv7"}.get(problem.op)
    module = ops if family is None else importlib.import_module(f"fla.ops.{family}")
    function = getattr(module, THEIRS[problem.op])
    tokens = {names.get(name, name): x.unsqueeze(1) for name, x in inputs.items()}

    def step(store: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        return function(**tokens, scale=1.0, initial_state=store, output_final_state=True)

    return step


LIBRARIES: dict[str, Callable[[Problem, dict[str, Tensor]], Step]] = {"parallelflow": ours, "fla": peer}


def on_the_card(calls: Sequence[Callable[[], Any]]) -> float:
    """Microseconds of one of the calls, in a CUDA graph of all of them."""

    def all_of_them() -> None:
        for call in calls:
            call()

    graph, _ = captured(all_of_them)
    return medians(graph.replay, 0.2) * 1e3 / len(calls)


def on_the_host(call: Callable[[], Any], rounds: int = 9, repeats: int = 200) -> float:
    """Microseconds that a call keeps its caller; the queue is empty when a round begins."""
    for _ in range(20):
        call()
    times = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        before = time.perf_counter()
        for _ in range(repeats):
            call()
        times.append((time.perf_counter() - before) / repeats * 1e6)
    torch.cuda.synchronize()
    return sorted(times)[rounds // 2]


class Steps:
    """A library's steps of a model for one batch, each on states of its own."""

    def __init__(self, problem: Problem, library: str, step: Step, batch: int) -> None:
        dtype = getattr(torch, problem.state)
        self.bytes = batch * HEADS * problem.size**2 * dtype.itemsize
        count = max(2, min(64, -(-COLD // self.bytes)))
        store = torch.zeros(batch * count, HEADS, problem.size, problem.size, device="cuda", dtype=dtype)
        self.calls = []
        for first in range(0, batch * count, batch):
            if library == report.OURS:
                arguments = store, torch.arange(first, first + batch, device="cuda", dtype=torch.int32)
            else:
                arguments = store[first : first + batch], torch.empty(0)
            self.calls.append(functools.partial(step, *arguments))


@torch.no_grad()
def measure(problem: Problem, library: str, copy_gb_s: float, wait: Callable[[], None]) -> Iterator[report.Row]:
    """A row for each batch; ``wait`` is called between the first steps of all batches and the timing."""
    steps = {batch: LIBRARIES[library](problem, draw(problem, batch)) for batch in BATCHES}
    for batch, step in steps.items():
        Steps(problem, library, step, batch).calls[0]()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    wait()
    for batch, step in steps.items():
        of = Steps(problem, library, step, batch)
        microseconds = on_the_card(of.calls)
        rate = 2 * of.bytes / microseconds / 1e3
        row: report.Row = {
            "op": problem.op, "batch": batch, "time": 1, "key_heads": HEADS, "value_heads": HEADS,
            "key_dim": problem.size, "value_dim": problem.size, "rank": 2 if problem.op == "delta_product" else 1,
            "state": problem.state, "library": library, "step_us": microseconds, "gb_s": rate,
            "of_copy": rate / copy_gb_s, "host_us": on_the_host(of.calls[0]) if batch <= 8 else None,
        }  # fmt: skip
        yield {name: float(f"{x:.4g}") if isinstance(x, float) else x for name, x in row.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", choices=LIBRARIES, action="append", help="all that are installed, unless given")
    parser.add_argument("--op", choices=sorted({p.op for p in PROBLEMS}), action="append", help="all, unless given")
    parser.add_argument("--patience", type=float, default=120, help="seconds for all the first steps")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/<card>-decode.json; rows are merged")
    parser.add_argument("--commit", default="", help="the commit that is measured; default: asked of git")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    libraries = arguments.library or [name for name in LIBRARIES if importlib.util.find_spec(name)]
    if arguments.worker:
        problem, copy_gb_s = PROBLEMS[int(arguments.worker[0])], float(arguments.worker[1])
        turns.work(lambda wait: measure(problem, libraries[0], copy_gb_s, wait))
        return
    card = torch.cuda.get_device_name()
    path = arguments.out or report.RESULTS / f"{card.removeprefix('NVIDIA ').lower().replace(' ', '-')}-decode.json"
    result = report.load(path)
    limits = {"copy_gb_s": ceilings()["copy_gb_s"]}
    torch.cuda.empty_cache()
    jobs = []
    for number, problem in enumerate(PROBLEMS):
        if arguments.op is not None and problem.op not in arguments.op:
            continue
        for library in libraries:
            if not serves(library, problem):
                continue
            command = [sys.executable, "-m", "benchmarks.decode", "--library", library]
            command += ["--worker", str(number), str(limits["copy_gb_s"])]
            jobs.append(turns.Job(f"{library}-{problem.op}-{problem.state}", command, {}))
    with tempfile.TemporaryDirectory() as folder:
        rows = turns.run(jobs, arguments.patience, Path(folder))
    report.merge(result, rows)
    head = {"kind": "decode", "card": card, "versions": {**result.get("versions", {}), **versions_of(libraries)}}
    head["commit"] = report.commit(arguments.commit)
    report.save({**head, "ceilings": limits, "rows": result["rows"]}, path)


if __name__ == "__main__":
    main()
