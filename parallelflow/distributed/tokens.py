"""All tokens of a line on every rank, for what cannot do with a state: softmax attention's keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.autograd.function import once_differentiable

from parallelflow.distributed.context import Context

WHAT = "the tokens of all ranks"


class _Gather(torch.autograd.Function):
    """``(context, lengths, tokens [B, T, …]) -> [B, ΣT, …]``; backward, the sum of what each rank has for these."""

    @staticmethod
    def forward(ctx: Any, context: Context, lengths: list[int], tokens: Tensor) -> Tensor:
        ctx.context, ctx.lengths = context, lengths
        padded = tokens.new_zeros(tokens.shape[0], max(lengths), *tokens.shape[2:])
        padded[:, : tokens.shape[1]] = tokens
        if not padded.numel():
            return padded
        parts = context.gather(padded, WHAT)
        return torch.cat([part[:, :length] for part, length in zip(parts, lengths, strict=True)], 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_whole: Tensor) -> tuple[None, None, Tensor]:
        context, lengths = ctx.context, ctx.lengths
        first = sum(lengths[: context.rank])
        total = context.sum(d_whole.contiguous().clone(), "the gradients of all ranks' tokens")
        return None, None, total[:, first : first + lengths[context.rank]]


@_disable_dynamo
def gather_tokens(tokens: Tensor, context_group: Any, context_lengths: Sequence[int]) -> Tensor:
    """``[B, T, …]`` of each rank to ``[B, ΣT, …]`` on all: bytes grow with the line, unlike those of flows."""
    return _Gather.apply(Context.of(context_group), list(context_lengths), tokens)
