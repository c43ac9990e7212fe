"""Rows of every kind, forward and backward: prepare, scan; then scan again, scan in reverse, pairs, pull.

Where there are few heads, long sequences are cut into segments (``kernels/segments.py``): one more scan each way finds
the segments' flows, ``compose`` the states at their entries and the gradients at their exits, then all run at once.
"""

from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from parallelflow.kernels.chunks import Chunks, known_chunks, regular_chunks
from parallelflow.kernels.compose import entry_states, exit_gradients
from parallelflow.kernels.rows.layout import VECTOR_DECAY, Factor, Layout
from parallelflow.kernels.rows.pairs import pairs
from parallelflow.kernels.rows.prepare import Prepared, Whole, prepare, writes_are_given
from parallelflow.kernels.rows.products import gathered, product, pull_product
from parallelflow.kernels.rows.pull import PORTABLE, Tier, pull
from parallelflow.kernels.rows.scan import (
    Launch,
    flow_scan,
    forward_scan,
    launch,
    programs,
    recompute_scan,
    reverse_flow_scan,
    reverse_scan,
    states_and_rows,
)
from parallelflow.kernels.rows.sums import converted
from parallelflow.kernels.segments import Segments, known_segments, regular_segments
from parallelflow.kernels.streams import aside, leaves_room, rejoin
from parallelflow.problem import TIES, Inputs, Traits


class Rows:
    """A problem as the kernels take it: contiguous tensors, and how they lie."""

    def __init__(self, inputs: Inputs, traits: Traits, sequence_starts: list[int] | None, tier: str) -> None:
        inputs = inputs.stacked().contiguous()
        self.inputs, self.traits, self.tier = inputs, traits, tier
        self.layout = layout = Layout.of(inputs, traits)
        batch, time = inputs.query.shape[:2]
        self.starts = None if sequence_starts is None else tuple(sequence_starts)
        self.chunks: Chunks = (
            regular_chunks(batch, time, layout.C)
            if self.starts is None
            else known_chunks(self.starts, layout.C, inputs.query.device)
        )
        self.scale = layout.K**-0.5 if traits.scale is None else traits.scale
        self.read = None if inputs.read is None else Factor(inputs.read, inputs.read_coefficient, traits.read_sign)
        self.value = None if inputs.value is None else Factor(inputs.value, inputs.value_coefficient, traits.value_sign)
        self.lone = None
        if inputs.lone_value is not None:
            self.lone = Factor(inputs.lone_value, inputs.lone_coefficient, traits.lone_sign)
        self.source, self.given = self.value, None
        if self.value is not None and not self.value.a_row:
            self.source = Factor(product(self.value, layout.value_heads))
        if self.lone is not None:
            self.given = product(self.lone, layout.value_heads)
        self.initial = None if inputs.initial_state is None else inputs.initial_state.float()

    def prepare(self) -> Prepared:
        of = self.inputs
        arrays = of.query, self.read, of.write, of.lone_write, of.log_decay
        return prepare(*arrays, self.layout, self.chunks, self.scale, preparation_of(self.tier, self.layout, *arrays))

    def kept(self, prepared: Prepared) -> list[Tensor]:
        """What the backward pass needs of it beside the inputs."""
        if writes_are_given(self.layout, self.inputs.write):
            prepared = prepared._replace(writes=None)
        return [tensor for tensor in prepared if tensor is not None]

    def restored(self, kept: list[Tensor]) -> tuple[Prepared, list[Tensor | None]]:
        """What ``kept`` was made of, and what ``forward`` added: of ``widened``, or of whole sequences, nothing."""
        layout, given = self.layout, writes_are_given(self.layout, self.inputs.write)
        there = {
            "queries": True, "reads": layout.R > 0, "writes": layout.R > 0 and not given, "lone": layout.L > 0,
            "inverse": layout.R > 0, "scores": layout.R > 0, "lone_gram": layout.R > 0 and layout.L > 0,
            "lone_scores": layout.L > 0, "total": layout.decay > 0, "floors": layout.decay == VECTOR_DECAY,
        }  # fmt: skip
        tensors = iter(kept)
        found = Prepared(**{name: next(tensors) if is_there else None for name, is_there in there.items()})  # type: ignore
        return found._replace(writes=self.inputs.write) if given else found, list(tensors)


def preparation_of(tier: str, layout: Layout, query: Tensor, read: Factor | None, write: Tensor | None,
                   lone_write: Tensor | None, log_decay: Tensor | None) -> Whole | None:  # fmt: skip
    """What prepares all chunks at once, on a tier that has it for these arrays."""
    if tier == "hopper_rows":
        from parallelflow.kernels.hopper import rows_gram

        if rows_gram.fits(layout, query, read, write, lone_write, log_decay):
            return rows_gram.launch
    return None


class Scan:
    """How a tier, ``rows`` or ``hopper_rows``, scans some rows with so many value channels: what launches it, the
    portable kernel past 32-bit coordinates; the segments into which it cuts sequences (None: it does not); and whether
    one scan leaves room for another beside it."""

    launch: Launch
    cut: Segments | None

    def __init__(self, rows: Rows, layout: Layout, batch_invariant: bool) -> None:
        self.launch, self.layout, chunks, query = launch, layout, rows.chunks, rows.inputs.query
        own = programs(layout, query.element_size())
        if rows.tier == "hopper_rows":
            from parallelflow.kernels.hopper import rows_scan

            if rows_scan.reaches(layout, chunks):
                self.launch, own = rows_scan.launch, rows_scan.programs(layout)
        if not chunks.count:
            self.cut = None
        elif rows.starts is None:
            self.cut = regular_segments(chunks.sequences, chunks.time, layout.C, *own, batch_invariant, query.device)
        else:
            self.cut = known_segments(rows.starts, layout.C, *own, batch_invariant, query.device)
        sequences = chunks.sequences if self.cut is None else self.cut.layout.sequences
        self.together = leaves_room(query.device, sequences * own[0])

    def enter(self, prepared: Prepared, source: Factor | None, given: Tensor | None,
              initial: Tensor | None) -> list[Tensor | None]:  # fmt: skip
        """The states from which the scan starts and, of sequences in segments, the flows that they were found by."""
        if self.cut is None:
            return [initial]
        flows = flow_scan(self.launch, prepared, source, given, self.layout, self.cut, initial_state=initial)
        entries = flows.new_empty(self.cut.layout.sequences, *flows.shape[1:3], self.layout.V)
        entry_states(flows, prepared.total, self.cut, initial, dense=self.layout.R > 0, into=entries)
        return [entries, flows]

    def leave(self, prepared: Prepared, d_output: Tensor, entered: list[Tensor | None],
              d_final: Tensor | None) -> Tensor:  # fmt: skip
        """The gradients of the states at the segments' exits, with what ``enter`` returned."""
        _, flows = entered
        assert self.cut is not None
        assert flows is not None
        sources = reverse_flow_scan(self.launch, prepared, d_output, self.layout, self.cut, d_final_state=d_final)
        exits = flows.new_empty(self.cut.layout.sequences, *sources.shape[1:])
        exit_gradients(flows, sources, prepared.total, self.cut, d_final, dense=self.layout.R > 0, into=exits)
        return exits


def pull_of(tier: str, layout: Layout, chunks: Chunks, read: Factor | None) -> Tier:
    """What launches the gradients of a tier; the portable one where Hopper's does not serve."""
    if tier == "hopper_rows":
        from parallelflow.kernels.hopper import rows_pull

        if rows_pull.serves(layout, chunks, read):
            return rows_pull.HOPPER
    return PORTABLE


def forward(inputs: Inputs, traits: Traits, sequence_starts: list[int] | None, tier: str, keep: bool,
            need_final_state: bool, batch_invariant: bool) -> tuple[Tensor, Tensor | None, list[Tensor]]:  # fmt: skip
    """Output ``[B, T, HV, V]``, final states ``[N, HV, K, V]`` in float32 if needed and, if ``keep``, what ``prepare``
    made, and of sequences in segments the states at their entries and their flows."""
    rows = Rows(inputs, traits, sequence_starts, tier)
    prepared = rows.prepare()
    scan = Scan(rows, rows.layout, batch_invariant)
    entered = scan.enter(prepared, rows.source, rows.given, rows.initial)
    output, final = forward_scan(scan.launch, prepared, rows.source, rows.given, rows.layout, rows.chunks, scan.cut,
                                 initial_state=entered[0], final_state=need_final_state)  # fmt: skip
    of_segments = [tensor for tensor in entered if tensor is not None] if scan.cut is not None else []
    return output, final, [*rows.kept(prepared), *of_segments] if keep else []


def widened(inputs: Inputs, traits: Traits, tier: str, keep: bool) -> tuple[Tensor, Tensor, list[Tensor]]:
    """``forward`` of a regular batch whose initial states may have more channels than its values, those beyond being 0:
    what ``prepare`` made, which alone is kept, is that of the same tokens with any initial state, and chunks are those
    of the values."""
    assert inputs.initial_state is not None
    rows = Rows(inputs, traits, None, tier)
    layout = replace(rows.layout, V=inputs.initial_state.shape[-1])
    more = layout.V - rows.layout.V
    source = None if rows.source is None else rows.source._replace(vector=pad(rows.source.vector, (0, more)))
    given = None if rows.given is None else pad(rows.given, (0, more))
    prepared = rows.prepare()
    scan = Scan(rows, layout, True)
    state = scan.enter(prepared, source, given, rows.initial)[0]
    output, final = forward_scan(scan.launch, prepared, source, given, layout, rows.chunks, scan.cut,
                                 initial_state=state, final_state=True)  # fmt: skip
    assert final is not None
    return output, final, rows.kept(prepared) if keep else []


def backward(inputs: Inputs, traits: Traits, sequence_starts: list[int] | None, tier: str, saved: list[Tensor],
             d_output: Tensor, d_final: Tensor | None, batch_invariant: bool) -> Inputs:  # fmt: skip
    """Gradients of all inputs, each in its dtype and shape; of what is tied, one of two slots has it all. ``d_output``
    and ``d_final``, in float32, are contiguous."""
    rows = Rows(inputs, traits, sequence_starts, tier)
    of, layout, chunks = rows.inputs, rows.layout, rows.chunks
    prepared, entered = rows.restored(saved) if saved else (rows.prepare(), [])
    d_exit = d_final
    scan = Scan(rows, layout, batch_invariant)
    if not entered:
        entered = scan.enter(prepared, rows.source, rows.given, rows.initial)
    entries, solution = states_and_rows(prepared, layout, chunks)
    with aside(d_output.device) if scan.together else nullcontext():
        read = recompute_scan(scan.launch, prepared, rows.source, rows.given, layout, chunks, scan.cut,
                              initial_state=entered[0], into=(entries, solution))  # fmt: skip
    if scan.cut is not None:
        d_exit = scan.leave(prepared, d_output, entered, d_exit)
    exits, d_source, d_given, d_initial = reverse_scan(
        scan.launch, prepared, d_output, layout, chunks, scan.cut, d_final_state=d_exit,
        initial_gradient=rows.initial is not None)  # fmt: skip
    if scan.together:
        rejoin(d_output.device)
    total, floors = prepared.total, prepared.floors
    del prepared, saved, entered, read  # their memory is free for the gradients
    pulling = pull_of(tier, layout, chunks, rows.read)
    met = pairs(solution, rows.given, d_source, d_output, of.log_decay, floors, layout, chunks,
                strong_alone=pulling.forms_pairs)  # fmt: skip
    pulled = pull(of.query, rows.read, of.write, of.lone_write, of.log_decay, solution, rows.given, d_source, d_output,
                  entries, exits, total, floors, met, layout, chunks, rows.scale, pulling)  # fmt: skip

    def summed(gradient: Tensor | None, like: Tensor | None) -> Tensor | None:
        return None if gradient is None or like is None else gathered(gradient, like.shape[3])

    def pulled_factor(gradient: Tensor | None, factor: Factor | None) -> tuple[Tensor | None, Tensor | None]:
        return (None, None) if gradient is None or factor is None else pull_product(gradient, factor)

    d_read, d_read_coefficient = pulled_factor(pulled.read, rows.read)
    if pulled.read_coefficient is not None and rows.read is not None:
        d_read_coefficient = gathered(pulled.read_coefficient, rows.read.coefficient_heads)
    d_value, d_value_coefficient = pulled_factor(d_source, rows.value)
    d_lone, d_lone_coefficient = pulled_factor(d_given, rows.lone)
    gradients = Inputs(
        query=gathered(pulled.query, layout.heads).squeeze(2), read=d_read, read_coefficient=d_read_coefficient,
        write=summed(pulled.write, of.write), value=d_value, value_coefficient=d_value_coefficient,
        lone_write=summed(pulled.lone, of.lone_write), lone_value=d_lone, lone_coefficient=d_lone_coefficient,
        log_decay=pulled.log_decay, initial_state=d_initial,
    )  # fmt: skip
    # A tensor in two slots: added before anything is rounded.
    apart: list[Tensor | None] = list(gradients)
    for slot, other in TIES:
        if inputs[slot] is not None and inputs[slot] is inputs[other]:
            first, second = apart[other], apart[slot]
            both = first if second is None else second if first is None else converted(first, torch.float32, second)
            apart[slot], apart[other] = both, None
    gradients = Inputs(*apart).unstacked(inputs)  # type: ignore[arg-type]
    return Inputs(*(
        None if gradient is None or given is None else converted(gradient, given.dtype).view(given.shape)
        for gradient, given in zip(gradients, inputs, strict=True)
    ))  # type: ignore[arg-type]  # fmt: skip
