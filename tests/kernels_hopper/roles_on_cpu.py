"""A Gluon kernel with copies, of several warp roles or none, on the CPU: every role is a thread, barriers and copies
are what they are on the card, and a product reads its operands when it is waited for.

So it sees, beside what ``gluon_on_cpu`` sees, a role that waits for ever, a tile that is read before it is there, and
one that is overwritten while somebody still needs it (a copy first fills its tile with NaN). It does not see layouts,
fences or the compiler.
"""

import math
import random
import threading
import types
from contextlib import contextmanager

import torch
from gluon_on_cpu import Shared, Value, inside, language, plain_functions, raw

PATIENCE = 20.0  # seconds


class Descriptor:
    """A TMA descriptor and the tensor that it describes."""

    def __init__(self, descriptor, tensor):
        self.at, self.flat = descriptor, tensor.reshape(-1)
        assert self.flat.data_ptr() == tensor.data_ptr()
        self.dtype, self.layout = descriptor.base.dtype, descriptor.layout
        self.block_type = types.SimpleNamespace(shape=list(descriptor.block_shape))

    def places(self, start):
        """Of a block: where its elements lie in the tensor, and which of them there are; those must be its own."""
        rank = len(self.at.shape)
        place = (self.at.base.data_ptr() - self.flat.data_ptr()) // self.flat.element_size()
        there = torch.tensor(True)
        for axis in range(rank):
            index = int(start[axis]) + torch.arange(self.at.block_shape[axis])
            index = index.view([-1 if other == axis else 1 for other in range(rank)])
            place = place + index * self.at.strides[axis]
            there = there & (index >= 0) & (index < self.at.shape[axis])
        assert there.any(), "a block wholly outside the tensor"
        assert not ((place < 0) | (place >= self.flat.numel()))[there].any(), "memory that is not the tensor's"
        return place.clamp(0, self.flat.numel() - 1), there


class Barrier:
    def __init__(self, count):
        self.count = self.missing = count
        self.bytes = self.phase = 0

    def settle(self):
        assert self.missing >= 0
        if self.missing == 0 and self.bytes == 0:
            self.phase, self.missing = self.phase + 1, self.count


class Product:
    """A product that has been issued."""

    def __init__(self, a, b, accumulator, use_acc):
        self.operands, self.accumulator, self.value = (a, b), accumulator if use_acc else None, None

    def settle(self):
        a, b = (operand.data.float() for operand in self.operands)
        before = 0.0
        if self.accumulator is not None:
            before = (self.accumulator.value if isinstance(self.accumulator, Product) else self.accumulator).data
        self.value = Value(a @ b + before)


class Program:
    """One program: its barriers, its copy engine and its roles."""

    def __init__(self, seed):
        self.condition, self.random = threading.Condition(), random.Random(seed)
        self.barriers, self.loads, self.stores, self.failure, self.done = {}, [], {}, None, False
        self.own = threading.local()

    def wait_for(self, met, what):
        """Call with the condition held."""
        assert self.condition.wait_for(lambda: met() or self.failure is not None, PATIENCE), f"waits for ever: {what}"
        if self.failure is not None:
            raise RuntimeError("another role failed")

    def init(self, barrier, count):
        self.barriers[barrier.data.data_ptr()] = Barrier(count)

    def changed(self, barrier, *, arrivals=0, expected=0):
        with self.condition:
            found = self.barriers[barrier.data.data_ptr()]
            found.missing -= arrivals
            found.bytes += expected
            found.settle()
            self.condition.notify_all()

    def expect(self, barrier, count, pred=True):
        if pred:
            self.changed(barrier, arrivals=1, expected=int(raw(count)))

    def arrive(self, barrier, count=1, pred=True):
        if pred:
            self.changed(barrier, arrivals=count)

    def wait(self, barrier, parity, pred=True):
        if pred:
            with self.condition:
                found = self.barriers[barrier.data.data_ptr()]
                self.wait_for(lambda: found.phase % 2 != parity, "a barrier")

    def load(self, descriptor, start, barrier, tile, pred=True):
        if not pred:
            return
        assert tile.shape == tuple(descriptor.block_type.shape)
        assert tile.dtype == descriptor.dtype
        tile.data.fill_(math.nan)
        with self.condition:
            self.loads.append((descriptor, [raw(x) for x in start], barrier, tile))
            self.condition.notify_all()

    def store(self, descriptor, start, tile):
        assert tile.shape == tuple(descriptor.block_type.shape)
        with self.condition:
            self.stores.setdefault(threading.get_ident(), []).append((descriptor, [raw(x) for x in start], tile))
            self.condition.notify_all()

    def store_wait(self, pending):
        with self.condition:
            mine = self.stores.setdefault(threading.get_ident(), [])
            self.wait_for(lambda: len(mine) <= pending, "a copy to memory")

    @torch.no_grad()
    def copy_engine(self):
        """Loads in any order, each role's stores in their order, none at once."""
        while True:
            with self.condition:
                queues = [queue for queue in self.stores.values() if queue]
                self.condition.wait_for(lambda: self.loads or any(self.stores.values()) or self.done)
                queues = [queue for queue in self.stores.values() if queue]
                if self.done and not self.loads and not queues:
                    return
                if self.loads and (not queues or self.random.random() < 0.7):
                    descriptor, start, barrier, tile = self.loads.pop(self.random.randrange(len(self.loads)))
                    place, there = descriptor.places(start)
                    tile.data.copy_(torch.where(there, descriptor.flat[place], 0))
                    count = tile.data.numel() * tile.data.element_size()
                else:
                    queue = self.random.choice(queues)
                    descriptor, start, tile = queue.pop(0)
                    place, there = descriptor.places(start)
                    descriptor.flat[place[there]] = tile.data[there]
                    barrier = None
                self.condition.notify_all()
            if barrier is not None:
                self.changed(barrier, expected=-count)

    def multiply(self, a, b, accumulator, use_acc=True, is_async=False):
        assert is_async
        issued = self.own.__dict__.setdefault("issued", [])
        issued.append(Product(a, b, accumulator, use_acc))
        return issued[-1]

    def multiply_wait(self, outstanding, deps):
        issued = self.own.__dict__.setdefault("issued", [])
        while len(issued) > outstanding:
            issued.pop(0).settle()
        found = tuple(Value(dep.value.data) if dep.value is not None else dep for dep in deps)
        return found if len(found) > 1 else found[0]

    def specialize(self, roles, warps, registers):
        """Run all roles to their ends."""

        def role(function, arguments):
            try:
                function(*arguments)
                assert not self.own.__dict__.get("issued"), "a product that nobody waited for"
            except BaseException as error:
                with self.condition:
                    if self.failure is None:
                        self.failure = error
                    self.condition.notify_all()

        assert len(roles) == 1 + len(warps) == 1 + len(registers)
        threads = [threading.Thread(target=role, args=each, daemon=True) for each in roles]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self.failure is not None:
            raise self.failure

    @contextmanager
    def copying(self):
        """Copies are made while the program runs."""
        engine = threading.Thread(target=self.copy_engine, daemon=True)
        engine.start()
        try:
            yield
        finally:
            with self.condition:
                self.done = True
                self.condition.notify_all()
            engine.join(PATIENCE)
        assert not engine.is_alive()
        assert not self.own.__dict__.get("issued"), "a product that nobody waited for"
        assert all(barrier.bytes == 0 for barrier in self.barriers.values())


def take_over(monkeypatch, module, descriptors):
    """What ``module`` binds runs here; ``descriptors`` are the names of its functions that make them."""
    known = {}

    def noting(make):
        def made(tensor, *sizes):
            found = make(tensor, *sizes)
            known[id(found)] = Descriptor(found, tensor)
            return found

        return made

    def bound(kernel, **constants):
        def launch(programs, *arguments):
            arguments = [known.get(id(argument), argument) for argument in arguments]
            named = dict(zip(kernel.arg_names, arguments, strict=False))
            options = {name: value for name, value in constants.items() if name in kernel.arg_names}
            run(kernel, programs, named | options)

        return launch

    for name in descriptors:
        monkeypatch.setattr(module, name, noting(getattr(module, name)))
    monkeypatch.setattr(module, "bind", bound)


def run(kernel, programs, arguments, seed=0):
    """Run a kernel's programs one after another; descriptors among the arguments are those above."""
    held = inside(kernel, arguments)
    for number in range(programs):
        program, scope = Program(seed + number), plain_functions(kernel)
        scope["gl"] = language(number, programs)
        scope["gl"].warp_specialize = program.specialize
        scope["gl"].allocate_shared_memory = allocate
        scope["mbarrier"] = types.SimpleNamespace(
            init=program.init, expect=program.expect, wait=program.wait, arrive=program.arrive, MBarrierLayout=object
        )
        scope["tma"] = types.SimpleNamespace(
            async_copy_global_to_shared=program.load, async_copy_shared_to_global=program.store,
            store_wait=program.store_wait,
        )  # fmt: skip
        scope["fence_async_shared"] = lambda: None
        scope["warpgroup_mma"], scope["warpgroup_mma_wait"] = program.multiply, program.multiply_wait
        with program.copying():
            types.FunctionType(kernel.fn.__code__, scope)(**held)


def allocate(dtype, shape, layout):
    return Shared(torch.full(shape, math.nan if dtype.is_floating_point else 0, dtype=dtype))
