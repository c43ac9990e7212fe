"""One sequence over several ranks: times, bytes, efficiency, and gradients beside one rank's.

    torchrun --nproc-per-node 8 -m benchmarks.context_parallel                        # GPUs, NCCL
    torchrun --nproc-per-node 4 -m benchmarks.context_parallel --device cpu --tokens 4096 --tokens-per-rank 1024

Of all ranks there are, groups of 1, 2, 4, … are measured one after another, on the same inputs:

* ``total``: ``--tokens`` in all, cut over the ranks. Efficiency is t(1) / (W t(W)); 1 is perfect.
* ``per rank``: ``--tokens-per-rank`` each. Efficiency is t(1) / t(W).

A time is the slowest rank's median. Bytes are what the rank that receives most receives, in one direction; the exchange
is also timed alone. ``agreement`` is what checking shapes and settings beforehand takes; the times are without it.
Gradients are those of ``--check-tokens`` tokens, compared, as norms, with those of one rank and of the torch backend
in float64: an error beside float64 that is not larger over ranks than on one is all that can be asked.
``--op NAME:TOKENS:PER_RANK`` sizes a model on its own.
"""

from __future__ import annotations

import argparse
import datetime
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

import parallelflow
from benchmarks import context_parallel_report, report
from parallelflow.distributed import Context, agreement, even_lengths, exchange

DENSE = ("gated_delta_rule", "delta_product", "kimi_delta_attention")
OPS = (*DENSE, "gated_linear_attention", "ssd")
ROWS = {"delta_product": 2}
HEADS, SIZE = 16, 128


class Machine(NamedTuple):
    """Where this rank computes."""

    device: torch.device
    dtype: torch.dtype
    heads: int
    size: int

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def draw(op: str, time: int, machine: Machine, seed: int) -> dict[str, Tensor]:
    """Unit queries and keys, beta in (0, 1), decays mostly mild; beta and decays in float32."""
    generator = torch.Generator(machine.device).manual_seed(seed)
    heads, size, rows = machine.heads, machine.size, (ROWS[op],) if op in ROWS else ()

    def normal(*shape: int) -> Tensor:
        return torch.randn(1, time, *shape, device=machine.device, generator=generator)

    def unit(*shape: int) -> Tensor:
        return torch.nn.functional.normalize(normal(*shape), dim=-1).to(machine.dtype)

    channels = (size,) if op in ("kimi_delta_attention", "gated_linear_attention") else ()
    inputs = {"query": unit(heads, size), "key": unit(*rows, heads, size)}
    inputs["value"] = normal(*rows, heads, size).to(machine.dtype)
    if op in DENSE:
        inputs["beta"] = normal(*rows, heads).sigmoid()
    inputs["log_decay"] = torch.nn.functional.logsigmoid(normal(heads, *channels) + 3)
    return inputs


def call(op: str, inputs: dict[str, Tensor], group: Any, backend: str, **options: Any) -> Tensor:
    function = getattr(parallelflow, op)
    return function(**inputs, backend=backend, aggregate="distributed", context_group=group, **options).output


def median(run: Callable[[], Any], machine: Machine, group: Any, repeats: int) -> float:
    """Milliseconds: the slowest rank's median."""
    run()
    times = []
    for _ in range(repeats):
        machine.wait()
        dist.barrier(group)
        start = time.perf_counter()
        run()
        machine.wait()
        times.append(1e3 * (time.perf_counter() - start))
    return max(gathered(statistics.median(times), group))


def gathered(value: Any, group: Any) -> list[Any]:
    everyone = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, value, group)
    return everyone


def exchanged(op: str, size: int, machine: Machine) -> tuple[str, int, Any]:
    """How flows travel, the most that a rank receives of them, and a flow like them."""
    shape = (1, machine.heads, machine.size, machine.size)
    source = torch.zeros(shape, device=machine.device)
    transition = source if op in DENSE else source[..., 0] if op == "gated_linear_attention" else source[..., 0, 0]
    latency = exchange.LATENCY_BYTES[machine.device.type == "cuda"]
    state, more = source.nbytes, transition.nbytes
    method = exchange.cheapest(size, size - 1, state, more, latency)
    rounds = (size - 1).bit_length()
    received = {"ring": state, "scan": rounds * (state + more) - more, "all_gather": (size - 1) * (state + more)}
    return method, received[method] if size > 1 else 0, exchange.Flow(transition.clone(), source)


def measure(op: str, tokens: int, mode: str, group: Any, machine: Machine, options: argparse.Namespace) -> report.Row:
    """One row, on every rank of the group."""
    context = Context.of(group)
    inputs = draw(op, even_lengths(tokens, context.size)[context.rank], machine, context.rank)
    cotangent = torch.ones_like(inputs["query"])
    leaves = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    unchecked = {"backend": options.backend, "validate": False}

    def forward() -> None:
        with torch.no_grad():
            call(op, leaves, group, **unchecked)

    def both() -> None:
        torch.autograd.grad(call(op, leaves, group, **unchecked), list(leaves.values()), cotangent)

    method, received, flow = exchanged(op, context.size, machine)
    passing = [0 < rank < context.size - 1 for rank in range(context.size)]
    row: report.Row = {"op": op, "mode": mode, "tokens": tokens, "ranks": context.size}
    row["forward_ms"] = median(forward, machine, group, options.repeats)
    if machine.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    row["forward_backward_ms"] = median(both, machine, group, options.repeats)
    if machine.device.type == "cuda":
        row["peak_mib"] = max(gathered(round(torch.cuda.max_memory_allocated() / 2**20), group))
    row |= {"method": "–", "bytes": received, "exchange_ms": 0.0}
    if context.size > 1:
        row["method"] = method
        row["exchange_ms"] = median(lambda: exchange.start(context, flow, passing)(), machine, group, 20)
    agree = {"query": "the same"}
    row["agreement_ms"] = median(
        lambda: agreement.agree(context, agree, tokens, True, machine.device), machine, group, 20
    )
    return {name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in row.items()}


def gradients(op: str, inputs: dict[str, Tensor], group: Any, backend: str, first: int, stop: int) -> dict[str, Tensor]:
    """Of a fixed function of the output, on tokens ``first`` to ``stop``."""
    mine = {name: tensor[:, first:stop].clone().requires_grad_() for name, tensor in inputs.items()}
    output = call(op, mine, group, backend)
    device = output.device
    weights = torch.randn(inputs["query"].shape, generator=torch.Generator(device).manual_seed(99), device=device)
    found = torch.autograd.grad(output, list(mine.values()), weights[:, first:stop].to(output.dtype))
    return {"output": output.detach(), **dict(zip(mine, found, strict=True))}


def check(op: str, tokens: int, group: Any, alone: Any, machine: Machine, backend: str) -> report.Row:
    """How far output and gradients over ranks are from one rank's, and both from float64."""
    context = Context.of(group)
    inputs = draw(op, tokens, machine, 7)
    edges = [sum(even_lengths(tokens, context.size)[:rank]) for rank in range(context.size + 1)]
    pieces = [
        gradients(op, inputs, group, backend, *edges[context.rank : context.rank + 2]) for _ in range(2)
    ]  # twice: the same bits?
    same = all(torch.equal(pieces[0][name], pieces[1][name]) for name in pieces[0])
    whole = {}
    for name, piece in pieces[0].items():
        longest = max(even_lengths(tokens, context.size))
        padded = torch.nn.functional.pad(
            piece.transpose(0, 1), (0, 0) * (piece.ndim - 1) + (0, longest - piece.shape[1])
        )
        parts = context.gather(padded.contiguous(), "the gradients")
        lengths = even_lengths(tokens, context.size)
        whole[name] = torch.cat([part[:n] for part, n in zip(parts, lengths, strict=True)]).transpose(0, 1)
    row: report.Row = {"op": op, "ranks": context.size, "check_tokens": tokens, "same_bits": all(gathered(same, group))}
    if context.rank == 0:
        one = gradients(op, inputs, alone, backend, 0, tokens)
        exact = gradients(op, {name: x.double() for name, x in inputs.items()}, alone, "torch", 0, tokens)

        def worst(found: dict[str, Tensor], reference: dict[str, Tensor]) -> float:
            errors = [
                ((found[n].double() - x.double()).norm() / x.double().norm()).item() for n, x in reference.items()
            ]
            return float(f"{max(errors):.2e}")

        row |= {"from_one_rank": worst(whole, one), "from_float64": worst(whole, exact)}
        row["one_rank_from_float64"] = worst(one, exact)
    return row


def efficiencies(rows: list[report.Row]) -> None:
    """Puts the ratios to one rank's times into the rows that have a time."""
    timed = [row for row in rows if "forward_ms" in row]
    base = {(row["op"], row["mode"]): row for row in timed if row["ranks"] == 1}
    for row in timed:
        one = base.get((row["op"], row["mode"]))
        if one is None:
            continue
        share = row["ranks"] if row["mode"] == "total" else 1
        for name in ("forward", "forward_backward"):
            row[f"{name}_efficiency"] = float(f"{one[f'{name}_ms'] / row[f'{name}_ms'] / share:.3g}")


def sizes_of(chosen: list[str], tokens: int, per_rank: int) -> list[tuple[str, int, int]]:
    """``NAME`` or ``NAME:TOKENS:PER_RANK``."""
    found = []
    for each in chosen:
        op, *sizes = each.split(":")
        if op not in OPS or len(sizes) not in (0, 2):
            raise SystemExit(f"--op: got {each!r}, expected NAME or NAME:TOKENS:PER_RANK, NAME one of {', '.join(OPS)}")
        found.append((op, *(int(size) for size in sizes or (tokens, per_rank))))
    return found


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", action="append", help="NAME or NAME:TOKENS:PER_RANK; default: the three that read")
    parser.add_argument("--tokens", type=int, default=2**20, help="in all, for the mode total; 0: not measured")
    parser.add_argument("--tokens-per-rank", type=int, default=2**17, help="for the mode per rank; 0: not measured")
    parser.add_argument("--check-tokens", type=int, default=4096, help="of the gradients compared; 0: none")
    parser.add_argument("--ranks", type=int, action="append", help="sizes of groups; default: 1, 2, 4, … and all")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default=None, help="default: bfloat16 on GPUs, float32 on a CPU")
    parser.add_argument("--backend", default="auto", help="as of parallelflow.integrate")
    parser.add_argument("--heads", type=int, default=HEADS)
    parser.add_argument("--size", type=int, default=SIZE, help="K = V")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1e9, help="what has not begun by then is left out")
    parser.add_argument("--out", type=Path, help="a JSON file; rows of the same problem are replaced")
    parser.add_argument("--commit", default="", help="the commit that is measured; default: asked of git")
    return parser.parse_args()


def run(options: argparse.Namespace, machine: Machine) -> list[report.Row]:
    """All rows, on rank 0."""
    size, rank, began = dist.get_world_size(), dist.get_rank(), time.monotonic()
    counts = options.ranks or sorted({2**n for n in range(size.bit_length()) if 2**n <= size} | {size})
    groups = {count: dist.new_group(range(count)) for count in sorted({1, *counts})}
    rows: list[report.Row] = []

    def attempt(count: int, what: str, job: Callable[[Any], report.Row]) -> None:
        late = gathered(time.monotonic() - began > options.seconds, dist.group.WORLD)
        row: report.Row | None = None
        failed = ""
        if rank < count and not any(late):
            try:
                row = job(groups[count])
            except torch.OutOfMemoryError:
                failed = "out of memory"
                if count > 1:
                    raise  # the other ranks are waiting inside a call
        if machine.device.type == "cuda":
            torch.cuda.empty_cache()
        dist.barrier()
        if rank == 0:
            if row is None:
                print(f"no row: {what} on {count} ranks: {failed or 'no time left'}", flush=True)
            else:
                rows.append(row)
                print(row, flush=True)

    for op, tokens, per_rank in sizes_of(options.op or list(DENSE), options.tokens, options.tokens_per_rank):
        if options.check_tokens:
            for count in counts:
                if count > 1:
                    attempt(
                        count, f"{op} gradients",
                        lambda group, op=op: check(
                            op, options.check_tokens, group, groups[1], machine, options.backend
                        ),
                    )  # fmt: skip
        for mode, given in (("per rank", per_rank), ("total", tokens)):
            for count in counts if given else ():
                line = given * (count if mode == "per rank" else 1)
                attempt(
                    count, f"{op} {mode}",
                    lambda group, op=op, line=line, mode=mode: measure(op, line, mode, group, machine, options),
                )  # fmt: skip
    efficiencies(rows)
    return rows


def main() -> None:
    options = arguments()
    local = int(os.environ.get("LOCAL_RANK", "0"))
    on_gpu = options.device == "cuda"
    if on_gpu:
        torch.cuda.set_device(local)
    device = torch.device("cuda", local) if on_gpu else torch.device("cpu")
    name = options.dtype or ("bfloat16" if on_gpu else "float32")
    machine = Machine(device, getattr(torch, name), options.heads, options.size)
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    dist.init_process_group(backend, timeout=datetime.timedelta(minutes=5))
    rows = run(options, machine)
    if dist.get_rank() == 0:
        print(context_parallel_report.times([row for row in rows if "forward_ms" in row]), flush=True)
        if options.out is not None:
            save(rows, options, machine, name)
    dist.barrier()
    dist.destroy_process_group()


def save(rows: list[report.Row], options: argparse.Namespace, machine: Machine, dtype: str) -> None:
    card = torch.cuda.get_device_name() if machine.device.type == "cuda" else "CPU"
    key = lambda row: tuple(row.get(name) for name in ("op", "mode", "tokens", "ranks", "check_tokens"))  # noqa: E731
    kept = {key(row): row for row in [*report.load(options.out)["rows"], *rows]}
    head = {"kind": "context_parallel", "card": card, "versions": {"PyTorch": torch.__version__}}
    head["commit"] = report.commit(options.commit)
    head |= {"dtype": dtype, "heads": machine.heads, "size": machine.size, "name": options.out.stem}
    report.save({**head, "rows": list(kept.values())}, options.out)


if __name__ == "__main__":
    main()
