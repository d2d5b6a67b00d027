"""The decoder as a model of the library transformers: its configuration, cache, generation, trainer and checkpoints.

`from optimized.huggingface import MixtureOfAttentionForCausalLM`; importing it registers the auto classes. Needs the
extra `transformers`.
"""

try:
    import transformers
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 24):
        raise ImportError(f"transformers {transformers.__version__}")
except ImportError as error:
    raise ImportError(
        "optimized.huggingface: expected transformers >= 5.24 to be installed, as by "
        f"pip install 'verified-mixture-of-attention[transformers]', got {error}"
    ) from error

from optimized.huggingface.cache import MixtureOfAttentionCache
from optimized.huggingface.config import MixtureOfAttentionConfig
from optimized.huggingface.models import MixtureOfAttentionForCausalLM, MixtureOfAttentionModel

__all__ = [
    "MixtureOfAttentionCache",
    "MixtureOfAttentionConfig",
    "MixtureOfAttentionForCausalLM",
    "MixtureOfAttentionModel",
]

AutoConfig.register(MixtureOfAttentionConfig.model_type, MixtureOfAttentionConfig, exist_ok=True)
AutoModel.register(MixtureOfAttentionConfig, MixtureOfAttentionModel, exist_ok=True)
AutoModelForCausalLM.register(MixtureOfAttentionConfig, MixtureOfAttentionForCausalLM, exist_ok=True)
