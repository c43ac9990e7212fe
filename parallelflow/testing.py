"""Inputs and error budgets for tests and benchmarks; nothing else in the package imports this module.

`make_inputs` draws the tensors of a model by the names of its arguments, `hostile_inputs` then makes them nasty in one
way, and `error_budget` says how far a result may be from a float64 recurrence: twice the error that the rounding which
nobody can avoid makes on these very data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "ARGUMENTS",
    "HOSTILE_KINDS",
    "Budget",
    "Sizes",
    "error_budget",
    "hostile_inputs",
    "hostile_kinds",
    "make_initial_state",
    "make_inputs",
    "relative_error",
    "round_inputs",
]


class Sizes(NamedTuple):
    """The sizes of a problem: B, T, H, HV, K, V, R."""

    batch: int = 1
    length: int = 11
    heads: int = 1
    value_heads: int = 1
    key_size: int = 4
    value_size: int = 3
    rows: int = 2


SIZES = Sizes()
"""Small, with several chunks of 4 and a part of one."""

KEY = "B T H K"
ROW_KEY = "B T R H K"
VALUE = "B T HV V"
ROW_VALUE = "B T R HV V"
PER_HEAD = "B T HV"
PER_ROW = "B T R HV"
PER_CHANNEL = "B T HV K"

ARGUMENTS: dict[str, dict[str, str]] = {
    "linear_attention": {"query": KEY, "key": KEY, "value": VALUE},
    "retention": {"query": KEY, "key": KEY, "value": VALUE, "log_decay": "HV"},
    "lightning_attention": {"query": KEY, "key": KEY, "value": VALUE, "log_decay": "HV"},
    "ssd": {"query": KEY, "key": KEY, "value": VALUE, "log_decay": PER_HEAD},
    "gated_linear_attention": {"query": KEY, "key": KEY, "value": VALUE, "log_decay": PER_CHANNEL},
    "delta_rule": {"query": KEY, "key": KEY, "value": VALUE, "beta": PER_HEAD},
    "gated_delta_rule": {"query": KEY, "key": KEY, "value": VALUE, "beta": PER_HEAD, "log_decay": PER_HEAD},
    "gated_delta_rule_2": {
        "query": KEY,
        "key": KEY,
        "value": VALUE,
        "erase": PER_CHANNEL,
        "write": VALUE,
        "log_decay": PER_CHANNEL,
    },
    "kimi_delta_attention": {"query": KEY, "key": KEY, "value": VALUE, "beta": PER_HEAD, "log_decay": PER_CHANNEL},
    "comba": {
        "query": KEY,
        "key": KEY,
        "value": VALUE,
        "beta": PER_HEAD,
        "log_decay": PER_HEAD,
        "removal_key": KEY,
    },
    "delta_product": {"query": KEY, "key": ROW_KEY, "value": ROW_VALUE, "beta": PER_ROW, "log_decay": PER_HEAD},
    "rwkv7": {
        "query": KEY,
        "key": KEY,
        "value": VALUE,
        "log_decay": PER_CHANNEL,
        "read": PER_CHANNEL,
        "write": PER_CHANNEL,
    },
    "longhorn": {"query": KEY, "key": KEY, "value": VALUE, "beta": PER_HEAD},
    "efla": {"query": KEY, "key": KEY, "value": VALUE, "beta": PER_HEAD},
    "low_rank_flow": {
        "query": KEY,
        "value": ROW_VALUE,
        "log_decay": PER_CHANNEL,
        "read": ROW_KEY,
        "write": ROW_KEY,
    },
}
"""Every function of `parallelflow.functional`: its tensors in positional order, with the axes of each."""


def _unit(tensor: Tensor) -> Tensor:
    return tensor / tensor.norm(dim=-1, keepdim=True).clamp_min(1e-30)


def make_inputs(
    model: str,
    sizes: Sizes = SIZES,
    *,
    decay: str | None = None,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> dict[str, Tensor]:
    """Draws the tensors of a model from distributions under which its state stays bounded.

    model: a function of `parallelflow.functional`.
    decay: for `delta_product` and `low_rank_flow`: "none", "scalar" or "vector" (by default the one in `ARGUMENTS`).
    Returns the tensors by argument name. They are drawn in float64 on the CPU, whatever `dtype` and `device` are, so
    that a seed means the same data everywhere. Keys are of unit length, beta lies in (0, 1).
    """
    generator = torch.Generator().manual_seed(seed)
    extent = dict(zip(("B", "T", "H", "HV", "K", "V", "R"), sizes, strict=True))
    axes = dict(ARGUMENTS[model])
    if decay == "none":
        del axes["log_decay"]
    elif decay is not None:
        axes["log_decay"] = {"scalar": PER_HEAD, "vector": PER_CHANNEL}[decay]

    def normal(layout: str) -> Tensor:
        shape = [extent[axis] for axis in layout.split()]
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    inputs = {name: normal(layout) for name, layout in axes.items()}
    if "key" in inputs:
        inputs["key"] = _unit(inputs["key"])
    if "removal_key" in inputs:  # a shortened key, as published, and a little off its direction
        other = inputs["removal_key"]
        inputs["removal_key"] = 0.5 * other[..., :1].sigmoid() * inputs["key"] + 0.05 * _unit(other)
    if model == "linear_attention":  # a positive feature map, so that the normalised form is well conditioned
        inputs |= {name: inputs[name].abs() + 0.1 for name in ("query", "key")}
    for name in ("beta", "erase"):
        if name in inputs:
            inputs[name] = inputs[name].sigmoid()
    if "log_decay" in inputs:
        inputs["log_decay"] = torch.nn.functional.logsigmoid(inputs["log_decay"] + 2.0)
    if model == "gated_delta_rule_2":
        inputs["write"] = inputs["write"].sigmoid()
    if model == "rwkv7":
        direction = _unit(inputs["read"])
        inputs["read"], inputs["write"] = -direction, direction * inputs["write"].sigmoid()
    if model == "low_rank_flow":
        direction = _unit(inputs["write"])
        noise = 0.3 * inputs["read"] / sizes.key_size**0.5
        inputs["write"], inputs["read"] = direction, (noise - 0.7 * direction) / sizes.rows
    return {name: tensor.to(device=device, dtype=dtype) for name, tensor in inputs.items()}


def make_initial_state(
    sizes: Sizes,
    *,
    sequences: int | None = None,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    seed: int = 1,
) -> Tensor:
    """An initial state [N, HV, K, V], N the number of sequences (B by default)."""
    generator = torch.Generator().manual_seed(seed)
    count = sizes.batch if sequences is None else sequences
    shape = (count, sizes.value_heads, sizes.key_size, sizes.value_size)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device=device, dtype=dtype)


HOSTILE_KINDS: dict[str, str] = {
    "strong_decay": "log_decay",  # -100 mixed with -1e-6: differences of cumulative sums lose the small terms
    "reset": "log_decay",  # -inf, 0 and ordinary decays mixed: inf - inf waits in every cumulative sum
    "no_decay": "log_decay",  # 0 everywhere
    "beta_two": "beta",  # reflections: the transition has the eigenvalue -1
    "correlated_keys": "key",  # cosine >= 0.999 and the strongest writes: powers of G overflow
    "correlated_reflections": "beta",  # the same keys with beta = 2
    "zero_keys": "key",  # every other key is zero
    "all_zero_keys": "key",
}
"""Ways to be hostile, each with the argument that a model must have for it."""


def hostile_kinds(inputs: Mapping[str, Tensor]) -> list[str]:
    """The hostile kinds that apply to the tensors of a model (`write` stands for the key where there is none)."""
    names = set(inputs) | ({"key"} if "write" in inputs and "read" in inputs else set())
    return [kind for kind, argument in HOSTILE_KINDS.items() if argument in names]


def _correlate(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Unit vectors around one direction a head, every two of a head with cosine >= 0.999."""
    direction = _unit(torch.randn(tensor.shape[-2:], generator=generator, dtype=tensor.dtype))
    offset = 0.02 * _unit(torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype))
    if bool((tensor > 0).all()):  # positive features stay positive
        direction, offset = _unit(direction.abs() + 0.1), offset.abs()
    return _unit(direction + offset)


def hostile_inputs(inputs: Mapping[str, Tensor], kind: str, *, seed: int = 2) -> dict[str, Tensor]:
    """The inputs of `make_inputs`, made hostile in one way (see `HOSTILE_KINDS`). float64 on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    result = {name: tensor.clone() for name, tensor in inputs.items()}
    if kind in ("strong_decay", "reset", "no_decay"):
        decay = result["log_decay"]
        choice = torch.rand(decay.shape, generator=generator)
        if kind == "strong_decay":
            result["log_decay"] = torch.where(choice < 0.2, -100.0, -1e-6).to(decay.dtype)
        elif kind == "reset":
            mixed = torch.where(choice < 0.15, -torch.inf, torch.where(choice < 0.5, 0.0, decay))
            result["log_decay"] = mixed.to(decay.dtype)
        else:
            result["log_decay"] = torch.zeros_like(decay)
    if kind in ("beta_two", "correlated_reflections"):
        result["beta"] = torch.full_like(result["beta"], 2.0)
    if kind in ("correlated_keys", "correlated_reflections"):
        if "key" in result:
            result["key"] = _correlate(result["key"], generator)
            if "removal_key" in result:
                result["removal_key"] = 0.5 * result["key"]  # a raw read of a full one at beta = 2 diverges
        if "read" in result:
            rows = result["read"].shape[2] if result["read"].dim() == 5 else 1
            result["write"] = _correlate(result["write"], generator)
            result["read"] = -result["write"] / rows
        for name in ("beta", "erase"):
            if name in result and kind == "correlated_keys":
                result[name] = torch.ones_like(result[name])
    if kind in ("zero_keys", "all_zero_keys"):
        for name in ("key", "removal_key") + (("read", "write") if "read" in result else ()):
            if name in result:
                result[name][:, slice(None, None, 2 if kind == "zero_keys" else 1)] = 0.0
    return result


def relative_error(actual: Tensor, reference: Tensor) -> float:
    """|actual - reference| / |reference| in the Frobenius norm, in float64; |actual| where the reference is zero."""
    actual, reference = actual.detach().double(), reference.detach().double()
    size = float(reference.norm())
    return float((actual - reference).norm()) / size if size > 0 else float(actual.norm())


def round_inputs(inputs: Mapping[str, Tensor], dtype: torch.dtype, *, keep: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """The inputs in `dtype`; those named in `keep` in float32 (decays, say, which models compute in float32)."""
    return {name: tensor.to(torch.float32 if name in keep else dtype) for name, tensor in inputs.items()}


class Budget(NamedTuple):
    """What a result may be off by, norm-relative, against `reference` (float64, of the unrounded inputs)."""

    reference: tuple[Tensor, ...]
    allowed: tuple[float, ...]


FLOOR = 8 * torch.finfo(torch.float32).eps
"""The least budget: where the recurrence happens to be exact, a few float32 roundings must still be allowed."""


def error_budget(
    recurrence: Callable[..., tuple[Tensor, ...]],
    inputs: Mapping[str, Tensor],
    dtype: torch.dtype,
    *,
    keep: tuple[str, ...] = (),
    factor: float = 2.0,
    **options: Any,
) -> Budget:
    """The error budget of a model on given float64 data: derived from the data, never tuned.

    recurrence: `recurrence(inputs, dtype=..., **options)` returns tensors, the first of them the output (rounded to
    the inputs' dtype by whoever computes it), the others states (at least float32).
    Half precision: `factor` times the error that rounding the inputs and the outputs alone makes in the float64
    recurrence. float32: the inputs are taken as they are, and `factor` times the float32 recurrence's own error,
    which contains both. Never less than `FLOOR`.
    """
    reference = recurrence(inputs, dtype=torch.float64, **options)
    rounded = round_inputs(inputs, dtype, keep=keep)
    working = torch.float32 if dtype == torch.float32 else torch.float64
    results = recurrence(rounded, dtype=working, **options)
    results = tuple(x.to(dtype if i == 0 else torch.float32) for i, x in enumerate(results))
    errors = (relative_error(x, y) for x, y in zip(results, reference, strict=True))
    return Budget(tuple(reference), tuple(max(factor * error, FLOOR) for error in errors))
