"""The scans of ``kernels/scan.py`` on Hopper GPUs: the same functions, for bfloat16 and float16, chunks of 64 tokens,
K of 64 or 128 and V a multiple of 64.  ``fits`` says whether they serve a problem."""

import torch
from torch import Tensor

from ..chunks import Chunks
from ..launch import bind
from ..scans import Scans
from .descriptors import CHUNK, blocks, rows, vectors
from .forward import forward_kernel
from .reverse import reverse_kernel

STAGES = 3
FLOW_REGISTERS = 128  # a thread, before the roles trade: two programs on a multiprocessor
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


def tiles(key: Tensor, value: Tensor, tied: bool) -> int:
    """Programs that carry one value head's state."""
    return value.shape[3] // 64


def launch_forward(key, value, prepared, chunks, initial_state, final_state, *, query=None, scale=1.0, output=None,
             innovation=None, entry_states=None, flows=None, owners=None, halts=None, halt=1) -> None:  # fmt: skip
    heads, value_dim, key_dim = value.shape[2], value.shape[3], key.shape[3]
    key_rows, value_rows, from_start = rows(key, key_dim), rows(value, 64), vectors(prepared.from_start)
    square = blocks(prepared.scores)
    need_output, save, solve = output is not None, entry_states is not None, prepared.inverse is not None
    vacant = prepared.total  # stands in for pointers that are not read
    if flows is None:
        programs, registers = chunks.sequences * (value_dim // 64), 168 if need_output else 240
    else:
        programs, registers = len(flows) * ((value_dim + solve * key_dim) // 64), FLOW_REGISTERS
    launch = bind(
        forward_kernel, K=key_dim, STAGES=STAGES, SOLVE=int(solve), OUTPUT=int(need_output), SAVE=int(save),
        INITIAL=int(initial_state is not None), FINAL=int(final_state is not None), FLOW=int(flows is not None),
        HALT=int(halts is not None), OWNED=int(owners is not None), PACKED=int(chunks.packed), num_warps=4,
        maxnreg=registers,
    )  # fmt: skip
    launch(
        programs * heads,
        rows(query, key_dim) if need_output else key_rows, key_rows, value_rows,
        blocks(prepared.inverse) if solve else square, square, from_start, vectors(prepared.to_end),
        rows(output, 64) if need_output else value_rows,
        rows(innovation, 64) if save and solve else value_rows,
        blocks(entry_states) if save else blocks(key),
        vacant if initial_state is None else initial_state,
        vacant if final_state is None else final_state,
        vacant if halts is None else halts,
        chunks.cu_seqlens if chunks.packed else vacant,
        chunks.offsets if chunks.packed else vacant,
        next((table for table in (flows, owners) if table is not None), vacant),
        scale, chunks.time, chunks.length, chunks.per_sequence, halt, key.shape[2], heads, value_dim,
    )  # fmt: skip


def launch_reverse(query, key, d_output, prepared, chunks, scale, d_final_state, d_initial_state, *, d_value=None,
             exit_gradients=None, flows=None, owners=None) -> None:  # fmt: skip
    heads, value_dim, key_dim = d_output.shape[2], d_output.shape[3], key.shape[3]
    solve = prepared.inverse is not None
    vacant, key_rows, gradient_rows = prepared.total, rows(key, key_dim), rows(d_output, 64)
    launch = bind(
        reverse_kernel, K=key_dim, STAGES=STAGES, SOLVE=int(solve), FINAL=int(d_final_state is not None),
        INITIAL=int(d_initial_state is not None), FLOW=int(flows is not None), OWNED=int(owners is not None),
        PACKED=int(chunks.packed), num_warps=4, maxnreg=168,
    )  # fmt: skip
    launch(
        (chunks.sequences if flows is None else len(flows)) * heads * (value_dim // 64),
        rows(query, key_dim), key_rows, gradient_rows,
        blocks(prepared.scores if prepared.inverse is None else prepared.inverse), blocks(prepared.scores),
        vectors(prepared.from_start), vectors(prepared.to_end),
        blocks(key) if exit_gradients is None else blocks(exit_gradients),
        gradient_rows if d_value is None else rows(d_value, 64),
        vacant if d_final_state is None else d_final_state,
        vacant if d_initial_state is None else d_initial_state,
        chunks.cu_seqlens if chunks.packed else vacant,
        chunks.offsets if chunks.packed else vacant,
        next((table for table in (flows, owners) if table is not None), vacant),
        scale, chunks.time, chunks.length, chunks.per_sequence, key.shape[2], heads, value_dim,
    )  # fmt: skip


SCANS = Scans(tiles, launch_forward, launch_reverse)
