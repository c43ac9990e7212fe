"""The backward pass in pieces of time and groups of sequences: the same bits, fewer bytes."""

from itertools import accumulate

import pytest
import torch

pytest.importorskip("triton")
from delta_checks import DEVICE, draw
from delta_recurrence import NAMES

from parallelflow.kernels import delta, pieces, schedule, segments


@pytest.fixture
def cut(monkeypatch):
    """Pieces of one chunk, whatever the states take."""

    def begin(largest=2**28):
        monkeypatch.setattr(pieces, "SMALL", 0)
        monkeypatch.setattr(pieces, "FEWEST", 1)
        monkeypatch.setattr(pieces, "LARGEST", largest)
        monkeypatch.setattr(delta, "_SCHEDULES", {})

    yield begin
    delta._SCHEDULES.clear()


def inputs_of(batch, time, heads, value_heads, *, initial=True, sizes=(16, 16)):
    drawn = draw(time, heads, value_heads, *sizes, batch=batch, decay="mild", initial=initial)
    return {n: None if x is None else x.float().to(DEVICE) for n, x in drawn.items()}


def gradients(inputs, *, tied=True, final=True, alone=False, starts=None):
    """All gradients; `final`: also of the final state; `alone`: the forward pass has left nothing; `starts`: packed."""
    generator = torch.Generator().manual_seed(3)
    value, key = inputs["value"], inputs["key"]
    d_output = torch.randn(value.shape, generator=generator).to(DEVICE)
    shape = (len(starts) - 1 if starts else value.shape[0], value.shape[2], key.shape[3], value.shape[3])
    d_final = torch.randn(shape, generator=generator).to(DEVICE) if final else None
    options = {"tied": tied, "scale": 0.3, "initial_state": inputs["initial_state"], "sequence_starts": starts}
    five = [inputs[n] for n in NAMES[:5]]
    saved = [] if alone else delta.forward(*five, save_for_backward=True, **options)[2]
    found = delta.backward(*five, saved, d_output, d_final, **options)
    return {n: x for n, x in zip(NAMES, found, strict=True) if x is not None}


def used():
    (only,) = delta._SCHEDULES.values()
    return only


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("batch", "heads", "value_heads"), [(1, 1, 2), (2, 1, 2), (2, 2, 2)])
def test_the_same_bits(batch, heads, value_heads, tied, cut):
    inputs = inputs_of(batch, 130, heads, value_heads)
    whole = gradients(inputs, tied=tied)
    cut()
    found = gradients(inputs, tied=tied)
    (group,) = used().groups
    assert [piece.tokens for piece in group.pieces] == [slice(0, 64), slice(64, 128), slice(128, 130)]
    for name, expected in whole.items():
        assert torch.equal(found[name], expected), name


@pytest.mark.parametrize(("initial", "final"), [(True, False), (False, True), (False, False)])
def test_states_that_nobody_gives_or_asks_for(initial, final, cut):
    inputs = inputs_of(2, 130, 1, 1, initial=initial)
    whole = gradients(inputs, final=final)
    cut()
    found = gradients(inputs, final=final)
    assert found.keys() == whole.keys()
    for name, expected in whole.items():
        assert torch.equal(found[name], expected), name


@pytest.mark.parametrize("tied", [True, False])
def test_without_what_the_forward_pass_leaves(tied, cut):
    inputs = inputs_of(2, 130, 1, 2)
    cut()
    kept, alone = gradients(inputs, tied=tied), gradients(inputs, tied=tied, alone=True)
    for name, expected in kept.items():
        assert torch.equal(alone[name], expected), name


def test_values_wider_than_a_tile(cut):
    inputs = inputs_of(1, 100, 1, 1, sizes=(16, 80))
    whole = gradients(inputs)
    cut()
    found = gradients(inputs)
    for name, expected in whole.items():
        assert torch.equal(found[name], expected), name


@pytest.mark.parametrize("tied", [True, False])
def test_a_cardful_of_sequences_at_a_time(tied, cut, monkeypatch):
    """Three sequences on a card for two, both groups in pieces."""
    inputs = inputs_of(3, 130, 1, 1)
    whole = gradients(inputs, tied=tied)
    cut(largest=2 * 16 * 16 * 4)
    monkeypatch.setattr(segments, "processors", lambda device: 2)
    found = gradients(inputs, tied=tied)
    assert [group.sequences for group in used().groups] == [slice(0, 2), slice(2, 3)]
    assert [len(group.pieces) for group in used().groups] == [3, 3]
    for name, expected in whole.items():
        assert torch.equal(found[name], expected), name


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("final", [True, False])
def test_packed_sequences_a_run_at_a_time(tied, final, cut, monkeypatch):
    starts = (0, 0, 70, 100, 164, 164, 200, 201, 201)
    drawn = draw(starts[-1], 1, 2, 16, 16, decay="mild", initial=True, sequences=len(starts) - 1)
    inputs = {n: x.float().to(DEVICE) for n, x in drawn.items()}
    whole = gradients(inputs, tied=tied, final=final, starts=starts)
    cut()
    monkeypatch.setattr(segments, "processors", lambda device: 1)
    found = gradients(inputs, tied=tied, final=final, starts=starts)
    assert [group.sequences for group in used().groups] == [slice(0, 2), slice(2, 4), slice(4, 8)]
    assert [group.chunks for group in used().groups] == [slice(0, 2), slice(2, 4), slice(4, 6)]
    for name, expected in whole.items():
        assert torch.equal(found[name], expected), name


@pytest.mark.parametrize("tied", [True, False])
def test_nothing_is_read_that_nobody_wrote(tied, cut, monkeypatch):
    """A workspace full of NaN, whatever the dtype, changes no bit."""
    inputs = inputs_of(2, 130, 1, 2)
    cut()
    clean = gradients(inputs, tied=tied, final=False)

    def poisoned(self, arena, device):
        return torch.full((arena.size,), 255, dtype=torch.uint8, device=device)

    monkeypatch.setattr(schedule.Schedule, "workspace", poisoned)
    for name, found in gradients(inputs, tied=tied, final=False).items():
        assert torch.equal(found, clean[name]), name


def test_where_it_is_cut():
    states = 2**27
    assert pieces.piece_length(64, states) == 16  # four pieces
    assert pieces.piece_length(63, states) == 16
    assert pieces.piece_length(40, states) == pieces.FEWEST
    assert pieces.piece_length(pieces.FEWEST, states) >= pieces.FEWEST
    assert pieces.piece_length(64, pieces.SMALL) >= 64
    assert pieces.piece_length(2048, 2**32) == 128  # of 4 GiB a sixteenth


def test_where_a_packed_line_is_cut():
    """Where the card stays as busy, and not for states that are few."""

    def runs(lengths, chunk_bytes=2**20, processors=4):
        starts = (0, *accumulate(64 * length for length in lengths))
        found = pieces.packed_groups(starts, 64, chunk_bytes, 1, processors, torch.device(DEVICE))
        return [(group.sequences.start, group.sequences.stop) for group in found]

    assert runs([16] * 16) == [(0, 4), (4, 8), (8, 12), (12, 16)]
    assert runs([16] * 4) == []  # four programs, which the card has at once
    assert runs([160, *[4] * 24]) == [(0, 1), (1, 17), (17, 25)]  # lasts as long as the first in any case
    assert runs([30, 5, 5, 5] * 8) == []  # each run would last as long as one of the long ones
    assert runs([16] * 16, chunk_bytes=2**18) == []
    assert len(runs([16] * 32, chunk_bytes=2**22)) == 8  # of 2 GiB


MIB = 2**20


@pytest.mark.parametrize(
    ("batch", "time", "heads", "value_heads", "kept", "scratch", "everything"),
    [
        (4, 4096, 16, 16, 84, 68, 410),
        (1, 8192, 16, 32, 76, 82, 352),
        (1, 32768, 16, 64, 560, 644, 2500),
        (16, 4096, 16, 16, 336, 68, 1436),
    ],
)
def test_bytes_on_hopper(batch, time, heads, value_heads, kept, scratch, everything, monkeypatch):
    """MiB of what is kept, of what is not, and with output and gradients; bfloat16, K = V = 128."""
    hopper = pytest.importorskip("parallelflow.kernels.hopper.gradient")
    from parallelflow.kernels.hopper import prepare, scan

    monkeypatch.setattr(schedule, "stages", lambda *_: (prepare, scan.SCANS, hopper))
    query, value = (torch.empty(batch, time, h, 128, dtype=torch.bfloat16, device="meta") for h in (heads, value_heads))
    chunks = schedule.chunks_of(query, value, None, None)
    found = schedule.Schedule(query, query, value, chunks, True, "hopper", True, None)
    per_token = 2 * 128 * 2 * (heads + value_heads) + 2 * 4 * value_heads  # output, dV, dQ, dK in 16 bits; beta, decay
    results = batch * time * per_token
    sizes = found.kept_bytes.size, found.scratch_bytes.size
    assert [round(size / MIB) for size in (*sizes, sum(sizes) + results)] == [kept, scratch, everything]
