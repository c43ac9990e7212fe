"""The gradient stage on Hopper: ``gradient`` of ``kernels/gradient.py`` in one launch that reads every input once.

The formulas are those of ``kernels/gradient.py``.  A program takes pairs of chunk and key head one after another and,
for each, walks over the value heads of the key head, BV value channels a step (128, or 64 where they do not divide V).
Everything but the closing products with Q and K is linear in the value channels.  Per step, with dO, W, R [64 x BV] the
rows and S, E [BV x K] the transposed states, the roles of a program are:

    compute  (8 warps)  the five products with their decays; dQ, dK, dA and dB stay in registers until the key head is
                        done (gradient_products.py)
    rows     (1 warp)   fetches R, dO and W (TMA; gradient_loads.py)
    states   (1 warp)   fetches E and S (TMA)
    vectors  (1 warp)   fetches Q and K (TMA), the decay sums and beta
    sums     (1 warp)   finishes beta and the decay of a value head; sends dQ and dK to memory (gradient_sums.py)

No sum crosses warps in the compute role: it leaves partial sums in shared memory for the sums role.
"""

from functools import lru_cache

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from ..arena import Arena
from ..chunks import Chunks
from ..gradient import Gradients
from ..launch import bind
from ..prepare import Prepared
from .descriptors import blocks, rows
from .gradient_loads import rows_role, states_role, vectors_role
from .gradient_products import compute_role
from .gradient_sums import sums_role
from .scan import fits as scans_fit

REGISTERS = 168  # a thread, before the roles trade: 12 warps fill a multiprocessor


@gluon.jit(do_not_specialize=["items", "time", "length", "per_sequence", "key_heads", "heads", "steps", "parts"])
def gradient_kernel(
    query, key, d_output, d_value, innovation, entry_states, exit_gradients, d_query, d_key,
    beta, cumulative, d_beta, d_log_decay, table, scale, items, time, length, per_sequence, key_heads, heads, steps,
    parts, K: gl.constexpr, PARTS: gl.constexpr, PACKED: gl.constexpr, TIED: gl.constexpr, HAS_BETA: gl.constexpr,
    HAS_DECAY: gl.constexpr, DIVISIBLE: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = key.dtype
    spread: gl.constexpr = gl.SwizzledSharedLayout(vec=8, per_phase=1, max_phase=8, order=[1, 0])
    plain: gl.constexpr = gl.SwizzledSharedLayout(vec=1, per_phase=1, max_phase=1, order=[1, 0])
    line: gl.constexpr = gl.SwizzledSharedLayout(vec=1, per_phase=1, max_phase=1, order=[0])
    row_tiles = gl.allocate_shared_memory(dtype, [4 * PARTS, 1, 64, 64], d_output.layout)
    entry_tiles = gl.allocate_shared_memory(dtype, [PARTS, 64, K], entry_states.layout)
    exit_tiles = gl.allocate_shared_memory(dtype, [PARTS, 64, K], entry_states.layout)
    query_tiles = gl.allocate_shared_memory(dtype, [2, 1, 64, K], query.layout)
    key_tiles = gl.allocate_shared_memory(dtype, [2, 1, 64, K], query.layout)
    gram_tile = gl.allocate_shared_memory(gl.float32, [64, 64], spread)
    vector_tiles = gl.allocate_shared_memory(gl.float32, [10, 64], line)
    exit_sums = gl.allocate_shared_memory(gl.float32, [64, 2], plain)
    query_sums = gl.allocate_shared_memory(gl.float32, [64, 2], plain)
    key_sums = gl.allocate_shared_memory(gl.float32, [64, 2], plain)
    pair_row_sums = gl.allocate_shared_memory(gl.float32, [64, 2], plain)
    pair_column_sums = gl.allocate_shared_memory(gl.float32, [16, 64], spread)
    early_column_sums = gl.allocate_shared_memory(gl.float32, [16, 64], spread)
    late_row_sums = gl.allocate_shared_memory(gl.float32, [64, 2], plain)
    aligned_sums = gl.allocate_shared_memory(gl.float32, [64, 2], plain)
    overlap_sums = gl.allocate_shared_memory(gl.float32, [64, 2], plain)

    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    rows_ready = gl.allocate_shared_memory(gl.int64, [4, 1], barrier)
    consumed = gl.allocate_shared_memory(gl.int64, [2, 1], barrier)
    vectors_ready = gl.allocate_shared_memory(gl.int64, [2, 1], barrier)
    sums_free = gl.allocate_shared_memory(gl.int64, [2, 1], barrier)
    tokens_ready = gl.allocate_shared_memory(gl.int64, [2, 1], barrier)
    tokens_free = gl.allocate_shared_memory(gl.int64, [2, 1], barrier)
    outward = gl.allocate_shared_memory(gl.int64, [2, 1], barrier)
    entry_ready = gl.allocate_shared_memory(gl.int64, [1], barrier)
    exit_ready = gl.allocate_shared_memory(gl.int64, [1], barrier)
    exit_free = gl.allocate_shared_memory(gl.int64, [1], barrier)
    sums_ready = gl.allocate_shared_memory(gl.int64, [1], barrier)
    for i in gl.static_range(4):
        mbarrier.init(rows_ready.index(i), count=1)
    for i in gl.static_range(2):
        mbarrier.init(consumed.index(i), count=1)
        mbarrier.init(vectors_ready.index(i), count=1)
        mbarrier.init(sums_free.index(i), count=1)
        mbarrier.init(tokens_ready.index(i), count=1)
        mbarrier.init(tokens_free.index(i), count=1)
        mbarrier.init(outward.index(i), count=1)
    mbarrier.init(entry_ready, count=1)
    mbarrier.init(exit_ready, count=1)
    mbarrier.init(exit_free, count=1)
    mbarrier.init(sums_ready, count=1)

    row_ring = (row_tiles, rows_ready)
    states = (entry_tiles, exit_tiles, entry_ready, exit_ready, exit_free)
    tokens = (query_tiles, key_tiles, tokens_ready, tokens_free)
    vectors = (vector_tiles, vectors_ready)
    sums = (exit_sums, query_sums, key_sums, pair_row_sums, pair_column_sums, early_column_sums, late_row_sums,
            aligned_sums, overlap_sums, sums_ready, sums_free)  # fmt: skip
    place = (items, key_heads, (table, time, length, per_sequence))
    gl.warp_specialize([
        (compute_role, (row_ring, states, consumed, tokens, vectors, gram_tile, sums, outward, items, steps, scale,
                        K, PARTS, TIED, HAS_BETA, HAS_DECAY)),
        (rows_role, ((d_output, d_value, innovation), row_ring, consumed, place, steps, PARTS, TIED, PACKED)),
        (states_role, ((entry_states, exit_gradients), states, consumed, place, steps, K, PARTS)),
        (vectors_role, ((query, key, beta, cumulative), tokens, vectors, sums_free, place, steps, parts, heads,
                        K, PACKED, HAS_BETA, HAS_DECAY)),
        (sums_role, ((d_query, d_key, d_beta, d_log_decay), tokens, vectors, sums, outward, place,
                     steps, parts, heads, scale, K, PACKED, TIED, HAS_BETA, HAS_DECAY, DIVISIBLE)),
    ], [1, 1, 1, 1], [40, 40, 40, 40])  # fmt: skip


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """How many programs run at once: one on each multiprocessor."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def fits(query: Tensor, value: Tensor, chunks: Chunks) -> bool:
    """Whether the Hopper gradient serves these shapes, dtype and device."""
    return scans_fit(query, value, chunks)


def vacant_sums(arena: Arena, query: Tensor, value: Tensor, count: int, chunk_size: int) -> None:
    """Nothing: all sums stay inside the kernel."""


def may_overwrite(query: Tensor, value: Tensor) -> bool:
    """Whether R may lie where the gradient of the query goes: the program that writes a chunk and head of one has then
    read all there is of the other."""
    return query.shape == value.shape


def gradient(query: Tensor, key: Tensor, beta: Tensor | None, log_decay: Tensor | None, d_output: Tensor,
             innovation: Tensor, d_value: Tensor, entry_states: Tensor, exit_gradients: Tensor, prepared: Prepared,
             chunks: Chunks, *, scale: float, sums: None, into: Gradients) -> None:  # fmt: skip
    """Gradients of query, key [B, T, H, K], beta and log_decay [B, T, HV], each in its input's dtype, in the tensors of
    `into`."""
    key_heads, k = key.shape[2:]
    heads, v = d_output.shape[2:]
    d_query, d_key, d_beta, d_log_decay = into
    parts = 2 if v % 128 == 0 else 1
    per_head = v // (64 * parts)
    items = chunks.count * key_heads
    vacant = prepared.total  # stands in for pointers that are not read
    launch = bind(
        gradient_kernel, K=k, PARTS=parts, PACKED=int(chunks.packed), TIED=int(prepared.inverse is not None),
        HAS_BETA=int(beta is not None), HAS_DECAY=int(log_decay is not None),
        DIVISIBLE=2.0**-6 if key.dtype == torch.float16 else 2.0**-40, num_warps=8, maxnreg=REGISTERS,
    )  # fmt: skip
    launch(
        min(items, multiprocessors(query.device)),
        rows(query, k), rows(key, k), rows(d_output, 64), rows(d_value, 64), rows(innovation, 64),
        blocks(entry_states), blocks(exit_gradients), rows(d_query, k), rows(d_key, k),
        vacant if beta is None else beta, prepared.cumulative, vacant if d_beta is None else d_beta,
        vacant if d_log_decay is None else d_log_decay, chunks.table if chunks.packed else vacant,
        scale, items, chunks.time, chunks.length, chunks.per_sequence, key_heads, heads, heads // key_heads * per_head,
        per_head,
    )  # fmt: skip
