"""A pass that is made again has the bits of the first one, wherever its tensors lie and whatever lay there before."""

import itertools
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton")

import parallelflow as pf
from parallelflow import functional
from parallelflow.autograd import Setting, _of_one_kind
from parallelflow.kernels import plan, recording
from parallelflow.kernels.launch import bind
from parallelflow.problem import Inputs, Traits
from parallelflow.testing import Sizes
from parallelflow.torch_backend import Plan
from tests.cases import MODELS, by_name, gradients, require_grad
from tests.kernels import entries

GPU = torch.cuda.is_available()
DEVICE, SIZE, BACKEND = ("cuda", 64, "auto") if GPU else ("cpu", 16, "triton")
VECTORS = torch.bfloat16 if GPU else torch.float32
PACKED = {"kimi_delta_attention": True, "delta_product-3-scalar": False, "gated_delta_rule": False}
SERVED = [model for model in MODELS if model.name in PACKED]
LONE = next(model for model in MODELS if model.name == "delta_product-2-none")
SERVED.append(replace(LONE, name="delta_product-1-none", rows=1))  # the delta rule with an axis R


@pytest.fixture
def again(monkeypatch):
    """How many passes were made again; memory is full of NaN."""
    bind.cache_clear()  # bound kernels keep their entry points
    if not GPU:
        entries.install(monkeypatch)
    monkeypatch.setattr(plan, "memory", lambda size, device: torch.full((size,), 255, dtype=torch.uint8, device=device))
    count, take = [], recording.Device.take
    monkeypatch.setattr(recording.Device, "take", lambda self, steps: count.append(len(steps)) or take(self, steps))
    yield count
    bind.cache_clear()


def draw(model, sizes):
    """Vectors in 16 bits on a GPU, where Hopper's tier takes them."""
    return {
        name: x.to(DEVICE, torch.float32 if name in ("beta", "log_decay") else VECTORS)
        for name, x in model.inputs(sizes).items()
    }


def call(model, inputs, state, **options):
    tensors = require_grad({name: x.clone() for name, x in {**inputs, "initial_state": state}.items()})
    result = model(tensors, return_final_state=True, backend=BACKEND, validate=False, **options)
    found = gradients([result.output, result.final_state], tensors)
    with torch.no_grad():
        alone = model({name: x.detach() for name, x in tensors.items()}, backend=BACKEND, validate=False, **options)
    return {"output": result.output.detach(), "state": result.final_state.detach(), "alone": alone.output, **found}


@pytest.mark.parametrize("model", SERVED, ids=by_name)
def test_the_same_bits(model, again):
    packed = PACKED.get(model.name, False)
    heads = 1 if packed else 2
    length = 67 if model.rows == 1 else 19  # in several chunks; up to 64 another kernel has it without gradients
    inputs = draw(model, Sizes(1, length, 1, heads, SIZE, SIZE, model.rows))
    options = {"cu_seqlens": torch.tensor([0, 65, 65, 67], device=DEVICE)} if packed else {}
    state = torch.randn(3 if packed else 1, heads, SIZE, SIZE, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    first = call(model, inputs, state, **options)
    kept = []
    for _ in range(4):
        again.clear()
        kept.append(call(model, inputs, state, **options))  # the results stay, so memory lies elsewhere each time
        for name, expected in first.items():
            assert torch.equal(kept[-1][name], expected), name
    assert len(again) == 2 + (length > 64), "forward, backward, and forward alone"


class Lived(NamedTuple):
    """An array of so many bytes, that lives from one launch to another."""

    bytes: int
    begin: int
    end: int


def test_a_call_in_another_form_is_remembered_too(again, monkeypatch):
    """Its first one finds a plan that calls by name have made."""
    inputs = draw(SERVED[0], Sizes(1, 65, 1, 1, SIZE, SIZE))
    options = {"backend": BACKEND, "validate": False}
    for _ in range(3):
        pf.gated_delta_rule(**inputs, **options)
    calls = []
    integrate = functional.integrate
    monkeypatch.setattr(functional, "integrate", lambda *a, **o: calls.append(1) or integrate(*a, **o))
    for _ in range(3):
        again.clear()
        pf.gated_delta_rule(*inputs.values(), **options)
        assert len(again) == 1
    assert len(calls) == 1


def test_problems_of_one_kind_share_what_is_decided():
    """Under torch.compile: same shapes, dtypes, settings and boundaries."""

    def decided(time=8, starts=None, dtype=torch.float32, scale=None):
        vectors = {name: torch.zeros(1, time, 1, 4, dtype=dtype) for name in ("query", "lone_write", "lone_value")}
        traits = Traits(False, False, (), (0,), 1, 1, 1, False, scale)
        return _of_one_kind(Setting(traits, Plan(), starts, "triton"), Inputs(**vectors)).decided

    assert decided() is decided()
    assert decided(starts=[0, 3, 8]) is decided(starts=[0, 3, 8])
    others = [decided(), decided(starts=[0, 3, 8]), decided(starts=[0, 4, 8]), decided(time=9),
              decided(dtype=torch.bfloat16), decided(scale=0.5)]  # fmt: skip
    assert len({id(other) for other in others}) == len(others)


@given(st.lists(st.tuples(st.integers(1, 2000), st.integers(0, 9), st.integers(1, 5)), max_size=12))
def test_arrays_that_live_at_one_time_lie_apart(drawn):
    arrays = {number: Lived(size, begin, begin + length) for number, (size, begin, length) in enumerate(drawn)}
    begins, size = plan.packed(arrays)
    for one, other in itertools.combinations(arrays, 2):
        (a, first), (b, second) = (arrays[one], begins[one]), (arrays[other], begins[other])
        if a.begin < b.end and b.begin < a.end:
            assert first + a.bytes <= second or second + b.bytes <= first
    assert all(begin % plan.APART == 0 and begin + arrays[number].bytes <= size for number, begin in begins.items())
    assert size <= sum(a.bytes + -a.bytes % plan.APART for a in arrays.values())


def test_memory_is_used_again():
    """Of three arrays of which only neighbours meet, the first and the last lie in one place."""
    begins, size = plan.packed({0: Lived(512, 0, 2), 1: Lived(512, 1, 3), 2: Lived(512, 2, 4)})
    assert begins[0] == begins[2]
    assert size == 1024
