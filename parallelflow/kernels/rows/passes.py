"""The engine's passes, made again where problems of their kind have been there before (``kernels/plan.py``)."""

from operator import itemgetter
from typing import Any

from torch import Tensor

from parallelflow.kernels.plan import Pass, Passed
from parallelflow.kernels.rows import engine
from parallelflow.kernels.watch import Launched, tell
from parallelflow.problem import TIES, Inputs, Traits


class Kind:
    """Problems of one kind: which slots' tensors the engine reads, each once, and its passes."""

    def __init__(self, inputs: Inputs) -> None:
        tied = [one for one, other in TIES if inputs[one] is inputs[other]]
        self.slots = [slot for slot, tensor in enumerate(inputs) if tensor is not None and slot not in tied]
        self.own = itemgetter(*self.slots)
        self.passes: dict[tuple, Pass] = {}

    @staticmethod
    def of(decided: dict[Any, Any] | None, inputs: Inputs) -> "Kind":
        """What is known of them; ``decided`` is one dictionary for one kind, or None where problems are unlike."""
        if decided is None:
            return Kind(inputs)
        found = decided.get(Kind)
        if found is None:
            found = decided[Kind] = Kind(inputs)
            decided["slots"] = found.slots, range(len(Inputs._fields))
        return found

    def one(self, *options: Any) -> Pass:
        """The pass with these options."""
        found = self.passes.get(options)
        if found is None:
            found = self.passes[options] = Pass()
        return found

    def opened(self, saved: list[Tensor]) -> list[Tensor]:
        """What a forward pass kept, whether in one piece or not."""
        for name, one in self.passes.items():
            if name[:2] == ("forward", True) and one.plan is not None:  # of every such pass the same arrays
                return one.plan.opened(saved)
        return saved


def forward(inputs: Inputs, traits: Traits, sequence_starts: list[int] | None, tier: str, keep: bool,
            need_final_state: bool, batch_invariant: bool, decided: dict[Any, Any] | None,
            ) -> tuple[Tensor, Tensor | None, list[Tensor]]:  # fmt: skip
    """``engine.forward``; what is kept may come in one piece. ``decided``: see ``Kind.of``."""
    inputs = inputs.contiguous()
    kind = Kind.of(decided, inputs)
    one, own = kind.one("forward", keep, need_final_state), kind.own(inputs)

    def compute() -> Passed:
        output, final, kept = engine.forward(
            inputs, traits, sequence_starts, tier, keep, need_final_state, batch_invariant
        )
        return (output, final), kept

    (output, final), kept = one.run(own, compute)
    assert output is not None
    if decided is not None:
        decided["forward", keep, need_final_state] = one
        if sequence_starts is None and not keep:
            tell(lambda: Launched((*own, output, final), len(own), len(own) + 1, False, one.settle))
    return output, final, kept


def backward(inputs: Inputs, traits: Traits, sequence_starts: list[int] | None, tier: str, saved: list[Tensor],
             d_output: Tensor, d_final: Tensor | None, batch_invariant: bool,
             decided: dict[Any, Any] | None) -> Inputs:  # fmt: skip
    """``engine.backward``."""
    inputs, d_output = inputs.contiguous(), d_output.contiguous()
    d_final = None if d_final is None else d_final.float().contiguous()
    kind = Kind.of(decided, inputs)
    one = kind.one("backward", len(saved), d_final is None)

    def compute() -> Passed:
        kept = kind.opened(saved)
        arguments = inputs, traits, sequence_starts, tier, kept, d_output, d_final, batch_invariant
        return engine.backward(*arguments), []

    found, _ = one.run((*kind.own(inputs), *saved, d_output, d_final), compute)
    if decided is not None:
        decided["backward", len(saved), d_final is None] = one
    return Inputs(*found)  # type: ignore[arg-type]
