"""What ranks ask of the GPU kernels: one run before the state that enters is known, and the backward pass from it."""

import pytest
import torch

pytest.importorskip("triton")

from delta_checks import draw
from delta_recurrence import NAMES

from parallelflow.autograd import Setting
from parallelflow.distributed import flows
from parallelflow.distributed.exchange import apply
from parallelflow.flow import Flow
from parallelflow.kernels import delta, halves, read
from parallelflow.kernels.backend import kernels_of
from parallelflow.problem import Inputs
from parallelflow.testing import Sizes, relative_error
from tests.cases import MODELS
from tests.distributed.test_passage import setting_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SERVED = (
    "delta_rule", "gated_delta_rule", "ssd", "gated_linear_attention", "kimi_delta_attention", "comba", "rwkv7",
    "delta_product-3-scalar", "low_rank_flow-2-simultaneous-vector-raw",
)  # fmt: skip


CASES = [(case, torch.float32) for case in MODELS if case.name in SERVED]
CASES += [(case, torch.bfloat16) for case in MODELS if case.name in ("gated_delta_rule", "kimi_delta_attention")]


@pytest.mark.parametrize(("case", "dtype"), CASES, ids=lambda each: getattr(each, "name", str(each)))
def test_one_run_tells_all(case, dtype):
    """Beside float64, at most twice as far as the same kernels when they know the state that enters. Sequences are
    whole here; the delta rule's kernels come in halves all the same."""
    torch.manual_seed(0)
    sizes = case.sizes(Sizes(1, 67, 1, 1, 16, 16))
    tensors = {name: x.to(dtype if x.ndim > 3 and name != "log_decay" else torch.float32).to(DEVICE)
               for name, x in case.inputs(sizes).items()}  # fmt: skip
    state = case.initial_state(sizes).float().to(DEVICE)
    inputs, setting = setting_of(case, tensors, "triton")
    setting = setting._replace(backend=kernels_of("triton", inputs, setting.traits))
    started = Inputs(*setting.untied(inputs))._replace(initial_state=state)
    output, final, kept = setting.forward(started, keep=True)
    d_output, d_final = torch.randn_like(output), torch.randn_like(state)
    usual = (output, final, *setting.backward(started, kept, d_output, d_final))

    exact_inputs, exact_setting = setting_of(case, {name: x.double() for name, x in tensors.items()}, "torch")
    begun = Inputs(*exact_setting.untied(exact_inputs))._replace(initial_state=state.double())
    output, final, kept = exact_setting.forward(begun, keep=True)
    exact = (output, final, *exact_setting.backward(begun, kept, d_output.double(), d_final.double()))

    plain = Setting(setting.traits, setting.plan, None, setting.backend)
    passage = flows.pass_through(inputs, plain, lambda wide: kernels_of("triton", wide, setting.traits), keep=True)
    output, kept, seen = passage.enter(state, keep=True)
    assert kept
    assert output.dtype == dtype
    gradients = setting.backward(started, kept, d_output, d_final)
    pulled = passage.pull(inputs, plain, kept, seen, d_output)
    transition = passage.flow.transition
    adjoint = Flow(transition.mT if transition.ndim == 4 else transition, pulled)
    gradients = gradients._replace(initial_state=apply(adjoint, d_final))
    found = (output, apply(passage.flow, state), *gradients)
    for name, *three in zip(("output", "final state", *Inputs._fields), found, usual, exact, strict=True):
        if three[-1] is not None:
            ours, theirs = (relative_error(each, three[-1]) for each in three[:2])
            floor = 0.0 if dtype is torch.float32 else 2.0**-9  # where a gradient is a sum that has lost its rounding
            assert ours <= max(2 * theirs, floor), (name, ours, theirs)


@pytest.mark.parametrize("name", ["kimi_delta_attention", "gated_linear_attention"])
def test_one_run_in_segments_tells_all(name, short):
    """Cut, and the backward pass finds for itself the flows that the run over wider states did not keep."""
    case = next(case for case in MODELS if case.name == name)
    test_one_run_tells_all(case, torch.float32)


@pytest.mark.parametrize(
    ("tied", "batch", "chunks", "decay"),
    [(True, 1, 5, "resets"), (True, 2, 3, "strong"), (False, 1, 5, "mild"), (False, 2, 3, "resets")],
)
def test_a_pass_in_halves_is_the_whole_pass(tied, batch, chunks, decay, short):
    """Segments' flows, the exchange, and only then the states: output, flow, what is kept, and the gradients."""
    inputs = draw(64 * chunks - 5, 1, 1, 16, 16, batch=batch, decay=decay, initial=True)
    query, key, value, beta, log_decay, state = (
        None if x is None else x.float().to(DEVICE) for x in (inputs[name] for name in NAMES)
    )
    tensors, options = (query, key, value, beta, log_decay), {"tied": tied, "scale": 0.3}
    half = halves.begin(*tensors, **options, tier="triton")
    assert half.flows.shape[0] == batch * chunks  # each chunk is a segment
    output, kept = halves.finish(half, state)
    whole, final, saved = delta.forward(
        *tensors, **options, initial_state=state, need_final_state=True, save_for_backward=True
    )
    assert relative_error(output, whole) <= 2e-6
    assert relative_error(apply(half.flow, state), final) <= 2e-6
    d_output, d_final = torch.randn_like(output), torch.randn_like(state)
    found, expected = (
        delta.backward(*tensors, each, d_output, d_final, **options, initial_state=state) for each in (kept, saved)
    )
    for name, ours, theirs in zip(NAMES, found, expected, strict=True):
        assert relative_error(ours, theirs) <= 2e-6, name
    pulled = halves.pull(*tensors, *kept, half.flows, d_output, **options, tier="triton")
    transition = half.flow.transition.mT if tied else half.flow.transition
    assert relative_error(apply(Flow(transition, pulled), d_final), expected[-1]) <= 2e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_a_state_adds_to_outputs(dtype):
    """Beside float64; of views into wider tensors, in sizes that are no powers of two, with heads wider than a tile."""
    for batch, time, heads, key_dim, value_dim in ((2, 67, 2, 20, 18), (1, 9, 1, 130, 70)):
        wide = torch.randn(batch, time, heads, value_dim + key_dim).to(DEVICE, dtype)
        output, queries = wide.split([value_dim, key_dim], -1)
        state = torch.randn(batch, heads, key_dim, value_dim, device=DEVICE)
        found, dense = read.add_read(output, queries, state, True)
        exact = output.double() + (queries.double().transpose(1, 2) @ state.double()).transpose(1, 2)
        assert found.dtype == dtype
        assert torch.equal(dense, queries)
        assert dense.is_contiguous()
        rounding = relative_error(exact.to(dtype), exact)
        assert relative_error(found, exact) <= max(2 * rounding, 2.0**-22)
