"""This library on a CPU, beside the reference inside Transformers.

    python -m benchmarks.cpu                      # everything: benchmarks/results/cpu.json, the plot, README's table
    python -m benchmarks.cpu --only pairs --rounds 3

Parts: ``pairs`` (training shapes beside ``torch_chunk_gated_delta_rule``, float32 and bfloat16, taking turns, medians
of ratios), ``memory`` (of forward and backward, each side in a process of its own), ``drivers`` (every model, R = 1, 2
and 4), ``length`` (1k to 64k tokens and the slope of log time in log tokens), ``decode`` (one token beside
``torch_recurrent_gated_delta_rule``).  Two threads.  A GFLOP/s counts the products of the chunked algorithm at 16
rows a chunk and nothing else, triangles as squares; its ceiling is the rate of batched products [64, K] [K, V].
"""

from __future__ import annotations

import argparse
import importlib.metadata
import math
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import parallelflow as pf
from benchmarks import report

RESULT = report.RESULTS / "cpu.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ROWS = 16  # of one kind in a chunk of the compiled kernels


class Shape(NamedTuple):
    """A problem's sizes."""

    batch: int
    time: int
    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int

    def row(self, op: str, library: str, dtype: str, rank: int = 1) -> report.Row:
        return {"op": op, **self._asdict(), "rank": rank, "library": library, "dtype": dtype}

    def forward_flops(self, rank: int = 1, reads: bool = True) -> float:
        """Of the chunked algorithm's products: Gram matrices, T Z, and the four with states and scores."""
        tokens = ROWS // rank
        chunks = self.batch * math.ceil(self.time / tokens)
        rows, k, v = tokens * rank, self.key_dim, self.value_dim
        gram = (tokens + (rows if reads else 0)) * rows * k * self.key_heads / self.value_heads
        solve = rows * rows * v + rows * k * v if reads else 0
        return 2.0 * chunks * self.value_heads * (gram + solve + tokens * rows * v + tokens * k * v + rows * k * v)


LARGE = Shape(1, 4096, 16, 32, 128, 128)
SMALL = Shape(4, 1024, 4, 4, 64, 64)
Call = Callable[[], Any]


def gated_delta_inputs(shape: Shape, dtype: torch.dtype) -> dict[str, Tensor]:
    """Unit keys and queries, β in (0, 1), decays down to e^-1 a token."""
    batch, time_, heads, value_heads, key_dim, value_dim = shape
    generator = torch.Generator().manual_seed(0)

    def unit() -> Tensor:
        return torch.nn.functional.normalize(torch.randn(batch, time_, heads, key_dim, generator=generator), dim=-1)

    inputs = {
        "query": unit(),
        "key": unit(),
        "value": torch.randn(batch, time_, value_heads, value_dim, generator=generator),
        "beta": torch.rand(batch, time_, value_heads, generator=generator),
        "log_decay": -torch.rand(batch, time_, value_heads, generator=generator),
    }
    return {name: tensor.to(dtype) for name, tensor in inputs.items()}


def ours(inputs: dict[str, Tensor]) -> Tensor:
    return pf.gated_delta_rule(**inputs).output


def theirs(inputs: dict[str, Tensor]) -> Tensor:
    """The reference, with its heads repeated before (that is not timed)."""
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    return torch_chunk_gated_delta_rule(
        inputs["query"], inputs["key"], inputs["value"], inputs["log_decay"], inputs["beta"]
    )[0]


def repeated(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Queries and keys once a value head, as the reference asks for them."""
    times = inputs["value"].shape[2] // inputs["query"].shape[2]
    return inputs | {name: inputs[name].repeat_interleave(times, 2) for name in ("query", "key")}


SIDES: dict[str, Callable[[dict[str, Tensor]], Tensor]] = {report.OURS: ours, "transformers": theirs}


def calls(library: str, inputs: dict[str, Tensor]) -> tuple[Call, Call]:
    """Forward alone, and forward with backward."""
    side = SIDES[library]
    inputs = inputs if library == report.OURS else repeated(inputs)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}

    def forward() -> None:
        with torch.no_grad():
            side(inputs)

    return forward, lambda: train(side, leaves)


def train(function: Callable[[dict[str, Tensor]], Tensor], leaves: dict[str, Tensor]) -> None:
    output = function(leaves)
    torch.autograd.grad(output, list(leaves.values()), torch.ones_like(output))


def seconds(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def product_rate(shape: Shape) -> float:
    """FLOP/s of batched products [64, K] [K, V], in cache as far as they fit."""
    heads = shape.batch * shape.value_heads
    left = torch.randn(heads, 64, shape.key_dim)
    right = torch.randn(heads, shape.key_dim, shape.value_dim)
    out = torch.bmm(left, right)
    flops = 2.0 * left.numel() * shape.value_dim
    times = max(1, round(2e9 / flops))
    return times * flops / seconds(lambda: [torch.bmm(left, right, out=out) for _ in range(times)])


def take_turns(first: Call, second: Call, rounds: int) -> tuple[float, float, float]:
    """Medians of both, in ms, and of the ratios of the second to the first."""
    first(), second()
    pairs = [(seconds(first), seconds(second)) for _ in range(rounds)]
    a, b = (statistics.median(pair[side] for pair in pairs) * 1e3 for side in (0, 1))
    return a, b, statistics.median(pair[1] / pair[0] for pair in pairs)


def pairs(rounds: int) -> list[report.Row]:
    rows = []
    for shape in (LARGE, SMALL):
        for name, dtype in DTYPES.items():
            inputs = gated_delta_inputs(shape, dtype)
            mine, other = calls(report.OURS, inputs), calls("transformers", inputs)
            rate = statistics.median(product_rate(shape) for _ in range(5))
            forward = take_turns(mine[0], other[0], rounds)
            both = take_turns(mine[1], other[1], rounds if shape is SMALL else max(1, rounds // 3))
            for side, library in enumerate((report.OURS, "transformers")):
                row = shape.row("gated_delta_rule", library, name)
                row |= {"forward_ms": forward[side], "forward_backward_ms": both[side]}
                if side == 0:
                    share = shape.forward_flops() / (forward[0] / 1e3) / rate
                    row |= {"forward_ratio": forward[2], "forward_backward_ratio": both[2]}
                    row |= {"product_gflop_s": rate / 1e9, "share_of_products": share}
                rows.append(row)
                print(row, flush=True)
    return rows


def memory(rounds: int) -> list[report.Row]:
    """MiB that forward and backward add to the process at most, results included."""
    del rounds
    rows = []
    for shape in (LARGE, SMALL):
        for library in SIDES:
            command = [sys.executable, "-m", "benchmarks.cpu", "--peak", library, *map(str, shape)]
            found = subprocess.run(command, check=True, capture_output=True, text=True, cwd=report.ROOT).stdout
            added = float(found.split()[-1])
            tokens = shape.batch * shape.time
            row = shape.row("gated_delta_rule", library, "float32")
            rows.append(row | {"extra_mib": added, "bytes_per_token": added * 2**20 / tokens})
            print(rows[-1], flush=True)
    return rows


def peak(library: str, shape: Shape) -> float:
    """MiB between the process's peak before and after one forward and backward of the problem."""
    small = gated_delta_inputs(Shape(1, 128, 1, 1, 16, 16), torch.float32)
    calls(library, small)[1]()  # libraries loaded, threads started
    both = calls(library, gated_delta_inputs(shape, torch.float32))[1]
    before = highest_memory()
    both()
    return highest_memory() - before


def highest_memory() -> float:
    """MiB that this program held at most. Not getrusage's number, which begins with that of the program's parent."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def drivers(rounds: int) -> list[report.Row]:
    """Every model at one size; DeltaProduct with 1, 2 and 4 rows a token."""
    shape = Shape(1, 2048, 8, 8, 64, 64)
    batch, time_, heads, _, k, v = shape
    base = gated_delta_inputs(shape, torch.float32)
    query, key, value, beta, log_decay = base.values()
    channels = -torch.rand(batch, time_, heads, k)
    lasting = -torch.rand(heads)
    unit = torch.nn.functional.normalize(torch.randn(batch, time_, heads, k), dim=-1)
    models: dict[tuple[str, int], tuple[Callable[..., Any], dict[str, Tensor]]] = {
        ("linear_attention", 1): (pf.linear_attention, {"query": query, "key": key, "value": value}),
        ("retention", 1): (pf.retention, {"query": query, "key": key, "value": value, "log_decay": lasting}),
        ("ssd", 1): (pf.ssd, {"query": query, "key": key, "value": value, "log_decay": log_decay}),
        ("gated_linear_attention", 1): (
            pf.gated_linear_attention,
            {"query": query, "key": key, "value": value, "log_decay": channels},
        ),
        ("delta_rule", 1): (pf.delta_rule, {"query": query, "key": key, "value": value, "beta": beta}),
        ("gated_delta_rule", 1): (pf.gated_delta_rule, base),
        ("kimi_delta_attention", 1): (pf.kimi_delta_attention, base | {"log_decay": channels}),
        ("gated_delta_rule_2", 1): (
            pf.gated_delta_rule_2,
            {"query": query, "key": key, "value": value, "erase": torch.rand_like(key), "write": torch.rand_like(value),
             "log_decay": channels},
        ),
        ("comba", 1): (pf.comba, base | {"removal_key": unit}),
        ("rwkv7", 1): (
            pf.rwkv7,
            {"query": query, "key": key, "value": value, "log_decay": channels, "read": -unit, "write": unit * 0.5},
        ),
        ("longhorn", 1): (pf.longhorn, {"query": query, "key": key, "value": value, "beta": beta}),
        ("efla", 1): (pf.efla, {"query": query, "key": key, "value": value, "beta": beta}),
    }  # fmt: skip
    for rank in (1, 2, 4):
        keys = torch.nn.functional.normalize(torch.randn(batch, time_, rank, heads, k), dim=-1)
        several = {"key": keys, "value": torch.randn(batch, time_, rank, heads, v)}
        product = {"query": query, **several, "beta": torch.rand(batch, time_, rank, heads), "log_decay": log_decay}
        models["delta_product", rank] = (pf.delta_product, product)
        flow = {"query": query, "value": several["value"], "read": -keys / rank, "write": keys, "log_decay": log_decay}
        models["low_rank_flow", rank] = (pf.low_rank_flow, flow)
    rows = []
    rate = statistics.median(product_rate(shape) for _ in range(5))
    for (op, rank), (function, inputs) in models.items():
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}

        def output(tensors: dict[str, Tensor], function: Callable[..., Any] = function) -> Tensor:
            return function(**tensors).output

        with torch.no_grad():
            output(inputs)
            forward = statistics.median(seconds(lambda: output(inputs)) for _ in range(rounds)) * 1e3  # noqa: B023
        both = statistics.median(seconds(lambda: train(output, leaves)) for _ in range(rounds)) * 1e3  # noqa: B023
        reads = op not in ("linear_attention", "retention", "ssd", "gated_linear_attention")
        share = shape.forward_flops(rank, reads) / (forward / 1e3) / rate
        row = shape.row(op, report.OURS, "float32", rank)
        rows.append(row | {"forward_ms": forward, "forward_backward_ms": both, "share_of_products": share})
        print(rows[-1], flush=True)
    return rows


def length(rounds: int) -> list[report.Row]:
    """One sequence from 1k to 64k tokens, and the slope of log time in log tokens."""
    rows: list[report.Row] = []
    for tokens in (1024, 2048, 4096, 8192, 16384, 32768, 65536):
        shape = Shape(1, tokens, 4, 4, 64, 64)
        forward, both = calls(report.OURS, gated_delta_inputs(shape, torch.float32))
        forward(), both()
        row = shape.row("gated_delta_rule", report.OURS, "float32")
        row |= {"forward_ms": statistics.median(seconds(forward) for _ in range(rounds)) * 1e3}
        row |= {"forward_backward_ms": statistics.median(seconds(both) for _ in range(max(1, rounds // 2))) * 1e3}
        rows.append(row)
        print(row, flush=True)
    return rows


def slope(rows: list[report.Row], of: str) -> float:
    """Of log time in log tokens, least squares."""
    x, y = ([math.log(row[name]) for row in rows] for name in ("time", of))
    return statistics.linear_regression(x, y).slope


def decode(rounds: int) -> list[report.Row]:
    """One token, the state carried."""
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_recurrent_gated_delta_rule

    rows = []
    for batch in (1, 16):
        shape = Shape(batch, 1, 16, 32, 128, 128)
        inputs = gated_delta_inputs(shape, torch.float32)
        token = {name: tensor.squeeze(1) for name, tensor in inputs.items()}
        state = torch.randn(batch, 32, 128, 128)
        wide = repeated(inputs)

        def mine(token: dict[str, Tensor] = token, state: Tensor = state) -> None:
            with torch.no_grad():
                pf.step.gated_delta_rule(**token, state=state)

        def other(wide: dict[str, Tensor] = wide, state: Tensor = state) -> None:
            with torch.no_grad():
                torch_recurrent_gated_delta_rule(
                    wide["query"], wide["key"], wide["value"], wide["log_decay"], wide["beta"], state, True
                )

        a, b, ratio = take_turns(mine, other, 20 * rounds)
        rows.append(shape.row("decode", report.OURS, "float32") | {"forward_ms": a, "forward_ratio": ratio})
        rows.append(shape.row("decode", "transformers", "float32") | {"forward_ms": b})
        print(*rows[-2:], sep="\n", flush=True)
    return rows


PARTS = {"pairs": pairs, "memory": memory, "drivers": drivers, "length": length, "decode": decode}


def processor() -> str:
    """The CPU's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to run (default: all)")
    parser.add_argument("--rounds", type=int, default=7, help="pairs or calls a median is taken of (default: 7)")
    parser.add_argument("--threads", type=int, default=2, help="threads (default: 2)")
    parser.add_argument("--peak", nargs=7, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.peak:
        library, *sizes = arguments.peak
        print(peak(library, Shape(*map(int, sizes))))
        return
    result = report.load(RESULT)
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    head = {"kind": "cpu", "card": processor(), "threads": arguments.threads, "versions": versions}
    head["commit"] = report.commit()
    result = {**result, **head, "rows": result["rows"]}
    for part in arguments.only:
        rows = PARTS[part](arguments.rounds)
        if part == "length":
            result["slopes"] = {name: slope(rows, name) for name in ("forward_ms", "forward_backward_ms")}
            print(result["slopes"])
        merge(result, rows)
        report.save(result, RESULT)


def merge(result: report.Result, rows: list[report.Row]) -> None:
    """Figures of a problem, library and dtype gather in one row, whichever part found them."""
    name = lambda row: tuple(row.get(key) for key in (*report.PROBLEM, "library", "dtype"))  # noqa: E731
    known = {name(row): row for row in result["rows"]}
    for row in rows:
        known[name(row)] = known.get(name(row), {}) | row
    result["rows"] = list(known.values())


if __name__ == "__main__":
    main()
