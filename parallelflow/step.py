"""One token at a time, for decoding: every model of ``functional`` without the time axis.

``query, key [B, H, K]``, ``value [B, HV, V]``, ``beta [B, HV]`` and so on (``delta_product`` keeps its R axis), and
``state [B, HV, K, V]``, the very state that the chunked functions take and return. Each returns
``Result(output [B, HV, V], final_state [B, HV, K, V])``. Options: ``scale``, ``normalize_query_key``,
``discretization`` (whose ``step``, if it is a tensor, keeps its time axis: ``[B, 1]`` or ``[B, 1, HV]``),
``backend``, ``validate``; and ``state_indices`` and ``in_place``, with which ``state`` is a store
``[slots, HV, K, V]`` and is updated (see ``integrate``). The first call of a kind makes every check; later ones go
straight to their launch.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from parallelflow import functional
from parallelflow.again import remembered
from parallelflow.checks import expect_tensor, nearest, one_token
from parallelflow.integrate import Result

_OPTIONS = (
    "scale", "normalize_query_key", "discretization", "validate", "backend", "state_indices", "in_place",
)  # fmt: skip


def _single(model: Callable[..., Any]) -> Callable[..., Result]:
    """The model's single-step form."""
    model = inspect.unwrap(model)
    signature = inspect.signature(model)
    own = [parameter for parameter in signature.parameters.values() if parameter.kind is not parameter.VAR_KEYWORD]
    names = {parameter.name for parameter in own}

    @remembered
    @functools.wraps(model)
    def step(*tensors: Any, state: Tensor, **keywords: Any) -> Result:
        expect_tensor("state", state)
        for name in keywords:
            if name not in names and name not in _OPTIONS:
                known = sorted({*_OPTIONS, "state"})
                raise TypeError(f"{name}: unknown option{nearest(name, known)}; the options are {', '.join(known)}")
        timed = {name: _with_time(value) if name in names else value for name, value in keywords.items()}
        token = None if torch.compiler.is_compiling() else one_token.set(True)
        try:
            result = model(*map(_with_time, tensors), initial_state=state, return_final_state=True, **timed)
        finally:
            if token is not None:
                one_token.reset(token)
        return Result(result.output.squeeze(1), result.final_state)

    step.__doc__ = (
        f"One step of ``functional.{model.__name__}``: inputs without their time axis, ``state [B, HV, K, V]``."
    )
    step.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[
            *own,
            inspect.Parameter("state", inspect.Parameter.KEYWORD_ONLY, annotation=Tensor),
            inspect.Parameter("options", inspect.Parameter.VAR_KEYWORD),
        ],
        return_annotation=Result,
    )
    return step


def _with_time(value: Any) -> Any:
    """A time axis for whatever has a batch axis; one number a head (``[HV]``) stays."""
    return value.unsqueeze(1) if isinstance(value, Tensor) and value.ndim >= 2 else value


linear_attention = _single(functional.linear_attention)
retention = _single(functional.retention)
lightning_attention = _single(functional.lightning_attention)
ssd = _single(functional.ssd)
gated_linear_attention = _single(functional.gated_linear_attention)
delta_rule = _single(functional.delta_rule)
gated_delta_rule = _single(functional.gated_delta_rule)
gated_delta_rule_2 = _single(functional.gated_delta_rule_2)
kimi_delta_attention = _single(functional.kimi_delta_attention)
comba = _single(functional.comba)
delta_product = _single(functional.delta_product)
rwkv7 = _single(functional.rwkv7)
longhorn = _single(functional.longhorn)
efla = _single(functional.efla)
low_rank_flow = _single(functional.low_rank_flow)
