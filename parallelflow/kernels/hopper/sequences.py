"""Where each sequence's tokens and chunks lie: by arithmetic for a regular batch, by tables for packed sequences."""

from typing import NamedTuple

import torch

CHUNK = 64


class Sequences(NamedTuple):
    """`count` sequences of `tokens` tokens each, or, when the tables are there, of the lengths they tell (int32 [count + 1])."""

    count: int
    tokens: int
    chunks: int
    token_offsets: torch.Tensor | None = None
    chunk_offsets: torch.Tensor | None = None

    @property
    def packed(self) -> bool:
        return self.token_offsets is not None


def regular(batch: int, tokens: int) -> Sequences:
    """`batch` sequences of equal length; the chunks of one never reach into the next."""
    return Sequences(batch, tokens, batch * -(-tokens // CHUNK))


def packed(cu_seqlens: torch.Tensor, host: list[int] | None = None) -> Sequences:
    """Sequences laid end to end; `cu_seqlens` [N + 1].  Without the host's copy its total of chunks is read from the device."""
    offsets = cu_seqlens.to(torch.int32)
    chunk_offsets = torch.nn.functional.pad(((offsets.diff() + CHUNK - 1) // CHUNK).cumsum(0, dtype=torch.int32), (1, 0))
    if host is None:
        chunks = int(chunk_offsets[-1])
    else:
        chunks = sum(-(-(end - start) // CHUNK) for start, end in zip(host[:-1], host[1:], strict=True))
    return Sequences(len(cu_seqlens) - 1, 0, chunks, offsets.contiguous(), chunk_offsets)
