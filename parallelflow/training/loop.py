"""The training itself. What a step does depends on weights, optimiser and the step's number alone, so going on from a
checkpoint gives what never stopping gives: bit for bit where the device computes the same bits twice."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallelflow.models import ParallelFlowForCausalLM
from parallelflow.training import checkpoint
from parallelflow.training.recipe import Recipe
from parallelflow.training.text import EVALUATION, Text

Report = Callable[[dict[str, Any]], None]


def train(
    recipe: Recipe,
    text: Text,
    folder: Path,
    *,
    device: torch.device | str = "cpu",
    resume: bool = False,
    report: Report = lambda entry: None,
    warn: Callable[[str], None] = lambda message: None,
) -> ParallelFlowForCausalLM:
    """Trains, and leaves in ``folder`` the ``checkpoints`` and ``log.jsonl``, a line a step.

    A line has ``step`` (steps done), ``loss`` (nats a token), ``learning_rate``, ``gradient_norm``,
    ``tokens_per_second`` and, where it was evaluated, ``held_out_loss``.

    Args:
        resume: go on from the newest whole checkpoint in ``folder``; from the start where none has been written yet.
        report: hears every line of the log; ``warn`` why a checkpoint is not used.

    Raises:
        ValueError: where the folder has checkpoints and ``resume`` is not asked for, or those of another training.
        CheckpointError: where there are checkpoints and none is whole.
        FloatingPointError: where the loss or its gradient is not finite.
    """
    checkpoints = folder / "checkpoints"
    found = None
    if any(checkpoints.glob("step-*")):
        if not resume:
            raise ValueError(f"output: {folder} has checkpoints already; go on with --resume, or choose another folder")
        found = checkpoint.latest(checkpoints, warn)
        _expect_same(found, recipe, text)
    torch.manual_seed(recipe.seed)
    model = ParallelFlowForCausalLM(recipe.configuration(text.tokens.size)).to(device)
    optimizer = _optimizer(model, recipe)
    done = 0
    if found is not None:
        found.restore(model, optimizer)
        done = found.step
    model.train()
    checkpoints.mkdir(parents=True, exist_ok=True)
    log = folder / "log.jsonl"
    _cut_log(log, done)
    with log.open("a", encoding="utf-8") as lines:
        for step in range(done, recipe.steps):
            entry = _step(model, optimizer, recipe, text, step)
            last = entry["step"] == recipe.steps
            if last or entry["step"] % recipe.evaluate_every == 0:
                entry["held_out_loss"] = evaluate(model, recipe, text)
            lines.write(json.dumps(entry) + "\n")
            lines.flush()
            if last or entry["step"] % recipe.checkpoint_every == 0:
                checkpoint.save(
                    checkpoints, entry["step"], model, optimizer, recipe.table(), text.tokens.name, recipe.keep
                )
            report(entry)
    return model


def _step(
    model: ParallelFlowForCausalLM, optimizer: torch.optim.Optimizer, recipe: Recipe, text: Text, step: int
) -> dict[str, Any]:
    start = time.perf_counter()
    rate = recipe.rate(step)
    for group in optimizer.param_groups:
        group["lr"] = rate
    total = 0.0
    for part in range(recipe.accumulation):
        loss = _loss(model, text.batch(recipe, step * recipe.accumulation + part), recipe) / recipe.accumulation
        loss.backward()
        total += loss.item()
    norm = nn.utils.clip_grad_norm_(model.parameters(), recipe.clip).item()
    if not torch.tensor([total, norm]).isfinite().all():
        raise FloatingPointError(
            f"step {step + 1}: the loss is {total}, its gradient's norm {norm}, expected finite numbers; "
            f"a smaller learning_rate than {recipe.learning_rate} or a longer warmup may help"
        )
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    seconds = time.perf_counter() - start
    tokens = recipe.batch * recipe.length * recipe.accumulation
    return {
        "step": step + 1,
        "loss": total,
        "learning_rate": rate,
        "gradient_norm": norm,
        "tokens_per_second": round(tokens / seconds, 1),
    }


def _loss(model: ParallelFlowForCausalLM, tokens: Tensor, recipe: Recipe) -> Tensor:
    """Nats a token; logits and their loss in float32."""
    tokens = tokens.to(model.device)
    with torch.autocast(model.device.type, torch.bfloat16, enabled=recipe.precision == "bfloat16"):
        logits = model(tokens[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())


@torch.no_grad()
def evaluate(model: ParallelFlowForCausalLM, recipe: Recipe, text: Text) -> float:
    """Nats a token on the same held-out windows each time."""
    model.eval()
    losses = [
        _loss(model, text.batch(recipe, EVALUATION + index, held_out=True), recipe).item()
        for index in range(recipe.evaluation_batches)
    ]
    model.train()
    return sum(losses) / len(losses)


def _optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW that lets matrices decay, and vectors (norms, biases, decays a head) not."""
    matrices = [x for x in model.parameters() if x.ndim >= 2]
    vectors = [x for x in model.parameters() if x.ndim < 2]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95))


def _expect_same(found: checkpoint.Checkpoint, recipe: Recipe, text: Text) -> None:
    """ValueError where the checkpoint is another training's."""
    ours = json.loads(json.dumps(recipe.table()))
    for key in ours:
        if found.recipe.get(key) != ours[key]:
            raise ValueError(
                f"{key}: got {ours[key]!r}, expected {found.recipe.get(key)!r} as in {found.folder}, to go on from it"
            )
    if found.tokens != text.tokens.name:
        raise ValueError(f"tokenizer: got other tokens than {found.folder} was trained on, expected the same")


def _cut_log(log: Path, done: int) -> None:
    """Without the lines after the checkpoint, which come again, and without one that a kill has left half."""
    kept = []
    for line in log.read_text(encoding="utf-8").splitlines() if log.exists() else []:
        try:
            if json.loads(line)["step"] > done:
                break
        except ValueError:
            break
        kept.append(line + "\n")
    writing = log.with_suffix(".writing")
    writing.write_text("".join(kept), encoding="utf-8")
    writing.replace(log)
