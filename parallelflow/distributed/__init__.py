"""Past one device: a sequence cut over the ranks of a ``torch.distributed`` process group.

A flow over a piece of the sequence is a pair ``(P, H)``, pieces compose, and a rank's piece is no different from a
chunk: ``aggregate="distributed"`` is the aggregate over ranks, around any backend, for every driver.
"""

from parallelflow.distributed.agreement import lengths_of, refuse
from parallelflow.distributed.call import FINAL_STATE_ON, check, run
from parallelflow.distributed.context import Context, ContextGroupError
from parallelflow.distributed.past import Surroundings, past_inputs
from parallelflow.distributed.shards import even_lengths
from parallelflow.distributed.tokens import gather_tokens

__all__ = [
    "FINAL_STATE_ON",
    "Context",
    "ContextGroupError",
    "Surroundings",
    "check",
    "even_lengths",
    "gather_tokens",
    "lengths_of",
    "past_inputs",
    "refuse",
    "run",
]
