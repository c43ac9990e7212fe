"""The delta rule and write-only rows with no or scalar decay, forward and backward, from the stages.

    tied:   S_t = e^{g_t} S_{t-1} + beta_t k_t (v_t - k_t^T e^{g_t} S_{t-1})^T        (DeltaNet, Gated DeltaNet)
    else:   S_t = e^{g_t} S_{t-1} + beta_t k_t v_t^T                                  (linear attention, retention, SSD)
    o_t = scale S_t^T q_t

The backward keeps the arrays of `prepare` and recomputes the states with one more scan, a piece of time at a time
(``pieces``), the latest first.  Long sequences are cut into segments where there are few heads (``segments``): one more
scan each way finds the segments' flows, ``compose`` their entry states, and then all segments run at once.

Source: Yang, Kautz, Hatamizadeh 2025 (arXiv 2412.06464) for the chunked gated delta rule; the gradients are those of
`gradient`.
"""

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .arena import Arena
from .compose import entry_states, exit_gradients
from .gradient import Gradients
from .plan import Passed
from .prepare import Prepared
from .schedule import Group, Kept, Schedule, Scratch, chunks_of
from .streams import aside, rejoin
from .watch import Launched, tell

LARGEST_HEAD = 512


class Arguments(NamedTuple):
    """A problem's tensors, contiguous: query, key [B, T, H, K], value [B, T, HV, V], beta, log_decay [B, T, HV],
    initial_state [N, HV, K, V]."""

    query: Tensor
    key: Tensor
    value: Tensor
    beta: Tensor | None
    log_decay: Tensor | None
    initial_state: Tensor | None


def forward(query: Tensor, key: Tensor, value: Tensor, beta: Tensor | None, log_decay: Tensor | None, *, tied: bool,
            scale: float, initial_state: Tensor | None = None, cu_seqlens: Tensor | None = None,
            cu_seqlens_host: Tensor | None = None, sequence_starts: tuple[int, ...] | None = None,
            need_final_state: bool = False, save_for_backward: bool = False, tier: str = "triton",
            batch_invariant: bool = True, decided: dict[Any, Any] | None = None,
            ) -> tuple[Tensor, Tensor | None, list[Tensor]]:  # fmt: skip
    """Output [B, T, HV, V], final state [N, HV, K, V] in float32 or None, and what the backward keeps.

    query, key [B, T, H, K], value [B, T, HV, V] of one dtype (bfloat16, float16 or float32), HV a multiple of H;
    beta, log_decay [B, T, HV] of any floating dtype (beta may be None if not tied; log_decay None means no decay);
    initial_state [N, HV, K, V] in float32; cu_seqlens [N + 1] on the device, or sequence_starts, the same
    numbers on the host, with B = 1.  Head sizes up to 512.  The same bits for a sequence whatever else is in the batch
    if batch_invariant.  decided: see schedule_of.
    """
    given = Arguments(*contiguous(query, key, value, beta, log_decay, initial_state))
    schedule = schedule_of(given, tied, tier, batch_invariant, sequence_starts, cu_seqlens, cu_seqlens_host, decided)
    one = schedule.one("forward", save_for_backward, need_final_state, scale)

    def compute() -> Passed:
        output, final = torch.empty_like(given.value), _state(schedule, given) if need_final_state else None
        size = schedule.kept_bytes if save_for_backward else schedule.passing_bytes
        workspace = schedule.workspace(size, output.device)
        kept = schedule.kept(Arena(workspace), halting=save_for_backward)
        state = _enter(schedule, given, kept, scale)
        cut = schedule.segments
        schedule.scans.forward_scan(
            *given[:3], kept.prepared, schedule.layout, scale=scale, initial_state=state, output=output,
            final_state=final, ended=None if cut is None else cut.ended,
            halts=kept.halts, halt=schedule.halt)  # fmt: skip
        return (output, final), [workspace] if save_for_backward else []

    (output, final), kept = one.run(given, compute)
    assert output is not None
    if decided is not None:
        decided["forward", save_for_backward, need_final_state] = one
        if sequence_starts is None and not save_for_backward:
            tell(lambda: Launched((*given, output, final), len(given), len(given) + 1, False, one.settle))
    return output, final, kept


def _are_aligned(given: Arguments) -> bool:
    """Whether descriptors can be made of the query and the key."""
    return not (given.query.data_ptr() | given.key.data_ptr()) % 16


def backward(query: Tensor, key: Tensor, value: Tensor, beta: Tensor | None, log_decay: Tensor | None,
             saved: list[Tensor], d_output: Tensor, d_final_state: Tensor | None, *, tied: bool, scale: float,
             initial_state: Tensor | None = None, cu_seqlens: Tensor | None = None,
             cu_seqlens_host: Tensor | None = None, sequence_starts: tuple[int, ...] | None = None,
             tier: str = "triton", batch_invariant: bool = True, decided: dict[Any, Any] | None = None,
             ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of query, key, value, beta, log_decay and initial_state (None where the input is None).

    saved is the forward's; empty, the arrays of the forward pass are made again.
    """
    given = Arguments(*contiguous(query, key, value, beta, log_decay, initial_state))
    d_output, d_final_state = contiguous(d_output, d_final_state)
    schedule = schedule_of(given, tied, tier, batch_invariant, sequence_starts, cu_seqlens, cu_seqlens_host, decided)
    one = schedule.one("backward", bool(saved), d_final_state is None, scale)

    def compute() -> Passed:
        device = given.value.device
        kept = schedule.kept(Arena(saved[0] if saved else schedule.workspace(schedule.kept_bytes, device)))
        scratch = schedule.scratch(Arena(schedule.workspace(schedule.scratch_bytes, device)))
        found = Arguments(*[None if tensor is None else torch.empty_like(tensor) for tensor in given])  # type: ignore[arg-type]
        if not saved:
            state = _enter(schedule, given, kept, scale)
            if kept.halts is not None:
                schedule.scans.halting_scan(given.key, given.value, kept.prepared, schedule.chunks,
                                            initial_state=state, halts=kept.halts, halt=schedule.halt)  # fmt: skip
        _reverse(schedule, given, kept, scratch, d_output, d_final_state, found, scale)
        return found, []

    found, _ = one.run((*given, *saved, d_output, d_final_state), compute)
    if decided is not None:
        decided["backward", len(saved), d_final_state is None] = one
    return tuple(found)  # type: ignore[return-value]


def _enter(schedule: Schedule, given: Arguments, kept: Kept, scale: float) -> Tensor | None:
    """Fill what is kept; the states from which the scan of the layout starts, None for zeros."""
    query, key, value, beta, log_decay, initial_state = given
    prepared, flows, entries, _ = kept
    schedule.prepare.prepare(query, key, beta, log_decay, schedule.chunks, scale=scale, into=prepared)
    cut = schedule.segments
    if cut is None:
        return initial_state
    schedule.scans.flow_scan(key, value, prepared, cut, initial_state=initial_state, flows=flows)
    entry_states(flows, prepared.total, cut, initial_state, dense=schedule.tied, into=entries)
    return entries


def _reverse(schedule: Schedule, given: Arguments, kept: Kept, scratch: Scratch, d_output: Tensor,
             d_final_state: Tensor | None, found: Arguments, scale: float) -> None:  # fmt: skip
    """The launches of the backward pass, a group of sequences at a time."""
    for group in schedule.groups:
        own, into = (
            Arguments(*[*map(group.tokens_of, tensors[:5]), group.states_of(tensors.initial_state)])
            for tensors in (given, found)
        )
        prepared, halts = Prepared(*map(group.chunks_of, kept.prepared)), kept.halts
        if halts is not None and group.sequences is not None:
            halts = halts[:, group.sequences]
        _reverse_group(schedule, group, own, kept._replace(prepared=prepared, halts=halts), scratch,
                       group.tokens_of(d_output), group.states_of(d_final_state), into, scale)  # fmt: skip


def _reverse_group(schedule: Schedule, group: Group, given: Arguments, kept: Kept, scratch: Scratch, d_output: Tensor,
                   d_final_state: Tensor | None, found: Arguments, scale: float) -> None:  # fmt: skip
    """The launches for one group, from its latest piece to its first: states, their gradients, the inputs'."""
    cut, scans, d_state = schedule.segments, schedule.scans, d_final_state
    if cut is not None:
        scans.reverse_flow_scan(given.query, given.key, d_output, kept.prepared, cut, scale=scale,
                                d_final_state=d_state, sources=scratch.sources)  # fmt: skip
        exit_gradients(kept.flows, scratch.sources, kept.prepared.total, cut, d_state, dense=schedule.tied,
                       into=scratch.carried)  # fmt: skip
        d_state = scratch.carried
    for piece in reversed(group.pieces):
        query, key, value, beta, log_decay, do, dq, dk, dv, d_beta, d_log_decay = map(
            piece.tokens_of, (*given[:5], d_output, *found[:5]))  # fmt: skip
        prepared = Prepared(*map(piece.chunks_of, kept.prepared))
        layout = group.layout if cut is not None else piece.layout
        if kept.halts is None:
            state = given.initial_state if cut is None else kept.entries
        else:
            state = kept.halts[piece.number]
        if not schedule.tied:
            innovation = value
        elif schedule.overwrites:
            innovation = dq
        else:
            innovation = scratch.innovation[: value.shape[0], : value.shape[1]]
        with aside(value.device) if schedule.together else nullcontext():
            scans.recompute_scan(key, value, prepared, layout, initial_state=state, entry_states=scratch.entry_states,
                                 innovation=innovation)  # fmt: skip
        d_entry = found.initial_state if piece.number == 0 else scratch.carried
        scans.reverse_scan(
            query, key, do, prepared, layout, scale=scale, d_final_state=d_state,
            exit_gradients=scratch.exit_gradients, d_value=dv, d_initial_state=d_entry,
            begun=None if cut is None else cut.begun)  # fmt: skip
        d_state = d_entry
        if schedule.together:
            rejoin(value.device)
        schedule.gradient.gradient(
            query, key, beta, log_decay, do, innovation, dv, scratch.entry_states, scratch.exit_gradients, prepared,
            piece.layout, scale=scale, sums=scratch.sums, into=Gradients(dq, dk, d_beta, d_log_decay))  # fmt: skip


_SCHEDULES: dict[tuple, Schedule] = {}
LARGEST_MEMORY = 256  # problems


def schedule_of(given: Arguments, tied: bool, tier: str, batch_invariant: bool, starts: tuple[int, ...] | None,
                cu_seqlens: Tensor | None, cu_seqlens_host: Tensor | None,
                decided: dict[Any, Any] | None = None) -> Schedule:  # fmt: skip
    """What is known of problems like this one.  Those whose boundaries only the device knows are all unlike.
    decided is a dictionary for problems of one kind, whose schedule depends on addresses' alignment alone."""
    query, key, value, beta, log_decay, initial_state = given
    aligned = _are_aligned(given)
    known = None if decided is None else decided.get((Schedule, aligned))
    if known is not None:
        return known
    mark = None
    if cu_seqlens is None:
        mark = (
            query.shape, value.shape, query.dtype, query.device, aligned, tied, tier, batch_invariant,
            starts, None if beta is None else beta.dtype, None if log_decay is None else log_decay.dtype,
            initial_state is None, key.shape, key.dtype, value.dtype,
        )  # fmt: skip
        known = _SCHEDULES.get(mark)
    if known is None:
        _check(query, key, value, beta, log_decay, tied, initial_state)
        chunks = chunks_of(query, value, cu_seqlens, cu_seqlens_host, starts)
        known = Schedule(query, key, value, chunks, tied, tier, batch_invariant, starts)
        if mark is not None:
            if len(_SCHEDULES) >= LARGEST_MEMORY:
                _SCHEDULES.clear()
            _SCHEDULES[mark] = known
    if decided is not None:
        decided[Schedule, aligned] = known
    return known


def contiguous(*tensors: Tensor | None) -> Any:
    return [tensor if tensor is None or tensor.is_contiguous() else tensor.contiguous() for tensor in tensors]


def _state(schedule: Schedule, given: Arguments) -> Tensor:
    """A state for every sequence, [N, HV, K, V]."""
    count = schedule.chunks.sequences
    _, _, heads, value_dim = given.value.shape
    return torch.empty(count, heads, given.key.shape[3], value_dim, dtype=torch.float32, device=given.value.device)


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
