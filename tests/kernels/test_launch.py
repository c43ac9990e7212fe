"""A bound kernel takes Triton's way the first time and for what is unusual, and else its entry point with addresses."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from parallelflow.kernels import launch


class Kernel:
    """A compiled kernel in Triton's shape: which launches came through Triton, which through the entry point."""

    def __init__(self) -> None:
        self.triton, self.entry = [], []
        self.params = [SimpleNamespace(do_not_specialize=place == 3) for place in range(6)]

    def __getitem__(self, grid):
        return lambda *arguments, **constants: self.triton.append((grid, arguments, constants))

    def start(self, *arguments):
        self.entry.append(arguments)


class Descriptor:
    kind = "a tile"

    def __init__(self) -> None:
        self.encoded = []


@pytest.fixture
def kernel(monkeypatch):
    found = Kernel()
    encoding = launch.Encoding(lambda descriptor, metadata: [metadata, 7], "swizzled")
    entry = launch.Compiled(found.start, ("before",), ("after",), (encoding,))
    active = SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda device: "stream")
    monkeypatch.setattr(launch, "JITFunction", Kernel)
    monkeypatch.setattr(launch, "_entry_point", lambda *_: entry)
    monkeypatch.setattr(launch, "driver", SimpleNamespace(active=active))
    return found


def aligned(*shape: int, dtype=torch.float32) -> torch.Tensor:
    """A tensor whose address is a multiple of 64, as on a GPU."""
    memory = torch.empty(4096, dtype=torch.uint8)
    start = -memory.data_ptr() % 64
    return memory[start : start + 2048].view(dtype)[: torch.Size(shape).numel()].view(shape)


def test_the_second_launch_goes_through_the_entry_point(kernel):
    bound, tile, tensor = launch.Bound(kernel, {"SIZE": 4}), Descriptor(), aligned(8)
    arguments = (tile, tensor, None, 5, 0.5)
    bound(3, *arguments)
    assert kernel.triton == [((3,), arguments, {"SIZE": 4})]
    assert not kernel.entry
    for _ in range(2):
        bound(3, *arguments)
        expected = (3, 1, 1, "stream", "before", "swizzled", 7, tensor.data_ptr(), None, 5, 0.5, "after")
        assert kernel.entry.pop() == expected
    assert len(kernel.triton) == 1
    assert tile.encoded == ["swizzled", 7]


@pytest.mark.parametrize(
    "changed",
    [
        lambda tile, tensor: (tile, aligned(8, dtype=torch.bfloat16), None, 5, 0.5),
        lambda tile, tensor: (tile, tensor, tensor, 5, 0.5),
        lambda tile, tensor: (tile, tensor[1:], None, 5, 0.5),
        lambda tile, tensor: (tile, tensor, None, 2**31, 0.5),
    ],
    ids=["dtype", "present", "unaligned", "64 bits"],
)
def test_another_kind_of_argument_is_compiled_for(kernel, changed):
    bound, tile, tensor = launch.Bound(kernel, {}), Descriptor(), aligned(8)
    bound(1, tile, tensor, None, 5, 0.5)
    bound(1, *changed(tile, tensor))
    assert len(kernel.triton) == 2
    assert not kernel.entry


def test_numbers_that_triton_looks_at_choose_the_kernel(kernel):
    bound, tile, tensor = launch.Bound(kernel, {}), Descriptor(), aligned(8)
    for free, looked_at in ((5, 3), (32, 3), (5, 1), (5, 16), (5, 48)):
        bound(1, tile, tensor, None, free, looked_at, 0.5)
    assert len(kernel.triton) == 3
    assert len(kernel.entry) == 2


def test_one_object_for_the_same_constants():
    kernel = Kernel()
    assert launch.bind(kernel, SIZE=4, WARPS=1) is launch.bind(kernel, SIZE=4, WARPS=1)
    assert launch.bind(kernel, SIZE=4, WARPS=1) is not launch.bind(kernel, SIZE=8, WARPS=1)


def remembered_steps(kernel, bound, tensors, remembered, number=0.5):
    """Two launches and something between them; how often they were composed, and what was launched."""
    composed = []

    def launches():
        composed.append(1)
        bound(3, Descriptor(), tensors[0], None, 5, number)
        launch.note(lambda device: f"stream {device}", "aside")
        bound(4, Descriptor(), tensors[1], None, 5, number)

    remembered.run(tensors, launches, number)
    entries, kernel.entry = kernel.entry, []
    return len(composed), entries


def test_launches_for_the_same_addresses_are_made_again(kernel):
    bound, remembered, tensors = launch.Bound(kernel, {}), launch.Remembered(), [aligned(8), aligned(8)]
    bound(3, Descriptor(), tensors[0], None, 5, 0.5)  # compiled
    composed, first = remembered_steps(kernel, bound, tensors, remembered)
    assert composed == 1
    assert [entry[3] for entry in first] == ["stream", "stream"]
    composed, again = remembered_steps(kernel, bound, tensors, remembered)
    assert composed == 0
    assert [entry[3] for entry in again] == ["stream", "stream aside"]
    assert [entry[:3] + entry[4:] for entry in again] == [entry[:3] + entry[4:] for entry in first]


@pytest.mark.parametrize("other", [(0.25, slice(None)), (0.5, slice(None, None, -1))], ids=["number", "addresses"])
def test_launches_for_others_are_not(kernel, other):
    bound, remembered, tensors = launch.Bound(kernel, {}), launch.Remembered(), [aligned(8), aligned(8)]
    bound(3, Descriptor(), tensors[0], None, 5, 0.5)
    remembered_steps(kernel, bound, tensors, remembered)
    number, order = other
    composed, entries = remembered_steps(kernel, bound, tensors[order], remembered, number)
    assert composed == 1
    assert entries[0][7] == tensors[order][0].data_ptr()
    assert entries[0][10] == number


def test_what_triton_compiled_on_the_way_is_not_remembered(kernel):
    bound, remembered, tensors = launch.Bound(kernel, {}), launch.Remembered(), [aligned(8), aligned(8)]
    assert remembered_steps(kernel, bound, tensors, remembered)[0] == 1  # its first launch compiles
    assert not remembered.found
    assert remembered_steps(kernel, bound, tensors, remembered)[0] == 1
    assert remembered_steps(kernel, bound, tensors, remembered)[0] == 0


def test_what_fails_is_not_remembered_and_nothing_goes_on_recording(kernel):
    remembered = launch.Remembered()

    def launches():
        raise ValueError("no room")

    with pytest.raises(ValueError, match="no room"):
        remembered.run([aligned(8)], launches, 0.5)
    assert not remembered.found
    assert launch._recording.steps is None


def test_only_so_many_are_remembered(kernel, monkeypatch):
    monkeypatch.setattr(launch.Remembered, "LARGEST", 2)
    bound, remembered = launch.Bound(kernel, {}), launch.Remembered()
    kept = [[aligned(8), aligned(8)] for _ in range(4)]
    bound(3, Descriptor(), kept[0][0], None, 5, 0.5)
    for tensors in kept:
        remembered_steps(kernel, bound, tensors, remembered)
        assert len(remembered.found) <= 2


def settle(kernel, tensors=None, numbers=(5, 0.5)):
    """A launch of two tensors and None, whose tensors will be given in the other order."""
    tensors = tensors or (aligned(8), None, aligned(4))
    bound = launch.Bound(kernel, {})
    bound(3, *tensors, *numbers)
    kernel.triton.clear()
    return bound.settled(3, tensors, numbers, (1, -1, 0))


def test_a_settled_launch_takes_other_tensors(kernel):
    settled, first, second = settle(kernel), aligned(4), aligned(8)
    assert settled((first, second))
    expected = (3, 1, 1, "stream", "before", second.data_ptr(), None, first.data_ptr(), 5, 0.5, "after")
    assert kernel.entry == [expected]
    assert not kernel.triton


def test_a_settled_launch_is_not_made_of_what_needs_another_kernel(kernel):
    settled = settle(kernel)
    assert not settled((aligned(4), aligned(9)[1:]))
    other = settled._replace(current_device=lambda: 1)
    assert not other((aligned(4), aligned(8)))
    assert not kernel.entry


def test_a_launch_without_a_known_entry_point_is_not_settled(kernel, monkeypatch):
    assert settle(kernel, numbers=(2**31, 0.5)) is None
    monkeypatch.setattr(launch, "_entry_point", lambda *_: None)
    assert settle(kernel) is None
    tensors = (aligned(8), None, aligned(4))
    assert launch.Bound(kernel, {}).settled(3, tensors, (5, 0.5), (1, -1, 0)) is None
