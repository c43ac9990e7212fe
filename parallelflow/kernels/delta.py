"""The delta rule and write-only rows with no or scalar decay, forward and backward, from the stages.

    tied:   S_t = e^{g_t} S_{t-1} + beta_t k_t (v_t - k_t^T e^{g_t} S_{t-1})^T        (DeltaNet, Gated DeltaNet)
    else:   S_t = e^{g_t} S_{t-1} + beta_t k_t v_t^T                                  (linear attention, retention, SSD)
    o_t = scale S_t^T q_t

The backward keeps the arrays of `prepare` and recomputes the states with one more scan.  Source: Yang, Kautz,
Hatamizadeh 2025 (arXiv 2412.06464) for the chunked gated delta rule; the gradients are those of `gradient`.
"""

from typing import Any

import torch
from torch import Tensor

from . import scan as portable
from .chunks import Chunks, packed_chunks, regular_chunks
from .gradient import gradient
from .prepare import Prepared, prepare

LARGEST_HEAD = 512


def chunk_size(query: Tensor, value: Tensor) -> int:
    """Tokens in a chunk: 64, or 32 where a token's key or value takes more than 512 bytes."""
    return 64 if max(query.shape[-1], value.shape[-1]) * query.element_size() <= 512 else 32


def _scans(tier: str):
    if tier == "triton":
        return portable
    if tier == "hopper":
        from .hopper import scan as hopper

        return hopper
    raise ValueError(f"tier: got {tier!r}, expected 'triton' or 'hopper'")


def chunks_of(query: Tensor, value: Tensor, cu_seqlens: Tensor | None, cu_seqlens_host: Tensor | None) -> Chunks:
    """How the line is cut."""
    batch, time = query.shape[:2]
    size = chunk_size(query, value)
    if cu_seqlens is None:
        return regular_chunks(batch, time, size)
    return packed_chunks(cu_seqlens, time, size, cu_seqlens_host)


def _contiguous(*tensors: Tensor | None) -> Any:
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


@torch.no_grad()
def forward(query: Tensor, key: Tensor, value: Tensor, beta: Tensor | None, log_decay: Tensor | None, *, tied: bool,
            scale: float, initial_state: Tensor | None = None, cu_seqlens: Tensor | None = None,
            cu_seqlens_host: Tensor | None = None, need_final_state: bool = False, save_for_backward: bool = False,
            tier: str = "triton") -> tuple[Tensor, Tensor | None, list[Tensor]]:  # fmt: skip
    """Output [B, T, HV, V], final state [N, HV, K, V] in float32 or None, and what the backward keeps.

    query, key [B, T, H, K], value [B, T, HV, V] of one dtype (bfloat16, float16 or float32), HV a multiple of H;
    beta, log_decay [B, T, HV] of any floating dtype (beta may be None if not tied; log_decay None means no decay);
    initial_state [N, HV, K, V] in float32; cu_seqlens [N + 1] with B = 1.  Head sizes up to 512.
    """
    _check(query, key, value, beta, log_decay, tied, initial_state)
    query, key, value, beta, log_decay, initial_state = _contiguous(query, key, value, beta, log_decay, initial_state)
    chunks = chunks_of(query, value, cu_seqlens, cu_seqlens_host)
    prepared = prepare(query, key, beta, log_decay, value.shape[2], chunks, tied=tied, scale=scale)
    output, final_state = _scans(tier).forward_scan(
        query, key, value, prepared, chunks, scale=scale, initial_state=initial_state, final_state=need_final_state
    )
    saved = [tensor for tensor in prepared if tensor is not None] if save_for_backward else []
    return output, final_state, saved


@torch.no_grad()
def backward(query: Tensor, key: Tensor, value: Tensor, beta: Tensor | None, log_decay: Tensor | None,
             saved: list[Tensor], d_output: Tensor, d_final_state: Tensor | None, *, tied: bool, scale: float,
             initial_state: Tensor | None = None, cu_seqlens: Tensor | None = None,
             cu_seqlens_host: Tensor | None = None, tier: str = "triton",
             ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of query, key, value, beta, log_decay and initial_state (None where the input is None).

    saved is the forward's; empty, the arrays of `prepare` are made again.
    """
    query, key, value, beta, log_decay, initial_state, d_output, d_final_state = _contiguous(
        query, key, value, beta, log_decay, initial_state, d_output, d_final_state)  # fmt: skip
    chunks = chunks_of(query, value, cu_seqlens, cu_seqlens_host)
    if not saved:
        prepared = prepare(query, key, beta, log_decay, value.shape[2], chunks, tied=tied, scale=scale)
    else:
        prepared = Prepared(*saved) if tied else Prepared(None, *saved)
    scans = _scans(tier)
    entry_states, innovation = scans.recompute_scan(key, value, prepared, chunks, initial_state=initial_state)
    exit_gradients, d_value, d_initial_state = scans.reverse_scan(
        query, key, d_output, prepared, chunks, scale=scale, d_final_state=d_final_state,
        initial_gradient=initial_state is not None)  # fmt: skip
    d_query, d_key, d_beta, d_log_decay = gradient(
        query, key, beta, log_decay, d_output, innovation, d_value, entry_states, exit_gradients, prepared, chunks,
        scale=scale)  # fmt: skip
    return d_query, d_key, d_value, d_beta, d_log_decay, d_initial_state


def _check(query, key, value, beta, log_decay, tied, initial_state) -> None:
    dtypes = {query.dtype, key.dtype, value.dtype}
    if len(dtypes) != 1 or query.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(
            f"query, key, value: got dtypes {query.dtype}, {key.dtype}, {value.dtype}, "
            "expected one of bfloat16, float16, float32 for all three"
        )
    if max(query.shape[-1], value.shape[-1]) > LARGEST_HEAD:
        raise ValueError(
            f"query, value: got head sizes {query.shape[-1]} and {value.shape[-1]}, expected at most {LARGEST_HEAD}"
        )
    if value.shape[2] % query.shape[2]:
        raise ValueError(f"value: got {value.shape[2]} heads, expected a multiple of the query's {query.shape[2]}")
    if tied and beta is None:
        raise ValueError("beta: got None, expected [B, T, HV] for the delta rule")
    for name, tensor in (("beta", beta), ("log_decay", log_decay)):
        if tensor is not None and tensor.shape != value.shape[:3]:
            raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected {tuple(value.shape[:3])}")
    if initial_state is not None and initial_state.dtype != torch.float32:
        raise ValueError(f"initial_state: got dtype {initial_state.dtype}, expected float32")
