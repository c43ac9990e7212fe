"""Three ways to solve a chunk's system on one GPU, with the same inputs and outputs: (I - G) X = Z, K + V columns.

    python -m benchmarks.solvers                        # writes benchmarks/results/solvers.json
    python -m benchmarks.solvers --out FILE --chunk 64 --rank 1

G is given in float32, Z and X in float32 or bfloat16. sigDelta and right-looking substitution are the library's CUDA
kernels, which need nothing but G; the blocked inverse is two Triton kernels, ``factor`` and ``solve``. The systems are
those of 4 × 4096 tokens and 16 heads, or 16 of them, as in one step from chunk to chunk, where dependent stages decide.
Times are a CUDA graph's, so the host has no part in them; errors are against float64.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import report
from benchmarks.blocked_inverse import BlockedInverse
from benchmarks.gpu import captured
from parallelflow.solvers import Factorisation
from parallelflow.solvers.cuda import COMPILED
from parallelflow.solvers.cuda.layout import Layout
from parallelflow.solvers.cuda.solve import KERNELS, machine_code

COLUMNS = 256  # K + V
TOKENS, HEADS, FEW = 4 * 4096, 16, 16
CHUNKS, RANKS, DTYPES = (16, 32, 64), (1, 2, 4), ("float32", "bfloat16")
CALLS = 4  # in a graph
CHECKED = 16  # systems compared with float64


def systems(chunk: int, rank: int, count: int, correlated: bool = False) -> tuple[Tensor, Tensor]:
    """G ``[count, n, n]`` of simultaneous rows that read ``-k / rank`` and write ``k``, k of unit length, and Z."""
    generator = torch.Generator(device="cuda").manual_seed(chunk * rank)
    keys = torch.randn(count, chunk * rank, 128, device="cuda", generator=generator)
    if correlated:  # cosines of 0.99 and more
        keys = torch.nn.functional.normalize(keys, dim=-1) * 0.05 + 128**-0.5
    keys = torch.nn.functional.normalize(keys, dim=-1)
    token = torch.arange(chunk * rank, device="cuda") // rank
    gram = -(keys @ keys.mT) / rank * (token[:, None] > token)
    return gram, torch.randn(count, chunk * rank, COLUMNS, device="cuda", generator=generator)


def factor_with(method: str, gram: Tensor, rank: int, dtype: torch.dtype) -> Factorisation:
    return BlockedInverse(gram, dtype) if method == "blocked_inverse" else COMPILED[method](gram, rank)


METHODS = ("sigdelta", "substitution", "blocked_inverse")


def device_ms(call: Callable[[], Any]) -> float:
    """Milliseconds of a call among others like it, the median of graphs of several."""

    def several() -> None:
        for _ in range(CALLS):
            call()

    graph, _ = captured(several)
    graph.replay()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(8)]
    for event in events:
        event.record()
        graph.replay()
    torch.cuda.synchronize()
    times = sorted(first.elapsed_time(last) for first, last in itertools.pairwise(events))
    return times[len(times) // 2] / CALLS


def error(found: Tensor, gram: Tensor, right: Tensor, transposed: bool) -> float:
    """Against float64 on the same numbers, of the first systems."""
    matrix = torch.eye(gram.shape[-1], dtype=torch.float64, device="cuda") - gram[:CHECKED].double()
    exact = torch.linalg.solve(matrix.mT if transposed else matrix, right[:CHECKED].double())
    return float((found[:CHECKED].double() - exact).norm() / exact.norm())


def measure(method: str, chunk: int, rank: int, name: str, count: int) -> report.Row:
    """One row: milliseconds of ``factor`` with ``solve``, of ``solve``, and of ``solve_transposed``, and errors."""
    dtype = getattr(torch, name)
    gram, right = systems(chunk, rank, count)
    right = right.to(dtype)
    factors = factor_with(method, gram, rank, dtype)
    row: report.Row = {"chunk": chunk, "rank": rank, "dtype": name, "systems": count, "method": method}
    row["error"] = error(factors.solve(right), gram, right, False)
    row["error_transposed"] = error(factors.solve_transposed(right), gram, right, True)
    row["same_bits"] = torch.equal(factors.solve(right), factors.solve(right))
    row["total_ms"] = device_ms(lambda: factor_with(method, gram, rank, dtype).solve(right))
    row["solve_ms"] = device_ms(lambda: factors.solve(right))
    row["transposed_ms"] = device_ms(lambda: factors.solve_transposed(right))
    hard, other = systems(chunk, rank, CHECKED, correlated=True)
    other = other.to(dtype)
    row["error_correlated"] = error(factor_with(method, hard, rank, dtype).solve(other), hard, other, False)
    size = count * (4 * (chunk * rank) ** 2 + 2 * chunk * rank * COLUMNS * dtype.itemsize)
    row["gb_s"] = size / row["total_ms"] / 1e6
    return {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in row.items()}


def compile_kernels(shapes: list[tuple[int, int, str]]) -> None:
    """The CUDA kernels, side by side, for each takes the compiler a second or more."""
    card = torch.cuda.get_device_properties(0)

    def compile_kernel(shape: tuple[int, int, str], count: int, solver: str) -> None:
        chunk, rank, name = shape
        width = Layout.width_of(solver, 4, count * COLUMNS, card.multi_processor_count)
        layout = Layout.of(solver, 4, chunk, rank, card.shared_memory_per_block_optin, width)
        machine_code(layout, torch.float32, getattr(torch, name), f"sm_{card.major}{card.minor}")

    with ThreadPoolExecutor() as pool:
        counts = (FEW, TOKENS // max(CHUNKS) * HEADS)
        list(pool.map(compile_kernel, *zip(*itertools.product(shapes, counts, KERNELS.values()), strict=True)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunk", type=int, action="append", help="tokens; 16, 32 and 64 unless given")
    parser.add_argument("--rank", type=int, action="append", help="rows of a token; 1, 2 and 4 unless given")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="both unless given")
    parser.add_argument("--out", type=Path, default=report.RESULTS / "solvers.json")
    parser.add_argument("--commit", default="", help="the commit that is measured; default: asked of git")
    arguments = parser.parse_args()
    rows = []
    shapes = list(itertools.product(arguments.chunk or CHUNKS, arguments.rank or RANKS, arguments.dtype or DTYPES))
    compile_kernels(shapes)
    for chunk, rank, name in shapes:
        for count in (TOKENS // chunk * HEADS, FEW):
            for method in METHODS:
                rows.append(measure(method, chunk, rank, name, count))
                print(json.dumps(rows[-1]), flush=True)
    versions = {"PyTorch": torch.__version__, "Triton": importlib.metadata.version("triton")}
    head = {"kind": "solvers", "card": torch.cuda.get_device_name(), "versions": versions}
    report.save({**head, "commit": report.commit(arguments.commit), "columns": COLUMNS, "rows": rows}, arguments.out)


if __name__ == "__main__":
    main()
