"""What every function of FLA 0.6.0 takes: names, order and defaults, as data.

Before the ``*`` stands FLA's signature. After it stand the keywords that FLA's functions read from their ``**kwargs``;
there is no ``**kwargs`` here: a keyword that is in neither list raises.
"""

from __future__ import annotations

import ast
from inspect import Parameter, Signature
from typing import Any

from parallelflow.checks import nearest

_STATE = "scale=None initial_state=None output_final_state=False"
_PACKED = "cu_seqlens=None cu_seqlens_cpu=None"
_BETA_GATE = "use_beta_sigmoid_in_kernel=False allow_neg_eigval=False"
_DECAY_GATE = "use_gate_in_kernel=False A_log=None dt_bias=None"
_NORMALIZE = "use_qk_l2norm_in_kernel=False"
_FIRST = "state_v_first=False"
_OLD_FIRST = "transpose_state_layout=None"  # the former name of state_v_first

_GATED_DELTA_CHUNK = (
    f"q k v g beta {_STATE} {_NORMALIZE} {_BETA_GATE} {_FIRST} {_PACKED} chunk_indices=None cp_context=None "
    f"* chunk_size=64 {_DECAY_GATE} {_OLD_FIRST}"
)
_GATED_DELTA_RECURRENT = (
    f"q k v g=None gk=None gv=None beta=None {_STATE} {_NORMALIZE} {_DECAY_GATE} {_BETA_GATE} {_FIRST} cu_seqlens=None "
    f"* {_OLD_FIRST}"
)

FAMILIES: dict[str, dict[str, str]] = {
    "delta_rule": {
        "chunk_delta_rule": f"q k v beta {_STATE} {_NORMALIZE} {_PACKED} * chunk_size=64",
        "fused_recurrent_delta_rule": f"q k v beta=None {_STATE} {_NORMALIZE} cu_seqlens=None",
    },
    "gated_delta_rule": {
        "chunk_gated_delta_rule": _GATED_DELTA_CHUNK,
        "chunk_gdn": _GATED_DELTA_CHUNK,
        "fused_recurrent_gated_delta_rule": _GATED_DELTA_RECURRENT,
        "fused_recurrent_gdn": _GATED_DELTA_RECURRENT,
    },
    "gated_delta_product": {
        "chunk_gated_delta_product": f"q k v g beta num_householder {_STATE} {_NORMALIZE} {_PACKED} cp_context=None",
    },
    "kda": {
        "chunk_kda": (
            f"q k v g beta {_STATE} {_NORMALIZE} use_gate_in_kernel=False {_BETA_GATE} safe_gate=False "
            f"lower_bound=None disable_recompute=False return_intermediate_states=False {_FIRST} {_PACKED} "
            f"cp_context=None use_graph=False max_num_seqs=None * A_log=None dt_bias=None chunk_size=64 {_OLD_FIRST}"
        ),
        "fused_recurrent_kda": (
            f"q k v g beta A_log=None dt_bias=None {_STATE} {_NORMALIZE} use_gate_in_kernel=False {_BETA_GATE} "
            f"lower_bound=None {_FIRST} cu_seqlens=None * {_OLD_FIRST}"
        ),
    },
    "gdn2": {
        "chunk_gdn2": (
            f"q k v g b w {_STATE} {_NORMALIZE} use_gate_in_kernel=False {_PACKED} safe_gate=False lower_bound=None "
            f"disable_recompute=False return_intermediate_states=False {_FIRST} cp_context=None "
            f"* A_log=None dt_bias=None chunk_size=64 {_OLD_FIRST}"
        ),
        "fused_recurrent_gdn2": (
            f"q k v g b w A_log=None dt_bias=None {_STATE} {_NORMALIZE} use_gate_in_kernel=False lower_bound=None "
            f"{_FIRST} cu_seqlens=None * {_OLD_FIRST}"
        ),
    },
    "rwkv7": {
        "chunk_rwkv7": (
            f"r w k v a b scale=1.0 initial_state=None output_final_state=False {_PACKED} safe_gate=False "
            "chunk_size=None disable_recompute=False cp_context=None lower_bound=None"
        ),
        "fused_recurrent_rwkv7": "r w k v a b scale=None initial_state=None output_final_state=True cu_seqlens=None",
        "fused_mul_recurrent_rwkv7": (
            "r w k v kk a scale=1.0 initial_state=None output_final_state=False reverse=False cu_seqlens=None"
        ),
    },
    "generalized_delta_rule.dplr": {
        "chunk_dplr_delta_rule": (
            f"q k v a b gk {_STATE} {_PACKED} safe_gate=False chunk_size=None disable_recompute=False cp_context=None "
            "lower_bound=None"
        ),
        "fused_recurrent_dplr_delta_rule": f"q k v a b gk {_STATE} reverse=False cu_seqlens=None",
    },
    "generalized_delta_rule.iplr": {
        "chunk_iplr_delta_rule": f"q k v a b {_STATE} {_PACKED} * chunk_size=None",
        "fused_recurrent_iplr_delta_rule": f"q k v a b {_STATE} cu_seqlens=None",
    },
    "comba": {
        "chunk_comba": f"q k v p g beta=None {_STATE} {_NORMALIZE} {_PACKED}",
        "fused_recurrent_comba": f"q k p v g beta=None {_STATE} {_NORMALIZE} cu_seqlens=None",
    },
    "gla": {
        "chunk_gla": f"q k v g {_STATE} {_FIRST} {_PACKED}",
        "fused_recurrent_gla": (
            f"q k v gk=None gv=None {_STATE} reverse=False {_FIRST} cu_seqlens=None * {_OLD_FIRST}"
        ),
    },
    "simple_gla": {
        "chunk_simple_gla": f"q k v g=None g_gamma=None {_STATE} {_FIRST} {_PACKED} * chunk_size=None",
        "fused_chunk_simple_gla": f"q k v g=None g_gamma=None {_STATE} cu_seqlens=None",
        "fused_recurrent_simple_gla": (
            f"q k v g=None g_gamma=None {_STATE} reverse=False {_FIRST} cu_seqlens=None * {_OLD_FIRST}"
        ),
    },
    "retention": {
        "chunk_retention": f"q k v {_STATE} cu_seqlens=None * chunk_size=None",
        "fused_chunk_retention": f"q k v {_STATE} cu_seqlens=None",
        "fused_recurrent_retention": f"q k v {_STATE} reverse=False {_FIRST} cu_seqlens=None * {_OLD_FIRST}",
    },
    "lightning_attn": {
        "chunk_lightning_attn": f"q k v layer_idx num_layers {_STATE} cu_seqlens=None * chunk_size=None",
        "fused_recurrent_lightning_attn": f"q k v layer_idx num_layers {_STATE} reverse=False cu_seqlens=None",
    },
    "linear_attn": {
        "chunk_linear_attn": f"q k v {_STATE} normalize=True cu_seqlens=None",
        "fused_chunk_linear_attn": f"q k v {_STATE} normalize=True cu_seqlens=None",
        "fused_recurrent_linear_attn": f"q k v {_STATE} reverse=False normalize=False cu_seqlens=None",
    },
}
"""Module below ``fla.ops`` → function → its parameters."""


_MAY_BE_NONE = {("chunk_gated_delta_product", "g"), ("chunk_comba", "p"), ("fused_recurrent_comba", "p")}
"""Parameters without a default for which FLA takes None: no decay; the key."""


class Arguments:
    """A function's parameters, and calls sorted into them."""

    def __init__(self, function: str, text: str) -> None:
        self.function = function
        positional, _, keywords = text.partition("*")
        self.positional = [item.partition("=")[0] for item in positional.split()]
        self.defaults: dict[str, Any] = {}
        for item in text.replace("*", " ").split():
            name, given, default = item.partition("=")
            if given:
                self.defaults[name] = ast.literal_eval(default)
        self.names = [*self.positional, *(item.partition("=")[0] for item in keywords.split())]

    def signature(self) -> Signature:
        """For ``help`` and ``inspect``."""
        kinds = dict.fromkeys(self.positional, Parameter.POSITIONAL_OR_KEYWORD)
        return Signature(
            [
                Parameter(
                    name, kinds.get(name, Parameter.KEYWORD_ONLY), default=self.defaults.get(name, Parameter.empty)
                )
                for name in self.names
            ]
        )

    def bind(self, args: tuple[Any, ...], keywords: dict[str, Any]) -> dict[str, Any]:
        """Every parameter's value. TypeError, naming the keyword and those there are, for what does not fit."""
        if len(args) > len(self.positional):
            raise TypeError(
                f"{self.function}: got {len(args)} positional arguments, expected at most {len(self.positional)}: "
                f"{', '.join(self.positional)}"
            )
        given = {**self.defaults, **dict(zip(self.positional, args, strict=False))}
        for name, value in keywords.items():
            if name == "head_first":
                raise TypeError(f"head_first: not taken by {self.function}, as in FLA: tensors are [B, T, H, ...]")
            if name not in self.names:
                known = ", ".join(self.names)
                raise TypeError(
                    f"{name}: unknown keyword of {self.function}{nearest(name, self.names)}; the keywords are {known}"
                )
            if name in self.positional[: len(args)]:
                raise TypeError(f"{name}: given to {self.function} twice, by position and by name")
            given[name] = value
        missing = [name for name in self.names if name not in given]
        if missing:
            raise TypeError(f"{missing[0]}: not given to {self.function}, expected a value")
        for name in self.names:
            if given[name] is None and name not in self.defaults and (self.function, name) not in _MAY_BE_NONE:
                raise TypeError(f"{name}: got None for {self.function}, expected a value")
        return given
