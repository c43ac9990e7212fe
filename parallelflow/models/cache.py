"""The memories of a model's layers, as ``generate`` carries them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class MemoryLayer(CacheLayerMixin):
    """One layer's memory: a tuple of tensors whose first axis is the sequence, or None before the first token."""

    def __init__(self) -> None:
        super().__init__()
        self.memory: Any = None
        self.tokens = 0

    def set(self, memory: Any, tokens: int) -> None:
        """The memory after ``tokens`` more tokens (padding included)."""
        self.memory, self.tokens, self.is_initialized = memory, self.tokens + tokens, True

    def each(self, change: Callable[[Tensor], Tensor]) -> None:
        """Changes every tensor of the memory."""
        if self.memory is not None:
            parts = (None if tensor is None else change(tensor) for tensor in self.memory)
            self.memory = type(self.memory)(*parts)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.each(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.each(lambda tensor: tensor[indices.to(tensor.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.each(lambda tensor: tensor.repeat_interleave(repeats, 0))

    def reset(self) -> None:
        self.memory, self.tokens, self.is_initialized = None, 0, False

    def get_seq_length(self) -> int:
        return self.tokens

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.tokens + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        raise NotImplementedError("parallelflow: a state does not forget its last tokens; keep a copy of the cache")

    def offload(self) -> None:
        raise NotImplementedError("parallelflow: memories are small and stay on their device; use the default cache")

    prefetch = offload

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise NotImplementedError("parallelflow: a layer makes its memory itself")

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("parallelflow: a layer returns its memory; see MemoryLayer.set")


class ParallelFlowCache(Cache):
    """A memory for each of a model's layers. Its size does not depend on the number of tokens, but for attention."""

    def __init__(self, num_layers: int) -> None:
        self.memories = [MemoryLayer() for _ in range(num_layers)]
        super().__init__(layers=list(self.memories))

    @property
    def nbytes(self) -> int:
        """Of all memories."""
        tensors = [tensor for layer in self.memories if layer.memory is not None for tensor in layer.memory]
        return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))
