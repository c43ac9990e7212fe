"""This library beside flash-linear-attention and FlashQLA on one GPU, same inputs, one run.

    python -m benchmarks.gpu                                  # all that is installed
    python -m benchmarks.gpu --library parallelflow --op delta_rule --time 32768

Every library computes every problem in a process of its own. All processes make their first gradient at once, from
empty caches: that is the time to compile and to autotune. Then they are timed one after another, with nothing else on
the card. Forward and forward with backward are medians over calls queued one behind the other, events between them:
whichever of host and device is slower. A CUDA graph of the same calls has no host time. The error is that of the
output's first tokens against this library's plain float64.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import itertools
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import report, turns

PREFIX = 1024  # tokens whose output is compared
CHUNK = 64
BATCH_INVARIANT = True  # the mode that is measured: the same bits in any batch, the default


class Problem(NamedTuple):
    """One model at one size."""

    op: str
    batch: int
    time: int
    key_heads: int
    value_heads: int
    key_dim: int = 128
    value_dim: int = 128
    rank: int = 1

    @property
    def reads(self) -> bool:
        return self.op not in ("ssd", "retention", "linear_attention", "gated_linear_attention")

    @property
    def function(self) -> str:
        """The name of this library's function."""
        return "delta_product" if self.op == "gated_delta_product" else self.op

    @property
    def channelwise(self) -> bool:
        """Whether the decay is one a key channel."""
        return self.op in ("kimi_delta_attention", "gated_linear_attention", "rwkv7")

    def work(self) -> tuple[float, float]:
        """The fewest bytes and operations of the forward pass: each input read and each output written once; the
        products of a chunked form with chunks of 64."""
        tokens, values = self.batch * self.time, self.value_heads * self.value_dim
        keys = 2 * self.key_heads * self.key_dim
        keys += 2 * self.key_heads * self.key_dim * (self.op == "rwkv7")
        keys += (self.rank - 1) * self.key_heads * self.key_dim
        size = 2 * tokens * (keys + (1 + self.rank) * values) + 8 * tokens * self.value_heads * self.rank
        size += 4 * tokens * self.value_heads * self.key_dim * self.channelwise
        state = 2 * self.key_dim * self.value_dim
        rows = self.rank * (3 if self.reads else 2) - (self.rank - 1)  # the queries' product comes once
        chain = rows * state + self.rank * (2 if self.reads else 1) * 2 * CHUNK * self.value_dim
        return size, tokens * (self.value_heads * chain + (2 if self.reads else 1) * 2 * CHUNK * keys / 2)


PROBLEMS = [
    Problem("gated_delta_rule", 1, 32768, 16, 64),
    Problem("gated_delta_rule", 4, 4096, 16, 16),
    Problem("gated_delta_rule", 1, 8192, 16, 32),
    Problem("delta_rule", 4, 4096, 16, 16),
    Problem("ssd", 4, 4096, 16, 16),
    Problem("retention", 4, 4096, 16, 16),
    Problem("linear_attention", 4, 4096, 16, 16),
    Problem("kimi_delta_attention", 4, 4096, 16, 16),
    Problem("kimi_delta_attention", 1, 32768, 16, 16),
    Problem("gated_linear_attention", 4, 4096, 16, 16),
    Problem("rwkv7", 4, 4096, 32, 32, 64, 64),
    Problem("delta_product", 4, 4096, 16, 16, rank=2),
    Problem("delta_product", 4, 4096, 16, 16, rank=3),
    Problem("delta_product", 4, 4096, 16, 16, rank=4),
    Problem("gated_delta_product", 4, 4096, 16, 16, rank=2),
    Problem("low_rank_flow", 4, 4096, 16, 16, rank=2),
    Problem("low_rank_flow", 4, 4096, 16, 16, rank=4),
    Problem("gated_delta_rule", 1, 32768, 2, 8),
    Problem("gated_delta_rule", 1, 32768, 4, 16),
    Problem("gated_delta_rule", 1, 32768, 8, 32),
    Problem("delta_rule", 1, 32768, 4, 4),
    Problem("gated_delta_rule", 1, 131072, 2, 8),
    Problem("gated_delta_rule", 1, 131072, 4, 16),
    Problem("delta_rule", 1, 131072, 4, 4),
]


def draw(problem: Problem) -> dict[str, Tensor]:
    """bfloat16 inputs with unit queries and keys, beta in (0, 1), decays mostly mild; float32 beta and decay."""
    op, b, t, h, hv, k, v, rank = problem
    generator = torch.Generator(device="cuda").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", generator=generator)

    unit = torch.nn.functional.normalize
    inputs = {
        "query": unit(normal(b, t, h, k), dim=-1).bfloat16(),
        "key": unit(normal(b, t, h, k), dim=-1).bfloat16(),
        "value": normal(b, t, hv, v).bfloat16(),
    }
    if op in ("delta_product", "gated_delta_product", "low_rank_flow"):
        inputs["key"] = unit(normal(b, t, rank, h, k), dim=-1).bfloat16()
        inputs["value"] = normal(b, t, rank, hv, v).bfloat16()
    if op == "rwkv7":  # in-context rates in (0, 1), as the published layer has them
        removed = unit(normal(b, t, h, k), dim=-1)
        inputs |= {"read": (-removed).bfloat16(), "write": (removed * normal(b, t, h, k).sigmoid()).bfloat16()}
    elif op == "low_rank_flow":
        inputs |= {"read": -inputs["key"] / rank, "write": inputs.pop("key")}
    elif op in ("delta_product", "gated_delta_product"):
        inputs["beta"] = normal(b, t, rank, hv).sigmoid()
    elif problem.reads:
        inputs["beta"] = normal(b, t, hv).sigmoid()
    if op in ("gated_delta_rule", "ssd", "gated_delta_product") or problem.channelwise:
        shape = (b, t, hv, k) if problem.channelwise else (b, t, hv)
        inputs["log_decay"] = torch.nn.functional.logsigmoid(normal(*shape) + 3)
    return inputs


def heads_decay(heads: int, **options: Any) -> Tensor:
    """Retention's log-decays, one a head: log(1 - 2^(-5 - h)), its paper's."""
    return torch.log1p(-(2.0 ** (-5.0 - torch.arange(heads, **options))))


def ours(problem: Problem, backend: str = "auto") -> Callable[..., Tensor]:
    import parallelflow

    function = getattr(parallelflow, problem.function)

    def call(**inputs: Tensor) -> Tensor:
        if problem.op == "retention":
            value = inputs["value"]
            kind = torch.float64 if value.dtype == torch.float64 else torch.float32
            inputs["log_decay"] = heads_decay(value.shape[2], device=value.device, dtype=kind)
        scale = problem.key_dim**-0.5
        options = {"scale": scale, "backend": backend, "batch_invariant": BATCH_INVARIANT, "validate": False}
        return function(**inputs, **options).output

    return call


def peer(problem: Problem) -> Callable[..., Tensor]:
    """flash-linear-attention's function for the problem, in this library's names."""
    from fla import ops  # type: ignore[import-not-found]
    from fla.ops.gated_delta_product import chunk_gated_delta_product  # type: ignore[import-not-found]

    def call(
        query: Tensor, key: Tensor, value: Tensor, beta: Any = None, log_decay: Any = None, read: Any = None,
        write: Any = None,
    ) -> Tensor:  # fmt: skip
        scale = problem.key_dim**-0.5
        if problem.op == "rwkv7":
            return ops.chunk_rwkv7(query, log_decay, key, value, read, write, scale=scale)[0]
        if problem.function == "delta_product":  # its rows lie one after another in time
            key, value = (tensor.flatten(1, 2) for tensor in (key, value))
            rows = {"g": log_decay, "beta": beta.flatten(1, 2), "num_householder": problem.rank}
            return chunk_gated_delta_product(query, key, value, scale=scale, **rows)[0]
        vectors = {"q": query, "k": key, "v": value, "scale": scale}
        if problem.op == "kimi_delta_attention":
            return ops.chunk_kda(**vectors, g=log_decay, beta=beta)[0]
        if problem.op == "gated_linear_attention":
            return ops.chunk_gla(**vectors, g=log_decay)[0]
        if problem.op == "gated_delta_rule":
            return ops.chunk_gated_delta_rule(**vectors, g=log_decay, beta=beta)[0]
        if problem.op == "delta_rule":
            return ops.chunk_delta_rule(**vectors, beta=beta)[0]
        if problem.op == "ssd":
            return ops.chunk_simple_gla(**vectors, g=log_decay)[0]
        if problem.op == "retention":
            return ops.chunk_retention(**vectors)[0]
        return ops.chunk_linear_attn(**vectors, normalize=False)[0]

    return call


def flash_qla(problem: Problem) -> Callable[..., Tensor]:
    """FlashQLA's function, the gated delta rule's."""
    from flash_qla import chunk_gated_delta_rule  # type: ignore[import-not-found]

    def call(query: Tensor, key: Tensor, value: Tensor, beta: Tensor, log_decay: Tensor) -> Tensor:
        scale = problem.key_dim**-0.5
        return chunk_gated_delta_rule(query, key, value, log_decay, beta, scale, auto_cp=True)[0]

    return call


LIBRARIES: dict[str, tuple[str, Callable[[Problem], Callable[..., Tensor]]]] = {
    "parallelflow": ("parallelflow", ours),
    "fla": ("fla", peer),
    "flash_qla": ("flash_qla", flash_qla),
}
DISTRIBUTIONS = {"fla": "fla-core", "flash_qla": "flash-qla"}


def serves(library: str, op: str) -> bool:
    """Whether a library has the model."""
    return {"fla": op != "low_rank_flow", "flash_qla": op == "gated_delta_rule"}.get(library, True)


def versions_of(libraries: list[str]) -> dict[str, str]:
    """Of what all run on, and of the libraries beside this one."""
    found = {"PyTorch": torch.__version__, "Triton": importlib.metadata.version("triton")}
    peers = [name for name in libraries if name in DISTRIBUTIONS]
    return found | {report.NAMES[name]: importlib.metadata.version(DISTRIBUTIONS[name]) for name in peers}


def medians(call: Callable[[], Any], seconds: float = 0.4) -> float:
    """Milliseconds of a call among others like it, queued one behind the other."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    before = time.perf_counter()
    call()
    torch.cuda.synchronize()
    repeats = max(12, min(100, int(seconds / (time.perf_counter() - before))))
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize()
    times = sorted(first.elapsed_time(last) for first, last in itertools.pairwise(events))
    return times[len(times) // 2]


def captured(call: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A CUDA graph of the call, and what it returned while captured, which the graph writes to."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = call()
    return graph, kept


def graphed(call: Callable[[], Any]) -> float | None:
    """Milliseconds of a CUDA graph of the call; None where it cannot be captured."""
    try:
        graph, kept = captured(call)
        found = medians(graph.replay)
        del kept
        return found
    except Exception as error:
        print(f"no CUDA graph: {type(error).__name__} {str(error)[:80]}", file=sys.stderr)
        return None


def error_of(problem: Problem, call: Callable[..., Tensor], inputs: dict[str, Tensor]) -> float:
    """Norm of the output's error over the output's norm, on the first tokens, against float64."""
    first = {name: tensor[:1, :PREFIX] for name, tensor in inputs.items()}
    with torch.no_grad():
        expected = ours(problem, "torch")(**{name: tensor.double() for name, tensor in first.items()})
        found = call(**inputs)[:1, :PREFIX].double()
    return ((found - expected).norm() / expected.norm()).item()


def measure(problem: Problem, library: str, wait: Callable[[], None]) -> report.Row:
    """One row; ``wait`` is called between the first gradient and the timing."""
    call = LIBRARIES[library][1](problem)
    inputs = draw(problem)
    values = inputs["value"]
    cotangent = torch.randn_like(values if values.ndim == 4 else values[:, :, 0])
    leaves = {name: tensor.requires_grad_() for name, tensor in inputs.items()}

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(call(**leaves), list(leaves.values()), cotangent)

    def forward() -> Tensor:
        with torch.no_grad():
            return call(**leaves)

    torch.cuda.synchronize()
    before = time.perf_counter()
    both()
    torch.cuda.synchronize()
    first_call = time.perf_counter() - before
    forward()
    wait()
    row: report.Row = {**problem._asdict(), "library": library}
    if library == report.OURS:
        row["batch_invariant"] = BATCH_INVARIANT
    row["forward_ms"] = medians(forward)
    row["forward_backward_ms"] = medians(both)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    both()
    torch.cuda.synchronize()
    row["extra_mib"] = round((torch.cuda.max_memory_allocated() - held) / 2**20)
    row["first_call_s"] = round(first_call, 1)
    row["error"] = error_of(problem, call, inputs)
    row["forward_graph_ms"] = graphed(forward)
    row["forward_backward_graph_ms"] = graphed(both)
    size, operations = problem.work()
    row["forward_gb_s"] = size / row["forward_ms"] / 1e6
    row["forward_tflop_s"] = operations / row["forward_ms"] / 1e9
    return {name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in row.items()}


def ceilings() -> dict[str, float]:
    """What the card does at best: a large copy, bytes read and written; a large product."""
    source = torch.randn(2**30, device="cuda")
    target = torch.empty_like(source)
    copy = medians(lambda: target.copy_(source))
    matrix = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    product = medians(lambda: matrix @ matrix)
    return {"copy_gb_s": round(8 * 2**30 / copy / 1e6), "bf16_tflop_s": round(2 * 8192**3 / product / 1e9)}


def job(problem: Problem, library: str, folder: Path) -> turns.Job:
    """The worker of a row, its compilers' caches empty."""
    number = str(PROBLEMS.index(problem))
    name = f"{library}-{problem.op}-{number}"
    caches = {"TRITON_CACHE_DIR": "triton", "TILELANG_CACHE_DIR": "tilelang"}
    environment = {variable: str(folder / name / cache) for variable, cache in caches.items()}
    command = [sys.executable, "-m", "benchmarks.gpu", "--worker", number, "--library", library]
    return turns.Job(name, command, {**environment, "FLA_FLASH_QLA": "0"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", choices=LIBRARIES, action="append", help="all that are installed, unless given")
    parser.add_argument("--op", choices=sorted({p.op for p in PROBLEMS}), action="append", help="all, unless given")
    parser.add_argument("--time", type=int, action="append", help="problems of so many tokens; all, unless given")
    parser.add_argument("--patience", type=float, default=400, help="seconds for all the first gradients")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/<card>.json, into which rows are merged")
    parser.add_argument("--commit", default="", help="the commit that is measured; default: asked of git")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    libraries = arguments.library or [
        name for name, (module, _) in LIBRARIES.items() if importlib.util.find_spec(module)
    ]
    if arguments.worker is not None:
        problem = PROBLEMS[arguments.worker]
        turns.work(lambda wait: [measure(problem, libraries[0], wait)])
        return
    chosen = [
        (problem, library)
        for library in libraries
        for problem in PROBLEMS
        if (arguments.op is None or problem.op in arguments.op)
        and (arguments.time is None or problem.time in arguments.time)
        and serves(library, problem.op)
    ]
    card = torch.cuda.get_device_name()
    path = arguments.out or report.RESULTS / f"{card.removeprefix('NVIDIA ').lower().replace(' ', '-')}.json"
    result = report.load(path)
    head = {"kind": "gpu", "card": card, "versions": {**result.get("versions", {}), **versions_of(libraries)}}
    head["commit"] = report.commit(arguments.commit)
    with tempfile.TemporaryDirectory() as folder:
        jobs = [job(problem, library, Path(folder)) for problem, library in chosen]
        rows = turns.run(jobs, arguments.patience, Path(folder))
    report.merge(result, rows)
    report.save({**head, "ceilings": ceilings(), "rows": result["rows"]}, path)


if __name__ == "__main__":
    main()
