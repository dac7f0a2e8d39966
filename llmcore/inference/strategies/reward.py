"""A reward model: a transformer with one more row of weights, which makes a number of the last token's hidden state."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from llmcore.checkpoints import CheckpointError, TensorFiles
from llmcore.inference.strategies.problem import Candidate, Problem
from llmcore.models import Transformer
from llmcore.models.pretrained import REWARD_HEAD, load_pretrained
from llmcore.tokenizers import Tokenizer

BATCH_TOKENS = 4096  # of a pass through the model


class RewardModel:
    """A scorer for `best_of_n`, `step_search` and `self_refine`.

    It sees the question with the text as the assistant's answer (of a prompt that is no chat: the prompt with the text
    after it), and its score is that of the last token: for a process reward model that of the last step.

    Args:
        model: whose hidden states are taken.
        weight: (1, dim), the row that makes a reward of them.
        tokenizer: the model's own, with its chat template.
        sigmoid: gives 1 / (1 + exp(-reward)), which is above 0, as weighted votes need it.
    """

    def __init__(self, model: Transformer, weight: Tensor, tokenizer: Tokenizer, *, sigmoid: bool = False) -> None:
        if weight.shape != (1, model.config.dim):
            raise ValueError(f"weight has shape {tuple(weight.shape)}; accepted: (1, {model.config.dim})")
        self.model, self.weight, self.tokenizer, self.sigmoid = model.eval(), weight, tokenizer, sigmoid

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        sigmoid: bool = False,
    ) -> RewardModel:
        """Reads a Hugging Face folder of a ...ForSequenceClassification with one label. Raises a CheckpointError."""
        files = TensorFiles(folder)
        if REWARD_HEAD not in files:
            raise CheckpointError(f"{folder}: has no tensor {REWARD_HEAD!r}; accepted: a sequence classifier")
        weight = files[REWARD_HEAD]
        if weight.ndim != 2 or len(weight) != 1:
            raise CheckpointError(
                f"{files.source(REWARD_HEAD)}: {REWARD_HEAD!r} has shape {tuple(weight.shape)}; accepted: (1, dim)"
            )
        model = load_pretrained(folder, dtype=dtype, device=device, classifier=True)
        return cls(model, weight.to(device, model.dtype), Tokenizer.load(folder), sigmoid=sigmoid)

    def __call__(self, problem: Problem, candidates: Sequence[Candidate]) -> list[float]:
        return self.rewards([self._tokens(problem, candidate.text) for candidate in candidates])

    def _tokens(self, problem: Problem, text: str) -> list[int]:
        if problem.is_chat:
            return self.tokenizer.encode_chat([*problem.prompt, {"role": "assistant", "content": text}])
        return self.tokenizer.encode(problem.question + text, add_bos=self.tokenizer.adds_bos)

    @torch.inference_mode()
    def rewards(self, texts: Sequence[Sequence[int]]) -> list[float]:
        """Of each text in tokens."""
        rewards: list[float] = []
        for batch in _batches(texts):
            lengths = torch.tensor([len(text) for text in batch], dtype=torch.int32)
            ends = lengths.cumsum(0, dtype=torch.int32)
            starts = torch.cat([ends.new_zeros(1), ends])
            tokens = torch.tensor([token for text in batch for token in text])
            hidden = self.model(
                tokens.to(self.model.device), cu_seqlens=starts.to(self.model.device), max_seqlen=int(lengths.max())
            ).hidden
            last = hidden[(ends - 1).long().to(hidden.device)]
            values = (last @ self.weight.to(last).T).float()[:, 0]
            rewards += (values.sigmoid() if self.sigmoid else values).tolist()
        return rewards


def _batches(texts: Sequence[Sequence[int]]) -> Iterator[list[Sequence[int]]]:
    batch: list[Sequence[int]] = []
    size = 0
    for text in texts:
        if batch and size + len(text) > BATCH_TOKENS:
            yield batch
            batch, size = [], 0
        batch.append(text)
        size += len(text)
    if batch:
        yield batch
