"""Language models for Hugging Face Transformers: any pattern of layers, with ``generate``, Auto classes and all.

Token ids and masks are integers, hidden states and logits have the parameters' dtype; what does not fit raises a
TypeError or ValueError that names the argument.
Importing this registers ``ParallelFlowConfig`` with ``AutoConfig``, ``AutoModel`` and ``AutoModelForCausalLM``.
"""

try:
    import transformers
except ImportError as error:
    raise ImportError(
        "parallelflow.models: got no transformers, expected it installed: pip install 'parallelflow[hf]'"
    ) from error

from parallelflow.models.cache import ParallelFlowCache
from parallelflow.models.configuration import ParallelFlowConfig
from parallelflow.models.model import ParallelFlowForCausalLM, ParallelFlowModel, ParallelFlowPreTrainedModel

transformers.AutoConfig.register(ParallelFlowConfig.model_type, ParallelFlowConfig, exist_ok=True)
transformers.AutoModel.register(ParallelFlowConfig, ParallelFlowModel, exist_ok=True)
transformers.AutoModelForCausalLM.register(ParallelFlowConfig, ParallelFlowForCausalLM, exist_ok=True)

__all__ = [
    "ParallelFlowCache",
    "ParallelFlowConfig",
    "ParallelFlowForCausalLM",
    "ParallelFlowModel",
    "ParallelFlowPreTrainedModel",
]
