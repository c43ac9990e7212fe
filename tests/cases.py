"""The one table of models, and those of solvers, aggregates and chunk sizes, that every test file crosses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from parallelflow.testing import SIZES, Sizes, make_initial_state, make_inputs
from tests import oracles

SOLVERS = ("tensor_inverse", "substitution", "sequential", "sigdelta")
AGGREGATES = ("sequential", "associative", "segmented")
CHUNK_SIZES = (1, 2, 3, 4, 16)
LENGTHS = (1, 11)
"""T = 1, and a T that is on no chunk boundary but that of chunk size 1, with several chunks and an unfinished one."""


@dataclass(frozen=True, eq=False)
class Model:
    """A row of the table: what to call, and the recurrence it must agree with."""

    name: str
    function: str
    recurrence: Callable[..., oracles.Reference]
    rows: int = 1
    decay: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    normalized: tuple[str, ...] = ("query", "key")
    """What normalize_query_key scales; nothing where there is no key: the option is then an error."""

    def __call__(self, inputs: dict[str, Tensor], **options: Any) -> Any:
        """The chunked form of the package."""
        import parallelflow

        return getattr(parallelflow.functional, self.function)(**inputs, **self.options, **options)

    def step(self, inputs: dict[str, Tensor], **options: Any) -> Any:
        """The single-step form of the package."""
        import parallelflow.step

        return getattr(parallelflow.step, self.function)(**inputs, **self.options, **options)

    def oracle(self, inputs: dict[str, Tensor], **options: Any) -> oracles.Reference:
        """The recurrence, in float64 unless told otherwise."""
        return oracles.evaluate(self.recurrence, inputs, **self.options, **options)

    def sizes(self, sizes: Sizes) -> Sizes:
        return sizes._replace(rows=self.rows)

    def inputs(self, sizes: Sizes = SIZES, **options: Any) -> dict[str, Tensor]:
        return make_inputs(self.function, self.sizes(sizes), decay=self.decay, **options)

    def initial_state(self, sizes: Sizes, **options: Any) -> Tensor:
        state = make_initial_state(sizes._replace(value_size=self.state_value_size(sizes.value_size)), **options)
        return state.abs() if self.normalizes else state

    @property
    def normalizes(self) -> bool:
        return bool(self.options.get("normalize"))

    def state_value_size(self, value_size: int) -> int:
        return value_size + 1 if self.normalizes else value_size


def low_rank(rows: int, order: str, decay: str, reads: str) -> Model:
    name = f"low_rank_flow-{rows}-{order}-{decay}-{reads}"
    options = {"order": order, "reads": reads}
    return Model(name, "low_rank_flow", oracles.low_rank_flow, rows, decay, options, normalized=())


PUBLISHED: tuple[Model, ...] = (
    Model("linear_attention", "linear_attention", oracles.linear_attention),
    Model("linear_attention-normalized", "linear_attention", oracles.linear_attention, options={"normalize": True}),
    Model("retention", "retention", oracles.retention),
    Model("lightning_attention", "lightning_attention", oracles.lightning_attention),
    Model("ssd", "ssd", oracles.ssd),
    Model("gated_linear_attention", "gated_linear_attention", oracles.gated_linear_attention),
    Model("delta_rule", "delta_rule", oracles.delta_rule),
    Model("gated_delta_rule", "gated_delta_rule", oracles.gated_delta_rule),
    Model("gated_delta_rule_2", "gated_delta_rule_2", oracles.gated_delta_rule_2),
    Model("kimi_delta_attention", "kimi_delta_attention", oracles.kimi_delta_attention),
    Model("comba", "comba", oracles.comba, normalized=("query", "key", "removal_key")),
    Model("delta_product-2-none", "delta_product", oracles.delta_product, rows=2, decay="none"),
    Model("delta_product-3-scalar", "delta_product", oracles.delta_product, rows=3, decay="scalar"),
    Model("rwkv7", "rwkv7", oracles.rwkv7),
    Model("longhorn", "longhorn", oracles.longhorn),
    Model("efla", "efla", oracles.efla),
)

GENERAL: tuple[Model, ...] = (
    *(low_rank(1, "simultaneous", decay, "decayed") for decay in ("none", "scalar", "vector")),
    *(low_rank(1, "sequential", decay, "raw") for decay in ("none", "scalar", "vector")),
    *(
        low_rank(2, "simultaneous", decay, reads)
        for decay in ("none", "scalar", "vector")
        for reads in ("decayed", "raw")
    ),
    *(low_rank(2, "sequential", decay, "decayed") for decay in ("none", "scalar", "vector")),
    low_rank(3, "sequential", "vector", "decayed"),
    low_rank(4, "simultaneous", "none", "decayed"),
    low_rank(4, "simultaneous", "scalar", "raw"),
    low_rank(4, "simultaneous", "vector", "decayed"),
    low_rank(4, "sequential", "scalar", "decayed"),
    low_rank(4, "sequential", "vector", "decayed"),
)

MODELS = PUBLISHED + GENERAL

STRUCTURES: tuple[Model, ...] = tuple(
    model
    for model in MODELS
    if model.name
    in {
        "linear_attention-normalized",
        "retention",
        "gated_linear_attention",
        "delta_rule",
        "gated_delta_rule",
        "gated_delta_rule_2",
        "kimi_delta_attention",
        "comba",
        "delta_product-3-scalar",
        "rwkv7",
        "low_rank_flow-2-simultaneous-vector-raw",
        "low_rank_flow-2-sequential-vector-decayed",
    }
)
"""One model of each structure (decay, reads, order, ties, kinds of rows), where all of them would cost minutes."""


def by_name(model: Model) -> str:
    return model.name


BACKENDS = ("auto", "torch")
"""On a CPU ``auto`` takes the compiled kernels for every model, where there is a compiler."""


def with_backends(models: Sequence[Model]) -> list[Any]:
    """Each model on each backend."""
    return [pytest.param(model, each, id=f"{model.name}-{each}") for model in models for each in BACKENDS]


def require_grad(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}


def slice_time(inputs: dict[str, Tensor], start: int | None, stop: int | None) -> dict[str, Tensor]:
    """The tokens [start, stop) of every input that has a time axis."""
    return {name: x if x.dim() == 1 else x[:, start:stop] for name, x in inputs.items()}


def token(inputs: dict[str, Tensor], t: int) -> dict[str, Tensor]:
    """The inputs of one token, without the time axis."""
    return {name: x if x.dim() == 1 else x[:, t] for name, x in inputs.items()}


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-10, what: str = "") -> None:
    """Largest difference at most `tolerance` times max(1, largest value), same shape, nothing lost to NaN."""
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if actual.numel() == 0:
        return
    expected = expected.to(actual.dtype) if actual.dtype == torch.float64 else expected
    difference = (actual.double() - expected.double()).abs().max().item()
    size = max(1.0, expected.double().abs().max().item())
    assert difference <= tolerance * size, f"{what}: off by {difference:.3e} of {size:.3e}, allowed {tolerance:.0e}"


def gradients(
    outputs: Sequence[Tensor], inputs: dict[str, Tensor], *, seed: int = 3, create_graph: bool = False
) -> dict[str, Tensor]:
    """Gradients of a fixed random linear function of the outputs."""
    generator = torch.Generator().manual_seed(seed)
    loss = sum((torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) * x).sum() for x in outputs)
    grads = torch.autograd.grad(loss, list(inputs.values()), create_graph=create_graph, allow_unused=True)
    return dict(zip(inputs, grads, strict=True))
