"""Context parallelism beyond the machines there are: what travels, how long it takes, and which way of the three wins.

    python -m benchmarks.context_parallel_simulation             everything: docs/results/context_parallel.json and .png
    python -m benchmarks.context_parallel_simulation --keep      the plot alone, from the results that are there

``simulated``: 8 to 4096 ranks and 1M to 1B tokens, from the rates of one device in benchmarks/results/h200.json and
stated link speeds. ``injected``: the three ways with real processes over gloo, where every message first waits for
``latency + bytes / bandwidth``, far longer than gloo itself takes: the check that they take the rounds and bytes that
``exchange.costs`` says, and change places where it says.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import socket
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from benchmarks import report
from benchmarks.tables import pyplot
from parallelflow.distributed import Context, exchange
from parallelflow.flow import Flow

RESULTS = report.ROOT / "docs" / "results" / "context_parallel.json"
RANKS = tuple(2**n for n in range(3, 13))
TOKENS = tuple(2**n for n in (20, 23, 27, 30))
MODEL = {"op": "gated_delta_rule", "batch": 1, "time": 32768, "value_heads": 64}
"""The row of h200.json whose rates are taken: one sequence, 64 value heads of 128."""

FIRST, SECOND, PULL = 1.04, 0.69, 0.62
"""Times over a forward pass's of the two halves of the delta rule's kernels, and of what pulls the outputs' gradients
back to the state that enters (``parallelflow/kernels/halves.py``), reckoned from the stages in
docs/performance/segments.md: 0.31 of a forward pass prepares, and of the rest, the scan, flows take 1.05 times as long
and the reverse flow 0.9 times."""

INJECTED_RANKS = 8
LATENCY = 0.04  # seconds a message, injected
RATIOS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1, 2, 4)
"""State and transition over the bytes that travel in a message's latency: (s + p) / L."""


class Link(NamedTuple):
    """A message of n bytes takes ``latency + n / bandwidth`` seconds."""

    name: str
    latency: float
    bandwidth: float

    def seconds(self, method: str, ranks: int, state: float, transition: float) -> float:
        cost = exchange.costs(ranks, ranks - 1, state, transition, self.latency * self.bandwidth)
        return cost[method] / self.bandwidth


NVLINK = Link("NVLink, 10 µs and 400 GB/s", 10e-6, 400e9)
INFINIBAND = Link("InfiniBand, 20 µs and 50 GB/s", 20e-6, 50e9)


class Device(NamedTuple):
    """Seconds a token of one layer, forward and backward, and of a product with what each output says of the state that
    enters, by the bytes that it reads and writes."""

    forward: float
    backward: float
    product: float
    heads: int
    size: int

    @staticmethod
    def measured() -> Device:
        result = report.load(report.RESULTS / "h200.json")
        (row,) = [
            row for row in result["rows"]
            if row["library"] == report.OURS and all(row[key] == value for key, value in MODEL.items())
        ]  # fmt: skip
        forward, both = (row[name] / row["time"] / 1e3 for name in ("forward_ms", "forward_backward_ms"))
        heads, size = row["value_heads"], row["value_dim"]
        product = 3 * 2 * heads * size / (result["ceilings"]["copy_gb_s"] * 1e9)  # two arrays read, one written
        return Device(forward, both - forward, product, heads, size)

    @property
    def state(self) -> int:
        """Bytes, in float32."""
        return 4 * self.heads * self.size**2

    def transition(self, kind: str) -> int:
        return {"dense": self.state, "diagonal": 4 * self.heads * self.size}[kind]


def simulated(device: Device) -> list[dict[str, Any]]:
    """A step of one layer, for every number of ranks and tokens: the time of the rank that has most to do.

    A rank between two others runs the first half, waits for the exchange, runs the second, pulls the gradient back,
    waits for the exchange backward, and runs backward. Where P is a diagonal it runs, and adds what the state that
    enters does to its outputs by a product, and pulls back by another.
    """
    rows = []
    for kind in ("dense", "diagonal"):
        state, transition = device.state, device.transition(kind)
        if kind == "dense":
            more = device.forward * (FIRST + SECOND + PULL - 1)
        else:
            more = 2 * device.product
        for ranks in RANKS:
            link = NVLINK if ranks <= 8 else INFINIBAND
            ways = {way: link.seconds(way, ranks, state, transition) for way in exchange.METHODS}
            best = exchange.cheapest(ranks, ranks - 1, state, transition, link.latency * link.bandwidth)
            for tokens in TOKENS:
                own = tokens / ranks
                local = own * (device.forward + more + device.backward)
                alone = tokens * (device.forward + device.backward)
                rows.append({
                    "kind": kind, "ranks": ranks, "tokens": tokens, "link": link.name, "best": best,
                    **{f"{way}_ms": 1e3 * seconds for way, seconds in ways.items()},
                    "received_mib": received(best, ranks, state, transition) / 2**20,
                    "step_ms": 1e3 * (local + 2 * ways[best]),
                    "efficiency": alone / ranks / (local + 2 * ways[best]),
                })  # fmt: skip
    return rows


def received(method: str, ranks: int, state: int, transition: int) -> float:
    """Bytes in one direction, of the rank that receives most."""
    rounds = (ranks - 1).bit_length()
    if method == "ring":
        return state
    if method == "scan":
        return rounds * (state + transition) - transition
    return (ranks - 1) * (state + transition)


class SlowContext(Context):
    """Whose messages take as long as on a slow link. A rank's sends of a round go one behind the other; everyone's
    share of a gathering comes over the same link."""

    bandwidth: float = 1.0

    def start_trade(self, sends: Any, receives: Any, what: str) -> list[Any]:
        if sends:
            time.sleep(LATENCY + sum(tensor.nbytes for _, tensor in sends) / self.bandwidth)
        return super().start_trade(sends, receives, what)

    def start_gather(self, tensor: Any, what: str) -> Any:
        time.sleep(LATENCY + (self.size - 1) * tensor.nbytes / self.bandwidth)
        return super().start_gather(tensor, what)


def injected_on_rank(rank: int, port: int, pipe: Any) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    dist.init_process_group("gloo", rank=rank, world_size=INJECTED_RANKS)
    rows = []
    flow = Flow(torch.zeros(4, 16, 16), torch.zeros(4, 16, 16))
    size = flow.source.nbytes
    passing = [0 < each < INJECTED_RANKS - 1 for each in range(INJECTED_RANKS)]
    for ratio in RATIOS:
        slow = SlowContext(dist.group.WORLD, rank, INJECTED_RANKS)
        object.__setattr__(slow, "bandwidth", 2 * size / ratio / LATENCY)
        costs = exchange.costs(INJECTED_RANKS, INJECTED_RANKS - 1, size, size, LATENCY * slow.bandwidth)
        row: dict[str, Any] = {"ratio": ratio}
        for method in exchange.METHODS:
            times = []
            for _ in range(3):
                dist.barrier()
                start = time.perf_counter()
                exchange.start(slow, flow, passing, method=method)()
                everyone: list[Any] = [None] * INJECTED_RANKS
                dist.all_gather_object(everyone, time.perf_counter() - start)
                times.append(max(everyone))
            row[f"{method}_ms"] = round(1e3 * statistics.median(times), 1)
            row[f"{method}_expected_ms"] = round(1e3 * costs[method] / slow.bandwidth, 1)
        rows.append(row)
    pipe.send(rows)
    dist.barrier()
    dist.destroy_process_group()


def injected() -> list[dict[str, Any]]:
    """Measured and expected milliseconds of each way, by the size of messages."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    processes = [context.Process(target=injected_on_rank, args=(r, port, theirs)) for r in range(INJECTED_RANKS)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return ours.recv()


def plot(result: dict[str, Any], path: Path) -> None:
    plt = pyplot()
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4.2))
    styles = dict(zip(exchange.METHODS, ("C0", "C1", "C2"), strict=True))
    for kind, line in (("dense", "-"), ("diagonal", ":")):
        rows = [row for row in result["simulated"] if row["kind"] == kind and row["tokens"] == TOKENS[0]]
        for way, colour in styles.items():
            label = f"{way.replace('_', '-')}, P {kind}"
            left.plot([r["ranks"] for r in rows], [r[f"{way}_ms"] for r in rows], line, color=colour, label=label)
    left.set(xscale="log", yscale="log", xlabel="ranks", ylabel="one exchange, ms", title="Exchange, simulated")
    left.legend(fontsize="x-small")
    for tokens in TOKENS:
        rows = [row for row in result["simulated"] if row["kind"] == "dense" and row["tokens"] == tokens]
        middle.plot([r["ranks"] for r in rows], [r["efficiency"] for r in rows], "o-", ms=3, label=f"{tokens:,} tokens")
    middle.set(xscale="log", ylim=(0, 1), xlabel="ranks", ylabel="efficiency", title="Forward and backward, P dense")
    middle.legend(fontsize="x-small")
    rows = result["injected"]
    for way, colour in styles.items():
        ratios = [row["ratio"] for row in rows]
        right.plot(ratios, [row[f"{way}_expected_ms"] for row in rows], "-", color=colour, label=way.replace("_", "-"))
        right.plot(ratios, [row[f"{way}_ms"] for row in rows], "o", color=colour)
    right.set(xscale="log", yscale="log", xlabel="state and transition / bytes in a latency", ylabel="ms",
              title=f"Over gloo, {INJECTED_RANKS} processes, {1e3 * LATENCY:.0f} ms a message")  # fmt: skip
    right.legend(fontsize="x-small", title="lines: expected, dots: measured", title_fontsize="x-small")
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def rounded(row: dict[str, Any]) -> dict[str, Any]:
    return {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in row.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", action="store_true", help="measure nothing, plot what there is")
    arguments = parser.parse_args()
    if not arguments.keep:
        device = Device.measured()
        result: dict[str, Any] = {"device": rounded(device._asdict()), "state_mib": device.state / 2**20}
        result["simulated"] = [rounded(row) for row in simulated(device)]
        result["injected"] = injected()
        text = json.dumps(result).replace("}, {", "},\n  {").replace("[{", "[\n  {").replace('], "', '],\n "')
        RESULTS.write_text(text + "\n", encoding="utf-8")
    plot(json.loads(RESULTS.read_text(encoding="utf-8")), RESULTS.with_suffix(".png"))


if __name__ == "__main__":
    main()
