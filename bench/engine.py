"""The engine beside other engines, and what it costs: SmolLM2-135M-Instruct.

    python bench/engine.py --cache FOLDER [--only TEXT ...] [--rounds 3] [--limit S] [--threads 2] [--json FILE]
        [--vllm-python PYTHON] [--openvino-python PYTHON]
    python bench/engine.py --table FILE      # prints what a file of results holds

Options as those of bench/real_model.py. Rows of throughput: 64 requests whose prompts and answers have mixed lengths,
16 at a time, every side the same ones, other prompts in every round; tokens are those that the requests asked for. The
sides take turns, both ways round; a ratio is the median over the rounds of the peer's time by ours. Each side's answers
are checked: as many tokens as asked for, and those of some requests are what our model gives one request at a time, up
to near-ties of the logits at the first difference. An engine's share of a step is all that is neither in the model's
layers and logits nor in the drawing op; the Python inside those calls counts as theirs. Run it alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parent.parent))  # behind the installed llmcore

import llmcore
from bench.real.common import (
    TEXT,
    TIE,
    WORKERS,
    limits_text,
    model_file,
    options_parser,
    reached_text,
    run,
    summary,
    worker_for,
    worker_reads,
)
from bench.real.engines import LLMCore, has_package
from bench.real.serving import AT_ONCE, LlamaCppServer, LLMCoreServer, Request, TransformersServer, greedy, make_engine
from llmcore import ops
from llmcore.inference import Engine
from llmcore.inference.decoder import Decoder

NUM_REQUESTS, LENGTHS = 64, (16, 192)  # of prompts and of answers, uniform
SHARED, SHARING, OWN = 1024, 32, (16, 48)  # tokens of the shared prompt, requests, tokens of their own
SAMPLE = 4  # answers that are checked
START = time.perf_counter()
SETTLE = 0.05  # seconds between sides, in which the other's threads stop spinning


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the table. kind: "serve", "prefix" or "overhead"; peers: whom it is compared with; must, aim: peer ->
    how many times its speed ours must be, or should ("best": the quickest of those that ran), and of an overhead the
    largest share of a step."""

    name: str
    kind: str
    format: str
    peers: tuple[str, ...] = ()
    sequences: int = AT_ONCE
    must: dict[str, float] = dataclasses.field(default_factory=dict)
    aim: dict[str, float] = dataclasses.field(default_factory=dict)


def rows() -> Iterator[Row]:
    name = f"{NUM_REQUESTS} requests, {AT_ONCE} at a time"
    yield Row(f"{name}, BF16, static batches", "serve", "BF16", ("transformers",), must={"transformers": 3},
              aim={"transformers": 6})  # fmt: skip
    yield Row(f"{name}, Q8_0", "serve", "Q8_0", ("llama.cpp",), must={"llama.cpp": 2}, aim={"llama.cpp": 4})
    yield Row(
        f"{name}, BF16, other engines", "serve", "BF16", tuple(WORKERS.values()), must={"best": 1.1}, aim={"best": 1.6}
    )
    yield Row(f"first token, {SHARING} requests share {SHARED} tokens, BF16", "prefix", "BF16",
              must={"no prefix cache": 5}, aim={"no prefix cache": 10})  # fmt: skip
    limits = {"must": {"share": 0.1}, "aim": {"share": 0.04}}
    yield Row("engine's share of a step, 16 sequences, BF16", "overhead", "BF16", **limits)
    yield Row("engine's share of a step, 16 sequences, Q8_0", "overhead", "Q8_0")
    yield Row("engine's share of a step, 1 sequence, BF16", "overhead", "BF16", sequences=1)
    yield Row("engine's share of a step, 1 sequence, Q4_1", "overhead", "Q4_1", sequences=1)


# ---- requests


def text_ids(tokenizer) -> list[int]:
    ids = tokenizer.encode(TEXT.read_text(encoding="utf-8"))
    return ids + ids  # a part may run over the end


def mixed(ids: list[int], turn: int, count: int = NUM_REQUESTS) -> list[Request]:
    """Parts of a text. Their lengths are the same in every turn."""
    lengths, places = random.Random(0), random.Random(1 + turn)
    starts = places.sample(range(len(ids) // 2), count)  # no two alike: nothing to be found in a cache of prefixes
    sizes = [(lengths.randint(*LENGTHS), lengths.randint(*LENGTHS)) for _ in range(count)]
    return [(ids[start : start + prompt], answer) for start, (prompt, answer) in zip(starts, sizes)]


def sharing(ids: list[int], turn: int) -> list[Request]:
    """Prompts that begin alike: another beginning in every turn."""
    draw = random.Random(turn)
    start = draw.randrange(len(ids) // 2)
    shared = (ids + ids)[start : start + SHARED]
    own = [draw.randint(*OWN) for _ in range(SHARING)]
    starts = draw.sample(range(len(ids) // 2), SHARING)
    return [(shared + ids[at : at + size], 8) for at, size in zip(starts, own)]


# ---- throughput


def measure_serve(row: Row, options: argparse.Namespace) -> dict:
    path = model_file(options.cache, row.format)
    ours = LLMCore(path)
    ids = text_ids(ours.lm.tokenizer)
    requests = mixed(ids, 0)
    engines = {"llmcore": LLMCoreServer(ours.lm, requests)}
    for name in row.peers:
        if (peer := peer_for(name, row, requests, options)) is not None:
            engines[name] = peer
    for engine in engines.values():  # warms up
        engine.serve([(tokens, 8) for tokens, _ in mixed(ids, -1, AT_ONCE)])
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    agreed: dict[str, str] = {}
    names, longest = list(engines), 0.0
    for turn in range(options.rounds):
        begin = time.perf_counter()
        if turn > 0 and begin - START + longest > options.limit:
            break
        requests = mixed(ids, turn)
        for name in names if turn % 2 == 0 else reversed(names):
            time.sleep(SETTLE)
            elapsed, outputs = engines[name].serve(requests)
            seconds[name].append(elapsed)
            if turn == 0:
                agreed[name] = check(row, ours, requests, outputs)
            else:
                check_counts(row, requests, outputs)
        longest = max(longest, time.perf_counter() - begin)
    result = summary(row, seconds, row.peers) | {"agreed_tokens": agreed}
    tokens = sum(count for _, count in requests)
    result["tokens_per_second"] = {name: tokens / value for name, value in result["seconds"].items()}
    result["requests"] = {"prompt_tokens": sum(len(prompt) for prompt, _ in requests), "new_tokens": tokens}
    result["versions"] = {name: engine.version for name, engine in engines.items()} | {"torch": torch.__version__}
    if hasattr(engines.get("llama.cpp"), "settings"):
        result["llama.cpp settings"] = engines["llama.cpp"].settings
    for engine in engines.values():
        if hasattr(engine, "close"):
            engine.close()
    return result


def peer_for(name: str, row: Row, requests: list[Request], options: argparse.Namespace):
    """None for one that is not there."""
    if name == "transformers" and has_package("transformers"):
        return TransformersServer(model_file(options.cache, "safetensors"))
    if name == "llama.cpp" and has_package("llama_cpp_python"):
        return best_llama(model_file(options.cache, row.format), requests, options.threads)
    kind = next((kind for kind, of in WORKERS.items() if of == name), None)
    return worker_for(kind, row.format, options) if kind and worker_reads(kind, row.format, options) else None


def best_llama(path: Path, requests: list[Request], threads: int) -> LlamaCppServer:
    """llama.cpp with the settings that are quickest for the first of the requests."""
    settings = [{"flash": flash, "unified": unified} for flash in (True, False) for unified in (False, True)]
    engines = [LlamaCppServer(path, threads, requests=requests, **one) for one in settings]
    trial = [(tokens, min(count, 48)) for tokens, count in requests[: AT_ONCE + 4]]
    engines[0].serve(trial[:4])
    times = [engine.serve(trial)[0] for engine in engines]
    chosen = times.index(min(times))
    for i, engine in enumerate(engines):
        if i != chosen:
            engine.close()
    engines[chosen].settings = settings[chosen]
    return engines[chosen]


def check_counts(row: Row, requests: list[Request], outputs: list[list[int]]) -> None:
    for (_, count), tokens in zip(requests, outputs, strict=True):
        assert len(tokens) == count, f"{row.name}: {len(tokens)} tokens, {count} were asked for"


def check(row: Row, ours: LLMCore, requests: list[Request], outputs: list[list[int]]) -> str:
    """How many tokens of some answers are those of one request at a time, up to the first difference. Raises
    AssertionError where that is no near-tie by our own logits, or an answer is not as long as asked for."""
    check_counts(row, requests, outputs)
    same, total, widest = 0, 0, 0.0
    for at in range(0, len(requests), len(requests) // SAMPLE):
        (prompt, count), tokens = requests[at], outputs[at]
        alone = make_engine(ours.lm, [requests[at]], max_sequences=1).generate([prompt], greedy(count))
        alone = alone[0].choices[0].tokens
        first = next((i for i, (a, b) in enumerate(zip(alone, tokens)) if a != b), count)
        same, total = same + first, total + count
        if first < count:
            margin = ours.margin(prompt + alone[:first], alone[first], tokens[first])
            place = f"{row.name}: token {first} of request {at}"
            assert margin < TIE, f"{place} is {tokens[first]}, alone {alone[first]}, {margin:.2f} above it"
            widest = max(widest, margin)
    return f"{same} of {total}, gaps up to {widest:.3f}"


# ---- time to the first token


def measure_prefix(row: Row, options: argparse.Namespace) -> dict:
    """All requests come at once, to a cache that has nothing of them. Beside it: once more, with all that the requests
    share in the cache; and one request after another, each when the one before has its first token."""
    ours = LLMCore(model_file(options.cache, row.format))
    ids = text_ids(ours.lm.tokenizer)
    sides = {"llmcore": True, "no prefix cache": False}
    engines = {
        name: make_engine(ours.lm, sharing(ids, 0), max_sequences=SHARING, prefix_caching=caching)
        for name, caching in sides.items()
    }
    for engine in engines.values():
        engine.generate([tokens for tokens, _ in mixed(ids, -1, AT_ONCE)], greedy(8))
    ways: dict[str, Callable] = {"at once": at_once, "again": again, "one by one": one_by_one}
    seconds: dict[str, dict[str, list[float]]] = {way: {name: [] for name in sides} for way in ways}
    for turn in range(options.rounds):
        for place, (way, way_of) in enumerate(ways.items()):
            requests = sharing(ids, len(ways) * turn + place)
            answers = {}
            for name in list(sides) if turn % 2 == 0 else list(sides)[::-1]:
                times, answers[name] = way_of(engines[name], requests)
                seconds[way][name].append(statistics.mean(times))
            if turn == 0:
                for outputs in answers.values():
                    check(row, ours, requests, outputs)
    result = summary(row, seconds["at once"])
    for way in ("again", "one by one"):
        other = summary(row, seconds[way])
        result[way] = {"seconds": other["seconds"], "ratio": other["ratio"]}
    return result


def at_once(engine: Engine, requests: list[Request]) -> tuple[list[float], list[list[int]]]:
    """(seconds to the first token of each, all tokens of each)"""
    begin = time.perf_counter()
    names = [engine.add(tokens, greedy(count)) for tokens, count in requests]
    first: dict[str, float] = {}
    outputs: dict[str, list[int]] = {name: [] for name in names}
    while engine.has_work:
        for delta in engine.step():
            first.setdefault(delta.request_id, time.perf_counter() - begin)
            outputs[delta.request_id] += delta.tokens
    return [first[name] for name in names], [outputs[name] for name in names]


def again(engine: Engine, requests: list[Request]) -> tuple[list[float], list[list[int]]]:
    engine.generate([requests[0][0][:SHARED]], greedy(1))
    return at_once(engine, requests)


def one_by_one(engine: Engine, requests: list[Request]) -> tuple[list[float], list[list[int]]]:
    results = [at_once(engine, [request]) for request in requests]
    return [times[0] for times, _ in results], [outputs[0] for _, outputs in results]


# ---- overhead


class KernelTime:
    """Sums the time of the calls of a model's layers, of its logits and of the drawing, while it is entered."""

    TARGETS = ((Decoder, "hidden"), (llmcore.models.Transformer, "forward"), (llmcore.models.Transformer, "logits"),
               (ops, "sample"))  # fmt: skip

    def __enter__(self) -> KernelTime:
        self.seconds: dict[str, float] = {}
        self._kept = [getattr(owner, name) for owner, name in self.TARGETS]
        for (owner, name), function in zip(self.TARGETS, self._kept):
            setattr(owner, name, self._timed(name, function))
        return self

    def __exit__(self, *_) -> None:
        for (owner, name), function in zip(self.TARGETS, self._kept):
            setattr(owner, name, function)

    def _timed(self, name: str, function: Callable) -> Callable:
        def call(*args, **kwargs):
            begin = time.perf_counter()
            result = function(*args, **kwargs)
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin
            return result

        return call


def measure_overhead(row: Row, options: argparse.Namespace) -> dict:
    """Of steps that go on with every sequence by a token, tokens turned to text. The median over steps."""
    ours = LLMCore(model_file(options.cache, row.format))
    ids, steps = text_ids(ours.lm.tokenizer), 120
    requests = [(ids[at * 97 : at * 97 + 128], steps + 9) for at in range(row.sequences)]
    engine = make_engine(ours.lm, requests, max_sequences=row.sequences)
    shares, whole, parts = [], [], []
    for _ in range(max(1, options.rounds)):
        names = [engine.add(tokens, greedy(count)) for tokens, count in requests]
        while sum(len(delta.tokens) for delta in engine.step()) < len(names):  # until all have begun
            pass
        for _ in range(4):
            engine.step()
        for _ in range(steps):
            with KernelTime() as kernels:
                begin = time.perf_counter()
                deltas = engine.step()
                elapsed = time.perf_counter() - begin
            assert sum(len(delta.tokens) for delta in deltas) == row.sequences
            shares.append(1 - sum(kernels.seconds.values()) / elapsed)
            whole.append(elapsed)
            parts.append(kernels.seconds)
        while engine.has_work:
            engine.step()
        ids = ids[1:] + ids[:1]
        requests = [(ids[at * 97 : at * 97 + 128], steps + 9) for at in range(row.sequences)]
    share = statistics.median(shares)
    reached = {word: share < getattr(row, word)["share"] if getattr(row, word) else None for word in ("must", "aim")}
    return {
        "share": share,
        "step_seconds": statistics.median(whole),
        "kernels": {name: statistics.median(part[name] for part in parts) for name in parts[0]},
        "must": row.must,
        "aim": row.aim,
        "met": reached,
        "steps": len(shares),
    }


# ---- the table


def table(results: dict[str, dict]) -> str:
    lines = ["| SmolLM2-135M-Instruct | llmcore | peers: speed, ratio | must | aim | reached |", "| --- " * 6 + "|"]
    for row in rows():
        overhead = row.kind == "overhead"
        limits = [
            "".join(f"< {value:.0%}" for value in limit.values()) if overhead else limits_text(limit)
            for limit in (row.must, row.aim)
        ]
        if (result := results.get(row.name)) is None:
            lines.append(f"| {row.name} | | | {limits[0]} | {limits[1]} | not measured |")
            continue
        if overhead:
            own, peers = f"{result['share']:.1%}", f"of {result['step_seconds'] * 1e3:.2f} ms"
        else:
            own = _figure(result, "llmcore")
            peers = "; ".join(
                f"{name} {_figure(result, name)}, {value:.2f}x" for name, value in result["ratio"].items()
            )
        lines.append(f"| {row.name} | {own} | {peers} | {limits[0]} | {limits[1]} | {reached_text(result['met'])} |")
    return "\n".join(lines)


def _figure(result: dict, name: str) -> str:
    """Tokens per second, or milliseconds."""
    speed = result.get("tokens_per_second")
    return f"{speed[name]:.0f} tokens/s" if speed else f"{result['seconds'][name] * 1e3:.0f} ms"


def main() -> None:
    parser = options_parser(__doc__, rounds=3)
    parser.add_argument("--limit", type=float, default=math.inf, help="seconds after which no round of requests begins")
    kinds = {"serve": measure_serve, "prefix": measure_prefix, "overhead": measure_overhead}
    run(parser, list(rows()), lambda row, options: kinds[row.kind](row, options), table)


if __name__ == "__main__":
    main()
