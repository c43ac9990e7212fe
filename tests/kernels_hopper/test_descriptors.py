"""The descriptors address what they should: checked by doing on the host what the copy engine does."""

import pytest
import torch

pytest.importorskip("triton.experimental.gluon")

from parallelflow.kernels.chunks import regular_chunks
from parallelflow.kernels.hopper.descriptors import blocks, rows
from parallelflow.kernels.hopper.scan import fits


def fetch(descriptor, storage, start):
    """The block of a descriptor at the coordinates `start`, from the array `storage` it describes; None outside."""
    first = (descriptor.base.data_ptr() - storage.data_ptr()) // storage.element_size()
    flat = storage.flatten()
    height, width = descriptor.block_shape[-2:]
    lead, row, column = start
    block = []
    for i in range(height):
        if not (0 <= lead < descriptor.shape[0] and 0 <= row + i < descriptor.shape[1]):
            block.append(None)
            continue
        place = first + lead * descriptor.strides[0] + (row + i) * descriptor.strides[1] + column
        assert place >= 0, "a row before the array would be read"
        block.append(flat[place : place + width])
    return block


@pytest.mark.parametrize(("first", "end"), [(0, 64), (0, 1), (0, 37), (37, 101), (90, 150), (149, 150)])
def test_a_chunk_ends_with_its_sequence(first, end):
    tokens, heads, size = 150, 3, 64
    array = torch.arange(tokens * heads * size, dtype=torch.float32).view(1, tokens, heads, size).to(torch.bfloat16)
    descriptor = rows(array, size)
    valid = min(end - first, 64)
    block = fetch(descriptor, array, (first + valid, 64 - valid, size))
    for i, row in enumerate(block):
        if i < valid:
            assert torch.equal(row, array[0, first + i, 1])
        else:
            assert row is None


def test_matrices_are_addressed_by_rows():
    array = torch.zeros(5, 2, 64, 128, dtype=torch.bfloat16)
    descriptor = blocks(array)
    assert descriptor.shape == [5 * 2 * 64, 128]
    assert descriptor.block_shape == [64, 128]
    assert descriptor is blocks(array), "a descriptor is made once for one array"


def test_nothing_fits_without_a_hopper_gpu():
    query = torch.zeros(1, 64, 1, 128, dtype=torch.bfloat16)
    assert not fits(query, query, regular_chunks(1, 64, 64))
