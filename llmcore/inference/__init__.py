"""Running a trained model: loading it, the paged cache, sampling and batch generation."""

from llmcore.inference.cache import PagedKVCache
from llmcore.inference.embed import TextEmbedder, load_embedder
from llmcore.inference.generate import generate
from llmcore.inference.load import load_model
from llmcore.inference.seq2seq import generate_seq2seq

__all__ = ["PagedKVCache", "TextEmbedder", "generate", "generate_seq2seq", "load_embedder", "load_model"]
