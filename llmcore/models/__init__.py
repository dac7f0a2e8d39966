"""Models: one decoder, its configuration, and presets in the style of known families."""

from llmcore.models.config import ModelConfig, MoEConfig
from llmcore.models.presets import PRESETS, gpt2, llama, llama_dyt, llama_moe
from llmcore.models.transformer import Transformer, TransformerOutput

__all__ = [
    "PRESETS",
    "MoEConfig",
    "ModelConfig",
    "Transformer",
    "TransformerOutput",
    "gpt2",
    "llama",
    "llama_dyt",
    "llama_moe",
]
