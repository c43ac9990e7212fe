"""Training a language model on files: recipe, text, checkpoints, and the loop that a kill at any moment does not harm.

Needs the extra ``hf``.
"""

try:
    import safetensors  # noqa: F401
    import yaml  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"parallelflow.training: got no {error.name}, expected it installed: pip install 'parallelflow[hf]'"
    ) from error

from parallelflow.training.checkpoint import Checkpoint, CheckpointError, latest
from parallelflow.training.loop import train
from parallelflow.training.recipe import Recipe
from parallelflow.training.text import Text, open_text
from parallelflow.training.tokens import Bytes, Tokenizer, open_tokens

__all__ = [
    "Bytes",
    "Checkpoint",
    "CheckpointError",
    "Recipe",
    "Text",
    "Tokenizer",
    "latest",
    "open_text",
    "open_tokens",
    "train",
]
