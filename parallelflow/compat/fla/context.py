"""FLA's ``cp_context``: a line of packed sequences over the ranks of a process group.

FLA's context knows a rank's own piece: ``group``, ``cu_seqlens`` (the boundaries on this rank, from its first token)
and ``is_first_rank`` (whether the first of these sequences begins on it). The engine takes the boundaries on the whole
line, which the ranks put together here, in one small exchange a call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def over_ranks(cp_context: Any, query: Tensor, given: dict[str, Any]) -> dict[str, Any]:
    """The engine's options for FLA's context; ``query [1, T, H, K]`` is this rank's, T the same on all.

    Raises:
        ValueError: for a state, which FLA's context has no place for, a layout that is not of contiguous pieces, or a
            context without a group or boundaries.
    """
    if given["initial_state"] is not None or given["output_final_state"]:
        raise ValueError("cp_context: got one with initial_state or output_final_state, expected neither, as in FLA")
    layout = getattr(cp_context, "layout", "contiguous")
    if layout != "contiguous":
        raise ValueError(f"cp_context: got the layout {layout!r}, expected 'contiguous'")
    group, bounds = getattr(cp_context, "group", None), getattr(cp_context, "cu_seqlens", None)
    if group is None or bounds is None:
        raise ValueError(f"cp_context: got {cp_context!r}, expected one with a group and cu_seqlens")
    if getattr(cp_context, "cu_seqlens_cpu", None) is not None:
        bounds = cp_context.cu_seqlens_cpu
    from torch import distributed

    pieces: list[Any] = [None] * distributed.get_world_size(group)
    distributed.all_gather_object(pieces, (bool(cp_context.is_first_rank), bounds.tolist()), group)
    line = torch.tensor(boundaries(pieces), dtype=torch.int64, device="cpu")
    lengths = [own[-1] for _, own in pieces]
    return {
        "aggregate": "distributed",
        "context_group": group,
        "context_lengths": lengths,
        "cu_seqlens": line.to(query.device),
        "cu_seqlens_cpu": line,
    }


def boundaries(pieces: Sequence[tuple[bool, list[int]]]) -> list[int]:
    """``cu_seqlens`` of the whole line, from every rank's own and whether a sequence begins at its first token."""
    line, start = [0], 0
    for begins, own in pieces:
        line += [start + bound for bound in own[:-1] if (bound > 0 or begins) and start + bound > 0]
        start += own[-1]
    return [*line, start]
