"""POST /v1/embeddings"""

from __future__ import annotations

import asyncio
import base64
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.nn.functional as F
from starlette.responses import JSONResponse, Response
from torch import Tensor

from llmcore.inference.async_engine import AsyncEngine, EngineClosed
from llmcore.inference.language_model import LanguageModel
from llmcore.serve.errors import ApiError, unavailable
from llmcore.serve.job import Job
from llmcore.serve.protocol import EmbeddingRequest

POOLINGS = ("mean", "last")
_BATCH_TOKENS = 2048  # of one run of the model, for which those who write must wait


class DecoderEmbedder:
    """Vectors of texts by a decoder: the hidden states of its tokens, after the last norm, pooled to length 1.

    Args:
        pooling: "mean" of all tokens, or "last": of the end-of-text token behind the text, where there is one.
    """

    def __init__(self, language_model: LanguageModel, engine: AsyncEngine, pooling: str = "mean") -> None:
        if pooling not in POOLINGS:
            raise ValueError(f"pooling is {pooling!r}; accepted: {', '.join(map(repr, POOLINGS))}")
        self._lm, self._engine, self.pooling = language_model, engine, pooling
        self.max_tokens = language_model.context_length

    def encode(self, text: str) -> list[int]:
        tokenizer = self._lm.tokenizer
        end = self.pooling == "last" and tokenizer.eos_id is not None
        return tokenizer.encode(text, add_bos=tokenizer.adds_bos, add_eos=end)

    @property
    def vocab_size(self) -> int:
        return self._lm.model.config.vocab_size

    async def embed(self, inputs: list[list[int]]) -> Tensor:
        """(len(inputs), dim) float32, between steps of the engine."""
        parts = []
        for batch in _batches(inputs):
            parts.append(await self._engine.call(lambda _, batch=batch: self._run(batch)))
        return torch.cat(parts)

    @torch.inference_mode()
    def _run(self, batch: list[list[int]]) -> Tensor:
        model = self._lm.model
        lengths = torch.tensor([len(tokens) for tokens in batch])
        ends = lengths.cumsum(0)
        packed = torch.tensor([token for tokens in batch for token in tokens], device=model.device)
        cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), ends]).int().to(model.device)
        hidden = model(packed, cu_seqlens=cu_seqlens, max_seqlen=int(lengths.max())).hidden.float()
        if self.pooling == "last":
            pooled = hidden[ends.to(hidden.device) - 1]
        else:
            pooled = torch.stack([part.mean(0) for part in hidden.split(lengths.tolist())])
        return F.normalize(pooled, dim=-1).cpu()


class EncoderEmbedder:
    """Vectors of texts by an encoder of the BERT family (`llmcore.inference.TextEmbedder`), in a thread of its own."""

    def __init__(self, embedder: Any) -> None:
        self._embedder, self.max_tokens = embedder, embedder.max_tokens
        self._thread = ThreadPoolExecutor(1, "llmcore-embed")

    def encode(self, text: str) -> list[int]:
        return self._embedder.tokenizer.encode_wrapped([text], 1 << 30)[0]  # not cut: too long is an error

    @property
    def vocab_size(self) -> int:
        return self._embedder.model.config.vocab_size

    async def embed(self, inputs: list[list[int]]) -> Tensor:
        loop, parts = asyncio.get_running_loop(), []
        for batch in _batches(inputs):
            parts.append(await loop.run_in_executor(self._thread, self._run, batch))
        return torch.cat(parts)

    def _run(self, batch: list[list[int]]) -> Tensor:
        return self._embedder.embed_tokens(batch).cpu()


def _batches(inputs: list[list[int]]) -> list[list[list[int]]]:
    batches: list[list[list[int]]] = []
    room = 0
    for tokens in inputs:
        if len(tokens) > room:
            batches.append([])
            room = _BATCH_TOKENS
        batches[-1].append(tokens)
        room -= len(tokens)
    return batches


async def answer(job: Job, request: EmbeddingRequest) -> Response:
    served = job.served
    if served.embedder is None or served.adapter(request.model) is not None:
        raise ApiError(f"{request.model} makes no embeddings", param="model", code="unsupported")
    if not 1 <= len(request.inputs) <= served.limits.max_inputs:
        raise ApiError(f"input has {len(request.inputs)} texts; accepted: 1 to {served.limits.max_inputs}",
                       param="input", code="invalid_value")  # fmt: skip
    inputs = await asyncio.to_thread(lambda: [_tokens(served.embedder, text) for text in request.inputs])
    try:
        vectors = await served.embedder.embed(inputs)
    except EngineClosed:
        raise unavailable("the server is shutting down", "shutting_down") from None
    if request.dimensions is not None:
        vectors = _shortened(vectors, request.dimensions)
    form = _base64 if request.encoding_format == "base64" else Tensor.tolist
    count = sum(map(len, inputs))
    return JSONResponse(
        {
            "object": "list",
            "data": [{"object": "embedding", "index": i, "embedding": form(v)} for i, v in enumerate(vectors)],
            "model": request.model,
            "usage": {"prompt_tokens": count, "total_tokens": count},
        }
    )


def _tokens(embedder: Any, text: str | list[int]) -> list[int]:
    try:
        tokens = embedder.encode(text) if isinstance(text, str) else text
    except ValueError as error:
        raise ApiError(f"input: {error}", param="input", code="invalid_value") from None
    if wrong := [token for token in tokens if token >= embedder.vocab_size]:
        raise ApiError(f"input holds token id {wrong[0]}; accepted: 0 to {embedder.vocab_size - 1}", param="input",
                       code="invalid_value")  # fmt: skip
    limit = embedder.max_tokens
    if not tokens or (limit is not None and len(tokens) > limit):
        raise ApiError(f"input has a text of {len(tokens)} tokens; accepted: 1 to {limit or 'any number'}",
                       param="input", code="context_length_exceeded" if tokens else "invalid_value")  # fmt: skip
    return tokens


def _shortened(vectors: Tensor, dimensions: int) -> Tensor:
    """The first numbers, brought to length 1 again: of use where a model was trained for it (arXiv 2205.13147)."""
    if dimensions > vectors.shape[1]:
        raise ApiError(f"dimensions is {dimensions}; accepted: 1 to {vectors.shape[1]}", param="dimensions",
                       code="invalid_value")  # fmt: skip
    return F.normalize(vectors[:, :dimensions], dim=-1)


def _base64(vector: Tensor) -> str:
    return base64.b64encode(vector.numpy().astype("<f4").tobytes()).decode()
