"""The scans of ``kernels/rows/scan.py`` on Hopper GPUs: what they launch, for bfloat16 and float16, K of 64 or 128, V a
multiple of 64 and 1, 2, 4, … rows of a family a token.  ``fits`` says whether they serve a problem."""

import torch
import triton
from torch import Tensor

from ..chunks import Chunks
from ..launch import bind
from ..rows.layout import VECTOR_DECAY, Layout, heads_of
from ..rows.products import weights_of
from ..segments import processors
from .descriptors import CHUNK, Descriptor, blocks, places, rows, vectors
from .rows import rows_kernel

SHARED_BYTES = 232_448  # that a program can have
COLUMNS = 64  # of the values, in a program
ELEMENT = 2  # bytes
BARRIERS = 768  # bytes, and what the roles hand one another there
LARGEST_COORDINATE = 2**31 - 1  # TMA coordinates are 32-bit
RINGS = ((3, 2, 2), (3, 2, 1), (2, 2, 2))  # chunks in the state's and the output's ring, buffers for handing over
TWO = SHARED_BYTES // 2 - 1024  # bytes of each of two programs on a multiprocessor, where 1 KB of each is the system's
KINDS = ((False, True, True, False), (False, True, False, True), (True, False, True, True))  # forward, again, reverse


def fits(layout: Layout, query: Tensor) -> bool:
    """Whether the Hopper scan serves these rows, dtype and device, where it ``reaches``."""
    families = [count for count in (layout.R, layout.L) if count]
    return (
        query.is_cuda
        and torch.cuda.get_device_capability(query.device)[0] == 9
        and query.dtype in (torch.bfloat16, torch.float16)
        and layout.K in (64, 128)
        and layout.V % COLUMNS == 0
        and all(rings(layout, *kind) is not None for kind in KINDS)
        and all(
            _is_power(count) or layout.tile(count) == layout.C * triton.next_power_of_2(count) for count in families
        )
    )


def _is_power(count: int) -> bool:
    return count & (count - 1) == 0


def reaches(layout: Layout, chunks: Chunks) -> bool:
    """Whether 32 bits hold the coordinates of all copies."""
    tokens = chunks.time if chunks.packed else chunks.time * chunks.sequences
    tiles = chunks.count * layout.value_heads * max(layout.V, layout.K, layout.N)
    return max(tiles, (tokens + CHUNK) * max(layout.R, layout.L, 1)) + CHUNK <= LARGEST_COORDINATE


def shared_bytes(layout: Layout, reverse: bool, source: bool, say: bool, hand: bool, stages: int, depth: int,
                 pairs: int) -> int:  # fmt: skip
    """What a program takes with such rings."""
    given, saying = (layout.Q, layout.M) if reverse else (layout.M, layout.Q)
    n, k = layout.N, layout.K
    state = ELEMENT * (n * (2 * k + n + given + source * COLUMNS) + given * (k + COLUMNS))
    vectors = 4 * (k * (layout.decay == VECTOR_DECAY) + n * source)
    output = ELEMENT * saying * (depth * (k + n + given) + COLUMNS)
    handing = ELEMENT * COLUMNS * (pairs * (k + n) if hand else 8)
    return stages * (state + vectors) + say * output + handing + BARRIERS


def rings(layout: Layout, reverse: bool, source: bool, say: bool, save: bool, room: int = SHARED_BYTES,
          ) -> dict[str, int] | None:  # fmt: skip
    """The first of RINGS that fits a program's room in shared memory; None where none does."""
    for stages, depth, pairs in RINGS:
        fitting = shared_bytes(layout, reverse, source, say, say or save, stages, depth, pairs) <= room
        if fitting and (pairs == 2 or not save):  # a copy to memory is handed back a chunk later
            return {"STAGES": stages, "DEPTH": depth, "PAIRS": pairs}
    return None


def options(layout: Layout, reverse: bool, source: bool, say: bool, save: bool, two: bool) -> dict[str, int]:
    """Rings, and registers a thread before the roles trade, of one program on a multiprocessor, or of ``two`` where
    their rings let them."""
    found = rings(layout, reverse, source, say, save, TWO) if two else None
    if found is not None:
        return found | {"maxnreg": 128}
    found = rings(layout, reverse, source, say, save)
    assert found is not None, "what does not fit is not launched"
    return found | {"maxnreg": 168 if say else 240}


def programs(layout: Layout) -> tuple[int, int]:
    """How many carry one sequence's state, and how many more the P of a segment."""
    return (layout.value_heads * (layout.V // COLUMNS),
            layout.value_heads * (layout.K // COLUMNS) if layout.R else 0)  # fmt: skip


def launch(layout: Layout, chunks: Chunks, reverse: bool, reads, writes, says, gives, inverse, couple, own, through,
           total, source, given, initial, solution, said, states, final, flows=None,
           owners=None) -> Tensor | None:  # fmt: skip
    """One direction of the scan, as ``rows.scan.launch``; returns the weights of U, which it made and reads."""
    like = next(each for each in (says, writes, gives) if each is not None)
    lone = (layout.L, layout.M)
    (saying, s), (giving, g) = (lone, (1, layout.Q)) if reverse else ((1, layout.Q), lone)
    k, n = layout.K, layout.N
    say, save = said is not None, states is not None
    square = blocks(like)  # stands in for descriptors that are not read
    vacant = torch.empty(0, dtype=torch.float32, device=like.device) if total is None else total

    def tiles(tensor: Tensor | None, width: int, height: int, there: bool = True) -> Descriptor:
        if tensor is None or not there:
            return square
        if tensor.data_ptr() % 16:  # a copy needs that much
            tensor = tensor.clone()
        make = rows if tensor.ndim == 4 or _is_power(tensor.shape[2]) else places
        return make(tensor, width, height)

    def matrices(tensor: Tensor | None, there: bool = True) -> Descriptor:
        return square if tensor is None or not there else blocks(tensor, tensor.shape[-2])

    values = weights = None
    if source is not None:
        values, weights = source.vector, weights_of(source, layout, chunks)
    count, units = programs(layout)
    count = chunks.sequences * count if flows is None else len(flows) * (count + (0 if reverse else units))
    two = flows is not None and not reverse and count > processors(like.device)
    bound = bind(
        rows_kernel, C=layout.C, N=n, S=s, G=g, R=layout.R, SAYING=saying, GIVING=giving, K=k, DECAY=layout.decay,
        REVERSE=int(reverse), PACKED=int(chunks.packed), SOURCE=(values is not None) + (weights is not None),
        SAY=int(say), SAVE=int(save), INITIAL=int(initial is not None), FINAL=int(final is not None),
        FLOW=int(flows is not None), OWNED=int(owners is not None), num_warps=4,
        **options(layout, reverse, source is not None, say, save, two),
    )  # fmt: skip
    if count:
        bound(
            count, tiles(reads, k, n), tiles(writes, k, n), tiles(says, k, s, say), tiles(gives, k, g),
            matrices(inverse), matrices(couple), matrices(own, say), matrices(through, say),
            tiles(values, COLUMNS, n), square if weights is None else vectors(weights, n), tiles(given, COLUMNS, g),
            vectors(total, k) if layout.decay == VECTOR_DECAY else square,
            tiles(solution if save else writes, COLUMNS, n), tiles(said, COLUMNS, s),
            blocks(states) if save else square,
            vacant, vacant if initial is None else initial, vacant if final is None else final,
            chunks.cu_seqlens if chunks.packed else vacant, chunks.offsets if chunks.packed else vacant,
            next((table for table in (flows, owners) if table is not None), vacant),
            chunks.time, chunks.per_sequence, layout.value_heads, heads_of(values), heads_of(given), layout.V,
        )  # fmt: skip
    return weights
