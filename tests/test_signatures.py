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


def increments(x: torch.Tensor, y: torch.Tensor, refine: int) -> torch.Tensor:
    """``<dx_p, dy_q>`` of piecewise linear paths, every piece cut in ``refine``."""
    dx, dy = (path.diff(dim=0).repeat_interleave(refine, 0) / refine for path in (x, y))
    return dx @ dy.mT


def stencil(products: torch.Tensor) -> torch.Tensor:
    """``k_ij`` on the grid, cell by cell: ``k_{i+1,j+1} = k_{i+1,j} + k_{i,j+1} - k_ij + <dx_i, dy_j> k_ij``."""
    k = [[1.0] * (products.shape[1] + 1)]
    for row in products.tolist():
        above, here = k[-1], [1.0]
        for j, product in enumerate(row):
            here.append(here[j] + above[j + 1] - above[j] + product * above[j])
        k.append(here)
    return torch.tensor(k, dtype=F64)


def signature_kernel(x: torch.Tensor, y: torch.Tensor, refine: int, solver: str) -> torch.Tensor:
    """``k(x, y) = 1 + ∫∫ k(x_s, y_t) d<x_s, y_t>``.

    On the grid, ``k_ij = 1 + Σ_{p<i, q<j} <dx_p, dy_q> k_pq`` is a triangular system (I - G) k = 1 with one row a cell:
    what a chunk's solver solves.
    """
    products = increments(x, y, refine)
    rows, columns = products.shape
    cells = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    before = (cells[:, None] > cells[None]).all(-1)
    gram = before * products.reshape(-1)
    values = SOLVERS[solver](gram[None], 1).solve(torch.ones(1, len(cells), 1, dtype=F64))[0, :, 0]
    return 1 + (products.reshape(-1) * values).sum()


def paths(lengths: tuple[int, int], dimension: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, y = (0.4 * torch.randn(n, dimension, generator=generator, dtype=F64).cumsum(0) for n in lengths)
    return x, y


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_triangular_system_is_the_stencil(solver):
    x, y = paths((4, 6), 3)
    for refine in (1, 2):
        expected = stencil(increments(x, y, refine))[-1, -1]
        assert abs(signature_kernel(x, y, refine, solver) - expected) <= 1e-12 * abs(expected)


@pytest.mark.parametrize("aggregate", ["sequential", "associative", "segmented"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_the_kernel_is_a_flow(solver, aggregate):
    """The state is a column of the grid, ``k_i: [columns + 1]``, token i one row for each increment of y:
    ``k_{i+1,j} = k_ij + Σ_{q<j} <dx_i, dy_q> k_iq``. The engine gives every column, however time is cut."""
    products = increments(*paths((4, 4), 2), 3)
    tokens, rows = products.shape
    read = torch.eye(rows, rows + 1, dtype=F64) * products[..., None]  # [T, R, K]: <dx_i, dy_q> e_q
    write = torch.ones(rows, rows + 1, dtype=F64).triu(1).expand(tokens, -1, -1)  # Σ_{j>q} e_j
    query = torch.eye(rows + 1, dtype=F64)[-1].expand(1, tokens, 1, -1)
    result = functional.low_rank_flow(
        query, read=read[None, :, :, None], write=write[None, :, :, None],
        value=torch.zeros(1, tokens, rows, 1, 1, dtype=F64),
        initial_state=torch.ones(1, 1, rows + 1, 1, dtype=F64), return_final_state=True, scale=1.0,
        solver=solver, aggregate=aggregate, chunk_size=4,
    )  # fmt: skip
    expected = stencil(products)
    assert_close(result.output[0, :, 0, 0], expected[1:, -1], 1e-12)
    assert_close(result.final_state[0, 0, :, 0], expected[-1], 1e-12)


@pytest.mark.parametrize("rows", [1, 3])
def test_sigdelta_takes_the_differences_of_a_signature_kernel(rows):
    """Mixed differences of its grid ``F(m, k) = Z_k + Σ_{i<m} Γ_{k,i} F(i, i)`` are an increment times the diagonal
    cell ``F(m-1, m-1)``, where a signature kernel's are one times the neighbour ``k_{m-1,k-1}``."""
    tokens = 7
    generator = torch.Generator().manual_seed(0)
    gram = torch.randn(tokens, rows, tokens, rows, generator=generator, dtype=F64)
    gram = gram * (torch.arange(tokens)[:, None, None, None] > torch.arange(tokens)[None, None, :, None])
    right = torch.randn(tokens, rows, 2, generator=generator, dtype=F64)
    flat = gram.reshape(tokens * rows, tokens * rows)
    solved = SOLVERS["sigdelta"](flat[None], rows).solve(right.reshape(1, -1, 2)).reshape(right.shape)

    def cell(m: int, k: int) -> torch.Tensor:  # in terms of what the solver found on the diagonal
        return right[k] + torch.einsum("ris,isd->rd", gram[k, :, :m], solved[:m])

    for m in range(1, tokens):
        assert_close(cell(m, m), solved[m], 1e-12)
        for k in range(m + 1, tokens):
            mixed = cell(m, k) - cell(m - 1, k) - cell(m, k - 1) + cell(m - 1, k - 1)
            assert_close(mixed, (gram[k, :, m - 1] - gram[k - 1, :, m - 1]) @ solved[m - 1], 1e-12)


def limit(x: torch.Tensor, y: torch.Tensor) -> tuple[float, float]:
    """The kernel on ever finer grids, and how far off it may be: the error is a series in 1 / refine, whose first terms
    are eliminated one after another; what the last elimination changed bounds what is left."""
    column = [float(stencil(increments(x, y, refine))[-1, -1]) for refine in (8, 16, 32, 64)]
    change = 0.0
    for power in range(1, 4):
        better = [(2**power * b - a) / (2**power - 1) for a, b in itertools.pairwise(column)]
        change = abs(better[-1] - column[-1])
        column = better
    return column[0], change


def test_the_kernel_of_two_straight_lines_is_a_bessel_function():
    """``I0(2 √<x, y>)``, in closed form; the grid's error is of order 1, and vanishes in the limit."""
    x, y = torch.tensor([[0.0, 0.0], [0.6, 0.3]], dtype=F64), torch.tensor([[0.0, 0.0], [0.5, 0.4]], dtype=F64)
    exact = float(torch.special.i0(2 * (x[1] @ y[1]).sqrt()))
    coarse, fine = (float(signature_kernel(x, y, n, "sigdelta")) - exact for n in (4, 8))
    assert 1.7 < coarse / fine < 2.3
    found, change = limit(x, y)
    assert abs(found - exact) <= change <= 1e-4 * abs(fine)


@pytest.mark.parametrize(("lengths", "dimension"), [((3, 4), 2), ((4, 3), 3), ((2, 2), 2), ((5, 3), 1)])
def test_the_kernel_of_paths_is_that_of_a_signature_library(lengths, dimension):
    pysiglib = pytest.importorskip("pysiglib")
    x, y = paths(lengths, dimension)
    coarser, theirs = (float(pysiglib.sig_kernel(x, y, dyadic_order=order)) for order in (6, 8))
    found, change = limit(x, y)
    assert abs(found - theirs) <= change + abs(coarser - theirs)
    assert change + abs(coarser - theirs) <= 1e-4 * abs(theirs - 1)  # and that says something
