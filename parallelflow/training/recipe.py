"""What is trained and how, as a YAML file says it."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from parallelflow.checks import expect_choice, nearest
from parallelflow.models import ParallelFlowConfig, ParallelFlowForCausalLM

PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True)
class Recipe:
    """A model and its training.

    Args:
        model: keywords of ``ParallelFlowConfig``; ``vocab_size`` is the tokens' and not given.
        length: tokens of a training sequence.
        batch: sequences of one forward pass.
        accumulation: forward passes whose gradients make one step.
        steps: of the optimiser, AdamW.
        warmup: steps over which the learning rate grows linearly to ``learning_rate``; from there half a cosine
            takes it to ``final_learning_rate``.
        weight_decay: of matrices; vectors have none.
        clip: the largest norm of a step's gradient.
        precision: ``float32``, or ``bfloat16``: products in bfloat16, weights and optimiser in float32.
        held_out: the share at the text's end that is kept for evaluation.
        evaluate_every, checkpoint_every: steps between them; both happen after the last step.
        evaluation_batches: how many batches, the same each time.
        keep: the newest checkpoints that are kept, at least 2: one to fall back to.
        seed: of the initial weights and of the order of data.

    Raises:
        TypeError, ValueError: naming the key.
    """

    model: dict[str, Any] = field(default_factory=dict)
    length: int = 256
    batch: int = 8
    accumulation: int = 1
    steps: int = 1000
    warmup: int = 50
    learning_rate: float = 3e-3
    final_learning_rate: float = 3e-4
    weight_decay: float = 0.1
    clip: float = 1.0
    precision: str = "float32"
    held_out: float = 0.1
    evaluate_every: int = 100
    evaluation_batches: int = 8
    checkpoint_every: int = 100
    keep: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"warmup": 0, "seed": 0, "keep": 2}
        for each in dataclasses.fields(self):
            value = getattr(self, each.name)
            if each.type == "int":
                if isinstance(value, bool) or not isinstance(value, int):
                    raise TypeError(f"{each.name}: got {value!r}, expected a whole number")
                if value < least.get(each.name, 1):
                    raise ValueError(f"{each.name}: got {value}, expected at least {least.get(each.name, 1)}")
            elif each.type == "float":
                if isinstance(value, bool) or not isinstance(value, int | float):
                    raise TypeError(
                        f"{each.name}: got {value!r}, expected a number (YAML reads 1e-3 as text, 1.0e-3 not)"
                    )
                if not (math.isfinite(value) and value >= 0):
                    raise ValueError(f"{each.name}: got {value}, expected a finite number ≥ 0")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out: got {self.held_out}, expected a share between 0 and 1")
        if self.clip == 0:
            raise ValueError("clip: got 0, expected a number > 0")
        expect_choice("precision", self.precision, PRECISIONS)
        if not isinstance(self.model, dict):
            raise TypeError(f"model: got {self.model!r}, expected keys of ParallelFlowConfig")
        if "vocab_size" in self.model:
            raise ValueError("model.vocab_size: got one, expected none: it is the number of tokens there are")
        configuration = self.configuration(2**31 - 1)  # a vocabulary that has any token
        try:
            with torch.device("meta"):  # layers check their options where they are made
                ParallelFlowForCausalLM(configuration)
        except (TypeError, ValueError) as error:
            raise type(error)(f"model.{error}") from None

    @classmethod
    def of(cls, given: dict[str, Any]) -> Recipe:
        """From a table of keys; TypeError for one that is not known."""
        known = [each.name for each in dataclasses.fields(cls)]
        for key in given:
            if key not in known:
                raise TypeError(f"{key}: unknown key{nearest(key, known)}; known are {', '.join(known)}")
        return cls(**given)

    @classmethod
    def load(cls, file: Path) -> Recipe:
        """From a YAML file; ValueError where it is none."""
        try:
            given = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ValueError(f"config: {file} cannot be read as YAML: {error}") from None
        if not isinstance(given, dict):
            what = "is empty" if given is None else f"holds {type(given).__name__}"
            raise ValueError(f"config: {file} {what}, expected keys and values")
        return cls.of({str(key): value for key, value in given.items()})

    def table(self) -> dict[str, Any]:
        """All keys, as ``of`` takes them."""
        return dataclasses.asdict(self)

    def configuration(self, vocabulary: int) -> ParallelFlowConfig:
        """Of the model, for so many tokens."""
        try:
            return ParallelFlowConfig(vocab_size=vocabulary, **self.model)
        except (TypeError, ValueError) as error:
            raise type(error)(f"model.{error}") from None

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return (
            self.final_learning_rate
            + (self.learning_rate - self.final_learning_rate) * (1 + math.cos(math.pi * done)) / 2
        )
