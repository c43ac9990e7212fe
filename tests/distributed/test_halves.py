"""The delta rule's kernels over ranks, in Triton's interpreter: all ranks, the first one too, run in halves."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

pytest.importorskip("triton")

from parallelflow.distributed import Context, exchange
from parallelflow.kernels import backend
from parallelflow.testing import Sizes
from tests.distributed.cases import alone, expect_same, on_rank
from tests.distributed.test_sharded import model
from tests.kernels.conftest import _mend_interpreter

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are compiled where there is a GPU")
LENGTHS = {2: [70, 65], 3: [65, 0, 70]}


def halves_on_rank(group, *arguments):
    """``on_rank``, and in what order this rank's halves and waits came before the backward pass."""
    from parallelflow.kernels import segments

    _mend_interpreter()
    events = []

    def noting(name, function):
        def noted(*arguments, **options):
            if name != "wait" or arguments[1]:
                events.append(name)
            return function(*arguments, **options)

        return noted

    with (
        mock.patch.object(segments, "SHORTEST", 2),
        mock.patch.object(segments, "FEWEST", 1),
        mock.patch.object(segments, "processors", return_value=8),
        mock.patch.object(backend, "begin", noting("first half", backend.begin)),
        mock.patch.object(backend, "finish", noting("second half", backend.finish)),
        mock.patch.object(backend, "pull", noting("pull", backend.pull)),
        mock.patch.object(exchange, "start", noting("exchange", exchange.start)),
        mock.patch.object(Context, "wait", noting("wait", Context.wait)),
    ):
        found = on_rank(group, *arguments)
    return found, events


@pytest.mark.parametrize(("name", "size"), [("gated_delta_rule", 3), ("ssd", 2)])
def test_all_ranks_run_in_halves(ranks, name, size):
    case, lengths = model(name), LENGTHS[size]
    sizes = case.sizes(Sizes(1, sum(lengths), 1, 1, 16, 16))
    inputs = {key: x.float() for key, x in case.inputs(sizes).items()}
    state = case.initial_state(sizes).float()
    call = (case.function, {"backend": "triton"})
    options = {"validate": False, "context_lengths": lengths}
    found = ranks.run(size, halves_on_rank, call, inputs, state, None, lengths, options)
    expect_same(alone((case.function, {"backend": "torch"}), inputs, state, None), [each for each, _ in found], 2e-5)
    for rank, (_, events) in enumerate(found):
        if not lengths[rank]:  # nothing to run, and no second half
            continue
        if rank == 0:
            assert events[:3] == ["first half", "exchange", "second half"]
        else:
            assert events[:4] == ["first half", "exchange", "wait", "second half"]
            assert "pull" in events[4:]
