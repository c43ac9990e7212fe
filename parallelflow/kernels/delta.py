"""The delta rule and write-only rows with no or scalar decay, forward and backward, from the stages.

    tied:   S_t = e^{g_t} S_{t-1} + beta_t k_t (v_t - k_t^T e^{g_t} S_{t-1})^T        (DeltaNet, Gated DeltaNet)
    else:   S_t = e^{g_t} S_{t-1} + beta_t k_t v_t^T                                  (linear attention, retention, SSD)
    o_t = scale S_t^T q_t

The backward keeps the arrays of `prepare` and recomputes the states with one more scan.  Source: Yang, Kautz,
Hatamizadeh 2025 (arXiv 2412.06464) for the chunked gated delta rule; the gradients are those of `gradient`.
"""

from contextlib import nullcontext
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import scan as portable
from .chunks import Chunks, known_chunks, packed_chunks, regular_chunks
from .gradient import Gradients, gradient, vacant_gradients
from .prepare import Prepared, prepare
from .streams import aside, rejoin

LARGEST_HEAD = 512
LARGEST_STATES = 2**28  # bytes of exit gradients at a time
HALF_OF_A_CARD = 66  # multiprocessors of an H100 or H200: two scans of so many programs run beside each other


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


def _preparation(tier: str, query: Tensor, key: Tensor, chunks: Chunks):
    """The tier's `prepare`; the portable one where Hopper's does not fit."""
    if tier == "hopper":
        from .hopper import prepare as hopper

        if hopper.fits(query, key, chunks):
            return hopper.prepare
    return prepare


def _gradient(tier: str, query: Tensor, value: Tensor, chunks: Chunks):
    """The tier's `gradient`; the portable one where Hopper's does not fit."""
    if tier == "hopper":
        from .hopper import gradient as hopper

        if hopper.fits(query, value, chunks):
            return hopper.gradient
    return gradient


def chunks_of(query: Tensor, value: Tensor, cu_seqlens: Tensor | None, cu_seqlens_host: Tensor | None,
              sequence_starts: tuple[int, ...] | None = None) -> Chunks:  # fmt: skip
    """How the line is cut."""
    batch, time = query.shape[:2]
    size = chunk_size(query, value)
    if sequence_starts is not None:
        return known_chunks(sequence_starts, size, query.device)
    if cu_seqlens is None:
        return regular_chunks(batch, time, size)
    return packed_chunks(cu_seqlens, time, size, cu_seqlens_host)


def _contiguous(*tensors: Tensor | None) -> Any:
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def forward(query: Tensor, key: Tensor, value: Tensor, beta: Tensor | None, log_decay: Tensor | None, *, tied: bool,
            scale: float, initial_state: Tensor | None = None, cu_seqlens: Tensor | None = None,
            cu_seqlens_host: Tensor | None = None, sequence_starts: tuple[int, ...] | None = None,
            need_final_state: bool = False, save_for_backward: bool = False, tier: str = "triton",
            ) -> tuple[Tensor, Tensor | None, list[Tensor]]:  # fmt: skip
    """Output [B, T, HV, V], final state [N, HV, K, V] in float32 or None, and what the backward keeps.

    query, key [B, T, H, K], value [B, T, HV, V] of one dtype (bfloat16, float16 or float32), HV a multiple of H;
    beta, log_decay [B, T, HV] of any floating dtype (beta may be None if not tied; log_decay None means no decay);
    initial_state [N, HV, K, V] in float32; cu_seqlens [N + 1] on the device, or sequence_starts, the same
    numbers on the host, with B = 1.  Head sizes up to 512.
    """
    _check(query, key, value, beta, log_decay, tied, initial_state)
    query, key, value, beta, log_decay, initial_state = _contiguous(query, key, value, beta, log_decay, initial_state)
    chunks = chunks_of(query, value, cu_seqlens, cu_seqlens_host, sequence_starts)
    make = _preparation(tier, query, key, chunks)
    prepared = make(query, key, beta, log_decay, value.shape[2], chunks, tied=tied, scale=scale)
    output, final_state = _scans(tier).forward_scan(
        query, key, value, prepared, chunks, scale=scale, initial_state=initial_state, final_state=need_final_state
    )
    saved = [tensor for tensor in prepared if tensor is not None] if save_for_backward else []
    return output, final_state, saved


def backward(query: Tensor, key: Tensor, value: Tensor, beta: Tensor | None, log_decay: Tensor | None,
             saved: list[Tensor], d_output: Tensor, d_final_state: Tensor | None, *, tied: bool, scale: float,
             initial_state: Tensor | None = None, cu_seqlens: Tensor | None = None,
             cu_seqlens_host: Tensor | None = None, sequence_starts: tuple[int, ...] | None = None,
             tier: str = "triton",
             ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of query, key, value, beta, log_decay and initial_state (None where the input is None).

    saved is the forward's; empty, the arrays of `prepare` are made again.
    """
    query, key, value, beta, log_decay, initial_state, d_output, d_final_state = _contiguous(
        query, key, value, beta, log_decay, initial_state, d_output, d_final_state)  # fmt: skip
    chunks = chunks_of(query, value, cu_seqlens, cu_seqlens_host, sequence_starts)
    if not saved:
        make = _preparation(tier, query, key, chunks)
        prepared = make(query, key, beta, log_decay, value.shape[2], chunks, tied=tied, scale=scale)
    else:
        prepared = Prepared(*saved) if tied else Prepared(None, *saved)
    scans = _scans(tier)
    together = query.is_cuda and programs_of(chunks, value) <= HALF_OF_A_CARD
    entry_states, innovation = scans.recompute_scan(
        key, value, prepared, chunks, initial_state=initial_state,
        launch_in=aside(query.device) if together else nullcontext())  # fmt: skip
    d_value, found = torch.empty_like(value), vacant_gradients(query, key, beta, log_decay)
    d_state = d_final_state
    pieces = pieces_of(chunks, entry_states)
    for piece in reversed(pieces):
        q, k, b, g, do, r, dv, *into = map(piece.tokens_of, (query, key, beta, log_decay, d_output, innovation, d_value,
                                                             *found))  # fmt: skip
        part = Prepared(*map(piece.chunks_of, prepared))
        exit_gradients, d_state = scans.reverse_scan(
            q, k, do, part, piece.layout, scale=scale, d_final_state=d_state,
            initial_gradient=initial_state is not None or piece is not pieces[0], d_value=dv)  # fmt: skip
        if together:
            rejoin(query.device)
        _gradient(tier, q, do, piece.layout)(
            q, k, b, g, do, r, dv, piece.chunks_of(entry_states), exit_gradients, part, piece.layout, scale=scale,
            into=Gradients(*into))  # fmt: skip
        del exit_gradients  # before the next piece takes as much
    return found.query, found.key, d_value, found.beta, found.log_decay, d_state


class Piece(NamedTuple):
    """A run of whole chunks: its tokens and its chunks (None: all there are), and how those lie."""

    tokens: slice | None
    chunks: slice | None
    layout: Chunks

    def tokens_of(self, tensor: Any) -> Any:
        """Its tokens of ``[B, T, …]`` (None of None)."""
        return tensor if self.tokens is None or tensor is None else tensor[:, self.tokens]

    def chunks_of(self, tensor: Any) -> Any:
        """Its chunks of ``[M, …]`` (None of None)."""
        return tensor if self.chunks is None or tensor is None else tensor[self.chunks]


def pieces_of(chunks: Chunks, states: Tensor) -> list[Piece]:
    """Where the reverse scan halts for the gradients, so that its states need not all be there at once: one long
    sequence in pieces whose states take at most LARGEST_STATES bytes; whole batches in one piece."""
    size, count, time = chunks.size, chunks.count, chunks.time
    parts = -(-states.numel() * states.element_size() // LARGEST_STATES)
    if chunks.packed or chunks.sequences != 1 or parts <= 1:
        return [Piece(None, None, chunks)]
    bounds = [count * part // parts for part in range(parts + 1)]
    return [
        Piece(slice(first * size, last * size), slice(first, last),
              regular_chunks(1, min(last * size, time) - first * size, size))
        for first, last in pairwise(bounds)
    ]  # fmt: skip


def programs_of(chunks: Chunks, value: Tensor) -> int:
    """How many programs a scan has, each with 64 value channels of a head."""
    return chunks.sequences * value.shape[2] * -(-value.shape[3] // 64)


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
