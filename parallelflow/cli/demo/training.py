"""Training the byte-level language model, and what it says afterwards."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from parallelflow.cli.demo.corpus import Corpus
from parallelflow.cli.demo.language_model import ByteLanguageModel

BITS = 1 / math.log(2)


@dataclass(frozen=True)
class Recipe:
    """How the language model is trained. The schedule runs to `steps` or, on a slow machine, to `seconds`."""

    width: int = 128
    depth: int = 2
    heads: int = 4
    length: int = 128
    batch: int = 8
    steps: int = 1100
    seconds: float = 70.0
    learning_rate: float = 8e-3
    evaluate_every: int = 50
    prompt: int = 64
    generated: int = 600
    temperature: float = 0.6
    seed: int = 0


@dataclass
class LanguageFigures:
    """Losses are in bits a byte."""

    source: str
    training_bytes: int
    parameters: int
    steps: int = 0
    seconds: float = 0.0
    training_loss: list[float] = field(default_factory=list)  # one a step
    evaluated_at: list[int] = field(default_factory=list)
    held_out_loss: list[float] = field(default_factory=list)
    single_byte_entropy: float = 0.0  # what counting single bytes achieves
    byte_pair_entropy: float = 0.0  # what counting pairs of bytes achieves
    step_agreement: float = 0.0  # largest difference of logits, chunked against byte by byte
    memory_bytes: int = 0  # what generation carries from byte to byte
    bytes_per_second: float = 0.0  # of generation
    prompt: str = ""
    sample: str = ""


def train(
    corpus: Corpus, recipe: Recipe = Recipe(), *, progress: Callable[[float, str], None] = lambda done, text: None
) -> tuple[ByteLanguageModel, LanguageFigures]:
    """Trains from random weights; `progress` hears the share that is done and the loss."""
    torch.manual_seed(recipe.seed)
    generator = torch.Generator().manual_seed(recipe.seed)
    model = ByteLanguageModel(recipe.width, recipe.depth, recipe.heads)
    figures = LanguageFigures(
        source=corpus.source,
        training_bytes=len(corpus.training),
        parameters=sum(x.numel() for x in model.parameters()),
        single_byte_entropy=entropy(corpus.training, 1),
        byte_pair_entropy=entropy(corpus.training, 2) - entropy(corpus.training, 1),
    )
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    start = time.perf_counter()
    done = 0.0
    while done < 1:
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * min(1.0, (figures.steps + 1) / 20) * max(0.02, 1 - done)
        tokens, targets = corpus.batch(recipe.batch, recipe.length, generator)
        loss = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

        figures.steps += 1
        figures.training_loss.append(BITS * loss.item())
        done = min(1.0, max(figures.steps / recipe.steps, (time.perf_counter() - start) / recipe.seconds))
        if figures.steps % recipe.evaluate_every == 0 or figures.steps == 1 or done == 1:
            figures.evaluated_at.append(figures.steps)
            figures.held_out_loss.append(BITS * evaluate(model, corpus, recipe))
        progress(done, f"{figures.held_out_loss[-1]:.2f} bits a byte")
    figures.seconds = time.perf_counter() - start
    return model, figures


@torch.no_grad()
def evaluate(model: ByteLanguageModel, corpus: Corpus, recipe: Recipe) -> float:
    """Nats a byte on the same 32 held-out windows each time."""
    tokens, targets = corpus.held_out_batch(32, recipe.length)
    return F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten()).item()


def entropy(data: Tensor, count: int) -> float:
    """Bits of the distribution of `count` neighbouring bytes, counted over the data."""
    raw = bytes(data.tolist()) if len(data) < 2**20 else bytes(data[: 2**20].tolist())
    counts = Counter(zip(*(raw[i:] for i in range(count)), strict=False))
    total = sum(counts.values())
    return -sum(n / total * math.log2(n / total) for n in counts.values())


@torch.no_grad()
def speak(model: ByteLanguageModel, corpus: Corpus, recipe: Recipe, figures: LanguageFigures) -> None:
    """Continues held-out text byte by byte, and checks that this is what the chunked form would have said."""
    prompt = bytes(corpus.held_out[: recipe.prompt].tolist())
    start = time.perf_counter()
    sample = model.generate(prompt, recipe.generated, temperature=recipe.temperature, seed=recipe.seed)
    figures.bytes_per_second = recipe.generated / (time.perf_counter() - start)
    figures.prompt, figures.sample = (x.decode("utf-8", errors="replace") for x in (prompt, sample))

    whole = torch.tensor([list(prompt + sample)])
    _, memories = model.read(whole[:, : recipe.prompt])
    figures.memory_bytes = sum(x.nbytes for memory in memories for x in memory if x is not None)
    stepped = []
    for position in range(recipe.prompt, whole.shape[1]):
        logits, memories = model.read(whole[:, position : position + 1], memories)
        stepped.append(logits)
    difference = torch.cat(stepped, dim=1) - model(whole)[:, recipe.prompt :]
    figures.step_agreement = difference.abs().max().item()
