"""The one way from a call in FLA's terms to one of the engine: what all functions share is handled here.

``scale``, ``initial_state``, ``output_final_state``, ``state_v_first``, ``use_qk_l2norm_in_kernel``, ``cu_seqlens``,
``cu_seqlens_cpu``, ``chunk_size``, ``reverse``, ``cp_context`` and ``return_intermediate_states`` become the engine's.
``chunk_indices``, ``disable_recompute`` and ``max_num_seqs`` tell FLA's kernels how to run and do not change a result;
there is nothing to tell here.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from parallelflow.compat.fla.chunk_states import chunk_starts, states_of_chunks
from parallelflow.compat.fla.context import over_ranks
from parallelflow.compat.fla.signatures import FAMILIES, Arguments


class Mapped(NamedTuple):
    """A model and its tensors in the engine's terms; where FLA's outputs and states look different, the ways between.

    ``enter`` turns FLA's initial state ``[N, HV, K, V]`` into the model's; ``leave`` turns the model's output and final
    state, with whether the caller wants the state, into FLA's.
    """

    model: Callable[..., Any]
    tensors: dict[str, Tensor]
    enter: Callable[[Any], Tensor | None] | None = None
    leave: Callable[[Tensor, Tensor, bool], tuple[Tensor, Any]] | None = None


def function(name: str, mapping: Callable[..., Mapped]) -> Callable[..., Any]:
    """FLA's function of this name; ``mapping`` takes those of its arguments that are the model's own."""
    text = next(names[name] for names in FAMILIES.values() if name in names)
    arguments = Arguments(name, text)
    own = [parameter for parameter in inspect.signature(mapping).parameters if parameter in arguments.names]

    def call(*args: Any, **keywords: Any) -> tuple[Any, ...]:
        given = arguments.bind(args, keywords)
        return _run(mapping(**{parameter: given[parameter] for parameter in own}), given)

    call.__name__ = call.__qualname__ = name
    call.__module__ = mapping.__module__
    call.__doc__ = mapping.__doc__
    call.__signature__ = arguments.signature()  # type: ignore[attr-defined]
    return call


def _run(mapped: Mapped, given: dict[str, Any]) -> tuple[Any, ...]:
    if given.get("use_graph") and given.get("cu_seqlens") is not None:
        raise ValueError(
            "use_graph: got True with cu_seqlens, expected False: packed lengths are read on the host, where a graph "
            "that is replayed cannot read others"
        )
    tensors = mapped.tensors
    query, cu_seqlens = tensors["query"], given.get("cu_seqlens")
    order = _backwards(query, cu_seqlens) if given.get("reverse") else None
    if order is not None:  # whatever has a time axis; one number a head ([HV]) has none
        tensors = {name: x[:, order] if x.ndim > 1 else x for name, x in tensors.items()}
    chunk_size = 64 if given.get("chunk_size") is None else given["chunk_size"]
    options: dict[str, Any] = {"cu_seqlens": cu_seqlens, "chunk_size": chunk_size}
    options["scale"] = query.shape[-1] ** -0.5 if given["scale"] is None else given["scale"]
    if given.get("cu_seqlens_cpu") is not None:
        options["cu_seqlens_cpu"] = given["cu_seqlens_cpu"]
    if given.get("use_qk_l2norm_in_kernel"):
        options["normalize_query_key"] = True
    if given.get("cp_context") is not None:
        options |= over_ranks(given["cp_context"], query, given)
    starts = None
    if given.get("return_intermediate_states"):
        starts = chunk_starts(query.shape[1], cu_seqlens, chunk_size)
        if starts.positions:
            options["state_positions"] = starts.positions

    value_first = _value_first(given)
    state = given["initial_state"]
    if mapped.enter is None and state is not None and not isinstance(state, Tensor):
        raise TypeError(f"initial_state: got {type(state).__name__}, expected a tensor")
    if value_first and state is not None:
        state = state.transpose(-1, -2)
    if mapped.enter is not None:
        state = mapped.enter(state)
    if state is not None and state.dtype.itemsize < 4:
        state = state.float()

    wanted = bool(given["output_final_state"])
    needed = wanted or mapped.leave is not None
    try:
        result = mapped.model(**tensors, initial_state=state, return_final_state=needed, **options)
    except (TypeError, ValueError) as error:
        raise _in_flas_letters(error, mapped.tensors, given) from error
    output, final = result[:2]
    if order is not None:
        output = output[:, order]
    if mapped.leave is not None:
        output, final = mapped.leave(output, final, wanted)
    if value_first and final is not None:
        final = final.transpose(-1, -2).contiguous()
    if starts is None:
        return output, final
    if state is None:
        sequences = output.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
        state = output.new_zeros(sequences, output.shape[2], query.shape[-1], output.shape[3])
    later = [x.to(output.dtype) for x in result.states.unbind(1)] if starts.positions else []
    states = states_of_chunks(starts, state.to(output.dtype), later, cu_seqlens is not None)
    return output, final, states.transpose(-1, -2).contiguous() if value_first else states


def _in_flas_letters(error: TypeError | ValueError, tensors: dict[str, Tensor], given: dict[str, Any]) -> Exception:
    """The same error, of the argument that the caller knows: ``g`` for ``log_decay`` where the one is the other."""
    name, colon, rest = str(error).partition(":")
    if colon and name in tensors:
        for letter, value in given.items():
            if value is tensors[name]:
                return type(error)(f"{letter}:{rest}")
    return error


def _value_first(given: dict[str, Any]) -> bool:
    """``state_v_first``, or its former name."""
    former = given.get("transpose_state_layout")
    if former is None:
        return bool(given.get("state_v_first", False))
    if given["state_v_first"]:
        raise ValueError("transpose_state_layout: got a value beside state_v_first, expected one of the two")
    warnings.warn("transpose_state_layout is the former name of state_v_first", DeprecationWarning, stacklevel=4)
    return bool(former)


def _backwards(query: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """The tokens of every sequence from its last to its first: an order that undoes itself."""
    bounds = [0, query.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    places = [torch.arange(stop - 1, start - 1, -1, device="cpu") for start, stop in pairwise(bounds)]
    return torch.cat(places).to(query.device)
