"""Drop-ins for the libraries users come from: ``compat.fla`` (flash-linear-attention), ``compat.transformers``."""
