"""The theorems of `docs/theory.md` as it states them, written out in dense matrices, against the recurrence and the
engine: a chunk's flow is its triangular system, its transition is a diagonal and a low rank, its adjoint its transpose.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from parallelflow import functional
from parallelflow.testing import Sizes, make_inputs
from tests.cases import AGGREGATES, MODELS, SOLVERS, assert_close, by_name

F64 = torch.float64
TOKENS, ROWS, K, V = 5, 2, 6, 3
SIZES = Sizes(1, TOKENS, 1, 1, K, V, ROWS)
SCALE = 0.7


class Chunk(NamedTuple):
    """Section 3 of the page, letter by letter; one head, n = C·R stacked rows."""

    gram: Tensor  # G [n, n]
    reads: Tensor  # Ā [n, K]
    values: Tensor  # U [n, V]
    seen: Tensor  # Q ⊙ e^c [C, K]
    said: Tensor  # Cq [C, n]
    writes: Tensor  # B̂ [n, K]
    decay: Tensor  # Λ [K, K]


def chunk_of(inputs: dict[str, Tensor], order: str, reads: str) -> Chunk:
    a, b, u = (inputs[name][0, :, :, 0] for name in ("read", "write", "value"))  # [C, R, ·]
    g = inputs["log_decay"][0, :, 0].reshape(TOKENS, -1).expand(TOKENS, K)
    query = inputs["query"][0, :, 0]
    token = torch.arange(TOKENS).repeat_interleave(ROWS)
    row = torch.arange(TOKENS * ROWS)
    c = g.cumsum(0)
    r = (c if reads == "decayed" else c - g)[token]
    a, b, u = (x.flatten(0, 1) for x in (a, b, u))
    precedes = token[:, None] > token if order == "simultaneous" else row[:, None] > row
    gram = torch.einsum("pk,qk,pqk->pq", a, b, (r[:, None] - c[token]).exp()) * precedes
    said = torch.einsum("tk,qk,tqk->tq", query, b, (c[:, None] - c[token]).exp())
    return Chunk(
        gram=gram,
        reads=a * r.exp(),
        values=u,
        seen=query * c.exp(),
        said=said * (token <= torch.arange(TOKENS)[:, None]),
        writes=b * (c[-1] - c[token]).exp(),
        decay=torch.diag(c[-1].exp()),
    )


def flow_of(chunk: Chunk) -> tuple[Tensor, Tensor]:
    """``W = (I - G)⁻¹ Ā``, ``Y = (I - G)⁻¹ U``, ``P = Λ + B̂ᵀ W``, ``H = B̂ᵀ Y``."""
    inverse = torch.linalg.inv(torch.eye(TOKENS * ROWS, dtype=F64) - chunk.gram)
    return chunk.decay + chunk.writes.T @ inverse @ chunk.reads, chunk.writes.T @ inverse @ chunk.values


def recurrence(inputs: dict[str, Tensor], state: Tensor, order: str, reads: str) -> tuple[Tensor, Tensor]:
    """Outputs and the final state, token by token and row by row."""
    outputs = []
    for t in range(TOKENS):
        before, state = state, inputs["log_decay"][0, t, 0].exp().reshape(-1, 1) * state
        decayed = state
        for j in range(ROWS):
            a, b, u = (inputs[name][0, t, j, 0] for name in ("read", "write", "value"))
            read = before if reads == "raw" else decayed if order == "simultaneous" else state
            state = state + torch.outer(b, a @ read + u)
        outputs.append(SCALE * inputs["query"][0, t, 0] @ state)
    return torch.stack(outputs), state


KINDS = [("simultaneous", "decayed"), ("simultaneous", "raw"), ("sequential", "decayed")]


@pytest.mark.parametrize("decay", ["scalar", "vector"])
@pytest.mark.parametrize(("order", "reads"), KINDS)
def test_the_flow_of_a_chunk_is_its_triangular_system(order, reads, decay):
    inputs = make_inputs("low_rank_flow", SIZES, decay=decay)
    state = torch.randn(K, V, generator=torch.Generator().manual_seed(1), dtype=F64)
    output, final = recurrence(inputs, state, order, reads)
    chunk = chunk_of(inputs, order, reads)
    transition, source = flow_of(chunk)
    assert_close(transition @ state + source, final, 1e-13)
    right = chunk.values + chunk.reads @ state
    solution = torch.linalg.solve(torch.eye(TOKENS * ROWS, dtype=F64) - chunk.gram, right)
    assert_close(SCALE * (chunk.seen @ state + chunk.said @ solution), output, 1e-13)
    for solver in SOLVERS:
        found = functional.low_rank_flow(
            **inputs, order=order, reads=reads, solver=solver, chunk_size=TOKENS, scale=SCALE,
            initial_state=state[None, None], return_final_state=True,
        )  # fmt: skip
        assert_close(found.output[0, :, 0], output, 1e-12)
        assert_close(found.final_state[0, 0], final, 1e-12)


def test_the_transition_of_few_rows_is_a_decay_and_a_low_rank():
    """One token of R rows in K dimensions: ``P - Λ`` has rank R."""
    inputs = make_inputs("low_rank_flow", SIZES, decay="scalar")
    rest = {name: x.clone() for name, x in inputs.items()}
    rest["read"][:, 1:] = 0  # later tokens only decay
    chunk = chunk_of(rest, "simultaneous", "decayed")
    low = flow_of(chunk)[0] - chunk.decay
    sizes = torch.linalg.svdvals(low)
    assert sizes[ROWS - 1] > 1e-3 * sizes[0] and sizes[ROWS] < 1e-14 * sizes[0]


@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("solver", SOLVERS)
def test_the_adjoint_is_the_transposed_flow(solver, aggregate):
    """What the loss asks of the last state, ``D``, it asks as ``Pᵀ D`` of the first."""
    inputs = make_inputs("low_rank_flow", SIZES, decay="vector")
    transition, _ = flow_of(chunk_of(inputs, "simultaneous", "decayed"))
    state, wanted = torch.randn(2, 1, 1, K, V, generator=torch.Generator().manual_seed(1), dtype=F64)
    state.requires_grad_()
    final = functional.low_rank_flow(
        **inputs, solver=solver, aggregate=aggregate, chunk_size=2, initial_state=state, return_final_state=True
    ).final_state
    (found,) = torch.autograd.grad(final, state, wanted)
    assert_close(found[0, 0], transition.T @ wanted[0, 0], 1e-12)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_sign_in_the_product_of_exponentials(sign):
    """``e^ω = I + ((e^{tr ω} - 1) / tr ω) ω`` for ω of rank 1: with a plus sign."""
    a, b = torch.randn(2, K, generator=torch.Generator().manual_seed(0), dtype=F64)
    omega, trace = torch.outer(b, a), a @ b
    factor = torch.eye(K, dtype=F64) + sign * torch.expm1(trace) / trace * omega
    assert torch.allclose(factor, torch.linalg.matrix_exp(omega), rtol=0, atol=1e-12) == (sign == 1)


@pytest.mark.parametrize("model", MODELS, ids=by_name)
def test_every_model_is_affine_in_its_state(model):
    """``S_t(s + λ(r - s)) = S_t(s) + λ (S_t(r) - S_t(s))``: what makes a flow of it."""
    sizes = Sizes(1, 9, 1, 2, 3, 2)
    inputs = model.inputs(sizes)
    first, second = model.initial_state(sizes), 2 * model.initial_state(sizes).flip(-2)
    end = lambda state: model(inputs, initial_state=state, return_final_state=True, chunk_size=4).final_state  # noqa: E731
    share = 0.3
    between = end(first + share * (second - first))
    assert_close(between, end(first) + share * (end(second) - end(first)), 1e-12)
