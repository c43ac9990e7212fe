"""The scan of rows in float64, chunk by chunk, from the equations of ``kernels/rows/scan.py``; and arrays for it."""

from itertools import pairwise

import torch
from triton import next_power_of_2

from parallelflow.kernels.rows.layout import Factor
from parallelflow.kernels.rows.prepare import Prepared

SMALL = 0.3  # what a chunk's rows add to the state, at most about this part of it


def draw(layout, chunks, batch, time, dtype, source):
    """Arrays such as ``prepare`` makes, values and gradients, and the states at the sequences' ends."""
    generator = torch.Generator().manual_seed(layout.N + layout.M + time)

    def normal(*shape, scale=1.0):
        return (torch.randn(*shape, generator=generator) * scale).to(dtype)

    r, lone, heads, k, v = layout.R, layout.L, layout.value_heads, layout.K, layout.V
    n, m, q, count = layout.N, layout.M, layout.Q, chunks.count * layout.value_heads
    narrow = SMALL / (k**0.5)
    channels = {0: None, 1: (), 2: (k,)}[layout.decay]
    prepared = Prepared(
        queries=normal(batch, time, 1, heads, k, scale=k**-0.5),
        reads=normal(batch, time, r, heads, k, scale=narrow) if r else None,
        writes=normal(batch, time, r, heads, k, scale=narrow) if r else None,
        lone=normal(batch, time, lone, heads, k, scale=narrow) if lone else None,
        inverse=(torch.eye(n) + normal(count, n, n, scale=SMALL / n**0.5).tril(-1)).to(dtype) if r else None,
        scores=normal(count, q, n, scale=SMALL / n**0.5) if r else None,
        lone_gram=normal(count, n, m, scale=SMALL / m**0.5) if r and lone else None,
        lone_scores=normal(count, q, m, scale=SMALL / m**0.5) if lone else None,
        total=None if channels is None else torch.rand(count, *channels, generator=generator),
        floors=None,
    )
    values = None
    if source:
        weights = torch.rand(batch, time, r, heads, generator=generator) if r > 1 or source > 1 else None
        values = Factor(normal(batch, time, r, source, v), weights)
    given = normal(batch, time, lone, heads, v) if lone else None
    d_output = normal(batch, time, heads, v)
    states = torch.randn(2, chunks.sequences, heads, k, v, generator=generator)
    return prepared, values, given, d_output, *states


def weights_of(factor, layout, chunks):
    """A factor's coefficients as the rows lie in each chunk, [chunks, HV, N]."""
    if factor.coefficient is None:
        return None
    rows = factor.sign * factor.coefficient.flatten(0, 1)  # [tokens, places, heads]
    found = torch.zeros(chunks.count, layout.value_heads, layout.N // layout.C, layout.C)
    for number, (first, length) in enumerate(chunk_table(chunks)):
        mine = rows[first : first + length].repeat_interleave(layout.value_heads // rows.shape[2], 2)
        found[number, :, : mine.shape[1], :length] = mine.permute(2, 1, 0)
    return found.mT.flatten(2).contiguous()


def chunk_table(chunks):
    """First token and number of tokens of each chunk."""
    if chunks.packed:
        return chunks.table.tolist()
    steps = range(0, chunks.time, chunks.size)
    return [
        (sequence * chunks.time + step, min(chunks.time - step, chunks.size))
        for sequence in range(chunks.sequences)
        for step in steps
    ]


def scan(layout, starts, reads, writes, says, gives, inverse, couple, own, through, total, source, given, state,
         reverse):  # fmt: skip
    """Said, X, the chunks' entry states [K, V] and the final ones; rows are [B, T, places, heads, columns]."""
    heads, tokens = layout.value_heads, starts[-1]
    inverse, couple, own, through, total = (
        None if x is None else x.double() for x in (inverse, couple, own, through, total)
    )

    def tile(array, first, last, head):
        places = array.shape[2]
        mine = array.reshape(tokens, places, array.shape[3], -1)[first:last, :, head * array.shape[3] // heads]
        padded = next_power_of_2(places)
        found = torch.zeros(layout.tile(places) // padded, padded, array.shape[4], dtype=torch.float64)
        found[: last - first, :places] = mine.double()
        return found.flatten(0, 1)

    def put(target, rows, first, last, head):
        places = target.shape[2]
        found = rows.unflatten(0, (-1, next_power_of_2(places)))[: last - first, :places]
        target.view(tokens, places, heads, -1)[first:last, :, head] = found

    if source is not None:
        values, weights = source.vector.double(), source.coefficient
        source = (
            values if weights is None else values.repeat_interleave(heads // values.shape[3], 3) * weights[..., None]
        )
    said, solution = (
        None if x is None else torch.zeros(*x.shape[:3], heads, layout.V, dtype=torch.float64) for x in (says, reads)
    )
    entries: list = []
    final = []
    for number, (begin, end) in enumerate(pairwise(starts)):
        carried, before = state[number].double(), len(entries)
        firsts = list(enumerate(range(begin, end, layout.C)))
        entries += [None] * len(firsts)
        for i, first in reversed(firsts) if reverse else firsts:
            last = min(first + layout.C, end)
            entries[before + i] = carried
            after = []
            for head, s in enumerate(carried):
                flat, at = (before + i) * heads + head, (first, last, head)
                fresh = s if total is None else s * total[flat][..., None]
                u = None if given is None else tile(given, *at)
                if given is not None:
                    fresh = fresh + tile(gives, *at).T @ u
                if reads is not None:
                    x = tile(reads, *at) @ s
                    x = x if source is None else x + tile(source, *at)
                    x = inverse[flat] @ (x if given is None else x + couple[flat] @ u)
                    fresh = fresh + tile(writes, *at).T @ x
                    put(solution, x, *at)
                if says is not None:
                    o = tile(says, *at) @ s
                    o = o if reads is None else o + own[flat] @ x
                    put(said, o if given is None else o + through[flat] @ u, *at)
                after.append(fresh)
            carried = torch.stack(after)
        final.append(carried)
    return said, solution, torch.stack(entries), torch.stack(final)


def composed(cut, flows, sources, total, given, reverse):
    """The states [S, heads, K, V] at the segments' entries, or (reverse) the gradients at their exits: from one segment
    to the next S <- P S + H, or P^T S + H, along each sequence; what H has of the first is the whole."""
    count, heads, key_dim, value_dim = given.shape
    first, offsets = cut.first.tolist(), cut.layout.offsets.tolist()
    found = given.new_empty(first[-1], heads, key_dim, value_dim)
    for number in range(count):
        order = range(first[number], first[number + 1])
        state = given[number].double()
        for step, segment in enumerate(reversed(order) if reverse else order):
            found[segment] = state
            if step + 1 == len(order):
                break
            source = sources[segment - number - 1 if reverse else segment - number].double()
            if step == 0:
                state = source[..., :value_dim]
                continue
            if flows.shape[3] > value_dim:
                transition = flows[segment - number, ..., value_dim:].double()
            else:
                chunks = total.view(-1, heads, total.numel() // (offsets[-1] * heads))
                decay = chunks[offsets[segment] : offsets[segment + 1]].double().prod(0)
                transition = torch.diag_embed(decay.expand(heads, key_dim))
            state = (transition.mT if reverse else transition) @ state + source[..., :value_dim]
    return found
