"""What a model is made of."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedConfig

from parallelflow.checks import (
    expect_choice,
    expect_flag,
    expect_number,
    expect_positive_integer,
    expect_positive_number,
    nearest,
)
from parallelflow.nn import LAYERS, layer_options


class ParallelFlowConfig(PreTrainedConfig):
    """A language model as a pattern of layers.

    Args:
        vocab_size: tokens.
        hidden_size: D.
        num_hidden_layers: how many layers.
        layers: their kinds, names of ``parallelflow.nn.LAYERS``, repeated until there are enough:
            ``["gated_delta_net"]``, or ``["gated_delta_net"] * 3 + ["softmax_attention"]``.
        num_heads: of every layer that takes it and is not told otherwise; None is a head for every 64 channels.
        layer_options: for each kind, its keywords, as ``{"gated_delta_net": {"head_dim": 128}}``.
        intermediate_size: of the MLPs; None is 8/3 D, rounded up to a multiple of 256.
        norm_eps: of all norms.
        initializer_range: the standard deviation of fresh weights.
        use_cache: whether a call returns its cache unless told.
        pad_token_id, bos_token_id, eos_token_id: tokens with a meaning, or None.
        tie_word_embeddings: whether the head's weight is the embeddings'.
        options: ``PreTrainedConfig``'s.

    Raises:
        TypeError, ValueError: for unknown layers and options, and for sizes that are not positive.
    """

    model_type = "parallelflow"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012

    def __init__(
        self,
        *,
        vocab_size: int = 32000,
        hidden_size: int = 1024,
        num_hidden_layers: int = 24,
        layers: Sequence[str] = ("gated_delta_net",),
        num_heads: int | None = None,
        layer_options: dict[str, dict[str, Any]] | None = None,
        intermediate_size: int | None = None,
        norm_eps: float = 1e-6,
        initializer_range: float = 0.02,
        use_cache: bool = True,
        pad_token_id: int | None = None,
        bos_token_id: int | None = None,
        eos_token_id: int | list[int] | None = None,
        tie_word_embeddings: bool = False,
        **options: Any,
    ) -> None:
        self.vocab_size, self.hidden_size, self.num_hidden_layers = vocab_size, hidden_size, num_hidden_layers
        self.num_heads = max(1, hidden_size // 64) if num_heads is None else num_heads
        _check_layers(layers, layer_options)
        self.layers, self.layer_options = list(layers), dict(layer_options or {})
        self.intermediate_size, self.norm_eps = intermediate_size, norm_eps
        self.initializer_range, self.use_cache = initializer_range, use_cache
        self.pad_token_id, self.bos_token_id, self.eos_token_id = pad_token_id, bos_token_id, eos_token_id
        self.tie_word_embeddings = tie_word_embeddings
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_heads"):
            expect_positive_integer(name, getattr(self, name))
        if intermediate_size is not None:
            expect_positive_integer("intermediate_size", intermediate_size)
        expect_positive_number("norm_eps", norm_eps)
        expect_number("initializer_range", initializer_range)
        if not 0 <= initializer_range < math.inf:
            raise ValueError(f"initializer_range: got {initializer_range}, expected a finite number ≥ 0")
        expect_flag("use_cache", use_cache)
        expect_flag("tie_word_embeddings", tie_word_embeddings)
        for name in ("pad_token_id", "bos_token_id"):
            expect_token(name, getattr(self, name), vocab_size)
        for token in eos_token_id if isinstance(eos_token_id, list | tuple) else [eos_token_id]:
            expect_token("eos_token_id", token, vocab_size)
        known = {field.name for field in dataclasses.fields(PreTrainedConfig)}
        for name in options:
            if name not in known | FROM_FILES and not hasattr(PreTrainedConfig, name) and not name.startswith("_"):
                raise TypeError(f"{name}: unknown option of ParallelFlowConfig{nearest(name, [*OWN, *sorted(known)])}")
        super().__init__(**options)

    def kind(self, index: int) -> str:
        """The kind of the layer with this number."""
        return self.layers[index % len(self.layers)]

    def options_of(self, index: int) -> dict[str, Any]:
        """The keywords of the layer with this number."""
        kind = self.kind(index)
        given: dict[str, Any] = {}
        known = layer_options(kind)
        for name in ("num_heads", "norm_eps"):
            if name in known:
                given[name] = getattr(self, name)
        if "layer_index" in known:
            given |= {"layer_index": index, "num_layers": self.num_hidden_layers}
        if "value_residual" in known:
            given["value_residual"] = any(self.kind(earlier) == kind for earlier in range(index))
        return given | self.layer_options.get(kind, {})


OWN = ("layers", "layer_options", "num_heads", "intermediate_size", "norm_eps", "hidden_size", "num_hidden_layers")
FROM_FILES = {"model_type", "transformers_version", "attn_implementation", "torch_dtype", "auto_map"}
"""What a saved configuration, or Transformers when it loads one, adds."""


def expect_token(name: str, token: object, vocab_size: int) -> None:
    """TypeError or ValueError unless ``token`` is one of the vocabulary, or None."""
    if token is None:
        return
    if isinstance(token, bool) or not isinstance(token, int):
        raise TypeError(f"{name}: got {token!r}, expected a token's number or None")
    if not 0 <= token < vocab_size:
        raise ValueError(f"{name}: got {token}, expected one of the {vocab_size} tokens, from 0, or None")


def _check_layers(layers: object, options: object) -> None:
    if not isinstance(layers, list | tuple):
        raise TypeError(f"layers: got {layers!r}, expected a list of names, as ['gated_delta_net']")
    if not layers:
        raise ValueError(f"layers: got none, expected at least one of {', '.join(LAYERS)}")
    for kind in layers:
        expect_choice("layers", kind, LAYERS)
    options = {} if options is None else options
    if not isinstance(options, dict) or not all(isinstance(given, dict) for given in options.values()):
        raise TypeError(
            f"layer_options: got {options!r}, expected keywords for kinds, as {{'mamba2': {{'expand': 2}}}}"
        )
    for kind, given in options.items():
        if kind not in layers:
            raise ValueError(f"layer_options: got options of {kind!r}, expected only kinds in layers, {layers}")
        known = layer_options(kind)
        for name in given:
            if name not in known:
                raise TypeError(f"layer_options: {kind} has no option {name!r}{nearest(name, known)}")
