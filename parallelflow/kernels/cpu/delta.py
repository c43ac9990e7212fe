"""The delta rule and write-only rows with no or scalar decay on a CPU: forward, backward and one token.

    tied:   S_t = e^{g_t} S_{t-1} + beta_t k_t (v_t - k_t^T e^{g_t} S_{t-1})^T        (DeltaNet, Gated DeltaNet)
    else:   S_t = e^{g_t} S_{t-1} + beta_t k_t v_t^T                                  (linear attention, retention, SSD)
    o_t = scale S_t^T q_t

Each head of each sequence is walked by one thread, all of a chunk's matrices in its cache. The backward pass starts
again from the states that entered each window of 4 chunks. Source: Yang, Kautz, Hatamizadeh 2025 (arXiv 2412.06464)
for the chunked gated delta rule; the gradients are written out in ``source/backward.h``.
"""

from __future__ import annotations

import ctypes
from functools import cache, reduce
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from parallelflow.kernels.cpu.build import library

LARGEST_HEAD = 512
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class _Tokens(ctypes.Structure):
    """``[B, T, heads, D]`` at any strides but the last."""

    _fields_ = [("at", ctypes.c_void_p), ("batch", ctypes.c_long), ("time", ctypes.c_long), ("head", ctypes.c_long),
                ("type", ctypes.c_int)]  # fmt: skip


class _Problem(ctypes.Structure):
    """``struct Problem`` of source/problem.h, field by field."""

    _fields_ = [
        ("query", _Tokens), ("key", _Tokens), ("value", _Tokens),
        ("beta", ctypes.c_void_p), ("log_decay", ctypes.c_void_p), ("output", _Tokens),
        ("initial", ctypes.c_void_p), ("final", ctypes.c_void_p), ("entries", ctypes.c_void_p),
        ("d_query", ctypes.c_void_p), ("d_key", ctypes.c_void_p), ("d_value", _Tokens),
        ("d_beta", ctypes.c_void_p), ("d_log_decay", ctypes.c_void_p), ("d_initial", ctypes.c_void_p),
        ("starts", ctypes.c_void_p), ("first_window", ctypes.c_void_p),
        *((name, ctypes.c_long) for name in ("batch", "time", "sequences", "heads", "value_heads", "key_dim",
                                             "value_dim", "tied", "parts", "threads")),
        ("scale", ctypes.c_float),
    ]  # fmt: skip


class _Call:
    """A problem as the library takes it, and the tensors that it points to."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, beta: Tensor | None, log_decay: Tensor | None, *,
                 tied: bool, scale: float, initial_state: Tensor | None,
                 sequence_starts: tuple[int, ...] | None) -> None:  # fmt: skip
        self.kept: list[Tensor] = []
        self.problem = problem = _Problem()
        self.batch, self.time, self.heads, self.key_dim = query.shape
        self.value_heads, self.value_dim = value.shape[2:]
        self.sequences = self.batch if sequence_starts is None else len(sequence_starts) - 1
        problem.query, problem.key, problem.value = self.tokens(query), self.tokens(key), self.tokens(value)
        problem.beta, problem.log_decay = self.numbers(beta), self.numbers(log_decay)
        problem.initial = self.numbers(initial_state)
        lengths = [self.time] * self.sequences
        if sequence_starts is not None:
            problem.starts = self.numbers(torch.tensor(sequence_starts, dtype=torch.int64), torch.int64)
            lengths = [last - first for first, last in pairwise(sequence_starts)]
        self.first_windows = [0, *accumulate(-(-length // _window()) for length in lengths)]
        problem.first_window = self.numbers(torch.tensor(self.first_windows), torch.int64)
        problem.batch, problem.time, problem.sequences = self.batch, self.time, self.sequences
        problem.heads, problem.value_heads = self.heads, self.value_heads
        problem.key_dim, problem.value_dim = self.key_dim, self.value_dim
        problem.tied, problem.scale, problem.threads = tied, scale, torch.get_num_threads()
        problem.parts = 1

    def numbers(self, tensor: Tensor | None, dtype: torch.dtype = torch.float32) -> int | None:
        """Contiguous, in one dtype."""
        if tensor is None:
            return None
        tensor = tensor.to(dtype).contiguous()
        self.kept.append(tensor)
        return tensor.data_ptr()

    def tokens(self, tensor: Tensor) -> _Tokens:
        """As it lies."""
        if tensor.stride(3) != 1:
            tensor = tensor.contiguous()
        self.kept.append(tensor)
        return _Tokens(tensor.data_ptr(), *tensor.stride()[:3], TYPES[tensor.dtype])

    def states(self, count: int, like: Tensor) -> Tensor:
        """``[count, HV, K, V]`` in float32."""
        return like.new_empty(count, self.value_heads, self.key_dim, self.value_dim, dtype=torch.float32)

    def run(self, name: str) -> None:
        """Raises MemoryError where a thread's workspace cannot be had."""
        if getattr(library(), name)(ctypes.byref(self.problem)):
            raise MemoryError("parallelflow: no memory for the workspace of the CPU kernels")


def forward(query: Tensor, key: Tensor, value: Tensor, beta: Tensor | None, log_decay: Tensor | None, *, tied: bool,
            scale: float, initial_state: Tensor | None = None, sequence_starts: tuple[int, ...] | None = None,
            need_final_state: bool = False, save_for_backward: bool = False,
            ) -> tuple[Tensor, Tensor | None, list[Tensor]]:  # fmt: skip
    """Output [B, T, HV, V], final state [N, HV, K, V] in float32 or None, and what the backward keeps.

    query, key [B, T, H, K], value [B, T, HV, V] in float32, bfloat16 or float16, HV a multiple of H; beta, log_decay
    [B, T, HV] (beta may be None if not tied; log_decay None means no decay); initial_state [N, HV, K, V];
    sequence_starts: the packed sequences' first tokens, and T. Products and sums are in float32.
    """
    call = _Call(query, key, value, beta, log_decay, tied=tied, scale=scale, initial_state=initial_state,
                 sequence_starts=sequence_starts)  # fmt: skip
    output = query.new_empty(call.batch, call.time, call.value_heads, call.value_dim)
    final = call.states(call.sequences, query) if need_final_state else None
    entries = call.states(call.first_windows[-1], query) if save_for_backward else None
    call.problem.output = call.tokens(output)
    call.problem.final = call.numbers(final)
    call.problem.entries = call.numbers(entries)
    call.run("parallelflow_forward")
    return output, final, [] if entries is None else [entries]


def backward(query: Tensor, key: Tensor, value: Tensor, beta: Tensor | None, log_decay: Tensor | None,
             saved: list[Tensor], d_output: Tensor, d_final_state: Tensor | None, *, tied: bool, scale: float,
             initial_state: Tensor | None = None, sequence_starts: tuple[int, ...] | None = None,
             ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of query, key, value, beta, log_decay and initial_state (None where the input is None).

    saved is the forward's; empty, the forward is run again.
    """
    if not saved:
        _, _, saved = forward(query, key, value, beta, log_decay, tied=tied, scale=scale, initial_state=initial_state,
                              sequence_starts=sequence_starts, save_for_backward=True)  # fmt: skip
    call = _Call(query, key, value, beta, log_decay, tied=tied, scale=scale, initial_state=initial_state,
                 sequence_starts=sequence_starts)  # fmt: skip
    problem, like = call.problem, query.new_empty(0, dtype=torch.float32)
    # A thread takes all value heads of a key head, and sums them, where there are threads enough for that.
    group = call.value_heads // call.heads
    problem.parts = parts = 1 if call.sequences * call.heads >= 2 * torch.get_num_threads() else group
    d_query, d_key = (like.new_empty(parts, *query.shape) for _ in range(2))
    d_value = torch.empty_like(value, memory_format=torch.contiguous_format)
    d_beta, d_log_decay = (None if x is None else like.new_empty(x.shape) for x in (beta, log_decay))
    d_initial = None if initial_state is None else call.states(call.sequences, query)
    problem.entries, problem.final = call.numbers(saved[0]), call.numbers(d_final_state)
    problem.output, problem.d_value = call.tokens(d_output), call.tokens(d_value)
    problem.d_query, problem.d_key = call.numbers(d_query), call.numbers(d_key)
    problem.d_beta, problem.d_log_decay = call.numbers(d_beta), call.numbers(d_log_decay)
    problem.d_initial = call.numbers(d_initial)
    call.run("parallelflow_backward")

    def as_given(gradient: Tensor | None, given: Tensor | None) -> Tensor | None:
        return None if gradient is None or given is None else gradient.to(given.dtype)

    return (
        reduce(torch.add, d_query).to(query.dtype), reduce(torch.add, d_key).to(key.dtype), d_value,
        as_given(d_beta, beta), as_given(d_log_decay, log_decay), as_given(d_initial, initial_state),
    )  # fmt: skip


def step(query: Tensor, key: Tensor, value: Tensor, beta: Tensor | None, log_decay: Tensor | None, *, tied: bool,
         scale: float, initial_state: Tensor | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output [B, 1, HV, V] and state [B, HV, K, V] after one token (T = 1)."""
    call = _Call(query, key, value, beta, log_decay, tied=tied, scale=scale, initial_state=initial_state,
                 sequence_starts=None)  # fmt: skip
    output = query.new_empty(call.batch, 1, call.value_heads, call.value_dim)
    final = call.states(call.batch, query)
    call.problem.output, call.problem.final = call.tokens(output), call.numbers(final)
    library().parallelflow_step(ctypes.byref(call.problem))
    return output, final


@cache
def _window() -> int:
    """Tokens between the states that the forward pass keeps."""
    return library().parallelflow_window()
