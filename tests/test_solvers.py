"""Each solver solves (I - G) X = Z and its transpose, and stays accurate where powers of G explode."""

from __future__ import annotations

import pytest
import torch

from parallelflow.solvers import SOLVERS as TABLE
from tests import cases
from tests.cases import assert_close

SOLVERS = tuple(TABLE)
SIZES = (1, 2, 3, 8, 15, 16, 17, 31, 32, 33, 48, 64, 65, 100, 128, 130)


def system(n: int, block: int = 1, leading=(2,), columns: int = 3, scale: float = 1.0):
    """A random strictly lower G whose diagonal blocks are zero, and a right side."""
    generator = torch.Generator().manual_seed(n)
    gram = torch.randn(*leading, n, n, generator=generator, dtype=torch.float64) * scale / max(1.0, n**0.5)
    rows = torch.arange(n) // block
    gram = gram * (rows[:, None] > rows[None, :])
    return gram, torch.randn(*leading, n, columns, generator=generator, dtype=torch.float64)


def identity(gram):
    return torch.eye(gram.shape[-1], dtype=gram.dtype)


def test_the_table_is_the_public_one():
    assert set(SOLVERS) == set(cases.SOLVERS)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("name", SOLVERS)
def test_solve_and_its_transpose(name, n):
    gram, right = system(n)
    factors = TABLE[name](gram, 1)
    assert_close(factors.solve(right), torch.linalg.solve(identity(gram) - gram, right), 1e-11)
    assert_close(factors.solve_transposed(right), torch.linalg.solve((identity(gram) - gram).mT, right), 1e-11)


@pytest.mark.parametrize(("block", "n"), [(2, 2), (2, 10), (3, 48), (4, 64), (4, 100), (5, 5), (16, 48)])
@pytest.mark.parametrize("name", SOLVERS)
def test_blocks_of_simultaneous_rows(name, block, n):
    """Rows of one token do not see each other: G has zero diagonal blocks of R rows."""
    n = n // block * block
    gram, right = system(n, block)
    factors = TABLE[name](gram, block)
    assert_close(factors.solve(right), torch.linalg.solve(identity(gram) - gram, right), 1e-11)
    assert_close(factors.solve_transposed(right), torch.linalg.solve((identity(gram) - gram).mT, right), 1e-11)


@pytest.mark.parametrize("leading", [(1,), (3,), (2, 2), (2, 1, 3)], ids=str)
@pytest.mark.parametrize("name", SOLVERS)
def test_any_leading_axes(name, leading):
    gram, right = system(19, leading=leading)
    factors = TABLE[name](gram, 1)
    expected = torch.linalg.solve(identity(gram) - gram, right)
    assert_close(factors.solve(right), expected, 1e-11)
    assert_close(factors[0:1].solve(right[0:1]), expected[0:1], 1e-11)


@pytest.mark.parametrize("name", SOLVERS)
def test_solve_and_its_transpose_are_adjoint(name):
    gram, right = system(37)
    left = torch.randn(right.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    factors = TABLE[name](gram, 1)
    assert_close((left * factors.solve(right)).sum(), (factors.solve_transposed(left) * right).sum(), 1e-11)


@pytest.mark.parametrize("name", SOLVERS)
def test_no_row_sees_a_later_one(name):
    """Causality to the bit: a change of a row changes no solution before it."""
    gram, right = system(40)
    factors = TABLE[name](gram, 1)
    changed = right.clone()
    changed[:, 23:] += 1.0
    assert torch.equal(factors.solve(changed)[:, :23], factors.solve(right)[:, :23])


@pytest.mark.parametrize("name", SOLVERS)
def test_the_input_is_left_alone(name):
    gram, right = system(33)
    kept = gram.clone(), right.clone()
    factors = TABLE[name](gram, 1)
    factors.solve(right), factors.solve_transposed(right)
    assert torch.equal(gram, kept[0])
    assert torch.equal(right, kept[1])


@pytest.mark.parametrize("name", SOLVERS)
def test_solving_is_differentiable(name):
    gram, right = system(6, leading=())
    mask = torch.ones(6, 6).tril(-1).double()
    gram.requires_grad_(), right.requires_grad_()
    assert torch.autograd.gradcheck(lambda g, z: TABLE[name](g * mask, 1).solve(z), (gram, right))
    assert torch.autograd.gradcheck(lambda g, z: TABLE[name](g * mask, 1).solve_transposed(z), (gram, right))


@pytest.mark.parametrize("beta", [1.0, 2.0])
@pytest.mark.parametrize("n", [16, 64, 128])
@pytest.mark.parametrize("name", SOLVERS)
def test_correlated_keys_in_float32(name, n, beta):
    """Keys of cosine >= 0.999: powers of G grow like binomials (1e8 and more), the solution does not.

    Allowed is the perturbation of a backward stable method, eps times the condition number of I - G; sigdelta, whose
    recursion adds and subtracts the same terms, gets sqrt(n) more: its rounding is known to grow with the chunk.
    """
    generator = torch.Generator().manual_seed(n)
    direction = torch.nn.functional.normalize(torch.randn(1, 32, generator=generator, dtype=torch.float64), dim=-1)
    noise = torch.nn.functional.normalize(torch.randn(n, 32, generator=generator, dtype=torch.float64), dim=-1)
    keys = torch.nn.functional.normalize(direction + 0.02 * noise, dim=-1)
    assert (keys @ keys.mT).min() >= 0.999
    gram = (-beta * keys @ keys.mT).tril(-1).float()
    right = torch.randn(n, 8, generator=generator, dtype=torch.float64).float()
    exact = identity(gram.double()) - gram.double()
    allowed = float(torch.finfo(torch.float32).eps * torch.linalg.cond(exact)) * (n**0.5 if name == "sigdelta" else 1.0)
    factors = TABLE[name](gram[None], 1)
    for actual, matrix in (
        (factors.solve(right[None])[0], exact),
        (factors.solve_transposed(right[None])[0], exact.mT),
    ):
        expected = torch.linalg.solve(matrix, right.double())
        error = float((actual.double() - expected).norm() / expected.norm())
        assert error <= allowed, f"off by {error:.2e}, allowed {allowed:.2e}"


@pytest.mark.parametrize("name", SOLVERS)
def test_zero_systems(name):
    gram, right = torch.zeros(2, 20, 20, dtype=torch.float64), system(20)[1]
    factors = TABLE[name](gram, 1)
    assert_close(factors.solve(right), right, 1e-14)
    assert_close(factors.solve_transposed(right), right, 1e-14)
