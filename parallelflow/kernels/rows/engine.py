"""Rows of every kind, forward and backward: prepare, scan; then scan again, scan in reverse, pairs, pull."""

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from parallelflow.kernels.chunks import Chunks, known_chunks, regular_chunks
from parallelflow.kernels.rows.layout import VECTOR_DECAY, Factor, Layout
from parallelflow.kernels.rows.pairs import pairs
from parallelflow.kernels.rows.prepare import Prepared, Whole, prepare, writes_are_given
from parallelflow.kernels.rows.products import gathered, product, pull_product
from parallelflow.kernels.rows.pull import PORTABLE, Tier, pull
from parallelflow.kernels.rows.scan import Launch, forward_scan, launch, recompute_scan, reverse_scan
from parallelflow.kernels.rows.sums import converted
from parallelflow.problem import Inputs, Traits


class Rows:
    """A problem as the kernels take it: contiguous tensors, and how they lie."""

    def __init__(self, inputs: Inputs, traits: Traits, sequence_starts: list[int] | None, tier: str) -> None:
        kept: dict[int, Tensor] = {}

        def whole(tensor: Tensor | None) -> Tensor | None:  # the same tensor twice stays the same
            return None if tensor is None else kept.setdefault(id(tensor), tensor.contiguous())

        inputs = Inputs(*map(whole, inputs.stacked()))  # type: ignore[arg-type]
        self.inputs, self.traits, self.tier = inputs, traits, tier
        self.layout = layout = Layout.of(inputs, traits)
        batch, time = inputs.query.shape[:2]
        self.chunks: Chunks = (
            regular_chunks(batch, time, layout.C)
            if sequence_starts is None
            else known_chunks(tuple(sequence_starts), layout.C, inputs.query.device)
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

    def restored(self, kept: list[Tensor]) -> Prepared:
        """What ``kept`` was made of."""
        layout, given = self.layout, writes_are_given(self.layout, self.inputs.write)
        there = {
            "queries": True, "reads": layout.R > 0, "writes": layout.R > 0 and not given, "lone": layout.L > 0,
            "inverse": layout.R > 0, "scores": layout.R > 0, "lone_gram": layout.R > 0 and layout.L > 0,
            "lone_scores": layout.L > 0, "total": layout.decay > 0, "floors": layout.decay == VECTOR_DECAY,
        }  # fmt: skip
        tensors = iter(kept)
        found = Prepared(**{name: next(tensors) if is_there else None for name, is_there in there.items()})  # type: ignore
        return found._replace(writes=self.inputs.write) if given else found


def preparation_of(tier: str, layout: Layout, query: Tensor, read: Factor | None, write: Tensor | None,
                   lone_write: Tensor | None, log_decay: Tensor | None) -> Whole | None:  # fmt: skip
    """What prepares all chunks at once, on a tier that has it for these arrays."""
    if tier == "hopper_rows":
        from parallelflow.kernels.hopper import rows_gram

        if rows_gram.fits(layout, query, read, write, lone_write, log_decay):
            return rows_gram.launch
    return None


def scan_of(tier: str, layout: Layout, chunks: Chunks) -> Launch:
    """What launches the scans of a tier, ``rows`` or ``hopper_rows``; the portable one past 32-bit coordinates."""
    if tier == "hopper_rows":
        from parallelflow.kernels.hopper import rows_scan

        if rows_scan.reaches(layout, chunks):
            return rows_scan.launch
    return launch


def pull_of(tier: str, layout: Layout, chunks: Chunks, read: Factor | None) -> Tier:
    """What launches the gradients of a tier; the portable one where Hopper's does not serve."""
    if tier == "hopper_rows":
        from parallelflow.kernels.hopper import rows_pull

        if rows_pull.serves(layout, chunks, read):
            return rows_pull.HOPPER
    return PORTABLE


def forward(inputs: Inputs, traits: Traits, sequence_starts: list[int] | None, tier: str, keep: bool,
            need_final_state: bool) -> tuple[Tensor, Tensor | None, list[Tensor]]:  # fmt: skip
    """Output ``[B, T, HV, V]``, final states ``[N, HV, K, V]`` in float32 if needed and, if ``keep``, what ``prepare``
    made."""
    rows = Rows(inputs, traits, sequence_starts, tier)
    prepared = rows.prepare()
    scan = scan_of(tier, rows.layout, rows.chunks)
    output, final = forward_scan(scan, prepared, rows.source, rows.given, rows.layout, rows.chunks,
                                 initial_state=rows.initial, final_state=need_final_state)  # fmt: skip
    return output, final, rows.kept(prepared) if keep else []


def widened(inputs: Inputs, traits: Traits, tier: str, keep: bool) -> tuple[Tensor, Tensor, list[Tensor]]:
    """``forward`` of a regular batch whose initial states have more channels than its values, those beyond being 0:
    what ``prepare`` made is that of the same tokens with any initial state, and chunks are those of the values."""
    assert inputs.initial_state is not None
    rows = Rows(inputs, traits, None, tier)
    layout = replace(rows.layout, V=inputs.initial_state.shape[-1])
    more = layout.V - rows.layout.V
    source = None if rows.source is None else rows.source._replace(vector=pad(rows.source.vector, (0, more)))
    given = None if rows.given is None else pad(rows.given, (0, more))
    prepared = rows.prepare()
    scan = scan_of(tier, layout, rows.chunks)
    output, final = forward_scan(scan, prepared, source, given, layout, rows.chunks, initial_state=rows.initial,
                                 final_state=True)  # fmt: skip
    assert final is not None
    return output, final, rows.kept(prepared) if keep else []


def backward(inputs: Inputs, traits: Traits, sequence_starts: list[int] | None, tier: str, saved: list[Tensor],
             d_output: Tensor, d_final: Tensor | None) -> Inputs:  # fmt: skip
    """Gradients of all inputs, each in its dtype and shape; of what is tied, one of two slots has it all."""
    rows = Rows(inputs, traits, sequence_starts, tier)
    of, layout, chunks = rows.inputs, rows.layout, rows.chunks
    prepared = rows.prepare() if not saved else rows.restored(saved)
    d_output = d_output.contiguous()
    d_final = None if d_final is None else d_final.float().contiguous()
    scan = scan_of(tier, layout, chunks)
    entries, solution = recompute_scan(scan, prepared, rows.source, rows.given, layout, chunks,
                                       initial_state=rows.initial)  # fmt: skip
    exits, d_source, d_given, d_initial = reverse_scan(
        scan, prepared, d_output, layout, chunks, d_final_state=d_final,
        initial_gradient=rows.initial is not None)  # fmt: skip
    total, floors = prepared.total, prepared.floors
    del prepared, saved  # their memory is free for the gradients
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
    for one, other in (("read", "write"), ("read_coefficient", "value_coefficient")):
        if getattr(inputs, one) is not None and getattr(inputs, one) is getattr(inputs, other):
            first, second = getattr(gradients, one), getattr(gradients, other)
            both = first if second is None else second if first is None else converted(first, torch.float32, second)
            gradients = gradients._replace(**{one: None, other: both})  # type: ignore[arg-type]
    gradients = gradients.unstacked(inputs)
    return Inputs(*(
        None if gradient is None or given is None else converted(gradient, given.dtype).view(given.shape)
        for gradient, given in zip(gradients, inputs, strict=True)
    ))  # type: ignore[arg-type]  # fmt: skip
