"""Checkpoints: whole or not there, and never trusted unseen.

A checkpoint is a folder ``step-00000100`` with ``config.json`` and ``model.safetensors`` (Transformers loads them),
``optimizer.safetensors`` and ``state.json``, which has the recipe, the state of the random numbers and the other files'
SHA-256. It is written under another name, flushed to the disk and renamed: a kill at any moment leaves those before it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, nn

FORMAT = "parallelflow training 1"
FILES = ("config.json", "model.safetensors", "optimizer.safetensors")


class CheckpointError(RuntimeError):
    """No checkpoint can be used; says why of each."""


class Checkpoint(NamedTuple):
    """One that was found whole: its folder, steps done, recipe, tokens' name and tokenizer's file, random state."""

    folder: Path
    step: int
    recipe: dict[str, Any]
    tokens: str
    random: list[int]

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Weights, the optimiser's tensors and the random numbers, as they were."""
        load_model(model, self.folder / "model.safetensors")
        state = load_file(self.folder / "optimizer.safetensors")
        parts: dict[int, dict[str, Tensor]] = {}
        for name, tensor in state.items():
            index, key = name.split(".", 1)
            parts.setdefault(int(index), {})[key] = tensor
        optimizer.load_state_dict({"state": parts, "param_groups": optimizer.state_dict()["param_groups"]})
        torch.set_rng_state(torch.tensor(self.random, dtype=torch.uint8, device="cpu"))


def digest(file: Path) -> str:
    """The file's SHA-256."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def save(
    folder: Path,
    step: int,
    model: Any,
    optimizer: torch.optim.Optimizer,
    recipe: dict[str, Any],
    tokens: str,
    keep: int,
) -> Path:
    """Writes ``folder/step-…`` and removes all but the newest ``keep`` of those that are there.

    Raises:
        OSError: where it cannot be written, as on a full disk; those that are there stay, and nothing half.
    """
    place = folder / f"step-{step:08d}"
    writing = folder / f".writing-{step:08d}"
    for left in folder.glob(".writing-*"):  # of an earlier run that was killed
        shutil.rmtree(left, ignore_errors=True)
    try:
        writing.mkdir(parents=True)
        _write(writing, step, model, optimizer, recipe, tokens)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(writing, ignore_errors=True)
        raise OSError(f"checkpoint: {place} cannot be written: {error}") from error
    if place.exists():  # of a step that is made again because the newest one was damaged
        _remove(place)
    writing.rename(place)
    _flush(folder)
    for old in _folders(folder)[keep:]:
        _remove(old)
    for left in folder.glob(".removing-*"):
        shutil.rmtree(left, ignore_errors=True)
    return place


def _write(
    writing: Path, step: int, model: Any, optimizer: torch.optim.Optimizer, recipe: dict[str, Any], tokens: str
) -> None:
    """All files of a checkpoint, flushed to the disk."""
    model.config.save_pretrained(writing)
    save_model(model, str(writing / "model.safetensors"), metadata={"format": "pt"})
    state = {
        f"{index}.{key}": tensor
        for index, parts in optimizer.state_dict()["state"].items()
        for key, tensor in parts.items()
    }
    save_file(state, writing / "optimizer.safetensors")
    content = {
        "format": FORMAT,
        "step": step,
        "recipe": recipe,
        "tokens": tokens,
        "random": torch.get_rng_state().tolist(),
        "sha256": {name: digest(writing / name) for name in FILES},
    }
    (writing / "state.json").write_text(json.dumps(content), encoding="utf-8")
    for file in writing.iterdir():
        _flush(file)
    _flush(writing)


def latest(folder: Path | str, refused: Callable[[str], None] = lambda why: None) -> Checkpoint:
    """The newest checkpoint of a folder that is whole; ``refused`` hears of each newer one why it is not used.

    Raises:
        CheckpointError: where there is none.
    """
    reasons, folder = [], Path(folder)
    for place in _folders(folder):
        try:
            return _open(place)
        except (OSError, ValueError, KeyError, TypeError) as error:
            what = f"no {error}" if isinstance(error, KeyError) else str(error)
            reasons.append(f"{place}: {what}")
            refused(reasons[-1])
    raise CheckpointError("checkpoint: " + ("; ".join(reasons) if reasons else f"{folder} has none"))


def _open(place: Path) -> Checkpoint:
    content = json.loads((place / "state.json").read_text(encoding="utf-8"))
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"state.json is foreign, expected the format {FORMAT!r}")
    for name in FILES:
        if digest(place / name) != content["sha256"][name]:
            raise ValueError(f"{name} is truncated or changed: its SHA-256 is not what state.json says")
    return Checkpoint(place, content["step"], content["recipe"], content["tokens"], content["random"])


def _folders(folder: Path) -> list[Path]:
    """Newest first."""
    return sorted(folder.glob("step-????????"), reverse=True)


def _remove(place: Path) -> None:
    """Out of sight at once, then gone."""
    gone = place.with_name(f".removing-{place.name}")
    shutil.rmtree(gone, ignore_errors=True)
    place.rename(gone)
    shutil.rmtree(gone)


def _flush(path: Path) -> None:
    """To the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
