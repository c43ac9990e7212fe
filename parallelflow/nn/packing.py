"""Padding is packing: the tokens of a padded batch on one line, and back."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from parallelflow.checks import expect_tensor, show


class Packing(NamedTuple):
    """Where the tokens of a padded batch ``[B, T]`` lie once they are packed on a line of M tokens.

    ``places [M]`` are their places in the flattened batch, ``cu_seqlens [B + 1]`` the sequences' first tokens on the
    line, then M, and ``cu_seqlens_cpu`` the same on the host. What layers see is real tokens only, so outputs and
    states are those of each sequence alone, whatever the padding and wherever it stands.
    """

    places: Tensor
    cu_seqlens: Tensor
    cu_seqlens_cpu: Tensor
    batch: int
    time: int

    @staticmethod
    def of(attention_mask: Tensor | None, hidden_states: Tensor) -> Packing | None:
        """The packing of ``hidden_states [B, T, D]``, or None where nothing is padded.

        Args:
            attention_mask: ``[B, T]``, or ``[B, T']`` with T' > T, whose last T columns count: tokens that went into a
                memory come first. Booleans or numbers; 0 is padding, 1 a token.

        Raises:
            TypeError, ValueError: for another rank, batch or length, and for numbers other than 0 and 1.
        """
        if attention_mask is None:
            return None
        expect_tensor("attention_mask", attention_mask)
        batch, time = hidden_states.shape[:2]
        if attention_mask.ndim != 2 or attention_mask.shape[0] != batch or attention_mask.shape[1] < time:
            raise ValueError(
                f"attention_mask: got shape {show(attention_mask)}, expected [B, T] = [{batch}, {time}] or more columns"
            )
        recent = attention_mask[:, attention_mask.shape[1] - time :]
        if bool((recent == 1).all()):
            return None
        mask = recent.to(torch.bool)
        if recent.dtype != torch.bool and not bool(((recent == 0) | (recent == 1)).all()):
            raise ValueError("attention_mask: got numbers other than 0 and 1, expected 0 (padding) and 1 (a token)")
        cu_seqlens = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0))
        return Packing(mask.flatten().nonzero().squeeze(1), cu_seqlens, cu_seqlens.cpu(), batch, time)

    def pack(self, tensor: Tensor) -> Tensor:
        """``[B, T, …]`` to ``[1, M, …]``."""
        return tensor.flatten(0, 1).index_select(0, self.places).unsqueeze(0)

    def unpack(self, tensor: Tensor) -> Tensor:
        """``[1, M, …]`` to ``[B, T, …]``, zero where the padding is."""
        padded = tensor.new_zeros(self.batch * self.time, *tensor.shape[2:])
        return padded.index_copy(0, self.places, tensor.squeeze(0)).unflatten(0, (self.batch, self.time))
