"""The engines that run in this process, and a handle of those in one of their own (bench/real/worker.py)."""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import os
import subprocess
import time
from pathlib import Path

import numpy as np
import torch

import llmcore
from llmcore.inference.generate import stream

MAX_CONTEXT = 8192
_QUIET: dict[str, object] = {}  # llama.cpp's callback for its log, which must outlive every engine
LLAMA_BATCH = 512  # tokens of one llama_decode


class LLMCore:
    """The loop that every user gets: `stream`, its sampling included."""

    def __init__(self, path: Path) -> None:
        self.lm = llmcore.load(path)
        self.version = llmcore.__version__

    def prompt(self, tokens: list[int]) -> tuple[float, list[int]]:
        begin = time.perf_counter()
        (new,) = stream(self.lm.model, [tokens], max_tokens=1, temperature=0)
        return time.perf_counter() - begin, [new.token]

    def start(self, prompts: list[list[int]]) -> list[int]:
        room = min(512, MAX_CONTEXT - max(map(len, prompts)))
        self.count = len(prompts)
        self.new = stream(self.lm.model, prompts, max_tokens=room, temperature=0)
        return self._step()

    def advance(self, steps: int) -> tuple[float, list[list[int]]]:
        begin = time.perf_counter()
        rows = [self._step() for _ in range(steps)]
        return time.perf_counter() - begin, [list(tokens) for tokens in zip(*rows)]

    def _step(self) -> list[int]:
        return [next(self.new).token for _ in range(self.count)]

    @torch.inference_mode()
    def margin(self, tokens: list[int], one: int, other: int) -> float:
        """How far the logit of `one` is above that of `other` after `tokens`, as a share of all logits' spread."""
        logits = self.lm.model.logits(self.lm.model(torch.tensor([tokens])).hidden[:, -1:])[0, -1].float()
        return float((logits[one] - logits[other]) / logits.std())


class LlamaCpp:
    """llama.cpp's own calls: one llama_decode for a batch of tokens of any sequences. The likeliest token is found by
    numpy, which is quicker than llama.cpp's sampler."""

    def __init__(
        self, path: Path, threads: int, *, sequences: int = 1, context: int = 1024, flash: bool = True,
        unified: bool = False,
    ) -> None:  # fmt: skip
        import llama_cpp

        self.c, self.version = llama_cpp, llama_cpp.__version__
        if "llama" not in _QUIET:
            _QUIET["llama"] = llama_cpp.llama_log_callback(lambda level, text, data: None)
            llama_cpp.llama_log_set(_QUIET["llama"], ctypes.c_void_p(0))
        self.model = llama_cpp.llama_model_load_from_file(
            str(path).encode(), llama_cpp.llama_model_default_params()
        )  # fmt: skip
        assert self.model, f"llama.cpp does not load {path}"
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = context * sequences
        params.n_batch = params.n_ubatch = LLAMA_BATCH
        params.n_seq_max = sequences
        params.n_threads = params.n_threads_batch = threads
        on, off = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED, llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.flash_attn_type = on if flash else off
        params.kv_unified = unified
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        assert self.context, "llama.cpp makes no context"
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.batch = llama_cpp.llama_batch_init(LLAMA_BATCH, 0, 1)

    def close(self) -> None:
        self.c.llama_batch_free(self.batch)
        self.c.llama_free(self.context)
        self.c.llama_model_free(self.model)

    def prompt(self, tokens: list[int]) -> tuple[float, list[int]]:
        begin = time.perf_counter()
        first = self.start([tokens])
        return time.perf_counter() - begin, first

    def start(self, prompts: list[list[int]]) -> list[int]:
        self.c.llama_memory_clear(self.c.llama_get_memory(self.context), False)
        entries = [
            (token, position, sequence, position == len(prompt) - 1)
            for sequence, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        ]
        self.last = [-1 for _ in prompts]
        for begin in range(0, len(entries), LLAMA_BATCH):
            part = entries[begin : begin + LLAMA_BATCH]
            self._decode(part)
            for index, (_, _, sequence, wanted) in enumerate(part):
                if wanted:
                    self.last[sequence] = self._likeliest(index)
        self.positions = [len(prompt) for prompt in prompts]
        return list(self.last)

    def advance(self, steps: int) -> tuple[float, list[list[int]]]:
        new: list[list[int]] = [[] for _ in self.positions]
        begin = time.perf_counter()
        for _ in range(steps):
            self._decode([(self.last[s], position, s, True) for s, position in enumerate(self.positions)])
            for sequence, tokens in enumerate(new):
                self.last[sequence] = self._likeliest(sequence)
                tokens.append(self.last[sequence])
                self.positions[sequence] += 1
        return time.perf_counter() - begin, new

    def _decode(self, entries: list[tuple[int, int, int, bool]]) -> None:
        batch = self.batch
        batch.n_tokens = len(entries)
        for i, (token, position, sequence, wanted) in enumerate(entries):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
            batch.seq_id[i][0], batch.logits[i] = sequence, wanted
        code = self.c.llama_decode(self.context, batch)
        assert code == 0, f"llama_decode gives {code}"

    def _likeliest(self, index: int) -> int:
        logits = np.ctypeslib.as_array(self.c.llama_get_logits_ith(self.context, index), (self.vocab,))
        token = int(logits.argmax())
        assert np.isfinite(logits[token]), "llama.cpp's logits are not finite"
        return token


class Transformers:
    """A loop of forward passes over a dynamic cache, in bfloat16: quicker than its `generate`."""

    def __init__(self, folder: Path) -> None:
        import transformers

        self.version = transformers.__version__
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()

    def prompt(self, tokens: list[int]) -> tuple[float, list[int]]:
        begin = time.perf_counter()
        first = self.start([tokens])
        return time.perf_counter() - begin, first

    @torch.inference_mode()
    def start(self, prompts: list[list[int]]) -> list[int]:
        self.cache, self.last = None, torch.tensor(prompts)
        return self._step()

    @torch.inference_mode()
    def advance(self, steps: int) -> tuple[float, list[list[int]]]:
        begin = time.perf_counter()
        rows = [self._step() for _ in range(steps)]
        return time.perf_counter() - begin, [list(tokens) for tokens in zip(*rows)]

    def _step(self) -> list[int]:
        out = self.model(self.last, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.cache, self.last = out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True)
        return self.last[:, 0].tolist()


class Worker:
    """An engine in a process of another Python."""

    def __init__(self, python: Path, kind: str, path: Path, threads: int, log: Path) -> None:
        script = Path(__file__).with_name("worker.py")
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        environment.pop("PYTHONPATH", None)
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                [python, script, kind, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
                env=environment,
            )  # fmt: skip
        self.log = log
        self.version = self._answer()

    def _answer(self):
        line = self.process.stdout.readline()
        assert line, f"{self.process.args[2]} has ended; see {self.log}"
        return json.loads(line)

    def _call(self, name: str, argument):
        print(json.dumps([name, argument]), file=self.process.stdin, flush=True)
        return self._answer()

    def prompt(self, tokens: list[int]) -> tuple[float, list[int]]:
        return self._call("prompt", tokens)

    def start(self, prompts: list[list[int]]) -> list[int]:
        return self._call("start", prompts)

    def advance(self, steps: int) -> tuple[float, list[list[int]]]:
        return self._call("advance", steps)

    def serve(self, requests: list[tuple[list[int], int]]) -> tuple[float, list[list[int]]]:
        return self._call("serve", requests)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=60)


def has_package(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
