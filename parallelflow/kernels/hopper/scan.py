"""The scans of ``kernels/scan.py`` on Hopper GPUs: the same functions, for bfloat16 and float16, chunks of 64 tokens,
K of 64 or 128 and V a multiple of 64.  ``fits`` says whether they serve a problem."""

from contextlib import AbstractContextManager

import torch
from torch import Tensor

from ..chunks import Chunks
from ..launch import bind
from ..prepare import Prepared
from .descriptors import CHUNK, blocks, rows, vectors
from .forward import forward_kernel
from .reverse import reverse_kernel

STAGES = 3
LARGEST_COORDINATE = 2**31 - 1  # TMA coordinates are 32-bit


def fits(query: Tensor, value: Tensor, chunks: Chunks) -> bool:
    """Whether the Hopper scans serve these shapes, dtype and device."""
    heads, value_dim = value.shape[-2:]
    return (
        query.is_cuda
        and torch.cuda.get_device_capability(query.device)[0] == 9
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] in (64, 128)
        and value_dim % 64 == 0
        and chunks.size == CHUNK
        and chunks.count > 0
        and max(chunks.count * heads * max(value_dim, CHUNK), query.shape[0] * query.shape[1] + 2 * CHUNK)
        <= LARGEST_COORDINATE
    )


def forward_scan(query: Tensor, key: Tensor, value: Tensor, prepared: Prepared, chunks: Chunks, *, scale: float,
                 initial_state: Tensor | None, final_state: bool) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Output [B, T, HV, V] in the dtype of `value` and, on request, the final state [N, HV, K, V] in float32.

    query, key [B, T, H, K], value [B, T, HV, V], contiguous; initial_state [N, HV, K, V] in float32 or None.
    """
    output = torch.empty_like(value)
    final = _state_like(key, value, chunks) if final_state else None
    _forward(query, key, value, prepared, chunks, scale, initial_state, final, output, None, None)
    return output, final


def recompute_scan(key: Tensor, value: Tensor, prepared: Prepared, chunks: Chunks, *, initial_state: Tensor | None,
                   launch_in: AbstractContextManager[None]) -> tuple[Tensor, Tensor]:  # fmt: skip
    """States at the chunks' entries, transposed, [M, HV, V, K], and R [B, T, HV, V], both in the dtype of `value`."""
    entry_states = value.new_empty(chunks.count, value.shape[2], value.shape[3], key.shape[3])
    innovation = value if prepared.inverse is None else torch.empty_like(value)
    with launch_in:
        _forward(None, key, value, prepared, chunks, 1.0, initial_state, None, None, innovation, entry_states)
    return entry_states, innovation


def _forward(
    query, key, value, prepared, chunks, scale, initial_state, final_state, output, innovation, entry_states
) -> None:
    heads, value_dim, key_dim = value.shape[2], value.shape[3], key.shape[3]
    key_rows, value_rows, from_start = rows(key, key_dim), rows(value, 64), vectors(prepared.from_start)
    square = blocks(prepared.scores)
    need_output, save, solve = output is not None, entry_states is not None, prepared.inverse is not None
    vacant = prepared.total  # stands in for pointers that are not read
    launch = bind(
        forward_kernel, K=key_dim, STAGES=STAGES, SOLVE=int(solve), OUTPUT=int(need_output), SAVE=int(save),
        INITIAL=int(initial_state is not None), FINAL=int(final_state is not None), PACKED=int(chunks.packed),
        num_warps=4, maxnreg=168 if need_output else 240,
    )  # fmt: skip
    launch(
        chunks.sequences * heads * (value_dim // 64),
        rows(query, key_dim) if need_output else key_rows, key_rows, value_rows,
        blocks(prepared.inverse) if solve else square, square, from_start, vectors(prepared.to_end),
        rows(output, 64) if need_output else value_rows,
        rows(innovation, 64) if save and solve else value_rows,
        blocks(entry_states) if save else blocks(key),
        vacant if initial_state is None else initial_state,
        vacant if final_state is None else final_state,
        chunks.cu_seqlens if chunks.packed else vacant,
        chunks.offsets if chunks.packed else vacant,
        scale, chunks.time, chunks.per_sequence, key.shape[2], heads, value_dim,
    )  # fmt: skip


def reverse_scan(query: Tensor, key: Tensor, d_output: Tensor, prepared: Prepared, chunks: Chunks, *, scale: float,
                 d_final_state: Tensor | None, initial_gradient: bool,
                 d_value: Tensor) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Gradients of the states at the chunks' exits, transposed, [M, HV, V, K], in the dtype of `d_output`, and, on
    request, of the initial state [N, HV, K, V] in float32; those of the values go into `d_value` [B, T, HV, V]."""
    heads, value_dim, key_dim = d_output.shape[2], d_output.shape[3], key.shape[3]
    exit_gradients = d_output.new_empty(chunks.count, heads, value_dim, key_dim)
    d_initial_state = _state_like(key, d_output, chunks) if initial_gradient else None
    solve = prepared.inverse is not None
    vacant = prepared.total
    launch = bind(
        reverse_kernel, K=key_dim, STAGES=STAGES, SOLVE=int(solve), FINAL=int(d_final_state is not None),
        INITIAL=int(d_initial_state is not None), PACKED=int(chunks.packed), num_warps=4, maxnreg=168,
    )  # fmt: skip
    launch(
        chunks.sequences * heads * (value_dim // 64),
        rows(query, key_dim), rows(key, key_dim), rows(d_output, 64),
        blocks(prepared.scores if prepared.inverse is None else prepared.inverse), blocks(prepared.scores),
        vectors(prepared.from_start), vectors(prepared.to_end),
        blocks(exit_gradients), rows(d_value, 64),
        vacant if d_final_state is None else d_final_state,
        vacant if d_initial_state is None else d_initial_state,
        chunks.cu_seqlens if chunks.packed else vacant,
        chunks.offsets if chunks.packed else vacant,
        scale, chunks.time, chunks.per_sequence, key.shape[2], heads, value_dim,
    )  # fmt: skip
    return exit_gradients, d_initial_state


def _state_like(key: Tensor, value: Tensor, chunks: Chunks) -> Tensor:
    shape = (chunks.sequences, value.shape[2], key.shape[3], value.shape[3])
    return torch.empty(shape, dtype=torch.float32, device=key.device)
