"""The inverse of I + L, L strictly lower triangular of 64 rows, one warp a matrix, or one matrix that every warp has.

The four diagonal blocks of 16 are inverted by forward substitution in float32, eight lanes a block and two columns a
lane, the rows in registers and the entries of L broadcast from shared memory.  Two blocks merge by

    [[A, 0], [L, C]]^-1 = [[A^-1, 0], [-C^-1 L A^-1, C^-1]]

first 16 with 16, then 32 with 32, in tensor-core products of three bfloat16 passes (relative error near 2^-16).  Powers
of L never occur: they lose every digit when the keys are strongly correlated.

No product moves its operands.  What the tensor cores leave in the accumulators of X is, as it stands, the left operand
X and the right operand X^T; so each product is formed plain or transposed, whichever its successor wants.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2


@gluon.constexpr_function
def accumulators(warps):
    """The layout of [heads, 16, 16] blocks in products, a warp a head; of one head, in every warp."""
    return gl.NVMMADistributedLayout([2, 0], [warps, 1, 1], [1, 16, 8])


@gluon.constexpr_function
def columns_by_lanes(warps):
    """The layout of one row of four blocks, [heads, block, column]: eight lanes a block, two columns a lane."""
    return gl.BlockedLayout([1, 1, 2], [1, 4, 8], [warps, 1, 1], [2, 1, 0])


@gluon.constexpr_function
def warps_along(axis, rank, heads, warps):
    """The bases of a linear layout that give each of one or two heads a warp, or one head to every warp."""
    return [[int(place == axis and heads == 2) for place in range(rank)]] * (warps.bit_length() - 1)


@gluon.constexpr_function
def entry_layout(heads, warps):
    """Four adjacent entries of a row of L, [heads, 1, block, 1, entry], each block's to its eight lanes."""
    everyone = [[0, 0, 0, 0, 0]] * 3
    return gl.DistributedLinearLayout(
        [[0, 0, 0, 0, 1], [0, 0, 0, 0, 2]], [*everyone, [0, 0, 1, 0, 0], [0, 0, 2, 0, 0]],
        warps_along(0, 5, heads, warps), [], [heads, 1, 4, 1, 4],
    )  # fmt: skip


@gluon.constexpr_function
def lone_block(heads, warps):
    """A block [1, heads, 16, 16] as `accumulators` hold [heads, 16, 16]."""
    return gl.DistributedLinearLayout(
        [[0, 0, 0, 1], [0, 0, 8, 0], [0, 0, 0, 8]],
        [[0, 0, 0, 2], [0, 0, 0, 4], [0, 0, 1, 0], [0, 0, 2, 0], [0, 0, 4, 0]],
        warps_along(1, 4, heads, warps), [], [1, heads, 16, 16],
    )  # fmt: skip


@gluon.jit
def halves(x):
    """Two bfloat16 numbers whose sum is x to 2^-16: its leading bits, cut off without rounding, and the rest."""
    high = (x.to(gl.int32, bitcast=True) & -65536).to(gl.float32, bitcast=True)
    return high.to(gl.bfloat16), (x - high).to(gl.bfloat16)


@gluon.jit
def left_operand(x, HEADS: gl.constexpr):
    """X on the left of a product, from accumulators."""
    operand: gl.constexpr = gl.DotOperandLayout(0, accumulators(gl.num_warps()), 2)
    high, low = halves(x)
    return gl.convert_layout(high, operand), gl.convert_layout(low, operand)


@gluon.jit
def right_transposed(x, HEADS: gl.constexpr):
    """X^T on the right of a product, from the accumulators of X."""
    operand: gl.constexpr = gl.DotOperandLayout(1, accumulators(gl.num_warps()), 2)
    high, low = halves(x)
    high = gl.convert_layout(gl.permute(high, (0, 2, 1)), operand)
    return high, gl.convert_layout(gl.permute(low, (0, 2, 1)), operand)


@gluon.jit
def multiply(a, b, acc):
    """acc + A B, the operands in halves."""
    a_high, a_low = a
    b_high, b_low = b
    return mma_v2(a_high, b_high, mma_v2(a_low, b_high, mma_v2(a_high, b_low, acc)))


@gluon.jit
def allocate_diagonal(HEADS: gl.constexpr):
    """Shared memory for the diagonal blocks of L, [head, row, block, quad of columns, column].

    Four entries of a row, for the four blocks, are 64 adjacent bytes; a gap of 16 bytes after each row spreads the
    stores over the banks.
    """
    shape: gl.constexpr = [HEADS, 16, 4, 4, 4]
    layout: gl.constexpr = gl.PaddedSharedLayout.with_identity_for([[64, 4]], shape, [4, 2, 3, 1, 0])
    return gl.allocate_shared_memory(gl.float32, shape, layout)


@gluon.jit
def store_diagonal(diagonal, block, index, HEADS: gl.constexpr):
    """Put the diagonal block `index` of L, [HEADS, 16, 16], in its place."""
    place = diagonal.slice(index, 1, 2).permute((0, 1, 3, 4, 2))
    place.store(gl.reshape(block, [HEADS, 16, 4, 4, 1]))


@gluon.jit
def four_entries(diagonal, row, quad, HEADS: gl.constexpr):
    """The entries 4 quad .. 4 quad + 3 of one row of every diagonal block, each [HEADS, 4, 1]."""
    layout: gl.constexpr = gl.SliceLayout(2, columns_by_lanes(gl.num_warps()))
    part = diagonal.slice(row, 1, 1).slice(quad, 1, 3).load(entry_layout(HEADS, gl.num_warps()))
    even, odd = gl.split(gl.reshape(part, [HEADS, 4, 2, 2]))
    first, third = gl.split(even)
    second, fourth = gl.split(odd)
    first = gl.expand_dims(gl.convert_layout(first, layout, assert_trivial=True), 2)
    second = gl.expand_dims(gl.convert_layout(second, layout, assert_trivial=True), 2)
    third = gl.expand_dims(gl.convert_layout(third, layout, assert_trivial=True), 2)
    fourth = gl.expand_dims(gl.convert_layout(fourth, layout, assert_trivial=True), 2)
    return first, second, third, fourth


@gluon.jit
def substitute(diagonal, HEADS: gl.constexpr):
    """The inverses of the diagonal blocks, [block, head, row, column] in shared memory: x_i = e_i - sum_j L_ij x_j."""
    layout: gl.constexpr = columns_by_lanes(gl.num_warps())
    column = gl.arange(0, 16, gl.SliceLayout(0, gl.SliceLayout(1, layout)))[None, None, :]
    rows: gl.tuple = ()
    for i in gl.static_range(16):
        x = gl.where(column == i, 1.0, 0.0) + gl.zeros([HEADS, 4, 16], gl.float32, layout)
        for quad in gl.static_range((i + 3) // 4):
            entries = four_entries(diagonal, i, quad, HEADS)
            for m in gl.static_range(4):
                if 4 * quad + m < i:
                    x = x - entries[m] * rows[4 * quad + m]
        rows += (x,)
    shape: gl.constexpr = [4, HEADS, 16, 16]
    shared: gl.constexpr = gl.PaddedSharedLayout.with_identity_for([[64, 8]], shape, [3, 0, 2, 1])
    solved = gl.allocate_shared_memory(gl.float32, shape, shared)
    for i in gl.static_range(16):
        solved.slice(i, 1, 2).permute((1, 0, 2, 3)).store(gl.reshape(rows[i], [HEADS, 4, 1, 16]))
    return solved


@gluon.jit
def load_block(solved, index, TRANSPOSED: gl.constexpr, HEADS: gl.constexpr):
    """One block of `substitute` in accumulators."""
    part = solved.slice(index, 1, 0)
    if TRANSPOSED:
        part = part.permute((0, 1, 3, 2))
    block = gl.reshape(part.load(lone_block(HEADS, gl.num_warps())), [HEADS, 16, 16])
    return gl.convert_layout(block, accumulators(gl.num_warps()), assert_trivial=True)


@gluon.jit
def invert(diagonal, below, HEADS: gl.constexpr):
    """The ten blocks on and below the diagonal of (I + L)^-1, row by row.

    diagonal: `allocate_diagonal`, filled.  below: the right operands (-L_rc)^T for (r, c) = (1, 0), (2, 0), (2, 1),
    (3, 0), (3, 1), (3, 2).
    """
    solved = substitute(diagonal, HEADS)
    zero = gl.zeros([HEADS, 16, 16], gl.float32, accumulators(gl.num_warps()))
    l10, l20, l21, l30, l31, l32 = below
    x0 = load_block(solved, 0, False, HEADS)
    x1 = load_block(solved, 1, False, HEADS)
    x2 = load_block(solved, 2, False, HEADS)
    x3 = load_block(solved, 3, False, HEADS)
    x0_t = left_operand(load_block(solved, 0, True, HEADS), HEADS)
    x1_t = left_operand(load_block(solved, 1, True, HEADS), HEADS)
    x2_t = left_operand(load_block(solved, 2, True, HEADS), HEADS)
    # 16 with 16; y = (-L X)^T.  The upper pair is wanted transposed in the next step, and plain in the result.
    y = multiply(x0_t, l10, zero)
    x10_t = left_operand(multiply(left_operand(y, HEADS), right_transposed(x1, HEADS), zero), HEADS)
    x10 = multiply(left_operand(x1, HEADS), right_transposed(y, HEADS), zero)
    y = multiply(x2_t, l32, zero)
    x2_left = left_operand(x2, HEADS)
    x3_left = left_operand(x3, HEADS)
    x32 = multiply(x3_left, right_transposed(y, HEADS), zero)
    x32_left = left_operand(x32, HEADS)
    # 32 with 32
    y20 = right_transposed(multiply(x0_t, l20, multiply(x10_t, l21, zero)), HEADS)
    y30 = right_transposed(multiply(x0_t, l30, multiply(x10_t, l31, zero)), HEADS)
    y21 = right_transposed(multiply(x1_t, l21, zero), HEADS)
    y31 = right_transposed(multiply(x1_t, l31, zero), HEADS)
    x20 = multiply(x2_left, y20, zero)
    x21 = multiply(x2_left, y21, zero)
    x30 = multiply(x32_left, y20, multiply(x3_left, y30, zero))
    x31 = multiply(x32_left, y21, multiply(x3_left, y31, zero))
    return x0, x10, x1, x20, x21, x2, x30, x31, x32, x3
