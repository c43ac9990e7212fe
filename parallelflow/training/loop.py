"""The training itself. What a step does depends on weights, optimiser and the step's number alone, so going on from a
checkpoint gives what never stopping gives: bit for bit where the device computes the same bits twice."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallelflow.checks import device_of, expect_kind
from parallelflow.distributed import Context
from parallelflow.models import ParallelFlowForCausalLM
from parallelflow.nn import set_context_group
from parallelflow.training import checkpoint
from parallelflow.training.recipe import Recipe
from parallelflow.training.text import EVALUATION, Text

Report = Callable[[dict[str, Any]], None]


def train(
    recipe: Recipe,
    text: Text,
    folder: Path | str,
    *,
    device: torch.device | str = "cpu",
    resume: bool = False,
    context_group: Any = None,
    report: Report = lambda entry: None,
    warn: Callable[[str], None] = lambda message: None,
    begin: Callable[[int], None] = lambda step: None,
) -> ParallelFlowForCausalLM:
    """Trains, and leaves in ``folder`` the ``checkpoints`` and ``log.jsonl``, a line a step.

    A line has ``step`` (steps done), ``loss`` (nats a token), ``learning_rate``, ``gradient_norm``,
    ``tokens_per_second`` and, where it was evaluated, ``held_out_loss``.

    Args:
        recipe: of the model and its training.
        text: what ``open_text`` returns for the same recipe.
        device: where to train.
        resume: go on from the newest whole checkpoint in ``folder``; from the start where none has been written yet.
        context_group: a process group whose ranks share every sequence (see docs/context_parallel.md). All ranks call
            this, with a folder that all see; the first one writes, and hears ``report``. What is computed does not
            depend on the number of ranks but for rounding, so another number of them may go on.
        report: hears every line of the log; ``warn`` why a checkpoint is not used; ``begin`` the steps done before.

    Raises:
        TypeError: for other than a recipe and a text.
        ValueError: for a device that is not there; where the folder has checkpoints and ``resume`` is not asked for, or
            those of another training.
        CheckpointError: where there are checkpoints and none is whole.
        FloatingPointError: where the loss or its gradient is not finite.
    """
    expect_kind("recipe", recipe, Recipe, "a Recipe")
    expect_kind("text", text, Text, "what open_text returns")
    device, folder = device_of(device), Path(folder)
    context = None if context_group is None else Context.of(context_group)
    writes = context is None or context.rank == 0
    checkpoints = folder / "checkpoints"
    found = None
    if any(checkpoints.glob("step-*")):
        if not resume:
            raise ValueError(f"output: {folder} has checkpoints already; go on with --resume, or choose another folder")
        found = checkpoint.latest(checkpoints, warn)
        _expect_same(found, recipe, text)
    torch.manual_seed(recipe.seed)
    model = ParallelFlowForCausalLM(recipe.configuration(text.tokens.size))
    torch.nn.Module.to(model, device)
    optimizer = _optimizer(model, recipe)
    done = 0
    if found is not None:
        found.restore(model, optimizer)
        done = found.step
    begin(done)
    model.train()
    if context is not None:
        _expect_same_step(context, done)  # before any of them writes
        set_context_group(model, context_group)
    if writes:
        checkpoints.mkdir(parents=True, exist_ok=True)
        _cut_log(folder / "log.jsonl", done)
    with open(folder / "log.jsonl" if writes else os.devnull, "a", encoding="utf-8") as lines:
        for step in range(done, recipe.steps):
            entry = _step(model, optimizer, recipe, text, step, context)
            last = entry["step"] == recipe.steps
            if last or entry["step"] % recipe.evaluate_every == 0:
                entry["held_out_loss"] = evaluate(model, recipe, text, context)
            if not writes:
                continue
            lines.write(json.dumps(entry) + "\n")
            lines.flush()
            if last or entry["step"] % recipe.checkpoint_every == 0:
                checkpoint.save(
                    checkpoints, entry["step"], model, optimizer, recipe.table(), text.tokens.name, recipe.keep
                )
            report(entry)
    return model


def _step(
    model: ParallelFlowForCausalLM,
    optimizer: torch.optim.Optimizer,
    recipe: Recipe,
    text: Text,
    step: int,
    context: Context | None,
) -> dict[str, Any]:
    start = time.perf_counter()
    rate = recipe.rate(step)
    for group in optimizer.param_groups:
        group["lr"] = rate
    total = 0.0
    for part in range(recipe.accumulation):
        batch = text.batch(recipe, step * recipe.accumulation + part)
        loss = _loss(model, batch, recipe, context) / recipe.accumulation
        # A device's backward pass in this thread: another one would have to be woken, and to take Python's lock.
        with torch.autograd.set_multithreading_enabled(False):
            loss.backward()
        total += loss.item()
    if context is not None:
        _average_gradients(model, context)
    norm = nn.utils.clip_grad_norm_(model.parameters(), recipe.clip).item()
    if not (math.isfinite(total) and math.isfinite(norm)):
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


def _loss(model: ParallelFlowForCausalLM, tokens: Tensor, recipe: Recipe, context: Context | None) -> Tensor:
    """Nats a token; logits and their loss in float32. Over ranks, that of all on each, from its share of the tokens."""
    tokens = tokens.to(model.device)
    with torch.autocast(model.device.type, torch.bfloat16, enabled=recipe.precision == "bfloat16"):
        if context is not None:
            mine = tokens.tensor_split(context.size, 1)[context.rank]
            return model(mine, labels=mine, use_cache=False).loss
        logits = model(tokens[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())


@torch.no_grad()
def evaluate(model: ParallelFlowForCausalLM, recipe: Recipe, text: Text, context: Context | None = None) -> float:
    """Nats a token on the same held-out windows each time."""
    model.eval()
    losses = [
        _loss(model, text.batch(recipe, EVALUATION + index, held_out=True), recipe, context).item()
        for index in range(recipe.evaluation_batches)
    ]
    model.train()
    return sum(losses) / len(losses)


@torch.no_grad()
def _average_gradients(model: nn.Module, context: Context) -> None:
    """The mean over ranks, which is the whole loss's gradient, in one exchange."""
    gradients = [x.grad for x in model.parameters() if x.grad is not None]
    line = context.sum(torch.cat([gradient.flatten() for gradient in gradients]), "the gradients") / context.size
    for gradient, mean in zip(gradients, line.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def _expect_same_step(context: Context, done: int) -> None:
    """ValueError unless all ranks have found the same checkpoint."""
    steps = context.gather_objects(done, "the checkpoints that were found")
    if len(set(steps)) > 1:
        raise ValueError(f"output: the ranks have found checkpoints of the steps {steps}, expected a folder they share")


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
