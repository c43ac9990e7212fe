"""Triangular systems of one chunk, ``(I - G) X = Z``, as rows of keys make them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def chunk_system(
    tokens: int, rows: int, columns: int, *, correlated: bool = False, key_size: int = 32, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """``G [1, n, n]`` and ``Z [1, n, columns]`` in float64, n = tokens · rows, of simultaneous rows that read
    ``-k / rows`` and write ``k``, k of unit length: DeltaNet with β = 1 where there is one row.

    correlated: keys of cosine ≥ 0.99, instead of random directions.
    """
    generator = torch.Generator().manual_seed(seed)
    size = tokens * rows
    keys = F.normalize(torch.randn(size, key_size, generator=generator, dtype=torch.float64), dim=-1)
    if correlated:
        direction = F.normalize(torch.randn(key_size, generator=generator, dtype=torch.float64), dim=0)
        keys = F.normalize(direction + 0.05 * keys, dim=-1)
    token = torch.arange(size) // rows
    gram = -keys @ keys.mT / rows * (token[:, None] > token[None, :])
    right = torch.randn(size, columns, generator=generator, dtype=torch.float64)
    return gram[None], right[None]
