"""The model of a configuration."""

from __future__ import annotations

from llmcore.models.config import ModelConfig
from llmcore.models.encoder import Encoder
from llmcore.models.encoder_decoder import EncoderDecoder
from llmcore.models.transformer import Transformer

Model = Transformer | Encoder | EncoderDecoder


def build_model(config: ModelConfig) -> Model:
    """A decoder, an encoder or both, with initial weights."""
    if config.encoder_layers:
        return EncoderDecoder(config)
    return Transformer(config) if config.causal else Encoder(config)
