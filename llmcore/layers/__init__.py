"""The modules that models are made of, each a thin layer over `llmcore.ops`."""

from llmcore.layers.attention import Attention, CacheStep
from llmcore.layers.cross_attention import CrossAttention, Memory
from llmcore.layers.latent_attention import LatentAttention
from llmcore.layers.linear import Linear
from llmcore.layers.linformer import LinformerAttention
from llmcore.layers.mlp import MLP, GatedMLP, make_mlp, plain
from llmcore.layers.moe import MoE, MoEOutput
from llmcore.layers.norm import DyT, LayerNorm, RMSNorm, make_norm
from llmcore.layers.positions import RelativeBias, sinusoidal
from llmcore.layers.quantized import QuantizedEmbedding, QuantizedLinear, quantize_model
from llmcore.layers.rope import RotaryEmbedding

__all__ = [
    "MLP",
    "Attention",
    "CacheStep",
    "CrossAttention",
    "DyT",
    "GatedMLP",
    "LatentAttention",
    "LayerNorm",
    "Linear",
    "LinformerAttention",
    "Memory",
    "MoE",
    "MoEOutput",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "RMSNorm",
    "RelativeBias",
    "RotaryEmbedding",
    "make_mlp",
    "make_norm",
    "plain",
    "quantize_model",
    "sinusoidal",
]
