"""A tiny chat model: random weights, a tokenizer trained on a few lines."""

from __future__ import annotations

import torch

from llmcore.inference import GenerationDefaults, LanguageModel
from llmcore.models import Transformer, llama
from llmcore.tokenizers import Tokenizer, train_tokenizer

TEXT = "the quick fox and the lazy dog run over the hill\na cat sat on the mat and saw a rat\n"
SPECIAL = ("<|im_start|>", "<|im_end|>")


def tiny_tokenizer(special: tuple[str, ...] = SPECIAL) -> Tokenizer:
    return train_tokenizer([TEXT] * 10, vocab_size=340, special_tokens=special)


def tiny_model(special: tuple[str, ...] = SPECIAL, max_positions: int = 2048) -> LanguageModel:
    torch.manual_seed(0)
    model = Transformer(llama("tiny", vocab_size=352, max_positions=max_positions))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
    tokenizer = tiny_tokenizer(special)
    stop = [tokenizer.special_tokens["<|im_end|>"]]
    return LanguageModel(model, tokenizer, stop_ids=stop, defaults=GenerationDefaults(temperature=0.0), source="tiny")
