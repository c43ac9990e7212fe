"""The CUDA solvers' source, run on a CPU thread by thread: against float64, and counted."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from parallelflow.kernels.cpu.build import COMPILER
from parallelflow.solvers import sigdelta, substitution
from parallelflow.solvers.cuda.layout import MOST_RANK, MOST_ROWS
from tests.solvers_cuda.on_cpu import HOPPER, layout_of, solve

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")

SOLVERS = {"SigDelta": sigdelta, "Substitution": substitution}
SHAPES = [(1, 1), (1, 2), (1, 3), (1, 16), (1, 17), (1, 18), (1, 64), (1, 65), (1, 200), (2, 1), (2, 9), (2, 33),
          (3, 6), (3, 21), (4, 5), (4, 16), (4, 17)]  # fmt: skip
"""Rows a token, and tokens: around the edges of warps of 16, 8, 5 and 4 tokens."""


def system(rank, tokens, columns=3, seed=0):
    """A random G, not a number where it must not be read, and a right side."""
    generator = torch.Generator().manual_seed(seed + 1000 * rank + tokens)
    rows = rank * tokens
    gram = torch.randn(2, rows, rows, generator=generator, dtype=torch.float64) / max(1.0, rows**0.5)
    token = torch.arange(rows) // rank
    gram[:, token[:, None] <= token] = torch.nan
    return gram, torch.randn(2, rows, columns, generator=generator, dtype=torch.float64)


def exact(gram, right, transposed=False):
    matrix = torch.eye(gram.shape[-1], dtype=torch.float64) - gram.nan_to_num()
    return torch.linalg.solve(matrix.mT if transposed else matrix, right.double())


def off(found, expected):
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize(("rank", "tokens"), SHAPES, ids=str)
@pytest.mark.parametrize("name", SOLVERS)
def test_solve_and_its_transpose(name, rank, tokens):
    layout = layout_of(name, 8, tokens, rank)
    gram, right = system(rank, tokens, columns=layout.columns + 3)
    for transposed in (False, True):
        assert off(solve(gram, right, layout, transposed=transposed)[0], exact(gram, right, transposed)) <= 1e-13


@pytest.mark.parametrize("name", SOLVERS)
def test_it_is_the_solver_that_it_is_called(name):
    """Operation for operation, but for the order of the sums over a token's rows."""
    for rank, tokens in ((1, 40), (3, 11)):
        gram, right = system(rank, tokens)
        layout = layout_of(name, 8, tokens, rank)
        factors = SOLVERS[name](gram.nan_to_num(), rank)
        assert off(solve(gram, right, layout)[0], factors.solve(right)) <= 1e-14
        turned = solve(gram, right, layout, transposed=True)[0]
        assert off(turned, factors.solve_transposed(right)) <= 1e-14


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("beta", [1.0, 2.0])
@pytest.mark.parametrize(("rank", "tokens"), [(1, 64), (4, 16)], ids=str)
@pytest.mark.parametrize("name", SOLVERS)
def test_correlated_keys_in_float32(name, rank, tokens, beta, transposed):
    """Keys of cosine ≥ 0.999: allowed is what a backward stable method may lose, for sigDelta sqrt(n) times as much."""
    generator = torch.Generator().manual_seed(tokens)
    rows = rank * tokens
    direction = torch.nn.functional.normalize(torch.randn(1, 32, generator=generator, dtype=torch.float64), dim=-1)
    noise = torch.nn.functional.normalize(torch.randn(rows, 32, generator=generator, dtype=torch.float64), dim=-1)
    keys = torch.nn.functional.normalize(direction + 0.02 * noise, dim=-1)
    token = torch.arange(rows) // rank
    gram = (-beta / rank * (keys @ keys.mT) * (token[:, None] > token)).float().double()[None]
    right = torch.randn(1, rows, 8, generator=generator).double()
    layout = layout_of(name, 4, tokens, rank)
    found = solve(gram, right, layout, number="float", transposed=transposed)[0]
    condition = float(torch.linalg.cond(torch.eye(rows) - gram[0]))
    allowed = torch.finfo(torch.float32).eps * condition * (rows**0.5 if name == "SigDelta" else 1)
    assert off(found, exact(gram, right, transposed)) <= allowed


@pytest.mark.parametrize("name", SOLVERS)
def test_decays_of_every_strength(name):
    """Entries from 1 down to e^-100 and to 0, as decays and resets make them."""
    gram, right = system(1, 64)
    generator = torch.Generator().manual_seed(1)
    choice = torch.randint(0, 4, gram.shape, generator=generator)
    strengths = torch.tensor([1.0, 1 - 1e-6, torch.exp(torch.tensor(-100.0)), 0.0], dtype=torch.float64)
    gram = (gram * strengths[choice]).float().double()
    layout = layout_of(name, 4, 64, 1)
    for transposed in (False, True):
        found = solve(gram, right, layout, number="float", transposed=transposed)[0]
        rounding = torch.finfo(torch.float32).eps * float(torch.linalg.cond(torch.eye(64) - gram.nan_to_num()).max())
        assert off(found, exact(gram, right, transposed)) <= rounding * 8


@pytest.mark.parametrize("name", SOLVERS)
def test_sixteen_bits_are_rounded_once(name):
    gram, right = system(2, 20, columns=40)
    right = right.bfloat16()
    layout = layout_of(name, 4, 20, 2)
    found = solve(gram.float().double(), right, layout, number="float", element="BFloat16")[0]
    expected = exact(gram.float().double(), right)
    near = expected.bfloat16()
    assert off(found, expected) <= 1.01 * off(near, expected)
    special = torch.tensor([torch.inf, -torch.inf, torch.nan, 1e-40, 0.0, 3.3895e38]).expand(1, 2, 6).bfloat16()
    kept = solve(torch.zeros(1, 2, 2).double(), special, layout_of(name, 4, 1, 2), number="float",
                 element="BFloat16")[0]  # fmt: skip
    assert torch.equal(kept.isnan(), special.isnan())
    assert torch.equal(kept[~kept.isnan()], special[~special.isnan()])


@pytest.mark.parametrize(("rank", "tokens"), [(1, 40), (3, 13)], ids=str)
@pytest.mark.parametrize("name", SOLVERS)
def test_every_layout_gives_the_same_bits(name, rank, tokens):
    """Tiles, tokens a thread and where G lies change who computes what, and no sum."""
    gram, right = system(rank, tokens, columns=70)
    layout = layout_of(name, 8, tokens, rank)
    expected = solve(gram, right, layout)[0]
    for change in ({"resident": False}, {"own": 3, "width": layout.width * 2}):
        assert torch.equal(solve(gram, right, replace(layout, **change))[0], expected), change
    assert torch.equal(solve(gram, right[..., 5:9], layout)[0], expected[..., 5:9]), "a column hangs on its neighbours"


@pytest.mark.parametrize("name", SOLVERS)
def test_no_row_sees_a_later_one(name):
    gram, right = system(1, 40)
    layout = layout_of(name, 8, 40, 1)
    changed = right.clone()
    changed[:, 23:] += 1
    assert torch.equal(solve(gram, changed, layout)[0][:, :23], solve(gram, right, layout)[0][:, :23])


def executed_cells(layout):
    """Cells of the grid that sigDelta's threads compute, a column. With one row a token these are all of a warp's rows
    in every stage of any of them: the cells before a row's start and behind its end are computed too, and not used."""
    if layout.rank > 1:
        return layout.tokens * (layout.tokens - 1) // 2
    cells = 0
    for first in range(1, layout.tokens, layout.own):
        last_stage = min(first + layout.own - 1 + layout.tokens - 1, 2 * layout.tokens - 2)
        cells += layout.own * (last_stage - 2 * first + 1)
    return cells


@pytest.mark.parametrize("lone", [True, False], ids=["one row a thread", "the layout in use"])
@pytest.mark.parametrize(("rank", "tokens"), [(1, 16), (1, 64), (2, 16), (4, 16)], ids=str)
def test_operations_and_stages_are_those_of_the_theory(rank, tokens, lone):
    """Counted while the source runs. Of one column: substitution takes C(C-1)R² operations, sigDelta (1 + 1/R) times as
    many; its differences of G are one subtraction an entry, once a tile. Stages: C - 1 and 2C - 3. With several rows a
    thread sigDelta computes cells that nobody needs, and no more stages."""
    cells = tokens * (tokens - 1) // 2
    counts, layouts = {}, {}
    for name in SOLVERS:
        layout = layout_of(name, 4, tokens, rank)
        layouts[name] = replace(layout, own=1) if lone else layout
        gram, right = system(rank, tokens, columns=layout.columns)
        found, counts[name] = solve(gram, right, layouts[name], number="Counted")
        assert off(found, exact(gram, right)) <= 1e-12
    found = counts["Substitution"]
    assert found.operations == layouts["Substitution"].columns * cells * 2 * rank**2
    assert found.stages == tokens - 1
    assert found.chain == (rank + 1) * (tokens - 1)
    found, layout = counts["SigDelta"], layouts["SigDelta"]
    differences = rank**2 * (cells - (tokens - 1))
    if lone:
        assert executed_cells(layout) == cells
    assert found.operations == layout.columns * executed_cells(layout) * 2 * rank * (rank + 1) + differences
    assert found.stages == 2 * tokens - 3
    assert 2 * (tokens - 1) * (rank + 1) <= found.chain <= (2 * tokens - 3) * (rank + 2)


@pytest.mark.parametrize("name", SOLVERS)
def test_every_size_fits_the_smallest_card(name):
    """Of compute capability 8.0 or later a block has at least 99 KB of shared memory and 1024 threads."""
    for rank in range(1, MOST_RANK + 1):
        for tokens in range(1, MOST_ROWS // rank + 1):
            for number_bytes in (4, 8):
                for shared in (99 * 1024, HOPPER):
                    layout = layout_of(name, number_bytes, tokens, rank, shared)
                    assert layout.memory * number_bytes <= shared, layout
                    assert layout.warps <= 32, layout
