"""Models: decoders, encoders and both, of one kind of layer, their configuration, presets in the style of known
families, and the families themselves."""

from llmcore.models.build import Model, build_model
from llmcore.models.config import MLAConfig, ModelConfig, MoEConfig
from llmcore.models.encoder import Encoder, EncoderOutput, mean_pool
from llmcore.models.encoder_decoder import EncoderDecoder, EncoderDecoderOutput
from llmcore.models.padding import Packing
from llmcore.models.presets import PRESETS, attention_is_all_you_need, gpt2, llama, llama_dyt, llama_moe
from llmcore.models.pretrained import load_pretrained, read_config, save_pretrained
from llmcore.models.transformer import MTPModule, Transformer, TransformerOutput

__all__ = [
    "PRESETS",
    "Encoder",
    "EncoderDecoder",
    "EncoderDecoderOutput",
    "EncoderOutput",
    "MLAConfig",
    "MTPModule",
    "MoEConfig",
    "Model",
    "ModelConfig",
    "Packing",
    "Transformer",
    "TransformerOutput",
    "attention_is_all_you_need",
    "build_model",
    "gpt2",
    "llama",
    "llama_dyt",
    "llama_moe",
    "load_pretrained",
    "mean_pool",
    "read_config",
    "save_pretrained",
]
