"""MiniMax's lightning attention, whose recurrence stands inside the layer's ``forward``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from parallelflow import functional


def forward(
    self: Any,
    hidden_states: Tensor,
    position_embeddings: Any = None,
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """``S_t = e^{-s_h} S_{t-1} + k_t v_tᵀ``, ``o_t = S_tᵀ q_t``, normalised and gated.

    In the place of ``MiniMaxLightningAttention.forward``. The state is the cache's, ``[B, H, K, V]`` in the
    hidden states' dtype; ``position_embeddings`` belong to the other layers.
    Source: ``transformers/models/minimax/modeling_minimax.py`` of Transformers 5.23.
    """
    batch, time, _width = hidden_states.shape
    mixed = self.act_fn(self.qkv_proj(hidden_states))
    if attention_mask is not None:
        mixed = (mixed * attention_mask[:, :, None]).to(mixed.dtype)
    query, key, value = mixed.view(batch, time, self.num_attention_heads, 3 * self.head_dim).split(self.head_dim, -1)
    state = None if past_key_values is None else past_key_values.get_linear_cache(self.layer_idx)
    state = state if isinstance(state, Tensor) else None  # a layer that has seen nothing holds None or an empty list
    output, final = functional.lightning_attention(
        query,
        key,
        value,
        -self.slope_rate.flatten().float(),
        scale=1.0,
        initial_state=None if state is None else state.to(torch.promote_types(state.dtype, torch.float32)),
        return_final_state=True,
        validate=False,
    )[:2]
    assert final is not None
    final = final.to(value.dtype)
    output = self.norm(output.reshape(batch, time, -1))
    output = self.out_proj(torch.sigmoid(self.output_gate(hidden_states)) * output)
    if past_key_values is not None:
        past_key_values.set_linear_cache(self.layer_idx, final)
    return output, final
