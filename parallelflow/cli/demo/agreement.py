"""Every model of the functional API against its recurrence: the same numbers, and how much sooner."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from parallelflow import functional
from parallelflow.cli.demo import recurrences
from parallelflow.cli.demo.inputs import Sizes, draw_inputs

AGREEMENT = 1e-10
"""The largest relative error, output, state or gradients, at which float64 results count as the same."""

EXACT = Sizes(batch=2, length=200, heads=2, key_size=24, value_size=40)
TIMED = Sizes(batch=1, length=2048, heads=4, key_size=64, value_size=64)


@dataclass(frozen=True)
class ModelFigures:
    """One row of the table. Errors are relative to the recurrence in the Frobenius norm, times are milliseconds."""

    model: str
    output_error: float
    state_error: float
    gradient_error: float
    forward_ms: float
    recurrence_forward_ms: float
    training_ms: float
    recurrence_training_ms: float

    @property
    def agrees(self) -> bool:
        return max(self.output_error, self.state_error, self.gradient_error) <= AGREEMENT

    @property
    def forward_speedup(self) -> float:
        return self.recurrence_forward_ms / self.forward_ms

    @property
    def training_speedup(self) -> float:
        return self.recurrence_training_ms / self.training_ms

    def speedups(self) -> dict[str, float]:
        return {"forward_speedup": self.forward_speedup, "training_speedup": self.training_speedup}


def measure_models() -> Iterator[ModelFigures]:
    """The figures of one model after another, in the order of `recurrences.MODELS`."""
    for recurrence in recurrences.MODELS:
        yield measure_model(recurrence.__name__)


def measure_model(model: str) -> ModelFigures:
    """Agreement in float64 on a length that no chunk divides, times in float32."""
    chunked, recurrence = getattr(functional, model), getattr(recurrences, model)
    output_error, state_error, gradient_error = agreement_errors(model)
    timed = draw_inputs(model, TIMED, torch.float32)
    return ModelFigures(
        model=model,
        output_error=output_error,
        state_error=state_error,
        gradient_error=gradient_error,
        forward_ms=forward_time(chunked, timed, repeats=5),
        recurrence_forward_ms=forward_time(recurrence, timed, repeats=3),
        training_ms=training_time(chunked, timed, repeats=4),
        recurrence_training_ms=training_time(recurrence, timed, repeats=2),
    )


def agreement_errors(model: str) -> tuple[float, float, float]:
    """The relative errors of output, final state and (the worst of the) gradients, in float64."""
    inputs = draw_inputs(model, EXACT, torch.float64)
    ours = _results(_with_state(getattr(functional, model)), inputs)
    theirs = _results(getattr(recurrences, model), inputs)
    output, state, *gradients = (relative_error(a, b) for a, b in zip(ours, theirs, strict=True))
    return output, state, max(gradients)


def _with_state(chunked: Callable[..., tuple]) -> Callable[..., tuple]:
    return lambda **inputs: chunked(**inputs, return_final_state=True)


def _results(run: Callable[..., tuple], inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """Output, final state and the gradients of all inputs under a fixed random cotangent."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
    output, state = run(**leaves)
    generator = torch.Generator().manual_seed(3)
    weights = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in (output, state)]
    loss = (output * weights[0]).sum() + (state * weights[1]).sum()
    return [output.detach(), state.detach(), *torch.autograd.grad(loss, list(leaves.values()))]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """‖actual - expected‖ / ‖expected‖ in the Frobenius norm."""
    return ((actual - expected).norm() / expected.norm()).item()


def milliseconds(run: Callable[[], object], repeats: int) -> float:
    """The best of some runs: what else the machine does can only make a run slower."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(1000 * (time.perf_counter() - start))
    return min(times)


@torch.no_grad()
def forward_time(function: Callable[..., tuple], inputs: Mapping[str, Tensor], repeats: int) -> float:
    """Milliseconds of the forward pass alone."""
    return milliseconds(lambda: function(**inputs), repeats)


def training_time(function: Callable[..., tuple], inputs: Mapping[str, Tensor], repeats: int) -> float:
    """Milliseconds of forward and backward."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}

    def run() -> None:
        output = function(**leaves)[0]
        torch.autograd.grad(output, list(leaves.values()), grad_outputs=torch.ones_like(output))

    return milliseconds(run, repeats)


@dataclass(frozen=True)
class LengthFigures:
    """Milliseconds of forward and backward at one length; None where it was not run."""

    length: int
    chunked_ms: float
    recurrence_ms: float | None
    softmax_ms: float | None


LENGTHS = tuple(2**n for n in range(6, 15))
LONGEST_RECURRENCE = 4096
LONGEST_SOFTMAX = 8192


def measure_lengths() -> Iterator[LengthFigures]:
    """The gated delta rule, chunked and as its recurrence, and causal softmax attention of the same shape."""
    for length in LENGTHS:
        inputs = draw_inputs("gated_delta_rule", TIMED._replace(length=length), torch.float32)
        repeats = 5 if length <= 1024 else 3
        yield LengthFigures(
            length=length,
            chunked_ms=training_time(functional.gated_delta_rule, inputs, repeats),
            recurrence_ms=(
                training_time(recurrences.gated_delta_rule, inputs, repeats=2) if length <= LONGEST_RECURRENCE else None
            ),
            softmax_ms=(
                training_time(_softmax_attention, {n: inputs[n] for n in ("query", "key", "value")}, repeats)
                if length <= LONGEST_SOFTMAX
                else None
            ),
        )


def _softmax_attention(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor]:
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return (F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2),)
