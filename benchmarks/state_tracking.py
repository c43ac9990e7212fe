"""Every layer on every task of ``parallelflow.tasks``, over seeds: trained short, tested long.

    python -m benchmarks.state_tracking                                  # all, on the GPU where there is one
    python -m benchmarks.state_tracking --tasks parity S3 --layers delta_net --seeds 2 --steps 300
    python -m benchmarks.state_tracking --seconds 25 --workers 14        # a run ends its schedule after 25 s at most

A model is an embedding, blocks of one layer each with its MLP, a norm and a head. It sees sequences of 3 to 40 tokens
and is tested on 40 and on 256 (recall: 3 to 48, and 48 and 96). Warm-up, then a linear fall
of the learning rate, by steps or by time, whichever ends first: ``steps`` in the results is what was done.
Models may run side by side; each is a process's own and does not depend on the others but for how many steps fit.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import queue
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
    "Kimi Delta Attention": ("kimi_delta_attention", {}),
    "RWKV-7": ("rwkv7", {}),
    "Gated Linear Attention": ("gated_linear_attention", {}),
    "Mamba-2": ("mamba2", {}),
    "Comba": ("comba", {}),
    "Low-rank flow, R = 4": ("low_rank_flow", {"rank": 4}),
    "Softmax attention": ("softmax_attention", {}),
}
PUBLISHED = {
    "what": "formal-language suite, trained to length 40 and tested to 256, average accuracy in %",
    "DeltaNet": 62.5,
    "DeltaNet, negative eigenvalues": 77.7,
    "Gated DeltaProduct, negative eigenvalues": 80.7,
    "DPLR-SLiCE, r = 4": 85.1,
}
"""As published, on other tasks than these: beside the table, not in it."""


class Tracker(nn.Module):
    """Tokens ``[B, T]`` to logits ``[B, T, classes]``."""

    def __init__(self, layer: str, options: dict[str, Any], task: Task, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(task.vocabulary, width)
        known, sizes = layer_options(layer), {"num_heads": heads}
        if "num_heads" not in known:  # RWKV-7, and Mamba-2, whose inner width is expand · width
            sizes = {"head_dim": width // heads * (2 if layer == "mamba2" else 1)}
        self.blocks = nn.ModuleList(
            Block(make_layer(layer, width, **sizes, **options), intermediate_size=2 * width) for _ in range(depth)
        )
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, task.classes)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        for block in self.blocks:
            hidden = block(hidden).output
        return self.head(self.norm(hidden))


def lengths(task: str) -> tuple[int, int]:
    """The longest that is trained, and the longest that is tested."""
    return (48, 96) if task == "associative_recall" else (40, 256)


def train(job: tuple[str, str, int], settings: dict[str, Any]) -> dict[str, Any]:
    """One training: its accuracies at both lengths."""
    name, task_name, seed = job
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    task, device = make_task(task_name), settings["device"]
    layer, options = LAYERS[name]
    model = Tracker(layer, options, task, settings["width"], settings["depth"], settings["heads"]).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.01)
    generator = torch.Generator().manual_seed(seed)
    trained, tested = lengths(task_name)
    found: dict[str, Any] = {"layer": name, "task": task_name, "seed": seed, "diverged": False}
    start, step, done = time.perf_counter(), 0, 0.0
    while done < 1:
        rate = settings["learning_rate"] * min(1.0, (step + 1) / 50) * max(0.01, 1 - done)
        for group in optimizer.param_groups:
            group["lr"] = rate
        length = int(torch.randint(3, trained + 1, (1,), generator=generator))
        loss = loss_of(model, task, settings["batch"], length, generator)
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 50 == 0 and not bool(norm.isfinite()):
            found["diverged"] = True
            break
        done = max(step / settings["steps"], (time.perf_counter() - start) / settings["seconds"])
    found |= {"steps": step, "seconds": round(time.perf_counter() - start, 1)}
    found |= {"parameters": sum(x.numel() for x in model.parameters())}
    for key, length in (("trained_length", trained), ("longer", tested)):
        found[key] = accuracy(model, task, length)
    return found


def loss_of(model: nn.Module, task: Task, batch: int, length: int, generator: torch.Generator) -> Tensor:
    device = next(model.parameters()).device
    tokens, labels = (x.to(device) for x in task.draw(batch, length, generator))
    return F.cross_entropy(model(tokens).flatten(0, 1), labels.flatten(), ignore_index=IGNORED)


@torch.no_grad()
def accuracy(model: nn.Module, task: Task, length: int, count: int = 256) -> float:
    """The share of right answers, of all that are asked, on sequences that no training sees."""
    device = next(model.parameters()).device
    tokens, labels = (x.to(device) for x in task.draw(count, length, torch.Generator().manual_seed(2**40)))
    asked = labels != IGNORED
    return (torch.cat([model(part).argmax(-1) for part in tokens.split(32)]) == labels)[asked].float().mean().item()


def work(jobs: Any, results: Any, settings: dict[str, Any]) -> None:
    """A process that takes one job after another."""
    while (job := jobs.get()) is not None:
        try:
            results.put(train(job, settings))
        except Exception as error:  # one that fails leaves the others running, and is in the results
            results.put({"layer": job[0], "task": job[1], "seed": job[2], "error": f"{type(error).__name__}: {error}"})


def run(jobs: list[tuple[str, str, int]], settings: dict[str, Any], workers: int, file: Path) -> list[dict[str, Any]]:
    """All trainings; the file is written after each, so that an end before the end loses nothing."""
    context = multiprocessing.get_context("spawn")
    waiting, results = context.Queue(), context.Queue()
    for job in jobs + [None] * workers:
        waiting.put(job)
    processes = [context.Process(target=work, args=(waiting, results, settings), daemon=True) for _ in range(workers)]
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
        content = {"machine": machine(settings["device"]), "settings": settings, "published": PUBLISHED, "runs": runs}
        file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    for process in processes:
        process.join()
    return runs


def machine(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "CPU"


def table(content: dict[str, Any], key: str = "longer") -> str:
    """Mean accuracy in % over seeds, and its range, in Markdown."""
    tasks = [name for name in TASKS if any(run["task"] == name for run in content["runs"])]
    lines = ["| layer | " + " | ".join(tasks) + " |", "|---|" + "---:|" * len(tasks)]
    for layer in LAYERS:
        cells = []
        for task in tasks:
            own = [100 * r[key] for r in content["runs"] if r["layer"] == layer and r["task"] == task and key in r]
            spread = f" ({min(own):.0f}–{max(own):.0f})" if len(own) > 1 else ""
            cells.append(f"{statistics.mean(own):.0f}{spread}" if own else "")
        if any(cells):
            lines.append(f"| {layer} | " + " | ".join(cells) + " |")
    chances = [f"{100 * make_task(task).chance:.0f}" for task in tasks]
    return "\n".join([*lines, "| *guessing* | " + " | ".join(chances) + " |"])


def plot(content: dict[str, Any], file: Path) -> None:
    """Accuracy at the longer length: layers by tasks."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tasks = [name for name in TASKS if any(run["task"] == name for run in content["runs"])]
    layers = [name for name in LAYERS if any(run["layer"] == name for run in content["runs"])]
    figure = Figure(figsize=(8, 0.4 * len(layers) + 1.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    means = [
        [
            statistics.mean(
                [r["longer"] for r in content["runs"] if (r["layer"], r["task"]) == (layer, task) and "longer" in r]
                or [float("nan")]
            )
            for task in tasks
        ]
        for layer in layers
    ]
    axes.imshow(means, vmin=0, vmax=1, aspect="auto", cmap="viridis")
    for row, column in itertools.product(range(len(layers)), range(len(tasks))):
        shade = "black" if means[row][column] > 0.6 else "white"
        axes.text(column, row, f"{100 * means[row][column]:.0f}", ha="center", va="center", color=shade)
    axes.set_xticks(range(len(tasks)), tasks, rotation=20)
    axes.set_yticks(range(len(layers)), layers)
    axes.set_title("right answers in %, on sequences longer than any that was trained", fontsize=10)
    figure.savefig(file, dpi=150)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--layers", nargs="+", choices=list(LAYERS), default=list(LAYERS))
    arguments.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    arguments.add_argument("--seeds", type=int, default=3)
    arguments.add_argument("--steps", type=int, default=20000)
    arguments.add_argument("--seconds", type=float, default=float("inf"), help="of one training at most")
    arguments.add_argument("--batch", type=int, default=256)
    arguments.add_argument("--width", type=int, default=128)
    arguments.add_argument("--depth", type=int, default=2)
    arguments.add_argument("--heads", type=int, default=4)
    arguments.add_argument("--learning-rate", type=float, default=2e-3)
    arguments.add_argument("--workers", type=int, default=1)
    arguments.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments.add_argument("--output", type=Path, default=RESULTS)
    arguments.add_argument("--report", action="store_true", help="table and plot of the results that are there")
    given = vars(arguments.parse_args())
    file, workers = given.pop("output"), given.pop("workers")
    if not given.pop("report"):
        jobs = [
            (layer, task, seed)
            for seed, task, layer in itertools.product(range(given.pop("seeds")), given["tasks"], given["layers"])
        ]
        settings = {key: value for key, value in given.items() if key not in ("layers", "tasks")}
        run(jobs, settings, workers, file)
    content = json.loads(file.read_text(encoding="utf-8"))
    print(table(content))
    plot(content, file.with_suffix(".png"))


if __name__ == "__main__":
    main()
