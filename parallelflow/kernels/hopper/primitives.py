"""What the scans share: where sequences, chunks and states lie, and 16-bit values unpacked two at a time."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def locate_sequence(sequence, tokens, length, per_sequence, cu_seqlens, offsets, PACKED: gl.constexpr):
    """First token, end token, first chunk and first own chunk (``Chunks``) of a sequence: from tables when packed, by
    arithmetic otherwise."""
    if PACKED:
        first = gl.load(cu_seqlens + sequence)
        end = gl.load(cu_seqlens + sequence + 1)
        chunk = gl.load(offsets + sequence)
        own = chunk
    else:
        first = sequence * tokens
        end = first + length
        chunk = sequence * per_sequence
        own = sequence * ((length + 63) // 64)
    return first, end, chunk, own


@gluon.jit
def chunk_window(first_token, end_token, i, C: gl.constexpr = 64, PLACES: gl.constexpr = 1, HEIGHT: gl.constexpr = 64):
    """Row coordinates of chunk i, of C tokens with PLACES rows each, for a descriptor made by ``rows`` (descriptors.py)
    with blocks of HEIGHT rows; they clip at its end."""
    first = first_token + i * C
    valid = gl.minimum(end_token - first, C)
    return (first + valid) * PLACES, HEIGHT - valid * PLACES


@gluon.jit
def unpack(x):
    """Sixteen-bit floats as float32.  bfloat16 goes two per register, kept where it is written (is_pure=False)."""
    if x.dtype == gl.bfloat16:
        return gl.inline_asm_elementwise(
            "{ shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000; }",
            "=r,=r,r",
            [x],
            dtype=gl.float32,
            is_pure=False,
            pack=2,
        )
    else:
        return x.to(gl.float32)


@gluon.jit
def opaque(x):
    """x, of which the compiler knows nothing: addresses that follow from it are not kept in registers for later."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def state_offsets(value_dim, layout: gl.constexpr, K: gl.constexpr):
    """Where the elements of a transposed tile [64 values, K keys] of a state [K, V] lie.

    The stride passes through an opaque move: offsets that a scan needs before and after its loop are then computed
    twice rather than kept in registers throughout.
    """
    stride = gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [value_dim], dtype=gl.int32, is_pure=False, pack=1)
    row = gl.arange(0, 64, gl.SliceLayout(1, layout))
    column = gl.arange(0, K, gl.SliceLayout(0, layout))
    return column[None, :] * stride + row[:, None]
