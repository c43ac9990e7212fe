"""Published parameter layouts, and how they become this package's when a state dict is loaded.

A layout is told by a key that only it has. Fused projections and convolutions are cut apart, parts of another name are
renamed; what a layer then lacks or does not know is reported by ``load_state_dict`` as ever.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

Parameters = dict[str, Tensor]


def accept(layer: nn.Module, *layouts: Callable[[Any, Parameters], None]) -> None:
    """Lets ``layer.load_state_dict`` take these layouts: each is called with the layer and its parameters by name."""
    layer.register_load_state_dict_pre_hook(partial(_translate, layouts))  # which can be pickled, as a closure cannot


def _translate(
    layouts: tuple[Callable[[Any, Parameters], None], ...],
    layer: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    *_: Any,
) -> None:
    own = {name.removeprefix(prefix): state_dict.pop(name) for name in list(state_dict) if name.startswith(prefix)}
    for layout in layouts:
        layout(layer, own)
    state_dict.update({prefix + name: value for name, value in own.items()})


def rename(parameters: Parameters, **names: str) -> None:
    """Parts by another name, here or deeper: ``out_proj="o_proj"`` takes ``out_proj.weight`` too."""
    for name in list(parameters):
        for old, new in names.items():
            if name == old or name.startswith(f"{old}."):
                parameters[new + name.removeprefix(old)] = parameters.pop(name)


def fused_convolution(layer: Any, parameters: Parameters) -> None:
    """``conv1d`` over the channels of query, key and value: OLMo-Hybrid, Kimi Linear and Qwen in Transformers."""
    for kind in ("weight", "bias"):
        if f"conv1d.{kind}" in parameters:
            parts = parameters.pop(f"conv1d.{kind}").split(layer.sizes)
            for part, name in zip(parts, "qkv", strict=True):
                parameters[f"{name}_conv1d.{kind}"] = part


def qwen3_next(layer: Any, parameters: Parameters) -> None:
    """Rows of ``in_proj_qkvz`` and ``in_proj_ba`` go by key head: its query, its key, its value heads, their gates."""
    if "in_proj_qkvz.weight" not in parameters:
        return
    heads, group = layer.num_heads, layer.num_value_heads // layer.num_heads
    values = group * layer.value_head_dim
    fused = parameters.pop("in_proj_qkvz.weight").unflatten(0, (heads, -1))
    parts = fused.split([layer.head_dim, layer.head_dim, values, values], 1)
    for name, part in zip("qkvg", parts, strict=True):
        parameters[f"{name}_proj.weight"] = part.flatten(0, 1)
    strengths = parameters.pop("in_proj_ba.weight").unflatten(0, (heads, -1)).split([group, group], 1)
    for name, part in zip("ba", strengths, strict=True):
        parameters[f"{name}_proj.weight"] = part.flatten(0, 1)
    rename(parameters, norm="o_norm", out_proj="o_proj")


def qwen3_5(layer: Any, parameters: Parameters) -> None:
    """``in_proj_qkv``, then ``in_proj_z``, ``in_proj_b`` and ``in_proj_a``."""
    if "in_proj_qkv.weight" not in parameters:
        return
    parts = parameters.pop("in_proj_qkv.weight").split(layer.sizes)
    for name, part in zip("qkv", parts, strict=True):
        parameters[f"{name}_proj.weight"] = part
    rename(parameters, in_proj_z="g_proj", in_proj_b="b_proj", in_proj_a="a_proj", norm="o_norm", out_proj="o_proj")


def kimi_linear(layer: Any, parameters: Parameters) -> None:
    """``f_a_proj, f_b_proj, g_a_proj, g_b_proj`` without a bias, maybe in ``forget_gate``; ``A_log [1, 1, H, 1]``."""
    rename(
        parameters,
        **{"forget_gate.f_a_proj": "f_a_proj", "forget_gate.f_b_proj": "f_b_proj", "forget_gate.f_proj": "f_proj"},
        **{"forget_gate.A_log": "A_log", "forget_gate.dt_bias": "dt_bias"},
    )
    rename(parameters, f_a_proj="f_proj.0", f_b_proj="f_proj.1", g_a_proj="g_proj.0", g_b_proj="g_proj.1")
    if "A_log" in parameters:
        parameters["A_log"] = parameters["A_log"].flatten()
    if "g_proj.1.weight" in parameters:
        weight = parameters["g_proj.1.weight"]
        parameters.setdefault("g_proj.1.bias", weight.new_zeros(weight.shape[0]))
