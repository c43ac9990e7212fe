"""Softmax attention, for models that mix it with flows."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right

from parallelflow.checks import expect_positive_integer, expect_positive_number
from parallelflow.nn.layer import Layer, Mixed, Sequences, head_size


class KeysAndValues(NamedTuple):
    """The memory of attention, which grows: ``key``, ``value`` ``[N, P, H, D]``.

    Sequence n has the first ``lengths[n]``; ``lengths [N]`` is on the host, None where all sequences have P.
    """

    key: Tensor
    value: Tensor
    lengths: Tensor | None


class SoftmaxAttention(Layer):
    """``softmax(q kᵀ / √D) v`` over the tokens so far, with rotary positions.

    Args:
        hidden_size: the channels of the hidden states.
        num_heads: of queries.
        num_key_value_heads: a divisor of it (grouped queries); None is ``num_heads``.
        head_dim: D; None is ``hidden_size // num_heads``.
        rope_theta: the base of the rotary angles.

    Computed by PyTorch's ``scaled_dot_product_attention``. Positions count each sequence's own tokens, so padding does
    not shift them. Over ranks (``set_context_group``) the keys and values of all come to each, which needs room for the
    whole line; sequences side by side only, without a memory.
    Source: Vaswani et al. 2017, arXiv 1706.03762; rotary positions Su et al. 2021, arXiv 2104.09864; names of
    flash-linear-attention's ``Attention``.
    """

    remembers = KeysAndValues

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        rope_theta: float = 10000.0,
    ) -> None:
        super().__init__(hidden_size)
        expect_positive_integer("num_heads", num_heads)
        expect_positive_number("rope_theta", rope_theta)
        self.num_heads, self.rope_theta = num_heads, rope_theta
        self.num_key_value_heads = num_heads if num_key_value_heads is None else num_key_value_heads
        self.head_dim = head_size(hidden_size, num_heads) if head_dim is None else head_dim
        for name in ("num_key_value_heads", "head_dim"):
            expect_positive_integer(name, getattr(self, name))
        if num_heads % self.num_key_value_heads:
            raise ValueError(f"num_key_value_heads: got {self.num_key_value_heads}, expected a divisor of {num_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim: got {self.head_dim}, expected an even number: rotations turn pairs")
        self.q_proj = nn.Linear(hidden_size, num_heads * self.head_dim, bias=False)
        self.k_proj, self.v_proj = (
            nn.Linear(hidden_size, self.num_key_value_heads * self.head_dim, bias=False) for _ in range(2)
        )
        self.o_proj = nn.Linear(num_heads * self.head_dim, hidden_size, bias=False)

    def mix(self, hidden_states: Tensor, memory: KeysAndValues | None, sequences: Sequences) -> Mixed:
        query, key, value = (
            projection(hidden_states).unflatten(-1, (-1, self.head_dim))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        alone = sequences.context_group is None
        regular = alone and sequences.cu_seqlens is None and (memory is None or memory.lengths is None)
        attend = self._regular if regular else self._ragged if alone else self._over_ranks
        output, memory = attend(query, key, value, memory, sequences)
        return Mixed(self.o_proj(output.flatten(-2)), memory)

    def _regular(
        self, query: Tensor, key: Tensor, value: Tensor, memory: KeysAndValues | None, _: Sequences
    ) -> tuple[Tensor, KeysAndValues | None]:
        """Sequences of one length."""
        time, past = query.shape[1], 0 if memory is None else memory.key.shape[1]
        positions = torch.arange(past, past + time, device=query.device)
        query, key = rotate(query, positions, self.rope_theta), rotate(key, positions, self.rope_theta)
        if memory is not None:
            key, value = torch.cat([memory.key, key], 1), torch.cat([memory.value, value], 1)
        mask = None
        if past and time > 1:
            mask = torch.arange(past + time, device=query.device) <= positions[:, None]
        return self._softmax(query, key, value, mask, past == 0), KeysAndValues(key, value, None)

    def _over_ranks(
        self, query: Tensor, key: Tensor, value: Tensor, memory: KeysAndValues | None, sequences: Sequences
    ) -> tuple[Tensor, KeysAndValues | None]:
        """Sequences of one length that are cut over ranks: the keys and values of all ranks come to each."""
        from parallelflow.distributed import Context, gather_tokens

        if memory is not None or sequences.cu_seqlens is not None:
            what = "packed sequences" if memory is None else "a memory"
            raise ValueError(f"context_group: got one with softmax attention and {what}, expected neither")
        context, lengths = Context.of(sequences.context_group), sequences.context_lengths
        assert lengths is not None
        past, time = sum(lengths[: context.rank]), query.shape[1]
        positions = torch.arange(past, past + time, device=query.device)
        query, key = rotate(query, positions, self.rope_theta), rotate(key, positions, self.rope_theta)
        both = gather_tokens(torch.cat([key, value], -1), context, lengths)
        keys, values = both.split([self.head_dim, self.head_dim], -1)
        memory = KeysAndValues(keys, values, None) if context.rank == context.size - 1 else None
        if not time:
            return query + 0 * both.sum(), memory  # its backward pass sends what others wait for
        seen = slice(0, past + time)
        mask = causal_lower_right(time, past + time)
        return self._softmax(query, keys[:, seen], values[:, seen], mask, False), memory

    def _ragged(
        self, query: Tensor, key: Tensor, value: Tensor, memory: KeysAndValues | None, sequences: Sequences
    ) -> tuple[Tensor, KeysAndValues | None]:
        """Sequences of several lengths: each has its own rows, the new ones after those of the memory."""
        packed, device = sequences.cu_seqlens is not None, query.device
        if packed:
            starts = sequences.cu_seqlens if sequences.cu_seqlens_cpu is None else sequences.cu_seqlens_cpu
            assert starts is not None
            new = starts.to("cpu", torch.int64).diff()
        else:
            new = torch.full((query.shape[0],), query.shape[1], device="cpu")
        if memory is None:
            old = torch.zeros_like(new)
        elif memory.lengths is None:
            old = torch.full_like(new, memory.key.shape[1])
        else:
            old = memory.lengths
        total, width = old + new, int(new.max())
        sequence = torch.arange(len(new), device="cpu").repeat_interleave(new)  # of each new token
        place = torch.arange(len(sequence), device="cpu") - (new.cumsum(0) - new)[sequence]  # among its sequence's
        position = old[sequence] + place
        sequence, place, position = (index.to(device) for index in (sequence, place, position))
        query, key, value = (x.flatten(0, 1) for x in (query, key, value))
        query, key = (rotate(x, position, self.rope_theta) for x in (query, key))

        rows = query.new_zeros(len(new), width, *query.shape[1:]).index_put((sequence, place), query)
        keys, values = (x.new_zeros(len(new), int(total.max()), *x.shape[1:]) for x in (key, value))
        if memory is not None:
            keys[:, : memory.key.shape[1]], values[:, : memory.key.shape[1]] = memory.key, memory.value
        keys = keys.index_put((sequence, position), key)
        values = values.index_put((sequence, position), value)
        last = old.to(device)[:, None] + torch.arange(width, device=device)  # what the new rows may see
        mask = (torch.arange(keys.shape[1], device=device) <= last[..., None]).unsqueeze(1)
        output = self._softmax(rows, keys, values, mask, False)[sequence, place]
        output = output.unsqueeze(0) if packed else output.unflatten(0, (len(new), width))
        return output, KeysAndValues(keys, values, total)

    def _softmax(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        """``[N, T, H, D]`` each."""
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        grouped = self.num_key_value_heads != self.num_heads
        output = F.scaled_dot_product_attention(query, key, value, mask, is_causal=causal, enable_gqa=grouped)
        return output.transpose(1, 2)


def rotate(vectors: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Turns channels i and i + D/2 by the angle ``position · theta^(-2i/D)``; ``vectors [..., T, H, D]``,
    ``positions [T]``. In at least float32."""
    size = vectors.shape[-1]
    wide = torch.promote_types(vectors.dtype, torch.float32)
    rates = theta ** (-torch.arange(0, size, 2, device=vectors.device, dtype=wide) / size)
    angles = (positions.to(wide)[:, None] * rates).unsqueeze(-2)
    cosine, sine = angles.cos(), angles.sin()
    first, second = vectors.to(wide).chunk(2, -1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], -1).to(vectors.dtype)
