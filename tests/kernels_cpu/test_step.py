"""One token, compiled: the recurrence of every model, only where nothing is recorded."""

import pytest
import torch

from parallelflow.kernels.cpu import build, flow
from parallelflow.testing import Sizes, relative_error
from tests.cases import MODELS, by_name, require_grad

pytestmark = pytest.mark.skipif(not build.usable(), reason="no C++ compiler")
SERVED = [model for model in MODELS if not model.normalizes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("model", SERVED, ids=by_name)
def test_one_token_is_the_recurrence(model, dtype):
    """Blocks of columns, whole vectors and single ones. What a function computes of its inputs before the engine is in
    their dtype, and reaches the state."""
    before = 2e-7 if dtype == torch.float32 or model.function not in ("longhorn", "efla") else torch.finfo(dtype).eps
    for heads, value_heads, key_size, value_size in ((2, 4, 24, 150), (1, 1, 1, 1), (1, 3, 3, 17)):
        sizes = Sizes(batch=3, length=1, heads=heads, value_heads=value_heads, key_size=key_size, value_size=value_size)
        inputs, state = model.inputs(sizes, dtype=dtype), model.initial_state(sizes).float()
        for initial in (state, None):
            found = model(inputs, initial_state=initial, return_final_state=True)
            exact = model.oracle(inputs, initial_state=initial)
            assert found.output.dtype == dtype
            assert relative_error(found.output, exact.output) <= max(4e-7, torch.finfo(dtype).eps)
            assert relative_error(found.final_state, exact.final_state) <= before


def test_one_token_runs_compiled_only_where_nothing_is_recorded(monkeypatch):
    calls = []
    monkeypatch.setattr(flow, "step", lambda *a, _run=flow.step, **o: calls.append(1) or _run(*a, **o))
    model = next(model for model in MODELS if model.name == "kimi_delta_attention")
    sizes = Sizes(batch=1, length=1)
    inputs, state = model.inputs(sizes, dtype=torch.float32), model.initial_state(sizes).float()
    model(inputs, initial_state=state)
    assert len(calls) == 1
    leaves = require_grad(inputs)
    model(leaves, initial_state=state).output.sum().backward()
    assert len(calls) == 1
    with torch.no_grad():
        model(leaves, initial_state=state)
    assert len(calls) == 2
