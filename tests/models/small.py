"""Small models of every kind of layer, with weights large enough that everything matters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from parallelflow.models import ParallelFlowConfig, ParallelFlowForCausalLM

OPTIONS: dict[str, dict[str, Any]] = {
    "delta_net": {"negative_eigenvalues": True},
    "gated_delta_net": {"head_dim": 4, "value_head_dim": 6},
    "delta_product": {"num_householder": 2},
    "kimi_delta_attention": {},
    "rwkv7": {"head_dim": 8},
    "gated_linear_attention": {},
    "mamba2": {"head_dim": 8, "state_size": 6},
    "comba": {},
    "low_rank_flow": {"tied": True},
    "softmax_attention": {"num_key_value_heads": 1},
}

PAD, END, VOCABULARY, WIDTH = 0, 1, 40, 16


def small_config(*layers: str, depth: int | None = None, **options: Any) -> ParallelFlowConfig:
    return ParallelFlowConfig(
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": WIDTH,
            "num_hidden_layers": len(layers) if depth is None else depth,
            "layers": list(layers),
            "num_heads": 2,
            "layer_options": {name: OPTIONS[name] for name in layers},
            "intermediate_size": 24,
            "pad_token_id": PAD,
            "eos_token_id": None,
            **options,
        }
    )


def small_model(*layers: str, seed: int = 0, **options: Any) -> ParallelFlowForCausalLM:
    torch.manual_seed(seed)
    model = ParallelFlowForCausalLM(small_config(*layers, **options))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def tokens(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(2, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))
