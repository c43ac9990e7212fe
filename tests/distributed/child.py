"""A training in a process of its own, of torchrun or alone: ``child.py FOLDER [STEP]`` kills the third rank in that
step, when its own gradients are there and the mean over the ranks is not."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from parallelflow.training import Bytes, Recipe, loop, open_text, train

RECIPE = Recipe(
    model={"hidden_size": 16, "num_hidden_layers": 2, "layers": ["gated_delta_net", "mamba2"], "num_heads": 2,
           "intermediate_size": 16, "layer_options": {"mamba2": {"head_dim": 8, "state_size": 8}}},
    length=30, batch=2, accumulation=2, steps=8, warmup=2, evaluate_every=4, evaluation_batches=2, checkpoint_every=3,
)  # fmt: skip
DATA = Path(__file__).parents[2] / "README.md"


def main(folder: Path, fatal: int | None) -> None:
    torch.set_num_threads(1)
    group = None
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
        group = dist.group.WORLD
    steps = iter(range(1, 100))
    average = loop._average_gradients

    def perhaps_die(model, context):
        if next(steps) == fatal and context.rank == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        average(model, context)

    loop._average_gradients = perhaps_die
    text = open_text(DATA, Bytes(), RECIPE, folder / "tokens")
    train(RECIPE, text, folder, resume=True, context_group=group)
    if group is not None:  # a process that ends while another still talks to it takes that one with it
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else None)
