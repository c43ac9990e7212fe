"""The gradients of rows in float64 as derivatives of one number a chunk; and arrays for them.

With X, u and the states S fixed, a chunk's outputs, what its reads find and its exit state are functions of its rows
and decays; the number is what dO, dU and the exit gradients E make of them. Its derivatives are the formulas of
``rows/pull.py``.
"""

from typing import NamedTuple

import torch
from rows_by_definition import chunk_table

from parallelflow.kernels.rows.layout import NO_DECAY, SCALAR_DECAY, VECTOR_DECAY, Factor


class Arrays(NamedTuple):
    query: torch.Tensor
    read: Factor | None
    write: torch.Tensor | None
    lone: torch.Tensor | None
    log_decay: torch.Tensor | None
    solution: torch.Tensor | None
    given: torch.Tensor | None
    d_source: torch.Tensor | None
    d_output: torch.Tensor
    entries: torch.Tensor
    exits: torch.Tensor


def draw(layout, chunks, batch, time, dtype, read_kind, tied, own_heads, strength=0.02):
    """Arrays as ``rows.pull.pull`` takes them; every key, read, write and lone value has ``own_heads``."""
    generator = torch.Generator().manual_seed(time + layout.R)

    def normal(*shape, scale=1.0, dtype=dtype):
        return (torch.randn(*shape, generator=generator) * scale).to(dtype)

    r, lone, heads, k, v = layout.R, layout.L, layout.value_heads, layout.K, layout.V
    narrow = k**-0.5
    write = normal(batch, time, r, own_heads, k, scale=narrow) if r else None
    read = None
    if r:
        vector = write if tied else normal(batch, time, r, own_heads, k, scale=narrow)
        coefficient = None
        if read_kind:
            channel = (k,) if read_kind == 2 else ()
            coefficient = torch.rand(batch, time, r, heads, *channel, generator=generator)
            coefficient = coefficient.to(dtype) if read_kind == 2 else coefficient
        read = Factor(vector, coefficient, -1)
    channels = {NO_DECAY: None, SCALAR_DECAY: (), VECTOR_DECAY: (k,)}[layout.decay]
    log_decay = None
    if channels is not None:
        log_decay = -strength * torch.rand(batch, time, heads, *channels, generator=generator)
    return Arrays(
        query=normal(batch, time, 1, own_heads, k), read=read, write=write,
        lone=normal(batch, time, lone, own_heads, k, scale=narrow) if lone else None, log_decay=log_decay,
        solution=normal(batch, time, r, heads, v) if r else None,
        given=normal(batch, time, lone, own_heads, v) if lone else None,
        d_source=normal(batch, time, r, heads, v) if r else None, d_output=normal(batch, time, heads, v),
        entries=normal(chunks.count, heads, v, k), exits=normal(chunks.count, heads, v, k),
    )  # fmt: skip


def pull(layout, chunks, arrays, scale, raw, sequential):
    """Gradients by name, once a value head; of a read with its coefficient or, where tied, of both in ``write``."""
    heads = layout.value_heads

    def wide(x):
        if x is None:
            return None
        return x.double().repeat_interleave(heads // x.shape[3], 3).flatten(0, 1).requires_grad_()

    q, b, w, u = wide(arrays.query), wide(arrays.write), wide(arrays.lone), wide(arrays.given)
    a = coefficient = None
    if arrays.read is not None:
        tied = arrays.read.vector is arrays.write
        if arrays.read.coefficient is not None:
            given = arrays.read.coefficient
            coefficient = wide(given if arrays.read.kind == 2 else given[..., None])
        a = b if tied else wide(arrays.read.vector)
        product = arrays.read.sign * (a if coefficient is None else a * coefficient)
        if not tied:  # the gradient asked for is that of the product
            product = a = product.detach().requires_grad_()
    g = None
    if arrays.log_decay is not None:
        g = arrays.log_decay.double().flatten(0, 1)
        g = (g[..., None] if g.ndim == 2 else g).requires_grad_()
    x, du = (None if y is None else y.double().flatten(0, 1) for y in (arrays.solution, arrays.d_source))
    do = arrays.d_output.double().flatten(0, 1)
    total = 0.0
    for number, (first, length) in enumerate(chunk_table(chunks)):
        tokens = slice(first, first + length)
        for head in range(heads):
            s, e = arrays.entries[number, head].double().mT, arrays.exits[number, head].double().mT
            c = torch.zeros(length, 1, dtype=torch.float64) if g is None else g[tokens, head].cumsum(0)
            before = c if g is None or not raw else c - g[tokens, head]

            def rows(y, of=head, at=tokens):
                return y[at, :, of].flatten(0, 1)

            def between(late, early, r, places, own, simultaneous=True, c=c, length=length):
                """Of rows, those of ``own`` a token beside those of ``places``, with what lies between them."""
                t, j = torch.arange(length * own) // own, torch.arange(length * own) % own
                o, i = torch.arange(length * places) // places, torch.arange(length * places) % places
                keep = t[:, None] > o if simultaneous is None else t[:, None] >= o
                if simultaneous is False:
                    keep = (t[:, None] > o) | ((t[:, None] == o) & (j[:, None] > i))
                exponent = torch.where(keep[..., None], r[t][:, None] - c[o][None], 0.0)
                found = (late[:, None] * early[None] * exponent.exp()).sum(-1)
                return torch.where(keep, found, 0.0)

            out = scale * (rows(q) * c.exp()) @ s
            end = c[-1].exp()[:, None] * s
            to_end = (c[-1] - c).exp()
            if b is not None:
                r, precedes = layout.R, False if sequential else None
                out = out + scale * between(rows(q), rows(b), c, r, 1) @ rows(x)
                said = (rows(product) * before.exp().repeat_interleave(r, 0)) @ s
                said = said + between(rows(product), rows(b), before, r, r, precedes) @ rows(x)
                end = end + (rows(b) * to_end.repeat_interleave(r, 0)).mT @ rows(x)
            if w is not None:
                n = layout.L
                out = out + scale * between(rows(q), rows(w), c, n, 1) @ rows(u)
                end = end + (rows(w) * to_end.repeat_interleave(n, 0)).mT @ rows(u)
                if b is not None:
                    said = said + between(rows(product), rows(w), before, n, layout.R, None) @ rows(u)
            total = total + (out * do[tokens, head]).sum() + (end * e).sum()
            if b is not None:
                total = total + (said * rows(du)).sum()
    named = {"query": q, "read": None if a is b else a, "read_coefficient": coefficient if a is b else None,
             "write": b, "lone": w, "log_decay": g}  # fmt: skip
    named = {name: y for name, y in named.items() if y is not None}
    return dict(zip(named, torch.autograd.grad(total, list(named.values())), strict=True))
