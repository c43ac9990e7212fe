"""Products of permutations of three things, which one Householder factor a token cannot follow and two can.

A token is one of the six permutations of S3, the answer at a position is the product of all of them up to there. A
rotation of the triangle is two reflections, and a reflection is `I - β k kᵀ` with β = 2: so a single layer needs two
factors a token and β up to 2 (Grazzi et al. 2025, arXiv 2411.12537; Siems et al. 2025, arXiv 2502.10297). All layers
start from random weights, have the same number of parameters and steps, see the same data, and are tested on sequences
four times as long as any they were trained on.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallelflow import functional

PERMUTATIONS = list(itertools.permutations(range(3)))
PRODUCT = torch.tensor(
    [[PERMUTATIONS.index(tuple(left[i] for i in right)) for right in PERMUTATIONS] for left in PERMUTATIONS]
)
"""PRODUCT[a, b] is the number of the permutation a ∘ b: first b, then a."""


@dataclass(frozen=True)
class Contender:
    """A layer: its number of Householder factors, the largest β, and sizes that give all the same parameters."""

    name: str
    householders: int
    largest_beta: float
    heads: int
    value_size: int


CONTENDERS = (
    Contender("DeltaProduct, 2 factors, β ≤ 2", householders=2, largest_beta=2.0, heads=2, value_size=16),
    Contender("DeltaNet, 1 factor, β ≤ 2", householders=1, largest_beta=2.0, heads=4, value_size=12),
    Contender("DeltaNet, 1 factor, β ≤ 1", householders=1, largest_beta=1.0, heads=4, value_size=12),
)


@dataclass(frozen=True)
class Recipe:
    """How every contender is trained. Lengths grow to `length` over the first share `growing` of the steps."""

    steps: int = 900
    length: int = 32
    batch: int = 32
    growing: float = 0.3
    learning_rate: float = 1e-2
    key_size: int = 4
    chunk_size: int = 16
    width: int = 32
    test_sequences: int = 512
    seed: int = 0


@dataclass
class TrackingFigures:
    """Accuracies are shares of positions whose product is right."""

    name: str
    parameters: int
    seconds: float
    loss: float
    accuracy_trained_length: float
    accuracy: float  # over sequences four times as long
    accuracy_last_position: float
    accuracy_by_position: list[float]


class PermutationTracker(nn.Module):
    """Embedding, one delta-product layer, and an MLP that reads it.  Tokens [B, T] to logits [B, T, 6]."""

    def __init__(self, contender: Contender, recipe: Recipe) -> None:
        super().__init__()
        heads, width = contender.heads, recipe.width
        self.heads, self.householders = heads, contender.householders
        self.largest_beta, self.chunk_size = contender.largest_beta, recipe.chunk_size
        self.embedding = nn.Embedding(len(PERMUTATIONS), width)
        self.query = nn.Linear(width, heads * recipe.key_size, bias=False)
        self.key = nn.Linear(width, self.householders * heads * recipe.key_size, bias=False)
        self.value = nn.Linear(width, self.householders * heads * contender.value_size, bias=False)
        self.beta = nn.Linear(width, self.householders * heads)
        self.initial_state = nn.Parameter(torch.randn(heads, recipe.key_size, contender.value_size))
        self.norm = nn.RMSNorm(contender.value_size)
        self.output = nn.Linear(heads * contender.value_size, width, bias=False)
        self.output_norm = nn.RMSNorm(width)
        self.readout = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, len(PERMUTATIONS)))

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        rows = (self.householders, self.heads)
        query = F.normalize(self.query(hidden).unflatten(-1, (self.heads, -1)), dim=-1)
        key = F.normalize(self.key(hidden).unflatten(-1, (*rows, -1)), dim=-1)
        value = self.value(hidden).unflatten(-1, (*rows, -1))
        beta = self.largest_beta * self.beta(hidden).unflatten(-1, rows).sigmoid()
        state = self.initial_state.expand(len(tokens), -1, -1, -1)
        mixed = functional.delta_product(
            query, key, value, beta, initial_state=state, chunk_size=self.chunk_size
        ).output
        return self.readout(self.output_norm(self.output(self.norm(mixed).flatten(-2))))


def sequences(count: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random permutations [count, length] and the running products of each sequence."""
    tokens = torch.randint(len(PERMUTATIONS), (count, length), generator=generator)
    products = [tokens[:, 0]]
    for t in range(1, length):
        products.append(PRODUCT[tokens[:, t], products[-1]])
    return tokens, torch.stack(products, dim=1)


def train(
    contender: Contender, recipe: Recipe = Recipe(), *, progress: Callable[[float, str], None] = lambda done, text: None
) -> TrackingFigures:
    """Trains one contender from random weights and tests it; `progress` hears the share that is done."""
    torch.manual_seed(recipe.seed)
    generator = torch.Generator().manual_seed(recipe.seed)
    model = PermutationTracker(contender, recipe)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    start = time.perf_counter()
    loss = torch.tensor(math.nan)
    for step in range(recipe.steps):
        done = step / recipe.steps
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * min(1.0, (step + 1) / 50) * (1 + math.cos(math.pi * done)) / 2
        length = max(2, round(recipe.length * min(1.0, done / recipe.growing)))
        tokens, products = sequences(recipe.batch, length, generator)
        loss = F.cross_entropy(model(tokens).flatten(0, 1), products.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 20 == 0:
            progress(done, f"loss {loss.item():.3f}")
    seconds = time.perf_counter() - start
    right = test(model, recipe)
    progress(1.0, f"{right.mean().item():.1%} right at 4 × the length")
    return TrackingFigures(
        name=contender.name,
        parameters=sum(x.numel() for x in model.parameters()),
        seconds=seconds,
        loss=loss.item(),
        accuracy_trained_length=right[: recipe.length].mean().item(),
        accuracy=right.mean().item(),
        accuracy_last_position=right[-1].item(),
        accuracy_by_position=right.tolist(),
    )


@torch.no_grad()
def test(model: PermutationTracker, recipe: Recipe) -> Tensor:
    """The share of new sequences, four times as long, that are right at each position [4 · length]."""
    generator = torch.Generator().manual_seed(2**31 + recipe.seed)
    tokens, products = sequences(recipe.test_sequences, 4 * recipe.length, generator)
    return (model(tokens).argmax(dim=-1) == products).float().mean(dim=0)
