"""Rows of every kind in segments: the recurrence's results and gradients, and the same bits whatever else is there."""

import weakref
from contextlib import nullcontext

import pytest
import torch

pytest.importorskip("triton")

from test_rows import DEVICE, HOPPER, ROWS, compare, mixed_decays, run

import parallelflow as pf
from parallelflow.kernels import segments
from parallelflow.kernels.rows import engine
from parallelflow.testing import Sizes, relative_error

pytestmark = pytest.mark.usefixtures("short")


def named(name):
    return next(model for model in ROWS if model.name == name)


@pytest.fixture(autouse=True)
def cut(monkeypatch):
    """The numbers of segments of all scans, in order."""
    found = []
    start = engine.Scan.__init__

    def noting(self, *arguments):
        start(self, *arguments)
        found.append(0 if self.cut is None else self.cut.layout.sequences)

    monkeypatch.setattr(engine.Scan, "__init__", noting)
    return found


@pytest.mark.parametrize(
    ("name", "time"),
    [("kimi_delta_attention", 200), ("gated_linear_attention", 200), ("rwkv7", 200), ("comba", 200),
     ("delta_product-3-scalar", 60), ("low_rank_flow-2-simultaneous-vector-raw", 100)],
)  # fmt: skip
def test_gradients(name, time, cut):
    """Weak decays, so that what a segment passes on counts; sizes that are no powers of two."""
    model = named(name)

    def change(inputs):
        if "log_decay" in inputs:
            inputs["log_decay"] /= 30

    compare(model, Sizes(1, time, 1, 1, 20, 18, model.rows), torch.float32, change=change)
    assert set(cut) == {4}


@pytest.mark.parametrize(("name", "dtype"), [("kimi_delta_attention", torch.bfloat16), ("rwkv7", torch.float16)])
def test_decays_of_every_strength(name, dtype, cut):
    model = named(name)
    compare(model, Sizes(1, 150, 1, 1, 16, 16, model.rows), dtype, change=mixed_decays)
    assert set(cut) == {3}


@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("name", ["kimi_delta_attention", "gated_linear_attention", "rwkv7", "delta_product-2-none"])
def test_hopper(name, cut):
    model = named(name)
    compare(model, Sizes(1, 333, 1, 1, 64, 64, model.rows), torch.bfloat16, backend="hopper")
    assert min(cut) > 1


def test_correlated_keys_without_decay(monkeypatch):
    """Whatever rounding does to keys of cosine 0.999 and beta 2, segments do no more."""
    model = named("delta_product-2-none")
    inputs = model.inputs(Sizes(1, 100, 1, 1, 16, 16, 2))
    key, generator = inputs["key"], torch.Generator().manual_seed(4)
    one = torch.nn.functional.normalize(torch.randn(key[0, 0, 0].shape, generator=generator), dim=-1)
    inputs["key"] = torch.nn.functional.normalize(0.03 * torch.nn.functional.normalize(key, dim=-1) + one, dim=-1)
    inputs["beta"].fill_(2.0)
    vectors = {name: x.to(DEVICE, torch.float32 if name == "beta" else torch.bfloat16) for name, x in inputs.items()}
    state = torch.randn(1, 1, 16, 16, generator=generator).to(DEVICE)
    exact = run(model, {name: x.double() for name, x in vectors.items()}, state.double(), "torch")
    found = run(model, vectors, state, "triton")
    monkeypatch.setattr(segments, "SHORTEST", 1000)
    whole = run(model, vectors, state, "triton")
    assert not torch.equal(found["output"], whole["output"])
    for name, expected in exact.items():
        assert relative_error(found[name], expected) <= 1.5 * relative_error(whole[name], expected), name


@pytest.mark.parametrize("name", ["kimi_delta_attention", "gated_linear_attention", "delta_product-3-scalar"])
def test_packed(name, cut):
    """An empty sequence, one of a token, one that is cut."""
    model = named(name)
    size = 64 if model.rows == 1 else 16
    starts = [0, size + 3, size + 3, size + 4, 3 * size + 20]
    compare(model, Sizes(1, starts[-1], 1, 1, 16, 16, model.rows), torch.float32, starts=starts)
    assert set(cut) == {2 + 1 + 1 + 3}


@pytest.mark.parametrize("name", ["kimi_delta_attention", "low_rank_flow-4-simultaneous-scalar-raw"])
def test_the_same_bits_alone_in_a_batch_and_packed(name):
    model = named(name)
    time = 64 * 2 + 9 if model.rows == 1 else 16 * 2 + 9
    sizes = Sizes(2, time, 1, 1, 16, 16, model.rows)
    inputs = {name: x.float().to(DEVICE) for name, x in model.inputs(sizes).items()}
    state = model.initial_state(sizes).float().to(DEVICE)
    weights = torch.randn(2, time, 1, 16, generator=torch.Generator().manual_seed(1)).to(DEVICE)

    def results(tensors, initial, weight, **options):
        leaves = {name: x.detach().requires_grad_() for name, x in {**tensors, "initial_state": initial}.items()}
        result = model(leaves, return_final_state=True, backend="triton", **options)
        loss = (result.output * weight).sum() + result.final_state.sum()
        found = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
        return found | {"output": result.output.detach(), "final_state": result.final_state.detach()}

    together = results(inputs, state, weights)
    before = {name: x[:1, :5] for name, x in inputs.items()}
    line = {name: torch.cat([before[name], x.flatten(0, 1)[None]], 1) for name, x in inputs.items()}
    packed = results(
        line, torch.cat([state[:1], state]), torch.cat([weights[:1, :5], weights.flatten(0, 1)[None]], 1),
        cu_seqlens=torch.tensor([0, 5, 5 + time, 5 + 2 * time], device=DEVICE))  # fmt: skip
    for number in range(2):
        own = {name: x[number : number + 1] for name, x in inputs.items()}
        alone = results(own, state[number : number + 1], weights[number : number + 1])
        for each, found in together.items():
            assert torch.equal(found[number : number + 1], alone[each]), f"{each} alone"
            start = 5 + number * time
            whole = each in ("initial_state", "final_state")
            part = packed[each][number + 1 : number + 2] if whole else packed[each][:, start : start + time]
            assert torch.equal(alone[each], part), f"{each} packed"


def test_the_batch_counts_only_where_it_is_allowed_to(cut):
    """Three sequences, for which a card of eight has room in two segments each if it may look at the batch."""
    model = named("gated_linear_attention")
    inputs = {name: x.float().to(DEVICE) for name, x in model.inputs(Sizes(3, 64 * 4, 1, 1, 16, 16, 1)).items()}
    inputs["log_decay"] /= 30
    found = []
    for invariant in (True, False):
        leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
        output = model(leaves, backend="triton", batch_invariant=invariant).output
        output.sum().backward()
        found.append((output.detach(), *[x.grad for x in leaves.values()]))
    assert cut == [12, 12, 6, 6]
    for one, other in zip(*found, strict=True):
        assert relative_error(one, other.double()) <= 1e-5


def test_rows_that_only_write_without_decay(cut):
    """Two a token, for which the kernels of the delta rule do not do: P is the identity."""
    draw = lambda *shape: torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))  # noqa: E731
    keys, values, query = draw(1, 90, 2, 1, 16), draw(1, 90, 2, 1, 18) / 5, draw(1, 90, 1, 16)
    found = {}
    for backend, dtype in (("triton", torch.float32), ("torch", torch.float64)):
        leaves = [x.to(DEVICE, dtype).requires_grad_() for x in (query, keys, values)]
        rows = tuple(pf.Row(write=leaves[1][:, :, j], value=pf.Factor(leaves[2][:, :, j])) for j in range(2))
        output = pf.integrate(pf.LowRankDriver(rows=rows, order="simultaneous"), leaves[0], backend=backend).output
        found[backend] = [output.detach(), *torch.autograd.grad(output.square().sum(), leaves)]
    assert set(cut) == {3}
    for ours, exact in zip(found["triton"], found["torch"], strict=True):
        assert relative_error(ours, exact) <= 2e-6


def test_nothing_is_read_that_nobody_wrote(monkeypatch):
    """Memory full of NaN changes no bit, and neither does a backward pass that has to make everything again."""
    model = named("kimi_delta_attention")
    sizes = Sizes(1, 150, 1, 1, 16, 16, 1)
    inputs = {name: x.float().to(DEVICE) for name, x in model.inputs(sizes).items()}
    state = model.initial_state(sizes).float().to(DEVICE)
    clean = run(model, inputs, state, "triton")
    vacant = torch.Tensor.new_empty

    def poisoned(self, *shape, **options):
        found = vacant(self, *shape, **options)
        return found.fill_(torch.nan) if found.is_floating_point() else found

    backward = engine.backward
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    monkeypatch.setattr(
        engine, "backward", lambda inputs, traits, starts, tier, saved, *rest: backward(
            inputs, traits, starts, tier, [], *rest))  # fmt: skip
    for each, found in run(model, inputs, state, "triton").items():
        assert torch.equal(found, clean[each]), each


def test_what_a_scan_reads_lives_until_the_streams_meet(monkeypatch):
    """A pass that is made again puts arrays where others have ended, which a scan aside has not by its launch."""
    start, lent, met = engine.Scan.__init__, [], []

    def beside(self, *arguments):
        start(self, *arguments)
        self.together, launch = True, self.launch

        def lending(*given, **options):
            launch(*given, **options)
            made = torch.zeros(1)
            lent.append(weakref.ref(made))
            return made

        self.launch = lending

    monkeypatch.setattr(engine.Scan, "__init__", beside)
    monkeypatch.setattr(engine, "aside", lambda device: nullcontext(lent.clear()))
    monkeypatch.setattr(engine, "rejoin", lambda device: met.append(lent[0]() is not None))
    model = named("kimi_delta_attention")
    inputs = {name: x.float().to(DEVICE) for name, x in model.inputs(Sizes(1, 70, 1, 1, 16, 16, 1)).items()}
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    model(leaves, backend="triton").output.sum().backward()
    assert met == [True]
