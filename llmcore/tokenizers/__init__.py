"""Tokenizers: training (BPE, Unigram, word, byte), use, chat templates; files in the standard `tokenizer.json`."""

from .chat import DEFAULT_CHAT_TEMPLATE, render_chat
from .tokenizer import Tokenizer
from .train import train_tokenizer

__all__ = ["DEFAULT_CHAT_TEMPLATE", "Tokenizer", "render_chat", "train_tokenizer"]
