"""Training on files from Python: what `parallelflow train` does, stopped half-way and gone on with."""

import tempfile
from pathlib import Path

from parallelflow.training import Bytes, Recipe, latest, open_text, train

recipe = Recipe(
    model={"hidden_size": 64, "num_hidden_layers": 2, "layers": ["gated_delta_net"], "num_heads": 2},
    length=64,
    batch=4,
    steps=60,
    warmup=10,
    evaluate_every=20,
    evaluation_batches=4,
    checkpoint_every=20,
)
data = Path(__file__).parents[1] / "README.md"  # or a folder: all files below it


def say(entry):
    if "held_out_loss" in entry:
        print(f"step {entry['step']}: loss {entry['loss']:.2f}, held out {entry['held_out_loss']:.2f}")


def stop(entry):
    say(entry)
    if entry["step"] == 30:
        raise KeyboardInterrupt


with tempfile.TemporaryDirectory() as folder:
    text = open_text(data, Bytes(), recipe, Path(folder) / "tokens")
    try:
        train(recipe, text, Path(folder), report=stop)
    except KeyboardInterrupt:
        print(f"stopped; the newest checkpoint is of step {latest(Path(folder) / 'checkpoints').step}")
    model = train(recipe, text, Path(folder), resume=True, report=say)
    print("going on ended at step", latest(Path(folder) / "checkpoints").step)
