"""Irregular time series, classified: a linear controlled equation, a GRU told the time gaps, a forward-filled DeltaNet.

    python benchmarks/irregular.py                   all runs that docs/results/irregular.json lacks, then the plot
    python benchmarks/irregular.py --seconds 300     as many of them as fit; call it again for the rest

The task: noisy spirals ``r(t) (cos θ, ±sin θ)``, eight classes: four frequencies, two senses of rotation. 48 irregular
times a sequence, from which each channel loses 0 to 70 % of its values, at random. Every model has the same number of
parameters (within 3 %), sees fresh sequences of the same seeds for the same number of steps, has the same choice of
learning rates, made on other data than it is tested on, and the same final classifier.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallelflow.nn import DeltaNet, LinearCDE

RESULTS = Path(__file__).parents[1] / "docs" / "results" / "irregular.json"
FREQUENCIES = (1.0, 1.4, 1.8, 2.2)
CLASSES = 2 * len(FREQUENCIES)
LENGTH, NOISE, WINDOW = 48, 0.3, 4
DROPS = (0.0, 0.3, 0.5, 0.7)
STEPS, BATCH = 400, 64
RATES = (3e-3, 1e-2, 3e-2, 1e-1)
TUNING_SEED, SEEDS = 100, (0, 1, 2, 3, 4)


def spirals(count: int, generator: torch.Generator, drop: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Times ``[count, 48]`` in [0, 1], values ``[count, 48, 2]`` with NaN where dropped, labels ``[count]``.

    ``drop``: the share dropped; None draws one for each sequence between 0 and 0.7.
    """
    uniform = lambda *shape: torch.rand(shape, generator=generator)  # noqa: E731
    label = torch.randint(CLASSES, (count,), generator=generator)
    frequency = torch.tensor(FREQUENCIES)[label // 2] + 0.24 * (uniform(count) - 0.5)
    times = uniform(count, LENGTH).sort(1).values
    again = torch.nn.functional.pad(times.diff(dim=1) == 0, (1, 0))  # float32 has few enough numbers to meet twice
    times = torch.where(again, torch.nextafter(times, torch.ones(())), times)
    angle = 2 * math.pi * (frequency[:, None] * times + uniform(count, 1))
    radius = torch.exp(-times * (1.5 * uniform(count, 1) - 0.5))
    sense = (2 * (label % 2) - 1)[:, None]
    values = radius[..., None] * torch.stack((angle.cos(), sense * angle.sin()), -1)
    values = values + NOISE * torch.randn(values.shape, generator=generator)
    share = 0.7 * uniform(count, 1, 1) if drop is None else torch.tensor(drop)
    return times, values.masked_fill(uniform(*values.shape) < share, math.nan), label


class Classifier(nn.Module):
    """The same small network on what a model says last."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(size, 32), nn.SiLU(), nn.Linear(32, CLASSES))

    def forward(self, hidden: Tensor) -> Tensor:
        return self.network(hidden)


def filled(times: Tensor, values: Tensor) -> Tensor:
    """What the discrete models see of every time: values filled forward, which of them are real, the time gap."""
    there = ~values.isnan()
    places = torch.arange(LENGTH)[None, :, None]
    last = torch.where(there, places, 0).cummax(1).values
    held = values.nan_to_num(0.0).gather(1, last)
    gap = torch.cat((times[:, :1], times.diff(dim=1)), 1)
    return torch.cat((held, there.float(), LENGTH * gap[..., None]), -1)


class ControlledEquation(nn.Module):
    """Straight lines between observations; log-ODE steps over windows of four of them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = LinearCDE(2, 32, num_heads=4, head_dim=16, discretization="log_ode")
        self.head = Classifier(32)

    def forward(self, times: Tensor, values: Tensor) -> Tensor:
        grid = torch.cat((times[:, ::WINDOW], times[:, -1:]), 1)
        return self.head(self.layer(times, values, grid)[:, -1])


class GatedRecurrentUnit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.GRU(5, 28, batch_first=True)
        self.head = Classifier(28)

    def forward(self, times: Tensor, values: Tensor) -> Tensor:
        return self.head(self.layer(filled(times, values))[0][:, -1])


class ForwardFilledDeltaNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm = nn.Linear(5, 25), nn.RMSNorm(25)
        self.layer = DeltaNet(25, num_heads=2, head_dim=13, negative_eigenvalues=True)
        self.head = Classifier(25)

    def forward(self, times: Tensor, values: Tensor) -> Tensor:
        hidden = self.embedding(filled(times, values))
        return self.head((hidden + self.layer(self.norm(hidden)).output)[:, -1])


MODELS = {"LinearCDE": ControlledEquation, "GRU": GatedRecurrentUnit, "DeltaNet": ForwardFilledDeltaNet}
NAMES = {
    "LinearCDE": "LinearCDE (log-ODE, windows of 4)",
    "GRU": "GRU with time gaps",
    "DeltaNet": "DeltaNet, forward-filled",
}


def train(model: str, rate: float, seed: int, steps: int = STEPS) -> nn.Module:
    """From random weights; AdamW, warm-up and cosine."""
    torch.manual_seed(seed)
    network = MODELS[model]()
    generator = torch.Generator().manual_seed(10_000 + seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 20) * (0.02 + 0.49 * (1 + math.cos(math.pi * step / steps)))
    )
    for _ in range(steps):
        times, values, label = spirals(BATCH, generator)
        loss = F.cross_entropy(network(times, values), label)
        optimizer.zero_grad()
        loss.backward()
        if not torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0).isfinite():
            raise FloatingPointError(f"{model} with learning rate {rate} diverged")
        optimizer.step()
        schedule.step()
    return network


@torch.no_grad()
def accuracy(network: nn.Module, seed: int, drop: float | None, count: int = 1024) -> float:
    times, values, label = spirals(count, torch.Generator().manual_seed(seed), drop)
    return (network(times, values).argmax(-1) == label).double().mean().item()


def run(model: str, rate: float, seed: int) -> dict:
    """One training and its accuracies: on validation data (all drops mixed), and on test data for each drop."""
    found: dict = {"model": model, "rate": rate, "seed": seed, "diverged": False}
    try:
        network = train(model, rate, seed)
    except FloatingPointError:
        found |= {"diverged": True, "validation": 0.0, "test": {str(drop): 0.0 for drop in DROPS}}
    else:
        found["validation"] = accuracy(network, 777, None)
        found["test"] = {str(drop): accuracy(network, 888, drop, 2048) for drop in DROPS}
    return found


def todo(runs: list[dict]) -> list[tuple[str, float, int]]:
    """What is missing: every learning rate with the tuning seed, then five seeds with the best of them."""
    done = {(r["model"], r["rate"], r["seed"]): r for r in runs}
    missing = []
    for model in MODELS:
        tuning = [(model, rate, TUNING_SEED) for rate in RATES]
        lacking = [key for key in tuning if key not in done]
        missing += lacking
        if not lacking:
            best = max(tuning, key=lambda key: done[key]["validation"])[1]
            missing += [(model, best, seed) for seed in SEEDS if (model, best, seed) not in done]
    return missing


def summary(runs: list[dict]) -> dict:
    """Of the five seeds: mean and standard deviation of the test accuracy at each drop."""
    found = {}
    for model in MODELS:
        rows = [r for r in runs if r["model"] == model and r["seed"] in SEEDS]
        if rows:
            scores = {drop: [r["test"][str(drop)] for r in rows] for drop in DROPS}
            found[model] = {
                "parameters": sum(x.numel() for x in MODELS[model]().parameters()),
                "rate": rows[0]["rate"],
                "seeds": len(rows),
                "mean": {str(d): round(statistics.mean(s), 4) for d, s in scores.items()},
                "deviation": {str(d): round(statistics.stdev(s) if len(s) > 1 else 0.0, 4) for d, s in scores.items()},
            }
    return found


def plot(runs: list[dict], path: Path) -> None:
    """Test accuracy over the share dropped: every seed a dot, their mean a line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    for (model, row), colour in zip(summary(runs).items(), ("#0b6e4f", "#c1666b", "#4357ad"), strict=False):
        label = f"{NAMES[model]}, {row['parameters']:,} parameters"
        axes.plot([100 * d for d in DROPS], [100 * row["mean"][str(d)] for d in DROPS], color=colour, label=label)
        for each in runs:
            if each["model"] == model and each["seed"] in SEEDS:
                scores = [100 * each["test"][str(d)] for d in DROPS]
                axes.scatter([100 * d for d in DROPS], scores, color=colour, s=12, alpha=0.6, linewidths=0)
    axes.axhline(100 / CLASSES, color="0.6", linewidth=0.8, linestyle=":")
    axes.annotate("chance", (0, 100 / CLASSES), color="0.4", fontsize=8, textcoords="offset points", xytext=(0, 3))
    axes.set(
        xlabel="values dropped, %", ylabel="sequences classified rightly, %", ylim=(0, 102), xticks=[0, 30, 50, 70]
    )
    axes.set_title("Noisy spirals, 8 classes, 48 irregular times, 5 seeds", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0, 0.14))
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no run after so many seconds")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    start = time.perf_counter()
    options.results.parent.mkdir(parents=True, exist_ok=True)
    runs = json.loads(options.results.read_text())["runs"] if options.results.exists() else []
    while (missing := todo(runs)) and time.perf_counter() - start < options.seconds:
        runs.append(run(*missing[0]))
        print(json.dumps(runs[-1]), flush=True)
        options.results.write_text(json.dumps({"summary": summary(runs), "runs": runs}, indent=1) + "\n")
    plot(runs, options.results.with_suffix(".png"))
    print(f"{len(missing)} runs are missing" if missing else json.dumps(summary(runs), indent=1))


if __name__ == "__main__":
    main()
