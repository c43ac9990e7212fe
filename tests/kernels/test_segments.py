"""Sequences in segments: the results and gradients of the recurrence, and the same bits whatever else is there."""

from functools import partial

import pytest
import torch

pytest.importorskip("triton")
from delta_checks import DEVICE, check, draw, kernel_results
from delta_recurrence import NAMES, relative

import parallelflow as pf
from parallelflow.kernels import compose, delta, schedule, segments


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("initial", [True, False])
def test_gradients(tied, initial, short):
    inputs = draw(64 * 6 + 5, 1, 2, 32, 16, decay="mild", initial=initial)
    assert cut_of(inputs, torch.float32, tied).layout.sequences == 4
    check(inputs, torch.float32, tied=tied)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("decay", [None, "strong", "resets"])
def test_decays(decay, dtype, short):
    check(draw(64 * 4, 1, 1, 16, 16, decay=decay, initial=True), dtype, tied=True)


def test_correlated_keys(short):
    """Without a decay: what a segment passes on matters."""
    check(draw(64 * 3, 1, 1, 64, 16, cosine=0.999, initial=True), torch.bfloat16, tied=True)


def test_sizes_that_are_no_power_of_two(short):
    check(draw(150, 1, 1, 100, 40, decay="mild", initial=True), torch.float32, tied=True)


def test_heads_wider_than_a_step_of_the_composition(short):
    check(draw(32 * 3, 1, 1, 272, 16, initial=True), torch.bfloat16, tied=True)


@pytest.mark.parametrize("tied", [True, False])
def test_packed_sequences(tied, short):
    lengths = [200, 0, 1, 64, 130, 0]
    inputs = draw(sum(lengths), 1, 1, 16, 16, decay="mild", initial=True, sequences=len(lengths))
    check(inputs, torch.float32, tied=tied, lengths=lengths, known=True)


def test_batches(short):
    check(draw(64 * 3 + 1, 1, 2, 16, 32, batch=2, decay="mild", initial=True), torch.float32, tied=True)


def cut_of(inputs, dtype, tied, batch_invariant=True, starts=None):
    query, key, value = (inputs[name].to(dtype) for name in ("query", "key", "value"))
    chunks = schedule.chunks_of(query, value, None, None, starts)
    return schedule.Schedule(query, key, value, chunks, tied, "triton", batch_invariant, starts).segments


def batch_of(inputs, number):
    return {name: None if x is None else x[number : number + 1] for name, x in inputs.items()}


@pytest.mark.parametrize("tied", [True, False])
def test_the_same_bits_alone_in_a_batch_and_packed(tied, short):
    time, sequences = 64 * 3 + 9, 2
    inputs = {n: x.float().to(DEVICE) for n, x in
              draw(time, 1, 1, 16, 16, batch=sequences, decay="mild", initial=True).items()}  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    cotangents = (torch.randn(sequences, time, 1, 16, generator=generator).to(DEVICE),
                  torch.randn(sequences, 1, 16, 16, generator=generator).to(DEVICE))  # fmt: skip
    options = {"tied": tied, "scale": 0.3}
    together = kernel_results(inputs, cotangents, **options)
    again = kernel_results(inputs, cotangents, **options)
    alone = [kernel_results(batch_of(inputs, n), tuple(c[n : n + 1] for c in cotangents), **options) for n in range(2)]
    # the same two packed behind a shorter sequence that is cut otherwise
    before = {n: x.float().to(DEVICE) for n, x in draw(70, 1, 1, 16, 16, decay="mild", initial=True, seed=2).items()}
    line = {n: torch.cat([before[n], x.flatten(0, 1).unsqueeze(0)], 1) for n, x in inputs.items() if n != NAMES[5]}
    line["initial_state"] = torch.cat([before["initial_state"], inputs["initial_state"]])
    line_cotangents = (torch.cat([torch.ones(1, 70, 1, 16, device=DEVICE), cotangents[0].flatten(0, 1)[None]], 1),
                       torch.cat([torch.ones(1, 1, 16, 16, device=DEVICE), cotangents[1]]))  # fmt: skip
    packed = kernel_results(line, line_cotangents, **options, lengths=[70, *[time] * 2], known=True)
    for name, found in together.items():
        assert torch.equal(found, again[name]), f"{name} in two runs"
        whole_states = name in ("final_state", "d_initial_state")
        for n in range(sequences):
            assert torch.equal(found[n : n + 1], alone[n][name]), f"{name} of {n} alone"
            start = 70 + n * time
            part = packed[name][n + 1 : n + 2] if whole_states else packed[name][:, start : start + time]
            assert torch.equal(found[n : n + 1], part), f"{name} of {n} packed"


def test_segments_are_not_the_same_bits_but_as_near(short, monkeypatch):
    """What the test of equal bits would not see: that nothing was cut."""
    inputs = {n: x.float().to(DEVICE) for n, x in draw(64 * 4, 1, 1, 32, 16, initial=True, decay="mild").items()}
    cotangents = torch.ones(1, 256, 1, 16, device=DEVICE), torch.ones(1, 1, 32, 16, device=DEVICE)
    cut = kernel_results(inputs, cotangents, tied=True, scale=0.3)
    monkeypatch.setattr(segments, "SHORTEST", 1000)
    delta._SCHEDULES.clear()
    whole = kernel_results(inputs, cotangents, tied=True, scale=0.3)
    assert not torch.equal(cut["output"], whole["output"])
    for name, expected in whole.items():
        assert relative(cut[name], expected) <= 1e-5, name


def test_a_batch_may_count_where_it_is_allowed_to():
    steps = 2 * segments.SHORTEST // 64
    length = partial(segments.segment_length, steps, 64)
    alone = length(steps, 16, 0, 132, True)
    assert alone == -(-steps // 8)
    assert length(64 * steps, 16, 0, 132, True) == alone
    assert length(2 * steps, 16, 0, 132, False) == -(-2 * steps // 8)
    assert length(64 * steps, 16, 0, 132, False) >= steps
    assert length(steps, 45, 0, 132, True) == steps  # more than a third of the card: as it is
    assert length(steps, 44, 0, 132, True) < steps
    assert length(steps, 16, 16, 132, True) == -(-steps // 5)  # 4 times 16 programs of H, 3 times 16 of P
    assert length(steps, 33, 33, 132, True) == -(-steps // 3)
    assert length(steps, 34, 34, 132, True) == steps


def test_a_sequence_is_long_by_its_tokens():
    """However few of them a chunk has."""
    for size in (16, 64):
        steps = segments.SHORTEST // size
        assert segments.segment_length(steps, size, steps, 16, 0, 132, True) < steps
        assert segments.segment_length(steps - 1, size, steps, 16, 0, 132, True) == steps - 1


def test_tables_name_every_token_once():
    starts, lengths = (0, 300, 300, 364, 500), (2, 5, 5, 1)
    cut = segments._tables(starts, 64, lengths, torch.device("cpu"))
    assert cut.layout.cu_seqlens.tolist() == [0, 128, 256, 300, 300, 364, 428, 492, 500]
    assert cut.layout.offsets.tolist() == [0, 2, 4, 5, 5, 6, 7, 8, 9]
    assert cut.first.tolist() == [0, 3, 4, 5, 8]
    assert cut.begun.tolist() == [0, -1, -1, 1, 2, 3, -1, -1]
    assert cut.ended.tolist() == [-1, -1, 0, 1, 2, -1, -1, 3]
    assert cut.leading.tolist() == [[0, 0], [1, -1], [5, 3], [6, -1]]
    assert cut.trailing.tolist() == [[1, -1], [2, 0], [6, -1], [7, 3]]
    assert (cut.layout.count, cut.layout.sequences, cut.flows) == (9, 8, 4)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("decays", [None, 0, 1, 48], ids=["dense", "none", "a head", "a channel"])
def test_a_flow_composed_is_a_flow(decays, reverse):
    """The composition against matrix products in float64, with P of any size, or a product of decays."""
    dense = decays is None
    cut = segments._tables((0, 640, 768), 64, (2, 2), torch.device("cpu"))
    generator = torch.Generator().manual_seed(5)
    flows = torch.randn(cut.flows, 2, 48, 24 + (48 if dense else 0), generator=generator) / 7
    given = torch.randn(2, 2, 48, 24, generator=generator)
    total = torch.rand(cut.layout.count * 2, decays, generator=generator) if decays else None
    h, sources = flows[..., :24].double(), flows[..., :24].contiguous()
    if dense:
        p = flows[..., 24:].double()
    else:
        factors = torch.ones(cut.layout.count, 2, 1) if total is None else total.unflatten(0, (-1, 2))
        of_segments = factors.double()[: 2 * cut.flows].unflatten(0, (-1, 2)).prod(1)  # of the first sequence
        p = torch.diag_embed(of_segments.expand(-1, -1, 48))
    found = torch.empty(6, 2, 48, 24)
    if reverse:
        compose.exit_gradients(flows, sources, total, cut, given, dense=dense, into=found)
        expected = [given[0].double(), h[3]]
        for segment in (3, 2, 1):
            expected.append(p[segment].mT @ expected[-1] + h[segment - 1])
        expected = [*expected[::-1], given[1].double()]
    else:
        compose.entry_states(flows, total, cut, given, dense=dense, into=found)
        expected = [given[0].double(), h[0]]
        for segment in (1, 2, 3):
            expected.append(p[segment] @ expected[-1] + h[segment])
        expected.append(given[1].double())
    assert relative(found, torch.stack(expected)) <= 1e-6


@pytest.mark.parametrize("tied", [True, False])
def test_nothing_is_read_that_nobody_wrote(tied, short, monkeypatch):
    """A workspace full of NaN, whatever the dtype, changes no bit."""
    inputs = {n: x.float().to(DEVICE) for n, x in draw(150, 1, 1, 16, 16, decay="mild", initial=True).items()}
    cotangents = torch.ones(1, 150, 1, 16, device=DEVICE), torch.ones(1, 1, 16, 16, device=DEVICE)
    clean = kernel_results(inputs, cotangents, tied=tied, scale=0.3)

    def poisoned(self, arena, device):
        return torch.full((arena.size,), 255, dtype=torch.uint8, device=device)

    monkeypatch.setattr(schedule.Schedule, "workspace", poisoned)
    for name, found in kernel_results(inputs, cotangents, tied=tied, scale=0.3).items():
        assert torch.equal(found, clean[name]), name


def test_the_batch_counts_only_where_it_is_allowed_to(short):
    """Three sequences, for which a card of eight has room in two segments each if it may look at the batch."""
    inputs = draw(64 * 4, 1, 1, 16, 16, batch=3, decay="mild")
    query, key, value, beta, log_decay = (inputs[n].float().to(DEVICE) for n in NAMES[:5])
    found = {}
    for invariant in (True, False):
        found[invariant] = pf.gated_delta_rule(
            query, key, value, beta, log_decay, backend="triton", batch_invariant=invariant
        ).output
    cuts = [known.segments.layout.sequences for known in delta._SCHEDULES.values()]
    assert cuts == [3 * 4, 3 * 2]
    assert relative(found[False], found[True]) <= 1e-5
    with pytest.raises(TypeError, match="batch_invariant: got 1, expected True or False"):
        pf.gated_delta_rule(query, key, value, beta, log_decay, batch_invariant=1)
