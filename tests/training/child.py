"""A training in a process of its own, which a test kills."""

from pathlib import Path

import torch

from parallelflow.training import Bytes, Recipe, open_text, train

RECIPE = {
    "model": {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_heads": 1,
        "intermediate_size": 16,
        "layer_options": {"gated_delta_net": {"head_dim": 8, "value_head_dim": 8}},
    },
    "length": 16,
    "batch": 2,
    "accumulation": 2,
    "steps": 20,
    "warmup": 5,
    "evaluate_every": 10,
    "evaluation_batches": 1,
    "checkpoint_every": 5,
}


def run(recipe: dict, data: Path, folder: Path, started=None, **options) -> None:
    torch.set_num_threads(1)
    recipe = Recipe.of(recipe)
    text = open_text(data, Bytes(), recipe, folder / "tokens")
    if started is not None:
        started.set()
    train(recipe, text, folder, resume=True, **options)
