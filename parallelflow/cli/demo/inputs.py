"""Tensors for every function of the functional API, drawn so that the state stays bounded."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Sizes(NamedTuple):
    """B, T, H, K, V, and R: the rows of the models that have several."""

    batch: int
    length: int
    heads: int
    key_size: int
    value_size: int
    rows: int = 2


SEVERAL_ROWS = ("delta_product", "low_rank_flow")
HEAD_DECAY = ("retention", "lightning_attention")  # [H]
SCALAR_DECAY = ("ssd", "gated_delta_rule", "comba", "delta_product")  # [B, T, H]
VECTOR_DECAY = ("gated_linear_attention", "gated_delta_rule_2", "kimi_delta_attention", "rwkv7", "low_rank_flow")
BETA = (
    *("delta_rule", "gated_delta_rule", "kimi_delta_attention", "comba"),
    *("delta_product", "longhorn", "efla"),
)


def draw_inputs(model: str, sizes: Sizes, dtype: torch.dtype, *, seed: int = 0) -> dict[str, Tensor]:
    """The tensors of `functional.<model>` by the names of its arguments: unit keys, β in (0, 1), mild decays."""
    generator = torch.Generator().manual_seed(seed)
    batch, length, heads, key_size, value_size, rows = sizes
    token = (batch, length)
    row = (*token, rows) if model in SEVERAL_ROWS else token

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def unit(*shape: int) -> Tensor:
        return F.normalize(normal(*shape), dim=-1)

    def decay(*shape: int) -> Tensor:
        return F.logsigmoid(normal(*shape) + 3)

    drawn = {"query": normal(*token, heads, key_size), "value": normal(*row, heads, value_size)}
    if model != "low_rank_flow":
        drawn["key"] = unit(*row, heads, key_size)
    if model in BETA:
        drawn["beta"] = normal(*row, heads).sigmoid()
    if model in HEAD_DECAY:
        drawn["log_decay"] = decay(heads)
    elif model in SCALAR_DECAY:
        drawn["log_decay"] = decay(*token, heads)
    elif model in VECTOR_DECAY:
        drawn["log_decay"] = decay(*token, heads, key_size)

    if model == "gated_delta_rule_2":
        drawn["erase"] = normal(*token, heads, key_size).sigmoid()
        drawn["write"] = normal(*token, heads, value_size).sigmoid()
    elif model == "comba":
        drawn["removal_key"] = 0.5 * drawn["key"]
    elif model in ("rwkv7", "low_rank_flow"):
        drawn["write"] = unit(*row, heads, key_size)
        drawn["read"] = -0.5 / (rows if model == "low_rank_flow" else 1) * drawn["write"]
    return {name: tensor.to(dtype) for name, tensor in drawn.items()}
