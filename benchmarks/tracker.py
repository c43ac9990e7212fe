"""A small model that follows a task's running result, and its training: the same step, eager or as a CUDA graph.

A step reads its sequences, its learning rate and its place from tensors on the device and needs nothing of the host.
On a GPU it is recorded once, for all tasks, and replayed; trainings on streams of their own share the card, and what
one of them finds does not depend on the others.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallelflow.nn import Block, layer_options, make_layer
from parallelflow.tasks import IGNORED, TASKS, make_task

SYMBOLS = max(max(task.vocabulary, task.classes) for task in map(make_task, TASKS))
"""Tokens and classes of the largest task: one shape for all, so that a step is recorded once."""
ASKED_AT_THE_END = ("associative_recall",)
"""The others are asked all along, and taught from short to long."""


class Sizes(NamedTuple):
    """Of every model: channels, blocks, heads; the MLPs' channels make the numbers of parameters equal."""

    width: int = 128
    depth: int = 2
    heads: int = 4


class Recipe(NamedTuple):
    """How every model is trained: AdamW, its rate rising for ``warm_up`` steps, then a cosine's fall to a hundredth.

    ``growing`` is the share of the steps over which the asked lengths grow from 3 to ``trained``; ``drawn``: sequences
    of a task and seed, after which a training begins again with the first; ``tested``: the longer length.
    """

    batch: int = 64
    learning_rate: float = 2e-3
    warm_up: int = 100
    growing: float = 0.33
    trained: int = 40
    tested: int = 256
    drawn: int = 2**17


class Tracker(nn.Module):
    """Tokens ``[B, T]`` to logits ``[B, T, SYMBOLS]``, those of no class of the task -inf.

    A token of its own comes first: the state before it is zero, and what a layer multiplies must be written first.
    """

    symbols: Tensor
    forbidden: Tensor

    def __init__(self, layer: str, options: dict[str, Any], sizes: Sizes, intermediate_size: int) -> None:
        super().__init__()
        width, known = sizes.width, layer_options(layer)
        own: dict[str, Any] = {"num_heads": sizes.heads}
        if "num_heads" not in known:  # RWKV-7, and Mamba-2, whose inner width is expand · width
            own = {"head_dim": width // sizes.heads * (2 if layer == "mamba2" else 1)}
        if layer == "mamba2":
            own["state_size"] = width // sizes.heads
        if "engine" in known:  # plain tensor algebra looks at no value on the GPU; short chunks, for few rows are here
            own["engine"] = {"backend": "torch", "chunk_size": 16}
        where = [{"layer_index": n, "num_layers": sizes.depth} if layer == "rwkv7" else {} for n in range(sizes.depth)]
        self.embedding = nn.Parameter(torch.randn(SYMBOLS + 1, width))
        self.blocks = nn.ModuleList(
            Block(make_layer(layer, width, **own, **options, **each), intermediate_size=intermediate_size)
            for each in where
        )
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, SYMBOLS)
        self.register_buffer("symbols", torch.arange(SYMBOLS))
        self.register_buffer("forbidden", torch.zeros(SYMBOLS))

    def ask(self, classes: int) -> None:
        """Answers are the first so many symbols."""
        self.forbidden.copy_(torch.where(self.symbols < classes, 0.0, -math.inf))

    def forward(self, tokens: Tensor) -> Tensor:
        # A product with ones and zeros: unlike a look-up's, its gradient is summed in one order.
        hidden = (tokens.unsqueeze(-1) == self.symbols).to(self.embedding.dtype) @ self.embedding[:-1]
        hidden = torch.cat([self.embedding[-1].expand(len(tokens), 1, -1), hidden], 1)
        shared: dict[str, Tensor] = {}
        for block in self.blocks:
            mixed = block(hidden, **shared)
            hidden = mixed.output
            if hasattr(mixed, "first_value"):  # RWKV-7's later layers mix the first one's values in
                shared = {"first_value": mixed.first_value}
        return self.head(self.norm(hidden[:, 1:])) + self.forbidden


def intermediate_size(layer: str, options: dict[str, Any], sizes: Sizes, parameters: int) -> int:
    """The MLPs' channels that bring the model nearest to so many parameters."""
    with torch.device("meta"):
        least = count_parameters(Tracker(layer, options, sizes, 1))
    each = 3 * sizes.width * sizes.depth
    return max(1, round((parameters - least) / each) + 1)


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@functools.lru_cache(maxsize=16)
def sequences(task_name: str, seed: int, count: int, length: int) -> tuple[Tensor, Tensor]:
    """Tokens and labels ``[count, length]`` in 8 bits, the same for every layer."""
    drawn = make_task(task_name).draw(count, length, torch.Generator().manual_seed(seed))
    return drawn.tokens.to(torch.int8), drawn.labels.to(torch.int8)


class Training:
    """One layer, trained on one task after another.

    ``begin`` makes fresh weights, ``advance`` enqueues steps, ``finished`` tells whether all are enqueued, ``ready``
    whether what was enqueued is done, ``result`` tests. ``record`` makes a CUDA graph of the step.
    """

    def __init__(
        self, layer: str, options: dict[str, Any], sizes: Sizes, recipe: Recipe, parameters: int, device: str
    ) -> None:
        self.layer, self.options, self.sizes, self.recipe, self.device = layer, options, sizes, recipe, device
        self.channels = intermediate_size(layer, options, sizes, parameters)
        on_gpu = device == "cuda"
        self.stream = torch.cuda.Stream() if on_gpu else None
        self.event = torch.cuda.Event() if on_gpu else None
        self.graph: torch.cuda.CUDAGraph | None = None
        self.model = self._fresh(0).to(device)
        self.rate, self.loss, self.steps_there = (torch.zeros((), device=device) for _ in range(3))
        self.place = torch.zeros((), dtype=torch.long, device=device)
        shape = (recipe.drawn, recipe.trained)
        self.tokens, self.labels = (torch.zeros(shape, dtype=torch.int8, device=device) for _ in range(2))
        self.growing = torch.ones((), device=device)
        matrices = [each for each in self.model.parameters() if each.ndim > 1]
        others = [each for each in self.model.parameters() if each.ndim <= 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}],
            betas=(0.9, 0.95),
            fused=device in ("cpu", "cuda"),
            capturable=on_gpu,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate
        self.done = self.steps = 0
        if on_gpu:
            torch.cuda.synchronize()  # all of this was made on another stream than the training's

    def _fresh(self, seed: int) -> Tracker:
        torch.manual_seed(seed)
        return Tracker(self.layer, self.options, self.sizes, self.channels)

    @torch.no_grad()
    def begin(self, task_name: str, seed: int, steps: int) -> None:
        with torch.cuda.stream(self.stream):
            for own, fresh in zip(self.model.parameters(), self._fresh(seed).parameters(), strict=True):
                own.copy_(fresh)
            for state in self.optimizer.state.values():
                for tensor in state.values():
                    tensor.zero_()
            self.task_name, self.seed, self.done, self.steps = task_name, seed, 0, steps
            self.model.ask(make_task(task_name).classes)
            tokens, labels = sequences(task_name, seed, self.recipe.drawn, self.recipe.trained)
            self.tokens.copy_(tokens)
            self.labels.copy_(labels)
            self.growing.fill_(0.0 if task_name in ASKED_AT_THE_END else self.recipe.growing)
            self.steps_there.fill_(steps)
            self.place.zero_()

    def _step(self) -> None:
        recipe, done = self.recipe, self.place / self.steps_there
        warm = ((self.place + 1) / recipe.warm_up).clamp(max=1)
        self.rate.copy_(recipe.learning_rate * warm * (0.01 + 0.99 * (1 + (torch.pi * done).cos()) / 2))
        rows = (self.place * recipe.batch + torch.arange(recipe.batch, device=self.device)) % recipe.drawn
        tokens, labels = self.tokens[rows].long(), self.labels[rows].long()
        longest = (3 + (recipe.trained - 3) * (done / self.growing).nan_to_num(nan=1.0).clamp(max=1)).ceil()
        labels = labels.masked_fill(torch.arange(recipe.trained, device=self.device) >= longest, IGNORED)
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.model(tokens).flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.loss.copy_(loss.detach())
        self.place += 1

    def record(self, task_name: str) -> str | None:
        """Makes a CUDA graph of the step, where it gives what eager steps give; else says why there is none.

        The loss after three steps may differ by rounding, for libraries may choose other kernels; it says so, too.
        """
        compared = 3
        self.begin(task_name, 0, 2 * compared)
        self.advance(compared)
        self.wait()
        eager = self.loss.item()
        try:
            graph = torch.cuda.CUDAGraph()
            self.optimizer.zero_grad()
            torch.cuda.synchronize()
            with torch.cuda.graph(graph, stream=self.stream):
                self._step()
        except Exception as error:
            torch.cuda.synchronize()
            return f"{type(error).__name__}: {error}"[:300]
        self.graph = graph
        self.begin(task_name, 0, 2 * compared)
        self.advance(compared)
        self.wait()
        if (replayed := self.loss.item()) == eager:
            return None
        if not abs(replayed - eager) <= 1e-4 * abs(eager):
            self.graph = None
        return f"loss after {compared} steps: {eager} eager, {replayed} replayed"

    def advance(self, steps: int) -> None:
        """Enqueues so many steps, or those that are left."""
        with torch.cuda.stream(self.stream):
            for _ in range(min(steps, self.steps - self.done)):
                if self.graph is not None:
                    self.graph.replay()
                else:
                    self._step()
                self.done += 1
            if self.event is not None:
                self.event.record()

    def ready(self) -> bool:
        return self.event is None or self.event.query()

    def wait(self) -> None:
        if self.event is not None:
            self.event.synchronize()

    @property
    def finished(self) -> bool:
        return self.done == self.steps

    def result(self) -> dict[str, Any]:
        """The last loss (None where it is no number), and the accuracies at both lengths."""
        recall = self.task_name in ASKED_AT_THE_END
        with torch.cuda.stream(self.stream):
            loss = self.loss.item()
            return {
                "task": self.task_name,
                "seed": self.seed,
                "steps": self.done,
                "recorded": self.graph is not None,
                "parameters": count_parameters(self.model),
                "loss": loss if math.isfinite(loss) else None,
                "trained_length": self.accuracy(self.recipe.trained),
                "longer": self.accuracy(96) if recall else self.accuracy(self.recipe.tested, after=self.recipe.trained),
            }

    @torch.no_grad()
    def accuracy(self, length: int, after: int = 0, count: int = 256) -> float:
        """The share of right answers after the first ``after`` tokens, on sequences that no training sees."""
        drawn = make_task(self.task_name).draw(count, length, torch.Generator().manual_seed(2**40))
        tokens, labels = drawn.tokens.to(self.device), drawn.labels[:, after:].to(self.device)
        answers = torch.cat([self.model(part).argmax(-1) for part in tokens.split(128)])[:, after:]
        return (answers == labels)[labels != IGNORED].double().mean().item()
