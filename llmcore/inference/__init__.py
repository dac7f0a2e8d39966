"""Running a trained model: loading it, the paged cache, sampling and batch generation."""

from llmcore.inference.cache import PagedKVCache
from llmcore.inference.generate import generate
from llmcore.inference.load import load_model

__all__ = ["PagedKVCache", "generate", "load_model"]
