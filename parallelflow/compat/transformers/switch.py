"""A loaded model switched over to this engine, layer by layer, and back."""

from __future__ import annotations

from collections.abc import Iterator
from types import FunctionType, MethodType, TracebackType
from weakref import WeakSet

from torch import nn

from parallelflow.compat.transformers import lightning
from parallelflow.compat.transformers.functions import AROUND, MODELS
from parallelflow.compat.transformers.rebinding import called_names, rebound

_WHOLE = {"MiniMaxLightningAttention": lightning.forward}
"""Layers whose recurrence is written into their ``forward``: the class's name → our ``forward``."""

_OTHER = {
    "MambaMixer": "Mamba-1: a decay for each channel and state",
    "FalconMambaMixer": "Mamba-1: a decay for each channel and state",
    "JambaMambaMixer": "Mamba-1: a decay for each channel and state",
    "ZambaMambaMixer": "Mamba-1: a decay for each channel and state",
    "RecurrentGemmaRglru": "a recurrence of vectors: there is no matrix to carry",
    "RwkvSelfAttention": "RWKV-4: a recurrence of vectors, normalised",
    "xLSTMLayer": "mLSTM: input gates without a bound, and a normaliser",
}
"""Recurrent layers of Transformers that this engine does not compute, by class, and why."""

_SWITCHED: WeakSet[nn.Module] = WeakSet()
"""The layers that are on this engine now."""


class Accelerated:
    """A model on this engine, until ``restore()`` or the end of ``with accelerate(model):``."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.replaced: dict[str, tuple[str, ...]] = {}
        """Name of the layer → what was replaced in it."""
        self._methods: list[tuple[nn.Module, str, object]] = []  # layer, attribute, what it held (None: nothing)

    def restore(self) -> None:
        """The model as it was. Caches made meanwhile stay usable: their layouts are Transformers' own."""
        for layer, attribute, before in self._methods:
            delattr(layer, attribute)
            if before is not None:
                setattr(layer, attribute, before)
            _SWITCHED.discard(layer)
        self._methods.clear()

    def _put(self, layer: nn.Module, attribute: str, ours: MethodType) -> None:
        self._methods.append((layer, attribute, vars(layer).get(attribute)))
        setattr(layer, attribute, ours)
        _SWITCHED.add(layer)

    def __enter__(self) -> Accelerated:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()

    def __str__(self) -> str:
        layers = "\n".join(f"  {name}: {', '.join(names)}" for name, names in self.replaced.items())
        return f"{type(self.model).__name__}: {len(self.replaced)} layers on ParallelFlow\n{layers}"


def accelerate(model: nn.Module) -> Accelerated:
    """The linear-attention layers of a Transformers model compute with this engine: prompts, training, decoding.

    Layers are found by the functions that they call (``MODELS``: Gated DeltaNet in Qwen3-Next, Qwen3.5 and OLMo-Hybrid,
    Kimi Delta Attention, Mamba-2 in its many models) or by their class (MiniMax's lightning attention). Each layer
    object gets a method of its own; classes, modules and other models are left alone. Weights, caches, masks, devices
    and ``state_dict`` are untouched, and so are results, up to rounding.

    Returns:
        The ``Accelerated`` model's handle: ``replaced`` says what, ``restore()`` undoes it; also a context manager.

    Raises:
        TypeError: if ``model`` is not a module.
        ValueError: if there is nothing in the model to replace (naming its recurrent layers that this engine does not
            compute, and why), or it is accelerated already.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected a torch.nn.Module")
    handle = Accelerated(model)
    found = [(name, layer, list(_methods(layer))) for name, layer in model.named_modules()]
    for name, layer, methods in found:
        held = vars(layer).get("forward")  # its class's own where a model was saved whole while it was accelerated
        foreign = held is not None and getattr(held, "__func__", None) is not type(layer).forward
        hooked = "_old_forward" in vars(layer)  # by something that moves weights between devices
        if methods and (layer in _SWITCHED or (foreign and not hooked)):
            raise ValueError(f"model: got one whose {name}.forward is replaced already, expected an untouched one")
    for name, layer, methods in found:
        for method, ours, replaced in methods:
            attribute = "_old_forward" if method == "forward" and "_old_forward" in vars(layer) else method
            handle._put(layer, attribute, MethodType(ours, layer))
            handle.replaced[name] = (*handle.replaced.get(name, ()), *replaced)
    if not handle.replaced:
        known = ", ".join([*MODELS, *_WHOLE])
        others = sorted({type(layer).__name__ for layer in model.modules()} & set(_OTHER))
        why = "".join(f" ({name} is {_OTHER[name]})" for name in others)
        raise ValueError(
            f"model: got {type(model).__name__}, in which nothing can be replaced{why}, expected one with layers that "
            f"call one of {known}"
        )
    return handle


def _methods(layer: nn.Module) -> Iterator[tuple[str, FunctionType, tuple[str, ...]]]:
    """The layer's methods to replace: name, ours, and what in it is ours."""
    whole = _WHOLE.get(type(layer).__name__)
    if whole is not None:
        assert isinstance(whole, FunctionType)
        yield "forward", whole, ("forward",)
        return
    for name in dir(type(layer)):
        method = getattr(type(layer), name, None)
        if not isinstance(method, FunctionType) or method.__module__.partition(".")[0] == "torch":
            continue
        called = called_names(method)
        if called & set(MODELS):
            table = {**MODELS, **AROUND}
            names = tuple(sorted(called & set(table)))
            yield name, rebound(method, {each: table[each] for each in names}), names
