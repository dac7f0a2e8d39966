"""The modules that models are made of, each a thin layer over `llmcore.ops`."""

from llmcore.layers.attention import Attention, CacheStep
from llmcore.layers.latent_attention import LatentAttention
from llmcore.layers.linear import Linear
from llmcore.layers.linformer import LinformerAttention
from llmcore.layers.mlp import MLP, GatedMLP, make_mlp
from llmcore.layers.moe import MoE, MoEOutput
from llmcore.layers.norm import DyT, LayerNorm, RMSNorm, make_norm
from llmcore.layers.quantized import QuantizedEmbedding, QuantizedLinear, quantize_model
from llmcore.layers.rope import RotaryEmbedding

__all__ = [
    "MLP",
    "Attention",
    "CacheStep",
    "DyT",
    "GatedMLP",
    "LatentAttention",
    "LayerNorm",
    "Linear",
    "LinformerAttention",
    "MoE",
    "MoEOutput",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "RMSNorm",
    "RotaryEmbedding",
    "make_mlp",
    "make_norm",
    "quantize_model",
]
