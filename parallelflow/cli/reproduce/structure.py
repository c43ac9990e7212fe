"""What the theory says of a flow, measured on one: it composes, its transition is a decay and a low rank, its adjoint
is its transpose, and a step of rank 1 is one factor of a product of exponentials."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, reduce
from typing import Any

import torch
from torch import Tensor

from parallelflow import functional
from parallelflow.cli.demo.agreement import relative_error
from parallelflow.cli.demo.inputs import Sizes, draw_inputs
from parallelflow.flow import Flow, compose

TOKENS, ROWS, KEY, VALUE = 16, 2, 40, 3
DIGITS = 1e-10
"""A singular value below this share of the largest counts as zero."""


@cache
def _inputs() -> dict[str, Tensor]:
    return draw_inputs("low_rank_flow", Sizes(1, TOKENS, 1, KEY, VALUE, ROWS), torch.float64)


def _run(start: int, stop: int, value: Tensor, state: Tensor) -> Tensor:
    """The state after the tokens ``[start, stop)``."""
    tensors: dict[str, Any] = {name: x[:, start:stop] for name, x in _inputs().items()}
    tensors |= {"value": value[:, start:stop], "initial_state": state, "chunk_size": 4, "backend": "torch"}
    final = functional.low_rank_flow(**tensors, return_final_state=True).final_state
    assert final is not None
    return final


def _flow(start: int, stop: int) -> Flow:
    """P is what becomes of a basis of states without values, H what becomes of zero."""
    value = _inputs()["value"]
    basis = torch.eye(KEY, dtype=torch.float64)[None, None]
    transition = _run(start, stop, value.new_zeros(*value.shape[:-1], KEY), basis)
    return Flow(transition, _run(start, stop, value, value.new_zeros(1, 1, KEY, VALUE)))


def composition(pieces: int) -> dict[str, Any]:
    """The flows of ``pieces`` equal pieces, composed, against the flow of all tokens."""
    length = TOKENS // pieces
    composed = reduce(compose, (_flow(start, start + length) for start in range(0, TOKENS, length)))
    whole = _flow(0, TOKENS)
    both = (relative_error(composed.transition, whole.transition), relative_error(composed.source, whole.source))
    return {"error": max(both), "rank": None}


def low_rank(tokens: int) -> dict[str, Any]:
    """``P - Λ`` after some tokens: its rank, and the first singular value that should vanish over the largest."""
    transition = _flow(0, tokens).transition[0, 0]
    decay = torch.diag(_inputs()["log_decay"][0, :tokens, 0].sum(0).exp())
    values = torch.linalg.svdvals(transition - decay)
    beyond = values[tokens * ROWS] if tokens * ROWS < KEY else values.new_zeros(())
    return {"error": float(beyond / values[0]), "rank": int((values > DIGITS * values[0]).sum())}


def adjoint(tokens: int) -> dict[str, Any]:
    """The gradient of ``<S_t, D>`` with respect to ``S_0`` against ``Pᵀ D``."""
    generator = torch.Generator().manual_seed(1)
    state, wanted = torch.randn(2, 1, 1, KEY, VALUE, generator=generator, dtype=torch.float64)
    with torch.enable_grad():
        state.requires_grad_()
        (found,) = torch.autograd.grad(_run(0, tokens, _inputs()["value"], state), state, wanted)
    return {"error": relative_error(found, _flow(0, tokens).transition.mT @ wanted), "rank": None}


def exponential(trace: float, sign: int) -> dict[str, Any]:
    """``I + sign · ((e^{tr ω} - 1) / tr ω) ω`` against the matrix exponential of ω, of rank 1 and trace ``-trace``."""
    a, b = torch.randn(2, KEY, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    b = a + 0.3 * b
    omega = torch.outer(b, a) * (-trace / (a @ b))
    factor = torch.eye(KEY, dtype=torch.float64) + sign * torch.expm1(omega.trace()) / omega.trace() * omega
    return {"error": relative_error(factor, torch.linalg.matrix_exp(omega)), "rank": None}


PROPERTIES: dict[str, Callable[[Any], dict[str, Any]]] = {
    "composition": composition,
    "low rank": low_rank,
    "adjoint": adjoint,
    "exponential, plus": lambda trace: exponential(trace, 1),
    "exponential, minus": lambda trace: exponential(trace, -1),
}
"""Each of one number: pieces, tokens, tokens, and the size of the trace."""
