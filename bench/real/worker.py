"""A peer that lives in an environment of its own: a process that takes calls as lines of JSON and answers likewise.

    PYTHON bench/real/worker.py vllm FOLDER | openvino FILE

Imports nothing of llmcore. Waits at a read between calls, so it takes no time from others then.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import deque
from collections.abc import Callable

MAX_TOKENS = 4608  # of a sequence
AT_ONCE = 16  # requests that `serve` runs at a time


class Engine:
    """What both have in common: requests are added, and a step runs all of them."""

    def __init__(self) -> None:
        self.tokens: dict[int, list[int]] = {}
        self.next_id = 0

    def add(self, request: int, tokens: list[int], count: int | None = None) -> None:
        """`count`: new tokens, then it ends; None: as many as there is room for."""
        raise NotImplementedError

    def step(self) -> None:
        """Runs all requests, and appends what they got to `tokens`."""
        raise NotImplementedError

    def drop(self, request: int) -> None:
        raise NotImplementedError

    def start(self, prompts: list[list[int]]) -> list[int]:
        for request in self.tokens:
            self.drop(request)
        self.tokens = {self.next_id + i: [] for i in range(len(prompts))}
        self.next_id += len(prompts)
        for request, prompt in zip(self.tokens, prompts):
            self.add(request, prompt)
        while not all(self.tokens.values()):
            self.step()
        return [tokens[0] for tokens in self.tokens.values()]

    def prompt(self, tokens: list[int]) -> tuple[float, list[int]]:
        begin = time.perf_counter()
        first = self.start([tokens])
        return time.perf_counter() - begin, first

    def advance(self, steps: int) -> tuple[float, list[list[int]]]:
        before = [len(tokens) for tokens in self.tokens.values()]
        begin = time.perf_counter()
        while any(len(tokens) < count + steps for tokens, count in zip(self.tokens.values(), before)):
            self.step()
        seconds = time.perf_counter() - begin
        return seconds, [tokens[count:] for tokens, count in zip(self.tokens.values(), before)]

    def serve(self, requests: list[tuple[list[int], int]]) -> tuple[float, list[list[int]]]:
        """See bench/real/serving.py."""
        for request in self.tokens:
            self.drop(request)
        self.tokens, first = {}, self.next_id
        self.next_id += len(requests)
        waiting, running, done = deque(enumerate(requests, first)), {}, {}
        begin = time.perf_counter()
        while waiting or running:
            while waiting and len(running) < AT_ONCE:
                request, (tokens, count) = waiting.popleft()
                self.tokens[request], running[request] = [], count
                self.add(request, tokens, count)
            self.step()
            for request in [r for r, count in running.items() if len(self.tokens[r]) >= count]:
                done[request] = self.tokens.pop(request)
                del running[request]
        return time.perf_counter() - begin, [done[request] for request in range(first, self.next_id)]


class VLLM(Engine):
    def __init__(self, path: str) -> None:
        super().__init__()
        os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
        import vllm
        from vllm.sampling_params import RequestOutputKind

        self.vllm, self.final_only = vllm, RequestOutputKind.FINAL_ONLY
        llm = vllm.LLM(
            path, dtype="bfloat16", max_model_len=MAX_TOKENS, max_num_seqs=16, max_num_batched_tokens=MAX_TOKENS,
            enable_prefix_caching=False, disable_log_stats=True,
        )  # fmt: skip
        self.engine, self.version = llm.llm_engine, vllm.__version__

    def add(self, request: int, tokens: list[int], count: int | None = None) -> None:
        most = MAX_TOKENS - len(tokens) if count is None else count
        settings = self.vllm.SamplingParams(temperature=0, max_tokens=most, ignore_eos=True, detokenize=False)
        if count is not None:
            settings.output_kind = self.final_only
        self.engine.add_request(str(request), {"prompt_token_ids": tokens}, settings)

    def step(self) -> None:
        for output in self.engine.step():
            if int(output.request_id.split("-")[0]) in self.tokens:
                self.tokens[int(output.request_id.split("-")[0])] = list(output.outputs[0].token_ids)

    def drop(self, request: int) -> None:
        self.engine.abort_request([str(request)])


class OpenVINO(Engine):
    def __init__(self, path: str) -> None:
        super().__init__()
        import numpy
        import openvino
        import openvino_genai

        self.numpy, self.openvino, self.genai = numpy, openvino, openvino_genai
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size, scheduler.max_num_batched_tokens = 1, MAX_TOKENS
        properties = {"INFERENCE_NUM_THREADS": int(os.environ["OMP_NUM_THREADS"])}
        self.pipeline = openvino_genai.ContinuousBatchingPipeline(path, scheduler, "CPU", properties)
        self.version = openvino_genai.__version__
        self.handles: dict[int, object] = {}

    def add(self, request: int, tokens: list[int], count: int | None = None) -> None:
        settings = self.genai.GenerationConfig()
        settings.max_new_tokens = MAX_TOKENS - len(tokens) if count is None else count
        settings.ignore_eos, settings.do_sample = True, False
        ids = self.openvino.Tensor(self.numpy.array([tokens], dtype=self.numpy.int64))
        self.handles[request] = self.pipeline.add_request(request, ids, settings)

    def step(self) -> None:
        self.pipeline.step()
        self.handles = {request: handle for request, handle in self.handles.items() if request in self.tokens}
        for request, handle in self.handles.items():
            while handle.can_read():
                for output in handle.read().values():
                    self.tokens[request] += output.generated_ids

    def drop(self, request: int) -> None:
        self.handles.pop(request).cancel()


def main() -> None:
    kind, path = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")  # the libraries print to the standard output
    os.dup2(2, 1)
    engine = {"vllm": VLLM, "openvino": OpenVINO}[kind](path)
    print(json.dumps(engine.version), file=answers, flush=True)
    calls: dict[str, Callable] = {name: getattr(engine, name) for name in ("prompt", "start", "advance", "serve")}
    for line in sys.stdin:
        name, argument = json.loads(line)
        print(json.dumps(calls[name](argument)), file=answers, flush=True)
    answers.flush()
    os._exit(0)  # neither library's threads always end


if __name__ == "__main__":
    main()
