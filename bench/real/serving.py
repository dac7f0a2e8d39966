"""The same requests served by each engine. `serve(requests)` runs all of them, 16 at a time, the next when one has
ended, and gives (seconds, the new tokens of each). A request is (token ids, how many new ones): the likeliest, and
nothing ends a text before. A worker's `serve` is in bench/real/worker.py."""

from __future__ import annotations

import time
from collections import deque
from pathlib import Path

import torch

import llmcore
from bench.real.engines import LLAMA_BATCH, LlamaCpp, Transformers
from llmcore.inference import Engine, LanguageModel, SamplingParams

AT_ONCE = 16
Request = tuple[list[int], int]


class LLMCoreServer:
    """`Engine` as it is by default, with room for the requests."""

    version = llmcore.__version__

    def __init__(self, lm: LanguageModel, requests: list[Request]) -> None:
        self.engine = make_engine(lm, requests, max_sequences=AT_ONCE)

    def serve(self, requests: list[Request]) -> tuple[float, list[list[int]]]:
        begin = time.perf_counter()
        outputs = self.engine.generate([tokens for tokens, _ in requests], [greedy(count) for _, count in requests])
        seconds = time.perf_counter() - begin
        return seconds, [output.choices[0].tokens for output in outputs]


def make_engine(lm: LanguageModel, requests: list[Request], **options) -> Engine:
    longest = max(len(tokens) + count for tokens, count in requests)
    most = options.get("max_sequences", AT_ONCE)
    return Engine.from_language_model(lm, cache_tokens=(most + 1) * (longest + 16), **options)


def greedy(count: int) -> SamplingParams:
    return SamplingParams(max_tokens=count, temperature=0, ignore_eos=True)


class LlamaCppServer(LlamaCpp):
    """As llama.cpp's server batches: a token of every text that is being written, then prompts, up to `LLAMA_BATCH`
    tokens a step; a slot that is free takes the next request at once."""

    def __init__(self, path: Path, threads: int, *, requests: list[Request], **settings) -> None:
        longest = max(len(tokens) + count for tokens, count in requests)
        context = -(-longest // 256) * 256
        super().__init__(path, threads, sequences=AT_ONCE, context=context, **settings)

    def serve(self, requests: list[Request]) -> tuple[float, list[list[int]]]:
        memory = self.c.llama_get_memory(self.context)
        self.c.llama_memory_clear(memory, False)
        waiting, outputs = deque(enumerate(requests)), [[] for _ in requests]
        slots: list[tuple[int, list[int], int] | None] = [None] * AT_ONCE  # request, what it has yet to run, position
        begin = time.perf_counter()
        while True:
            for slot, running in enumerate(slots):
                if running is None and waiting:
                    request, (tokens, _) = waiting.popleft()
                    slots[slot] = (request, tokens, 0)
            busy = [slot for slot in range(AT_ONCE) if slots[slot] is not None]
            if not busy:
                return time.perf_counter() - begin, outputs
            entries = []
            for slot in sorted(busy, key=lambda s: len(slots[s][1]) > 1):  # texts first
                request, tokens, position = slots[slot]
                part = tokens[: LLAMA_BATCH - len(entries)]
                left = tokens[len(part) :]
                entries += [
                    (token, position + i, slot, not left and i == len(part) - 1) for i, token in enumerate(part)
                ]
                slots[slot] = (request, left, position + len(part))
            self._decode(entries)
            for index, (_, _, slot, wanted) in enumerate(entries):
                if not wanted:
                    continue
                request, _, position = slots[slot]
                outputs[request].append(self._likeliest(index))
                slots[slot] = (request, outputs[request][-1:], position)
                if len(outputs[request]) == requests[request][1]:
                    slots[slot] = None
                    self.c.llama_memory_seq_rm(memory, slot, -1, -1)


class TransformersServer(Transformers):
    """`generate` on batches of 16 in the order of the requests, each padded on the left to its longest prompt and run
    to its longest answer. The tokens beyond what a request asked for are dropped."""

    @torch.inference_mode()
    def serve(self, requests: list[Request]) -> tuple[float, list[list[int]]]:
        outputs = []
        begin = time.perf_counter()
        for first in range(0, len(requests), AT_ONCE):
            batch = requests[first : first + AT_ONCE]
            longest, most = max(len(tokens) for tokens, _ in batch), max(count for _, count in batch)
            pads = [longest - len(tokens) for tokens, _ in batch]
            ids = torch.tensor([[0] * pad + tokens for pad, (tokens, _) in zip(pads, batch)])
            seen = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in pads])
            new = self.model.generate(
                ids, attention_mask=seen, do_sample=False, max_new_tokens=most, min_new_tokens=most, pad_token_id=0
            )[:, longest:].tolist()
            outputs += [row[:count] for row, (_, count) in zip(new, batch)]
        return time.perf_counter() - begin, outputs
