"""Rows that no model has, compiled: every kind in one token, coefficients of every shape, ties, dtypes, strides."""

import pytest
import torch

import parallelflow as pf
from parallelflow.kernels.cpu import build, flow
from parallelflow.testing import FLOOR, relative_error
from tests.cases import gradients

pytestmark = pytest.mark.skipif(not build.usable(), reason="no C++ compiler")
B, T, K, V = 2, 45, 5, 7
DECAYS = {"none": None, "head": (), "channel": (K,)}


class Tensors:
    """float64 leaves, drawn one after another."""

    def __init__(self, heads, value_heads):
        self.heads, self.value_heads = heads, value_heads
        self.generator, self.leaves = torch.Generator().manual_seed(0), {}

    def draw(self, *shape, like=torch.Tensor.clone):
        tensor = like(torch.randn(B, T, *shape, generator=self.generator)).float().double().requires_grad_()
        self.leaves[str(len(self.leaves))] = tensor
        return tensor


def every_kind(tensors, decay):
    """Bounded states: a row that only writes, one that only transforms, two stacked, one with channels' coefficients,
    and two more that only write, with key heads' vectors and coefficients here and value heads' there."""
    draw, h, hv = tensors.draw, tensors.heads, tensors.value_heads
    half = lambda x: x / 2  # noqa: E731
    key, stack, per_row = draw(h, K, like=half), draw(2, h, K, like=half), draw(2, hv, like=torch.sigmoid)
    return (
        pf.Row(write=draw(h, K, like=half), value=pf.Factor(draw(hv, V))),
        pf.Row(write=key, read=pf.Factor(key, draw(hv, K, like=torch.sigmoid), -1)),
        pf.Row(write=stack, read=pf.Factor(stack, per_row, -1), value=pf.Factor(draw(2, hv, V), per_row)),
        pf.Row(
            write=draw(hv, K, like=half),
            read=pf.Factor(draw(h, K, like=lambda x: x / 8), draw(h)),
            value=pf.Factor(draw(h, V), draw(hv, V), -1),
        ),
        pf.Row(write=draw(2, h, K, like=half), value=pf.Factor(draw(2, hv, V), draw(2, h), -1)),
    )


def untied(tensors, decay):
    """Key heads' read, value heads' write, and coefficients of either."""
    draw, h, hv = tensors.draw, tensors.heads, tensors.value_heads
    read = pf.Factor(draw(h, K, like=lambda x: x / 4), draw(h, like=torch.sigmoid), -1)
    value = pf.Factor(draw(h, V), draw(hv))
    return (pf.Row(write=draw(hv, K).detach() * 0.3, read=read, value=value),)


def shared_channels(tensors, decay):
    """One coefficient a channel for read and value, K = V."""
    draw, h, hv = tensors.draw, tensors.heads, tensors.value_heads
    key, coefficient = draw(h, K, like=lambda x: x / 2), draw(hv, K, like=torch.sigmoid)
    return (pf.Row(write=key, read=pf.Factor(key, coefficient, -1), value=pf.Factor(draw(hv, K), coefficient, -1)),)


def lone(tensors, decay):
    """Three rows that only write, coefficients a channel of key heads."""
    draw, h, hv = tensors.draw, tensors.heads, tensors.value_heads
    return (pf.Row(write=draw(3, h, K), value=pf.Factor(draw(3, hv, V), draw(3, h, V), -1)),)


ROWS = {each.__name__: each for each in (every_kind, untied, shared_channels, lone)}


def run(rows, tensors, order, reads, decay, backend, dtype, *, change=lambda x: x, **options):
    """Output, state and gradients of all leaves."""
    leaves = {name: change(x.detach().to(dtype)).requires_grad_() for name, x in tensors.leaves.items()}
    of = {id(x): leaves[name] for name, x in tensors.leaves.items()}

    def taken(tensor):
        return None if tensor is None else of.get(id(tensor), tensor.to(dtype))

    def factor(each):
        return None if each is None else pf.Factor(taken(each.vector), taken(each.coefficient), each.sign)

    parts = tuple(pf.Row(write=taken(row.write), read=factor(row.read), value=factor(row.value)) for row in rows)
    driver = pf.LowRankDriver(parts, None if decay is None else taken(decay), order, reads)
    width = V if parts[0].value is None else parts[0].value.vector.shape[-1]
    state = torch.randn(B, tensors.value_heads, K, width, generator=torch.Generator().manual_seed(1)).to(dtype)
    leaves["state"] = state.requires_grad_()
    options = {"initial_state": state, "return_final_state": True, "backend": backend, **options}
    result = pf.integrate(driver, of[id(tensors.query)], **options)
    found = gradients([result.output, result.final_state], leaves) if torch.is_grad_enabled() else {}
    return {"output": result.output.detach(), "final": result.final_state.detach(), **found}


def problem(kind, decay, heads):
    tensors = Tensors(*heads)
    tensors.query = tensors.draw(heads[0], K)
    rows = ROWS[kind](tensors, decay)
    own = DECAYS[decay]
    gate = None if own is None else tensors.draw(heads[1], *own, like=lambda x: -x.abs())
    return tensors, rows, gate


@pytest.mark.parametrize("heads", [(1, 1), (1, 2), (2, 6)], ids=str)
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("how", ["simultaneous-decayed", "simultaneous-raw", "sequential-decayed"])
@pytest.mark.parametrize("kind", ROWS)
def test_rows_of_any_kind(kind, how, decay, heads):
    """Twice the error of the recurrence (chunks of one token) in float32, against it in float64."""
    tensors, rows, gate = problem(kind, decay, heads)
    how = (*how.split("-"), gate)
    exact, plain = (run(rows, tensors, *how, "torch", dtype, chunk_size=1) for dtype in (torch.float64, torch.float32))
    found = run(rows, tensors, *how, "cpu", torch.float32)
    for name, reference in exact.items():
        if reference is None:
            assert found[name] is None
            continue
        allowed = max(FLOOR, 2 * relative_error(plain[name], reference))
        error = relative_error(found[name], reference)
        assert error <= allowed, f"{name} off by {error:.1e}, allowed {allowed:.1e}"


@pytest.mark.parametrize("heads", [(1, 2), (2, 2)], ids=str)
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("how", ["simultaneous-decayed", "simultaneous-raw", "sequential-decayed"])
@pytest.mark.parametrize("kind", ["every_kind", "shared_channels", "lone"])
@torch.no_grad()
def test_one_token_of_any_rows(kind, how, decay, heads, monkeypatch):
    """Compiled, since nothing is recorded; a token's sums are of a few terms."""
    calls = []
    monkeypatch.setattr(flow, "step", lambda *a, _run=flow.step, **o: calls.append(1) or _run(*a, **o))
    tensors, rows, gate = problem(kind, decay, heads)
    how = (*how.split("-"), gate)
    exact = run(rows, tensors, *how, "torch", torch.float64, change=lambda x: x[:, :1])
    found = run(rows, tensors, *how, "auto", torch.float32, change=lambda x: x[:, :1])
    assert calls
    for name, reference in exact.items():
        assert relative_error(found[name], reference) <= FLOOR, name


@pytest.mark.parametrize("decay", DECAYS)
def test_strides_and_threads_leave_the_bits(decay):
    """Transposed and strewn tensors, and as many threads as there are: the bits of dense ones on one thread."""
    tensors, rows, gate = problem("every_kind", decay, (1, 2))
    how = ("sequential", "decayed", gate, "cpu", torch.float32)
    want = run(rows, tensors, *how)
    strewn = lambda x: x.transpose(0, -1).contiguous().transpose(0, -1)  # noqa: E731
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        for change in (strewn, lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)):
            got = run(rows, tensors, *how, change=change)
            for name, tensor in want.items():
                assert tensor is None or torch.equal(tensor, got[name]), name
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_gradients_are_rounded_once(dtype):
    """Shared by value heads or not, of vectors, coefficients and decays."""
    tensors, rows, gate = problem("every_kind", "channel", (1, 2))
    for leaf in tensors.leaves.values():
        leaf.data = leaf.data.to(dtype).double()
    how = ("simultaneous", "raw", gate, "cpu")
    wide = run(rows, tensors, *how, torch.float32)
    narrow = run_narrow(rows, tensors, how, dtype)
    for name, reference in wide.items():
        assert relative_error(narrow[name], reference) <= torch.finfo(dtype).eps, name


def run_narrow(rows, tensors, how, dtype):
    """The state stays in float32."""
    order, reads, gate, backend = how
    leaves = {name: x.detach().to(dtype).requires_grad_() for name, x in tensors.leaves.items()}
    of = {id(x): leaves[name] for name, x in tensors.leaves.items()}

    def factor(each):
        if each is None:
            return None
        return pf.Factor(of[id(each.vector)], None if each.coefficient is None else of[id(each.coefficient)], each.sign)

    parts = tuple(pf.Row(write=of[id(row.write)], read=factor(row.read), value=factor(row.value)) for row in rows)
    driver = pf.LowRankDriver(parts, of[id(gate)], order, reads)
    state = torch.randn(B, tensors.value_heads, K, V, generator=torch.Generator().manual_seed(1))
    leaves["state"] = state.requires_grad_()
    result = pf.integrate(driver, of[id(tensors.query)], initial_state=state, return_final_state=True, backend=backend)
    found = gradients([result.output.float(), result.final_state], leaves)
    return {"output": result.output.detach(), "final": result.final_state.detach(), **found}
