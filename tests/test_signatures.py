"""Flows and signatures: Chen's relation at any cuts, and signature kernels as the triangular systems that they are."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parallelflow import functional
from parallelflow.flow import Flow, compose
from parallelflow.solvers import SOLVERS
from parallelflow.testing import Sizes, make_inputs
from tests.cases import assert_close

F64 = torch.float64
SIZES = Sizes(1, 12, 1, 1, 2, 3, 2)


def flow_between(inputs: dict, start: int, stop: int, **options) -> Flow:
    """The flow of the tokens [start, stop): H is what zero becomes, P what a basis of states adds to it."""
    width = max(SIZES.key_size, SIZES.value_size)
    padded = {name: x[:, start:stop] for name, x in inputs.items()}
    basis = torch.eye(SIZES.key_size, width, dtype=F64)[None, None]
    value = torch.nn.functional.pad(padded["value"], (0, width - SIZES.value_size))

    def run(value: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        tensors = padded | {"value": value}
        return functional.low_rank_flow(**tensors, initial_state=state, return_final_state=True, **options).final_state

    transition = run(torch.zeros_like(value), basis)[..., : SIZES.key_size]
    return Flow(transition, run(value, torch.zeros_like(basis))[..., : SIZES.value_size])


@settings(max_examples=25, deadline=None)
@given(
    cuts=st.lists(st.integers(1, SIZES.length - 1), min_size=1, max_size=5, unique=True),
    chunk=st.integers(1, 5),
    solver=st.sampled_from(sorted(SOLVERS)),
    decay=st.sampled_from(["none", "scalar", "vector"]),
    seed=st.integers(0, 5),
)
def test_chens_relation_at_any_cuts(cuts, chunk, solver, decay, seed):
    """However time is cut, the flows of the pieces compose to the flow of the whole."""
    inputs = make_inputs("low_rank_flow", SIZES, decay=decay, seed=seed)
    options = {"chunk_size": chunk, "solver": solver}
    whole = flow_between(inputs, 0, SIZES.length, **options)
    ends = [0, *sorted(cuts), SIZES.length]
    pieces = [flow_between(inputs, a, b, **options) for a, b in itertools.pairwise(ends)]
    composed = pieces[0]
    for piece in pieces[1:]:
        composed = compose(composed, piece)
    assert_close(composed.transition, whole.transition, 1e-12)
    assert_close(composed.source, whole.source, 1e-12)


def signature_kernel(x: torch.Tensor, y: torch.Tensor, refine: int, solver: str) -> torch.Tensor:
    """``k(x, y) = 1 + ∫∫ k(x_s, y_t) d<x_s, y_t>`` of piecewise linear paths, every piece cut in ``refine``.

    On the grid, ``k_ij = 1 + Σ_{p<i, q<j} <dx_p, dy_q> k_pq`` is a triangular system (I - G) k = 1 with one row a cell:
    what a chunk's solver solves.
    """
    dx, dy = (path.diff(dim=0).repeat_interleave(refine, 0) / refine for path in (x, y))
    increments = dx @ dy.mT
    rows, columns = increments.shape
    cells = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    before = (cells[:, None] > cells[None]).all(-1)
    gram = before * increments.reshape(-1)
    values = SOLVERS[solver](gram[None], 1).solve(torch.ones(1, len(cells), 1, dtype=F64))[0, :, 0]
    return 1 + (increments.reshape(-1) * values).sum()


def extrapolated(x: torch.Tensor, y: torch.Tensor, solver: str, finest: int) -> float:
    """The limit of ever finer grids: their error is a series in 1 / refine, whose first terms are eliminated."""
    column = [signature_kernel(x, y, finest * 2**n // 8, solver) for n in range(4)]
    for power in range(1, 4):
        column = [(2**power * b - a) / (2**power - 1) for a, b in itertools.pairwise(column)]
    return float(column[0])


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_kernel_of_two_straight_lines_is_a_bessel_function(solver):
    """``I0(2 √<x, y>)``, in closed form; the grid's error is of order 1, and vanishes in the limit."""
    x, y = torch.tensor([[0.0, 0.0], [0.6, 0.3]], dtype=F64), torch.tensor([[0.0, 0.0], [0.5, 0.4]], dtype=F64)
    exact = float(torch.special.i0(2 * (x[1] @ y[1]).sqrt()))
    coarse, fine = (float(signature_kernel(x, y, n, solver)) - exact for n in (4, 8))
    assert 1.7 < coarse / fine < 2.3
    assert abs(extrapolated(x, y, solver, 16) - exact) <= 1e-2 * abs(fine)


def test_the_kernel_of_paths_is_that_of_a_signature_library():
    pysiglib = pytest.importorskip("pysiglib")
    generator = torch.Generator().manual_seed(0)
    x, y = (0.4 * torch.randn(n, 2, generator=generator, dtype=F64).cumsum(0) for n in (3, 4))
    theirs = float(pysiglib.sig_kernel(x, y, dyadic_order=6))
    coarse = float(signature_kernel(x, y, 8, "sigdelta"))
    assert abs(coarse - theirs) <= 0.2 * abs(theirs - 1)
    assert abs(extrapolated(x, y, "sigdelta", 8) - theirs) <= 0.02 * abs(coarse - theirs)
