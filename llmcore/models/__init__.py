"""Models: one decoder, its configuration, presets in the style of known families, and the families themselves."""

from llmcore.models.config import MLAConfig, ModelConfig, MoEConfig
from llmcore.models.presets import PRESETS, gpt2, llama, llama_dyt, llama_moe
from llmcore.models.pretrained import load_pretrained, read_config, save_pretrained
from llmcore.models.transformer import Transformer, TransformerOutput

__all__ = [
    "PRESETS",
    "MLAConfig",
    "MoEConfig",
    "ModelConfig",
    "Transformer",
    "TransformerOutput",
    "gpt2",
    "llama",
    "llama_dyt",
    "llama_moe",
    "load_pretrained",
    "read_config",
    "save_pretrained",
]
