"""Hugging Face Transformers' linear-attention models on this engine, by one line: ``accelerate(model)``.

Needs no import of Transformers itself, and works with whichever of its models call the functions that it knows.
"""

from parallelflow.compat.transformers.switch import Accelerated, accelerate

__all__ = ["Accelerated", "accelerate"]
