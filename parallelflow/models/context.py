"""The loss of lines that are cut over ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._compile import _disable_dynamo

from parallelflow.distributed import Context, lengths_of

IGNORED = -100


@_disable_dynamo
def loss_over_ranks(
    logits: Tensor, labels: Tensor, cu_seqlens: Tensor | None, context_group: Any, count: Tensor | int | None = None
) -> Tensor:
    """The mean cross-entropy of the whole lines' next tokens, in nats, in float32 or wider.

    Its value is that of the whole on every rank. Its gradient is that of the rank's own terms times the number of
    ranks, so that the mean of the ranks' gradients is the gradient of the whole.

    Args:
        logits, labels: ``[B, T, vocabulary]``, ``[B, T]``, this rank's; the label of a rank's last token is the next
            rank's first.
        cu_seqlens: of the whole line: a sequence's first token has no loss.
        count: what the sum is divided by; None: the number of labels there are.
    """
    context = Context.of(context_group)
    first = torch.full_like(labels[:, :1], IGNORED) if labels.shape[1] == 0 else labels[:, :1].clone()
    firsts = context.gather(first, "the labels at the edges of ranks")
    lengths = lengths_of(context, labels.shape[1], labels.device)
    if cu_seqlens is not None:
        before = sum(lengths[: context.rank])
        starts = cu_seqlens.to(labels.device, torch.int64)
        own = starts[(starts >= before) & (starts < before + labels.shape[1])] - before
        labels = labels.index_fill(1, own, IGNORED)
        begun = {int(start) for start in cu_seqlens.tolist()}
    following = torch.full_like(first, IGNORED)
    for rank in range(context.rank + 1, context.size):
        if lengths[rank]:
            begins = cu_seqlens is not None and sum(lengths[:rank]) in begun
            following = following if begins else firsts[rank]
            break
    targets = torch.cat([labels[:, 1:], following], 1)[:, : labels.shape[1]]
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    own_sum = F.cross_entropy(wide.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")
    found = torch.stack([own_sum.detach().double(), (targets != IGNORED).sum().double()])
    total, terms = context.sum(found, "the loss").unbind()
    divisor = terms.clamp(min=1) if count is None else torch.as_tensor(count).to(terms)
    loss = own_sum * (context.size / divisor).to(own_sum.dtype)
    return loss + ((total / divisor).to(loss.dtype) - loss).detach()
