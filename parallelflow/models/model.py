"""The language model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel, initialization
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from parallelflow.checks import expect_offsets, expect_shape, show
from parallelflow.models.cache import ParallelFlowCache
from parallelflow.models.configuration import ParallelFlowConfig
from parallelflow.nn import RWKV7, Block, Layer, make_layer
from parallelflow.nn.layer import tokens_of_ranks
from parallelflow.nn.packing import Packing
from parallelflow.problem import may_read


class ParallelFlowBlock(GradientCheckpointingLayer, Block):
    """A block whose inner values may be computed again for the backward pass instead of kept."""


class ParallelFlowPreTrainedModel(PreTrainedModel):
    """Initialisation, and what Transformers asks about the model."""

    config_class = ParallelFlowConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ParallelFlowBlock"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _is_stateful = True
    _supports_sdpa = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Layer):
            for name, value in module.initial_values().items():
                initialization.copy_(module.get_parameter(name), value)


class ParallelFlowModel(ParallelFlowPreTrainedModel):
    """Tokens ``[B, T]`` to hidden states ``[B, T, D]``: embeddings, blocks, a norm.

    Names of flash-linear-attention's models: ``embeddings``, ``layers.N.attn_norm``, ``attn``, ``mlp_norm``, ``mlp``,
    ``norm``.
    """

    context_group: Any = None

    def __init__(self, config: ParallelFlowConfig) -> None:
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(
            ParallelFlowBlock(
                make_layer(config.kind(index), config.hidden_size, **config.options_of(index)),
                intermediate_size=config.intermediate_size,
                norm_eps=config.norm_eps,
            )
            for index in range(config.num_hidden_layers)
        )
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.add_module("embeddings", value)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: ParallelFlowCache | None = None,
        use_cache: bool | None = None,
        cu_seqlens: Tensor | None = None,
        position_ids: Tensor | None = None,
        output_hidden_states: bool | None = None,
        **unused: Any,
    ) -> BaseModelOutputWithPast:
        """See ``ParallelFlowForCausalLM``."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids: got both or neither of input_ids and inputs_embeds, expected one of them")
        if input_ids is not None and (input_ids.ndim != 2 or input_ids.dtype not in (torch.int32, torch.int64)):
            got = f"{input_ids.dtype} {show(input_ids)}"
            raise ValueError(f"input_ids: got {got}, expected numbers of tokens [B, T], int32 or int64")
        if input_ids is not None and may_read(input_ids) and input_ids.numel():
            least, most = int(input_ids.min()), int(input_ids.max())
            count = getattr(self.embeddings, "num_embeddings", self.config.vocab_size)
            if least < 0 or most >= count:
                raise ValueError(f"input_ids: got tokens from {least} to {most}, expected some from 0 to {count - 1}")
        _refuse(unused)
        hidden_states = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        cache = self._cache(past_key_values, use_cache)
        tokens = hidden_states.shape[1]
        over_ranks: dict[str, Any] = {}
        if self.context_group is not None:
            if attention_mask is not None or position_ids is not None:
                raise ValueError("attention_mask, position_ids: got one with a context group, expected cu_seqlens")
            over_ranks = {"context_lengths": tokens_of_ranks(self.context_group, hidden_states)}
        if cu_seqlens is None and attention_mask is None:
            cu_seqlens = sequences_of(position_ids)
        packing, options = None, {}
        if cu_seqlens is None:
            packing = Packing.of(attention_mask, hidden_states)
        elif attention_mask is None:
            expect_offsets(cu_seqlens, None, hidden_states)
            options = {"cu_seqlens": cu_seqlens, "cu_seqlens_cpu": cu_seqlens.cpu()}
        else:
            raise ValueError("attention_mask: got one together with cu_seqlens, expected one or the other")
        if packing is not None:  # once, for all layers
            hidden_states = packing.pack(hidden_states)
            options = {"cu_seqlens": packing.cu_seqlens, "cu_seqlens_cpu": packing.cu_seqlens_cpu}

        seen = []
        first_value = None
        for index, block in enumerate(self.layers):
            seen.append(hidden_states)
            memory = None if cache is None else cache.memories[index].memory
            shared = {"first_value": first_value} if isinstance(block.attn, RWKV7) else {}
            mixed = block(hidden_states, memory=memory, **options, **over_ranks, **shared)
            hidden_states = mixed.output
            first_value = getattr(mixed, "first_value", first_value)
            if cache is not None:
                cache.memories[index].set(mixed.memory, tokens)
        if over_ranks and mixed.memory is None:  # the sequences end on another rank
            cache = None
        hidden_states = self.norm(hidden_states)
        seen.append(hidden_states)
        if packing is not None:
            hidden_states = packing.unpack(hidden_states)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        kept = None
        if output_hidden_states:
            kept = tuple(seen if packing is None else map(packing.unpack, seen))
        return BaseModelOutputWithPast(last_hidden_state=hidden_states, past_key_values=cache, hidden_states=kept)

    def _cache(self, past: Any, use_cache: bool | None) -> ParallelFlowCache | None:
        if past is not None and not isinstance(past, ParallelFlowCache):
            raise TypeError(f"past_key_values: got {type(past).__name__}, expected a ParallelFlowCache or None")
        checkpointing = self.training and any(getattr(block, "gradient_checkpointing", False) for block in self.layers)
        if checkpointing and self._is_reentrant():
            raise ValueError("use_reentrant: got True, expected False: it loses the gradients of keyword arguments")
        if past is not None or checkpointing:
            return past
        wanted = (self.config.use_cache and not self.training) if use_cache is None else use_cache
        return ParallelFlowCache(len(self.layers)) if wanted else None

    def _is_reentrant(self) -> bool:
        checkpoint = getattr(self.layers[0], "_gradient_checkpointing_func", None)
        return bool(getattr(checkpoint, "keywords", {}).get("use_reentrant"))


class ParallelFlowForCausalLM(ParallelFlowPreTrainedModel, GenerationMixin):
    """Tokens to the logits of the next ones.

    Called with

    - ``input_ids [B, T]`` or ``inputs_embeds [B, T, D]``,
    - ``attention_mask [B, T]``: 1 for tokens, 0 for padding, on either side: the real tokens are packed, so that each
      sequence gets what it would get alone; outputs at padding are zero,
    - ``cu_seqlens [N + 1]``: sequences packed on a line of B = 1, instead of a mask; or ``position_ids [1, T]`` that
      begin again at 0, as Transformers' ``DataCollatorWithFlattening`` gives them. Layers count positions themselves,
    - ``labels [B, T]``: the tokens themselves, -100 where there is no loss; they are shifted inside, and the first
      token of a sequence has no loss, for nothing predicts it,
    - ``past_key_values``: the ``ParallelFlowCache`` of an earlier call; changed in place,
    - ``logits_to_keep``: of the last so many places (0: all), or at these indices,

    it returns ``CausalLMOutputWithPast``.

    After ``nn.set_context_group(model, group)`` the tokens (and labels) are a rank's share of longer lines, and
    ``cu_seqlens`` are of the whole lines. ``loss`` is then that of the whole lines, on every rank, and the mean of the
    ranks' gradients, as DistributedDataParallel and FSDP take it, is its gradient. The last rank returns the cache.
    """

    context_group: Any = None
    _tied_weights_keys = {"lm_head.weight": "model.embeddings.weight"}  # noqa: RUF012

    def __init__(self, config: ParallelFlowConfig) -> None:
        super().__init__(config)
        self.model = ParallelFlowModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: ParallelFlowCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        cu_seqlens: Tensor | None = None,
        position_ids: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        num_items_in_batch: Tensor | None = None,
        **unused: Any,
    ) -> CausalLMOutputWithPast:
        if cu_seqlens is None and attention_mask is None:
            cu_seqlens = sequences_of(position_ids)
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            use_cache=use_cache,
            cu_seqlens=cu_seqlens,
            output_hidden_states=output_hidden_states,
            **unused,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            expect_shape("labels", labels, "as many as logits", logits.shape[:2])
            if self.context_group is not None:
                from parallelflow.models.context import loss_over_ranks

                loss = loss_over_ranks(logits, labels, cu_seqlens, self.context_group, num_items_in_batch)
            else:
                loss = self.loss_function(
                    logits=logits,
                    labels=_predicted(labels, attention_mask, cu_seqlens),
                    vocab_size=self.config.vocab_size,
                    num_items_in_batch=num_items_in_batch,
                )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # the first call makes its own


def sequences_of(position_ids: Tensor | None) -> Tensor | None:
    """``cu_seqlens`` of positions that begin again at 0 on a line of B = 1; None for those of one sequence.

    Raises:
        ValueError: if the line begins inside a sequence and then has others.
    """
    if position_ids is None or position_ids.shape[0] != 1 or position_ids.shape[-1] == 1:
        return None
    starts = (position_ids[0] == 0).nonzero().squeeze(1)
    if len(starts) == 0 or (len(starts) == 1 and starts[0] == 0):
        return None
    if starts[0] != 0:
        raise ValueError(f"position_ids: got a 0 at {int(starts[0])} after {int(position_ids[0, 0])}, expected 0 first")
    return torch.cat([starts, starts.new_tensor([position_ids.shape[-1]])])


def _predicted(labels: Tensor, attention_mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """The labels but those of each sequence's first token, which after padding or on a line is not in column 0."""
    if cu_seqlens is not None:
        starts = cu_seqlens[:-1].to(torch.int64)
        return labels.index_fill(1, starts[starts < labels.shape[1]], -100)
    if attention_mask is not None:
        before = nn.functional.pad(attention_mask[:, -labels.shape[1] :][:, :-1].to(torch.bool), (1, 0))
        return labels.masked_fill(~before, -100)
    return labels


def _refuse(unused: dict[str, Any]) -> None:
    """Whatever else Transformers passes to every model is known; anything more is a mistake."""
    for name, value in unused.items():
        if name not in ("output_attentions", "return_dict") and value is not None:
            raise TypeError(f"{name}: got {type(value).__name__}, expected no such argument")
    if unused.get("output_attentions"):
        raise ValueError("output_attentions: got True, expected False: a flow has no attention weights")
