"""Running a trained model: loading it, the paged cache, sampling and batch generation."""

from llmcore.inference.cache import PagedKVCache
from llmcore.inference.generate import generate
from llmcore.inference.load import load_model
from llmcore.inference.seq2seq import generate_seq2seq

__all__ = ["PagedKVCache", "generate", "generate_seq2seq", "load_model"]
