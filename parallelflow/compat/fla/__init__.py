"""flash-linear-attention's functions on this engine: names, signatures, layouts, defaults and results of FLA 0.6.0.

``from parallelflow.compat.fla import chunk_gated_delta_rule`` in the place of ``fla.ops…``, or one line,
``parallelflow.compat.fla.install()``, and every ``import fla.ops…`` gets them. Tensors are ``[B, T, H, ·]``, states
``[N, HV, K, V]`` in float32; any device and dtype; all differentiable. What differs from FLA, and why, is in
``docs/coming_from_fla.md``.
"""

from parallelflow.compat.fla.delta import (
    chunk_comba,
    chunk_delta_rule,
    chunk_gated_delta_product,
    chunk_gated_delta_rule,
    chunk_gdn,
    chunk_gdn2,
    chunk_kda,
    fused_recurrent_comba,
    fused_recurrent_delta_rule,
    fused_recurrent_gated_delta_rule,
    fused_recurrent_gdn,
    fused_recurrent_gdn2,
    fused_recurrent_kda,
)
from parallelflow.compat.fla.installation import Installation, install, uninstall
from parallelflow.compat.fla.linear import (
    chunk_gla,
    chunk_lightning_attn,
    chunk_linear_attn,
    chunk_retention,
    chunk_simple_gla,
    fused_chunk_linear_attn,
    fused_chunk_retention,
    fused_chunk_simple_gla,
    fused_recurrent_gla,
    fused_recurrent_lightning_attn,
    fused_recurrent_linear_attn,
    fused_recurrent_retention,
    fused_recurrent_simple_gla,
)
from parallelflow.compat.fla.low_rank import (
    chunk_dplr_delta_rule,
    chunk_iplr_delta_rule,
    chunk_rwkv7,
    fused_mul_recurrent_rwkv7,
    fused_recurrent_dplr_delta_rule,
    fused_recurrent_iplr_delta_rule,
    fused_recurrent_rwkv7,
)
from parallelflow.compat.fla.signatures import FAMILIES

__all__ = [
    "FAMILIES",
    "Installation",
    "chunk_comba",
    "chunk_delta_rule",
    "chunk_dplr_delta_rule",
    "chunk_gated_delta_product",
    "chunk_gated_delta_rule",
    "chunk_gdn",
    "chunk_gdn2",
    "chunk_gla",
    "chunk_iplr_delta_rule",
    "chunk_kda",
    "chunk_lightning_attn",
    "chunk_linear_attn",
    "chunk_retention",
    "chunk_rwkv7",
    "chunk_simple_gla",
    "fused_chunk_linear_attn",
    "fused_chunk_retention",
    "fused_chunk_simple_gla",
    "fused_mul_recurrent_rwkv7",
    "fused_recurrent_comba",
    "fused_recurrent_delta_rule",
    "fused_recurrent_dplr_delta_rule",
    "fused_recurrent_gated_delta_rule",
    "fused_recurrent_gdn",
    "fused_recurrent_gdn2",
    "fused_recurrent_gla",
    "fused_recurrent_iplr_delta_rule",
    "fused_recurrent_kda",
    "fused_recurrent_lightning_attn",
    "fused_recurrent_linear_attn",
    "fused_recurrent_retention",
    "fused_recurrent_rwkv7",
    "fused_recurrent_simple_gla",
    "install",
    "uninstall",
]
