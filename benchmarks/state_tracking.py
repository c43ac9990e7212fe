"""Every layer on every task of ``parallelflow.tasks``, over seeds: trained short, tested long.

    python -m benchmarks.state_tracking --seconds 220                    # all, on the GPUs that there are
    python -m benchmarks.state_tracking --tasks parity S3 --layers "DeltaNet" --seeds 1 --steps 300
    python -m benchmarks.state_tracking --report                         # table and plot of the results that are there

A model is an embedding, blocks of one layer each with its MLP, a norm and a head. Sequences begin with a token of their
own: the state is zero before them, and what a layer multiplies must be written first. It is trained on 40 tokens,
asked at every position (recall: on 48, at the end), and tested on positions 41 to 256 (recall: on 96). Over the first
third of the steps the positions that count grow from 3 to all. AdamW, warm-up, cosine.

On a GPU a step is one CUDA graph, and many trainings run side by side on streams of their own. With ``--seconds`` the
trainings share that time equally, and all those that run side by side take the same number of steps.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import queue
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.state_tracking_report import PUBLISHED, plot, table
from parallelflow.nn import Block, layer_options, make_layer
from parallelflow.tasks import IGNORED, TASKS, Task, make_task

RESULTS = Path(__file__).parents[1] / "docs" / "results" / "state_tracking.json"
NEGATIVE = {"negative_eigenvalues": True}
LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    "DeltaNet": ("delta_net", {}),
    "DeltaNet, negative eigenvalues": ("delta_net", NEGATIVE),
    "Gated DeltaNet": ("gated_delta_net", {}),
    "Gated DeltaNet, negative eigenvalues": ("gated_delta_net", NEGATIVE),
    "Gated DeltaProduct, 2 factors, negative eigenvalues": ("delta_product", NEGATIVE | {"num_householder": 2}),
    "Gated DeltaProduct, 4 factors, negative eigenvalues": ("delta_product", NEGATIVE | {"num_householder": 4}),
    "Kimi Delta Attention": ("kimi_delta_attention", {}),
    "Kimi Delta Attention, negative eigenvalues": ("kimi_delta_attention", NEGATIVE),
    "RWKV-7": ("rwkv7", {}),
    "Gated Linear Attention": ("gated_linear_attention", {}),
    "Mamba-2": ("mamba2", {}),
    "Comba": ("comba", {}),
    "Low-rank flow, R = 4": ("low_rank_flow", {"rank": 4, "discretization": "rk4"}),
    "Softmax attention": ("softmax_attention", {}),
}
FRESH = 2**18
"""Sequences drawn for a task and seed; a training that needs more begins again with the first."""


class Tracker(nn.Module):
    """Tokens ``[B, T]`` to logits ``[B, T, classes]``."""

    def __init__(self, layer: str, options: dict[str, Any], task: Task, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.begin = task.vocabulary
        self.embedding = nn.Parameter(torch.randn(task.vocabulary + 1, width))
        known, sizes = layer_options(layer), {"num_heads": heads}
        if "num_heads" not in known:  # RWKV-7, and Mamba-2, whose inner width is expand · width
            sizes = {"head_dim": width // heads * (2 if layer == "mamba2" else 1)}
        if layer == "mamba2":
            sizes["state_size"] = width // heads
        if "engine" in known:  # plain tensor algebra looks at no value on the GPU, and so fits into a CUDA graph
            options = options | {"engine": {"backend": "torch"}}
        where = [{"layer_index": n, "num_layers": depth} if layer == "rwkv7" else {} for n in range(depth)]
        self.blocks = nn.ModuleList(
            Block(make_layer(layer, width, **sizes, **options, **each), intermediate_size=2 * width) for each in where
        )
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, task.classes)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = F.pad(tokens, (1, 0), value=self.begin)
        symbols = torch.arange(self.begin + 1, device=tokens.device)
        hidden = (tokens.unsqueeze(-1) == symbols).to(self.embedding.dtype) @ self.embedding  # no sums in any order
        shared: dict[str, Tensor] = {}
        for block in self.blocks:
            mixed = block(hidden, **shared)
            hidden = mixed.output
            if hasattr(mixed, "first_value"):  # RWKV-7's later layers mix the first one's values in
                shared = {"first_value": mixed.first_value}
        return self.head(self.norm(hidden[:, 1:]))


def lengths(task: str) -> tuple[int, int]:
    """The length that is trained, and the one that is tested."""
    return (48, 96) if task == "associative_recall" else (40, 256)


@lru_cache(maxsize=16)
def sequences(task: str, seed: int, count: int, device: str) -> tuple[Tensor, Tensor]:
    """Tokens and labels ``[count, trained length]`` in 8 bits, the same for every layer."""
    drawn = make_task(task).draw(count, lengths(task)[0], torch.Generator().manual_seed(seed))
    return drawn.tokens.to(torch.int8).to(device), drawn.labels.to(torch.int8).to(device)


class Training:
    """One model and its training, a step at a time; all that changes from step to step is on the device."""

    def __init__(self, job: tuple[str, str, int], settings: dict[str, Any]) -> None:
        self.layer, self.task, self.seed = job
        self.settings, self.device = settings, settings["device"]
        torch.manual_seed(self.seed)
        layer, options = LAYERS[self.layer]
        sizes = (settings["width"], settings["depth"], settings["heads"])
        self.model = Tracker(layer, options, make_task(self.task), *sizes).to(self.device)
        self.tokens, self.labels = sequences(self.task, self.seed, FRESH, self.device)
        self.step, self.steps, self.rate, self.loss = (torch.zeros((), device=self.device) for _ in range(4))
        self.steps.fill_(settings["steps"])
        matrices = [x for x in self.model.parameters() if x.ndim > 1]
        others = [x for x in self.model.parameters() if x.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
        captured = self.device != "cpu"
        self.optimizer = torch.optim.AdamW(groups, lr=self.rate, betas=(0.9, 0.95), fused=True, capturable=captured)
        self.graph: torch.cuda.CUDAGraph | None = None
        if captured:
            self.stream = torch.cuda.Stream(self.device)

    def advance(self) -> None:
        """One step; nothing in it waits for the device."""
        batch, done = self.settings["batch"], self.step / self.steps
        warm = ((self.step + 1) / self.settings["warm_up"]).clamp(max=1)
        self.rate.copy_(self.settings["learning_rate"] * warm * (0.01 + 0.99 * (1 + (torch.pi * done).cos()) / 2))
        rows = (self.step.long() * batch + torch.arange(batch, device=self.device)) % len(self.tokens)
        tokens, labels = self.tokens[rows].long(), self.labels[rows].long()
        if self.task != "associative_recall":
            counted = (tokens.shape[1] * done / self.settings["growing"]).clamp(min=3)
            labels = labels.masked_fill(torch.arange(tokens.shape[1], device=self.device) >= counted, IGNORED)
        self.optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(self.model(tokens).flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.loss.copy_(loss.detach())
        self.step += 1

    def capture(self) -> None:
        """Makes a CUDA graph of a step, after some that are taken as they are."""
        with torch.cuda.stream(self.stream):
            for _ in range(3):
                self.advance()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=self.stream):
            self.advance()

    def replay(self) -> None:
        if self.graph is None:
            self.advance()
        else:
            with torch.cuda.stream(self.stream):
                self.graph.replay()

    def found(self, seconds: float) -> dict[str, Any]:
        """What came out."""
        self.graph = None
        found = {"layer": self.layer, "task": self.task, "seed": self.seed, "steps": int(self.step)}
        found |= {"seconds": round(seconds, 1), "loss": float(self.loss)}
        found |= {"parameters": sum(x.numel() for x in self.model.parameters())}
        trained, tested = lengths(self.task)
        found["trained_length"] = accuracy(self.model, self.task, trained)
        found["longer"] = accuracy(self.model, self.task, tested, trained if tested == 256 else 0)
        return found


@torch.no_grad()
def accuracy(model: nn.Module, task: str, length: int, after: int = 0, count: int = 256) -> float:
    """The share of right answers after the first ``after`` tokens, on sequences that no training sees."""
    device = next(model.parameters()).device
    drawn = make_task(task).draw(count, length, torch.Generator().manual_seed(2**40))
    tokens, labels = drawn.tokens.to(device), drawn.labels[:, after:].to(device)
    asked = labels != IGNORED
    answers = torch.cat([model(part).argmax(-1) for part in tokens.split(64)])[:, after:]
    return (answers == labels)[asked].float().mean().item()


def train(jobs: list[tuple[str, str, int]], settings: dict[str, Any], until: float) -> list[dict[str, Any]]:
    """Trainings side by side, step after step of each; they end at the time ``until`` or before."""
    start = time.perf_counter()
    trainings, found = [], []
    for job in jobs:
        try:
            training = Training(job, settings)
            if settings["device"] != "cpu":
                training.capture()
            trainings.append(training)
        except Exception as error:  # one that fails leaves the others running, and is in the results
            found.append(dict(zip(("layer", "task", "seed"), job, strict=True)))
            found[-1]["error"] = f"{type(error).__name__}: {error}"

    def run(rounds: int) -> None:
        for _ in range(rounds):
            for training in trainings:
                training.replay()
        if settings["device"] != "cpu":
            torch.cuda.synchronize(settings["device"])

    steps, tried = settings["steps"], 10
    if trainings and until < float("inf"):
        begun = time.perf_counter()
        run(tried)
        rate = tried / (time.perf_counter() - begun)
        steps = max(1, min(steps, int(trainings[0].step) + int(rate * max(0.0, 0.95 * (until - time.perf_counter())))))
        for training in trainings:
            training.steps.fill_(steps)
    if trainings:
        run(max(0, steps - int(trainings[0].step)))
    seconds = time.perf_counter() - start
    return found + [training.found(seconds) for training in trainings]


def work(jobs: list[tuple[str, str, int]], results: Any, settings: dict[str, Any]) -> None:
    """A process that makes its share of the trainings, so many at a time, in equal shares of the time."""
    torch.set_num_threads(1)
    if settings["device"] != "cpu":
        torch.cuda.set_device(settings["device"])
    end = time.perf_counter() + settings["seconds"]
    waves = [jobs[first : first + settings["together"]] for first in range(0, len(jobs), settings["together"])]
    for number, wave in enumerate(waves):
        now = time.perf_counter()
        for found in train(wave, settings, now + (end - now) / (len(waves) - number)):
            results.put(found)


def run(jobs: list[tuple[str, str, int]], settings: dict[str, Any], devices: list[str], file: Path) -> None:
    """All trainings; the file is written after each, so that an end before the end loses nothing."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [
        context.Process(
            target=work, args=(jobs[n :: len(devices)], results, settings | {"device": device}), daemon=True
        )
        for n, device in enumerate(devices)
    ]
    for process in processes:
        process.start()
    runs: list[dict[str, Any]] = []
    for _ in jobs:
        while True:
            try:
                runs.append(results.get(timeout=5))
                break
            except queue.Empty:
                if any(process.exitcode for process in processes) and results.empty():
                    raise RuntimeError(f"a training ended its process; what was found so far is in {file}") from None
        print(json.dumps(runs[-1]), flush=True)
        content = {"machine": machine(devices), "settings": settings, "published": PUBLISHED, "runs": runs}
        file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    for process in processes:
        process.join()


def machine(devices: list[str]) -> str:
    return f"{len(devices)} × {torch.cuda.get_device_name()}" if devices[0] != "cpu" else f"CPU, {len(devices)} threads"


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    arguments.add_argument("--layers", nargs="+", choices=list(LAYERS), default=list(LAYERS))
    arguments.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    arguments.add_argument("--seeds", type=int, default=2)
    arguments.add_argument("--steps", type=int, default=10000, help="of one training at most")
    arguments.add_argument("--seconds", type=float, default=float("inf"), help="of all trainings at most")
    arguments.add_argument("--batch", type=int, default=128)
    arguments.add_argument("--width", type=int, default=128)
    arguments.add_argument("--depth", type=int, default=2)
    arguments.add_argument("--heads", type=int, default=4)
    arguments.add_argument("--learning-rate", type=float, default=2e-3)
    arguments.add_argument("--warm-up", type=int, default=100, help="steps")
    arguments.add_argument("--growing", type=float, default=0.33, help="share of the steps in which lengths grow")
    arguments.add_argument("--together", type=int, default=28 if cuda else 1, help="trainings side by side on a device")
    arguments.add_argument("--workers", type=int, default=1, help="processes, without a GPU")
    arguments.add_argument("--output", type=Path, default=RESULTS)
    arguments.add_argument("--report", action="store_true", help="table and plot of the results that are there")
    given = vars(arguments.parse_args())
    file, workers = given.pop("output"), given.pop("workers")
    if not given.pop("report"):
        # Layer by layer of one task and seed, so that trainings side by side share their sequences.
        jobs = [
            (layer, task, seed)
            for seed, task, layer in itertools.product(range(given.pop("seeds")), given["tasks"], given["layers"])
        ]
        devices = [f"cuda:{n}" for n in range(torch.cuda.device_count())] if cuda else ["cpu"] * workers
        run(jobs, {key: value for key, value in given.items() if key not in ("layers", "tasks")}, devices, file)
    content = json.loads(file.read_text(encoding="utf-8"))
    print(table(content, list(LAYERS)))
    plot(content, list(LAYERS), file.with_suffix(".png"))


if __name__ == "__main__":
    main()
