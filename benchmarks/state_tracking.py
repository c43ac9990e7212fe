"""Every layer on every task of ``parallelflow.tasks``, over seeds: trained short, tested long.

    python -m benchmarks.state_tracking --seconds 220                 # on the GPUs that there are; again: goes on
    python -m benchmarks.state_tracking --tasks parity S3 --layers "DeltaNet" --seeds 1 --steps 300
    python -m benchmarks.state_tracking --report                      # table, plot and page of what is there

A model is an embedding, blocks of one layer each with its MLP, a norm and a head (``benchmarks.tracker``); all have the
same number of parameters, of steps, and the same data. It is trained on 40 tokens, asked at every position (recall: at
the end), and tested on positions 41 to 256 (recall: on 96).

Layers are shared out to the GPUs that there are and train side by side, each on a stream of its own; every layer takes
one task after another in the order given, all tasks of a seed before the next seed. With ``--seconds`` the steps of a
training are as many as fit into the time, the same for all, measured at the beginning with all of them running, and the
last tasks are left out where they would be too few; at the end of the time all ends, and what was not trained is told
and counts nowhere. The file is written after every training; a second run takes the number of steps from it, leaves out
what is there, and adds the rest. Where a step cannot be recorded as a CUDA graph, its layer trains eagerly after the
others, and that is told.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import queue
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.state_tracking_report import PUBLISHED, plot, rendered, table
from benchmarks.tracker import Recipe, Sizes, Tracker, Training, count_parameters
from parallelflow.tasks import TASKS

BEGUN = time.time()
RESULTS = Path(__file__).parents[1] / "docs" / "results" / "state_tracking.json"
PAGE = RESULTS.parents[1] / "state_tracking.md"
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
STEP_COSTS = {
    "softmax_attention": 1.0,
    "mamba2": 2.8,
    "delta_net": 2.9,
    "gated_linear_attention": 3.8,
    "gated_delta_net": 4.2,
    "comba": 4.3,
    "delta_product": 4.4,
    "kimi_delta_attention": 6.4,
    "rwkv7": 6.7,
    "low_rank_flow": 6.9,
}
"""The time of a recorded step on an H200, in those of softmax attention: layers are shared out to devices by it."""
AT_ONCE = 8
"""Steps that are enqueued for a training before the next one's."""
Cell = tuple[str, str, int]
"""Layer, task, seed."""


def equal_parameters(sizes: Sizes) -> int:
    """The parameters of the largest layer's model with MLPs of twice the width."""
    with torch.device("meta"):
        return max(count_parameters(Tracker(*kind, sizes, 2 * sizes.width)) for kind in LAYERS.values())


def pace(trainings: list[Training], task: str, seed: int) -> float:
    """The seconds of a step of all trainings, side by side."""
    rounds, start = -1, 0.0
    for training in trainings:
        training.begin(task, seed, 2**20)
    while rounds < AT_ONCE or (time.time() - start < 2 and rounds < 10 * AT_ONCE):
        for training in trainings:
            training.advance(1 if rounds < 0 else AT_ONCE)
        for training in trainings:
            training.wait()
        rounds, start = (0, time.time()) if rounds < 0 else (rounds + AT_ONCE, start)
    return (time.time() - start) / rounds


def affordable(seconds: float, step: float, most: int, layers: int, least: int) -> tuple[int, int]:
    """How many trainings a layer can have one after another, and the steps of each.

    These are ``least`` at least, unless it is one training; a test and a beginning are taken to need 0.1 s.
    """
    for count in range(most, 0, -1):
        steps = int(0.9 * max(0.0, seconds - 0.1 * layers * count) / (count * step))
        if steps >= least:
            break
    return count, steps


def work(
    number: int, cells: dict[str, list[Cell]], settings: dict[str, Any], results: Any, orders: Any, end: float
) -> None:
    """Trains its layers side by side, until ``end``, on one device; says to ``results`` how fast it is and what it
    finds, and hears from ``orders`` how many trainings a layer has, and of how many steps."""
    torch.set_num_threads(settings["threads"])
    sizes, recipe, device = Sizes(**settings["sizes"]), Recipe(**settings["recipe"]), settings["device"]
    if device == "cuda":
        torch.cuda.set_device(number)
    recorded: dict[str, Training] = {}
    eager: dict[str, Training] = {}
    for layer, waiting in cells.items():
        try:
            training = Training(*LAYERS[layer], sizes, recipe, settings["parameters"], device)
            if device == "cuda" and (message := training.record(waiting[0][1])):
                kind = "recorded" if training.graph else "eager steps after the recorded ones of others"
                results.put({"message": f"{layer}: {kind}: {message}"})
            (recorded if training.graph else eager)[layer] = training
        except Exception as error:  # one that fails leaves the others running, and is told
            results.put({"message": f"{layer}: failed: {type(error).__name__}: {error}"[:400]})
    # Eager steps keep the host busy, and the others waiting.
    groups = [group for group in (recorded, eager) if group]
    step = pace(list(groups[0].values()), *waiting[0][1:]) if groups and end < math.inf else 0.0
    results.put({"number": number, "step": step})
    count, steps = orders.get(timeout=None if end == math.inf else max(1.0, end - time.time()))
    for group in groups:
        race({layer: (training, cells[layer][:count]) for layer, training in group.items()}, steps, results, end)
    results.put({"end": number})


def race(running: dict[str, tuple[Training, list[Cell]]], steps: int, results: Any, end: float) -> None:
    """Every layer goes through its trainings, at the pace that the device gives it."""
    begun: dict[str, float] = {}
    taken: dict[str, float] = {}  # the seconds of the layer's last training
    for training, _ in running.values():
        training.steps = training.done = 0
    while running and time.time() < end:
        ready = [layer for layer, (training, _) in running.items() if training.ready()]
        if not ready:
            time.sleep(2e-4)
        for layer in ready:
            training, waiting = running[layer]
            try:
                if not training.finished:
                    training.advance(AT_ONCE)
                    continue
                if layer in begun:
                    taken[layer] = time.time() - begun.pop(layer)
                    results.put({"layer": layer, **training.result(), "seconds": round(taken[layer], 1)})
                if not waiting or time.time() + 0.8 * taken.get(layer, 0.0) > end:
                    del running[layer]
                    continue
                _, task, seed = waiting.pop(0)
                training.begin(task, seed, steps)
                begun[layer] = time.time()
            except Exception as error:
                results.put({"message": f"{layer}: failed: {type(error).__name__}: {error}"[:400]})
                del running[layer]


def shares(cells: list[Cell], devices: int) -> list[dict[str, list[Cell]]]:
    """The trainings of each device: whole layers, the slowest ones first to the device that has least to do."""
    of_layers: dict[str, list[Cell]] = {}
    for cell in cells:
        of_layers.setdefault(cell[0], []).append(cell)
    costs = {layer: STEP_COSTS[LAYERS[layer][0]] * len(own) for layer, own in of_layers.items()}
    found: list[dict[str, list[Cell]]] = [{} for _ in range(devices)]
    for layer in sorted(of_layers, key=lambda layer: -costs[layer]):
        least = min(found, key=lambda share: sum(costs[name] for name in share))
        least[layer] = of_layers[layer]
    return [share for share in found if share]


def run(cells: list[Cell], content: dict[str, Any], end: float, file: Path) -> None:
    """All trainings, in a process for each device that ends when the time does; the file is written after each."""
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "32"  # as many streams run at once; read when CUDA starts
    context = multiprocessing.get_context("spawn")
    results, settings = context.Queue(), content["settings"]
    parts = shares(cells, torch.cuda.device_count() if settings["device"] == "cuda" else 1)
    orders = [context.Queue() for _ in parts]
    processes = {
        number: context.Process(target=work, args=(number, part, settings, results, orders[number], end), daemon=True)
        for number, part in enumerate(parts)
    }
    for process in processes.values():
        process.start()
    paces: dict[int, float] = {}
    planned = False
    while processes and time.time() < end + 2:
        for number, process in list(processes.items()):
            if process.exitcode is not None and results.empty():
                print(f"the process of device {number} ended with exit code {process.exitcode}", flush=True)
                del processes[number]
        if not planned and processes and paces.keys() >= processes.keys():
            planned = True
            count, settings["steps"] = plan(parts, paces, settings, end)
            for order in orders:
                order.put((count, settings["steps"]))
        try:
            found = results.get(timeout=0.5)
        except queue.Empty:
            continue
        if "end" in found:
            processes.pop(found["end"]).join()
        elif "message" in found:
            print(found["message"], flush=True)
        elif "number" in found:
            paces[found["number"]] = found["step"]
        else:
            print(
                "{layer}, {task}, {seed}: {trained_length:.3f}, {longer:.3f}, {seconds} s".format(**found), flush=True
            )
            content["runs"].append(found)
            save(content, file)
    for process in processes.values():
        process.kill()
    there = {(each["layer"], each["task"], each["seed"]) for each in content["runs"]}
    missing = [cell for cell in cells if cell not in there]
    if missing:
        print(f"not trained: {len(missing)} of {len(cells)}: " + "; ".join(f"{a}, {b}, {c}" for a, b, c in missing))


def plan(
    parts: list[dict[str, list[Cell]]], paces: dict[int, float], settings: dict[str, Any], end: float
) -> tuple[int, int]:
    """How many trainings a layer has, and their steps: the same for all, as the slowest device can make them."""
    most = max(len(own) for part in parts for own in part.values())
    steps = settings["steps"]
    if end == math.inf:
        return most, steps or settings["most_steps"]
    least, layers = steps or settings["least_steps"], max(map(len, parts))
    count, fit = affordable(end - time.time(), max(paces.values()), most, layers, least)
    steps = steps or min(fit, settings["most_steps"])
    told = ", ".join(f"{1e3 * paces[number]:.1f}" for number in sorted(paces))
    print(f"{told} ms a step of a device's layers; {count} trainings of {fit} steps fit; {steps} are made", flush=True)
    return count, steps


def save(content: dict[str, Any], file: Path) -> None:
    """Whole or not at all."""
    part = file.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    part.replace(file)


def content_of(file: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """What is in the file, if it was trained with the same settings; a beginning, if it is not there.

    Raises:
        ValueError: for a file of other settings.
    """
    if not file.exists():
        return {"settings": settings, "published": PUBLISHED, "runs": []}
    content = json.loads(file.read_text(encoding="utf-8"))
    there = content["settings"]
    for name in ("sizes", "recipe", "parameters", "steps"):
        if settings[name] is not None and there.get(name) != settings[name]:
            raise ValueError(
                f"{name}: got {settings[name]}, but {file} has results of {there.get(name)}; give another --output"
            )
    machines = dict.fromkeys([*there["machine"].split(", then "), settings["machine"]])
    content["settings"] = {**settings, "steps": there["steps"], "machine": ", then ".join(machines)}
    return content


def machine() -> str:
    count, name = torch.cuda.device_count(), torch.cuda.get_device_name()
    return name if count == 1 else f"{count} × {name}"


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    arguments.add_argument("--layers", nargs="+", choices=list(LAYERS), default=list(LAYERS))
    arguments.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    arguments.add_argument("--seeds", type=int, default=3)
    arguments.add_argument("--steps", type=int, help="of a training; without, as many as fit into the time")
    arguments.add_argument("--most-steps", type=int, default=3000, help="where more would fit")
    arguments.add_argument("--least-steps", type=int, default=1000, help="where fewer would, the last tasks wait")
    arguments.add_argument("--seconds", type=float, default=math.inf, help="of the whole run")
    arguments.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if cuda else "cpu")
    arguments.add_argument("--threads", type=int, default=1 if cuda else torch.get_num_threads())
    arguments.add_argument("--output", type=Path, default=RESULTS)
    arguments.add_argument("--report", action="store_true", help="table and plot of the results that are there")
    for each in (Sizes(), Recipe()):
        for name, value in each._asdict().items():
            arguments.add_argument("--" + name.replace("_", "-"), type=type(value), default=value)
    given = arguments.parse_args()
    if not given.report:
        sizes = Sizes(*(getattr(given, name) for name in Sizes._fields))
        recipe = Recipe(*(getattr(given, name) for name in Recipe._fields))
        settings = {"sizes": sizes._asdict(), "recipe": recipe._asdict(), "parameters": equal_parameters(sizes)}
        settings |= {
            "steps": given.steps,
            "most_steps": given.most_steps,
            "least_steps": given.least_steps,
            "device": given.device,
        }
        settings |= {"threads": given.threads}
        settings |= {"machine": machine() if given.device == "cuda" else "CPU"}
        try:
            content = content_of(given.output, settings)
        except (ValueError, KeyError) as error:
            arguments.error(str(error))
        there = {(each["layer"], each["task"], each["seed"]) for each in content["runs"]}
        wanted = [(a, b, c) for c in range(given.seeds) for b in given.tasks for a in given.layers]
        run([cell for cell in wanted if cell not in there], content, BEGUN + given.seconds - 8, given.output)
    content = json.loads(given.output.read_text(encoding="utf-8"))
    print(table(content, list(LAYERS)))
    if given.output == RESULTS:
        PAGE.write_text(rendered(PAGE.read_text(encoding="utf-8"), content, list(LAYERS)), encoding="utf-8")
    plot(content, list(LAYERS), given.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
