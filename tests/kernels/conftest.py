"""Without a GPU the kernels run in Triton's interpreter (``tests/conftest.py`` chooses it).

Four gaps of the interpreter of Triton 3.6 are filled here: it counts loops in a way that NumPy 2.4 refuses, it
multiplies the bit patterns of bfloat16 numbers, it cuts off where a GPU rounds to the nearest bfloat16, and what it
changes in ``triton.language`` for a function that a kernel calls stays changed, which later breaks compilations.
"""

import pytest
import torch


@pytest.fixture
def short(monkeypatch):
    """Sequences of two chunks and more are cut, each chunk a segment of its own where 8 multiprocessors have room."""
    from parallelflow.kernels import delta, segments

    def clear():
        segments._known.cache_clear()
        delta._SCHEDULES.clear()

    monkeypatch.setattr(segments, "SHORTEST", 2)
    monkeypatch.setattr(segments, "FEWEST", 1)
    monkeypatch.setattr(segments, "processors", lambda device: 8)
    clear()
    yield
    clear()


def _mend_interpreter() -> None:
    try:
        import triton.language as tl
        from triton.runtime import interpreter
    except ImportError:
        return
    import numpy as np

    patch_tensor = interpreter._patch_lang_tensor
    create_dot = interpreter.InterpreterBuilder.create_dot
    cast = interpreter.InterpreterBuilder.cast_impl

    def patched_tensor(tensor, scope):
        patch_tensor(tensor, scope)
        tensor.__index__ = lambda self: int(self.handle.data.reshape(-1)[0])

    def widened(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = handle.data.view(np.uint16).astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    def patched_dot(self, a, b, *rest):
        return create_dot(self, widened(a), widened(b), *rest)

    def patched_cast(self, source, dtype):
        if source.dtype.scalar == tl.bfloat16 and dtype.scalar == tl.float32:
            return widened(source)
        if source.dtype.scalar == tl.float32 and dtype.scalar == tl.bfloat16:
            rounded = torch.from_numpy(np.ascontiguousarray(source.data)).to(torch.bfloat16)
            return interpreter.TensorHandle(rounded.view(torch.int16).numpy().view(np.uint16), tl.bfloat16)
        return cast(self, source, dtype)

    call = interpreter.InterpretedFunction.__call__

    def restoring_call(self, *args, **kwargs):
        scope = interpreter._patch_lang(self.fn)
        try:
            return call(self, *args, **kwargs)
        finally:
            scope.restore()

    interpreter._patch_lang_tensor = patched_tensor
    interpreter.InterpretedFunction.__call__ = restoring_call
    interpreter.InterpreterBuilder.create_dot = patched_dot
    interpreter.InterpreterBuilder.cast_impl = patched_cast
    for name in ("create_fp_ext", "create_fp_trunc"):
        setattr(interpreter.InterpreterBuilder, name, patched_cast)


_mend_interpreter()
