"""A bound kernel takes Triton's way the first time and for what is unusual, and else its entry point with addresses."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from parallelflow.kernels import launch, plan, recording


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

    def __init__(self, origin=0) -> None:
        self.encoded, self.origin = [], origin

    def moved(self, origin):
        return Descriptor(origin)


@pytest.fixture
def kernel(monkeypatch):
    found = Kernel()
    encoding = launch.Encoding(lambda descriptor, metadata: [metadata, 7], "swizzled")
    entry = launch.Compiled(found.start, ("before",), ("after",), (encoding,))
    active = SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda device: "stream")
    monkeypatch.setattr(launch, "JITFunction", Kernel)
    monkeypatch.setattr(launch, "_entry_point", lambda *_: entry)
    for module in (launch, recording):
        monkeypatch.setattr(module, "driver", SimpleNamespace(active=active))
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


class Steps:
    """A pass of two launches and something between them, on what begins in one tensor and inside another: how often it
    was composed, and the addresses that were launched with. The kernel's first launch, which compiles, is over."""

    def __init__(self, kernel, compiled=True) -> None:
        self.kernel, self.composed, self.one = kernel, 0, plan.Pass()
        self.bound = launch.Bound(kernel, {})
        if compiled:
            self.compose([aligned(8), aligned(8)])
            encoding = launch.Encoding(lambda descriptor, metadata: [("map", descriptor.origin), 7], "swizzled")
            for pattern in self.bound.patterns.values():
                for key, entry in pattern.compiled.items():
                    pattern.compiled[key] = entry._replace(encodings=(encoding,))
            self.one.calls = 1

    def compose(self, tensors):
        self.composed += 1
        window = tensors[1][4:]
        self.bound(1, Descriptor(window.data_ptr()), tensors[0], None, 5, 0.5)
        recording.note(lambda device: f"stream {device}", "aside")
        self.bound(2, Descriptor(tensors[0].data_ptr()), window, None, 5, 0.5)
        return (), []

    def __call__(self, tensors):
        self.kernel.entry.clear()
        self.composed = 0
        self.one.run(tensors, lambda: self.compose(tensors))
        return self.composed, [(entry[3], entry[5], entry[7]) for entry in self.kernel.entry]


def expected(tensors, streams=("stream", "stream aside")):
    first, second = (tensor.data_ptr() for tensor in tensors)
    return [(streams[0], ("map", second + 16), first), (streams[1], ("map", first), second + 16)]


def test_a_pass_is_made_again_at_the_same_and_at_other_addresses(kernel):
    steps, tensors, others = Steps(kernel), [aligned(8), aligned(8)], [aligned(8), aligned(8)]
    assert steps(tensors) == (1, expected(tensors, ("stream", "stream")))
    for given in (tensors, others, tensors, others[::-1]):
        assert steps(given) == (0, expected(given))


def test_a_pass_on_memory_that_overlapped_is_composed_again(kernel):
    """Which of the two was meant cannot be told."""
    steps, both = Steps(kernel), aligned(16)
    assert steps([both[:8], both[4:12]])[0] == 1
    assert steps.one.plan is None
    assert steps([aligned(8), aligned(8)])[0] == 1


def test_a_pass_is_composed_at_addresses_that_need_another_kernel(kernel):
    steps = Steps(kernel)
    steps([aligned(8), aligned(8)])
    assert steps([aligned(9)[1:], aligned(8)])[0] == 1
    assert steps([aligned(8), aligned(8)])[0] == 0


def test_a_pass_is_composed_on_another_device(kernel):
    steps, tensors = Steps(kernel), [aligned(8), aligned(8)]
    steps(tensors)
    assert steps(tensors)[0] == 0
    steps.one.plan = steps.one.plan._replace(launched_on=steps.one.plan.launched_on._replace(current=lambda: 1))
    assert steps(tensors)[0] == 1


def test_a_pass_on_which_triton_compiled_is_composed_again(kernel):
    steps = Steps(kernel, compiled=False)
    steps.one.calls = 1
    assert steps([aligned(8), aligned(8)])[0] == 1
    assert steps.one.plan is None


def test_the_first_pass_is_not_watched_nor_one_that_was_in_vain_too_often(kernel, monkeypatch):
    steps, watched = Steps(kernel), []
    monkeypatch.setattr(plan, "_plan", lambda *_: watched.append(1))
    steps.one.calls = 0
    for _ in range(10):
        assert steps([aligned(8), aligned(8)])[0] == 1
    assert len(watched) == plan.Pass.TRIES


def test_what_fails_leaves_no_plan_and_nothing_goes_on_recording(kernel):
    def launches():
        raise ValueError("no room")

    one = plan.Pass()
    one.calls = 1
    with pytest.raises(ValueError, match="no room"):
        one.run([aligned(8)], launches)
    assert one.plan is None
    assert recording.recording.recorder is None


def test_only_so_many_sets_of_addresses_are_kept(kernel, monkeypatch):
    monkeypatch.setattr(plan.Pass, "LARGEST", 2)
    steps = Steps(kernel)
    kept = [[aligned(8), aligned(8)] for _ in range(5)]
    for tensors in kept:
        steps(tensors)
        assert len(steps.one.found) <= 2
    assert len({tuple(map(id, tensors)) for tensors in kept}) == 5


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
    other = settled._replace(device=settled.device._replace(current=lambda: 1))
    assert not other((aligned(4), aligned(8)))
    assert not kernel.entry


def test_a_launch_without_a_known_entry_point_is_not_settled(kernel, monkeypatch):
    assert settle(kernel, numbers=(2**31, 0.5)) is None
    monkeypatch.setattr(launch, "_entry_point", lambda *_: None)
    assert settle(kernel) is None
    tensors = (aligned(8), None, aligned(4))
    assert launch.Bound(kernel, {}).settled(3, tensors, (5, 0.5), (1, -1, 0)) is None
