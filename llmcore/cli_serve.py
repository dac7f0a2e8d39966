"""``llmcore serve``: a model behind OpenAI's API."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from llmcore.cli_models import MODEL, add_loading

KEYS = "LLMCORE_API_KEYS"


def serve(args: argparse.Namespace) -> int:
    try:
        from llmcore.serve.app import create_app
        from llmcore.serve.run import serve as run
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("llmcore"):
            raise
        raise ImportError(f"{error.name} is missing; `pip install 'llmcore[serve]'`") from None
    from llmcore.inference import Engine, load
    from llmcore.inference.device import find_device
    from llmcore.serve.limits import Limits

    keys = frozenset([*args.api_key, *os.environ.get(KEYS, "").split()])
    names = ("max_requests", "max_body", "max_tokens", "max_choices", "timeout", "drain_timeout")
    limits = Limits(keys, **{name: value for name in names if (value := getattr(args, name)) is not None})
    name = args.name or args.model
    device = find_device(args.device, "--device")
    if (embedder := _embedder(args, device)) is not None:
        return run(create_app(None, embedder=embedder, name=name, limits=limits), args.host, args.port, args.say)
    speculator = _speculator(args, device)
    model = load(args.model, dtype=args.dtype, device=device, quantize=args.quantize)
    names = ("cache_tokens", "max_batch_tokens", "max_sequences")
    options = {name: value for name in names if (value := getattr(args, name)) is not None}
    options |= {"adapters": _adapters(args.adapter)} if args.adapter else {}
    engine = Engine.from_language_model(model, speculator=speculator, **options)
    app = create_app(
        model, engine=engine, name=name, limits=limits, tool_parser=args.tool_parser,
        reasoning={"auto": None, "on": True, "off": False}[args.reasoning], pooling=args.pooling, page=not args.no_page,
    )  # fmt: skip
    return run(app, args.host, args.port, args.say)


def _adapters(settings: list[str]) -> dict[str, str]:
    """Names of adapters and their folders."""
    adapters: dict[str, str] = {}
    for setting in settings:
        name, _, folder = setting.partition("=")
        if not name or not folder or name in adapters:
            raise ValueError(f"--adapter is {setting!r}; accepted: NAME=FOLDER, each name once")
        adapters[name] = folder
    return adapters


def _speculator(args: argparse.Namespace, device: Any) -> Any:
    """What --speculate asks for, or None."""
    from llmcore.inference import load
    from llmcore.inference.mtp import MTPSpeculator
    from llmcore.inference.speculation import DraftSpeculator, NGramSpeculator

    if args.speculate is None:
        if args.draft_tokens is not None:
            raise ValueError(f"--draft-tokens is {args.draft_tokens}; accepted: with --speculate")
        return None
    count = {} if args.draft_tokens is None else {"num_tokens": args.draft_tokens}
    if args.speculate in (known := {"ngram": NGramSpeculator, "mtp": MTPSpeculator}):
        return known[args.speculate](**count)
    return DraftSpeculator(load(args.speculate, device=device).model, **count)


def _embedder(args: argparse.Namespace, device: Any) -> Any:
    """The embedder of a folder with an encoder (BERT); None for any other model."""
    from llmcore.inference import load_embedder
    from llmcore.inference.load import is_hf_folder
    from llmcore.models import read_config
    from llmcore.models.pretrained import DTYPES

    folder = Path(args.model)
    if not (folder.is_dir() and is_hf_folder(folder)):
        return None
    _, config = read_config(folder)
    if config.causal or config.encoder_layers:
        return None
    for name in ("quantize", "speculate"):
        if (value := getattr(args, name)) is not None:
            raise ValueError(f"--{name} is {value!r}; accepted for an encoder: nothing")
    return load_embedder(folder, dtype=DTYPES.get(args.dtype), device=device)


def add_serve(add: Any, say: Any) -> None:
    """Adds the command to the parser by `add(name, function, text)`."""
    p = add("serve", serve, "Serve a model: OpenAI's API under /v1, metrics, and a page to chat on.")
    p.set_defaults(say=say)
    p.add_argument("model", metavar="MODEL", help=MODEL)
    add_loading(p)
    p.add_argument("--name", help="what clients call the model (default: MODEL)")
    text = "a LoRA adapter, which clients ask for as the model NAME (repeatable)"
    p.add_argument("--adapter", action="append", default=[], metavar="NAME=FOLDER", help=text)
    text = "0.0.0.0 for every network, then better with a key (default: 127.0.0.1, this machine alone)"
    p.add_argument("--host", default="127.0.0.1", help=text)
    p.add_argument("--port", type=int, default=8000, help="0: any free one (default: 8000)")
    text = f"a key that clients must send (repeatable; also those in ${KEYS}, which other users don't see)"
    p.add_argument("--api-key", action="append", default=[], metavar="KEY", help=text)
    p.add_argument("--max-requests", type=int, metavar="N", help="served at a time; more get 503 (default: 256)")
    p.add_argument("--max-body", type=int, metavar="BYTES", help="of a request (default: 4 MiB)")
    p.add_argument("--max-tokens", type=int, metavar="N", help="new tokens of a choice (default: the context)")
    p.add_argument("--max-choices", type=int, metavar="N", help="of a request, prompts times n (default: 64)")
    p.add_argument("--timeout", type=float, metavar="S", help="seconds for a request (default: 600)")
    p.add_argument("--drain-timeout", type=float, metavar="S", help="seconds to end in after SIGTERM (default: 30)")
    text = "keys and values of so many tokens are kept (default: 16 contexts, at most 65536 tokens)"
    p.add_argument("--cache-tokens", type=int, metavar="N", help=text)
    p.add_argument("--max-sequences", type=int, metavar="N", help="written at a time (default: 64)")
    p.add_argument("--max-batch-tokens", type=int, metavar="N", help="run in one step (default: 2048)")
    text = "guess tokens ahead: ngram, mtp (the model's own module), or a smaller MODEL of the same vocabulary"
    p.add_argument("--speculate", metavar="HOW", help=text)
    p.add_argument("--draft-tokens", type=int, metavar="N", help="guesses of a step (default: 4; 1 of mtp)")
    p.add_argument("--tool-parser", choices=("hermes", "llama3", "mistral", "deepseek"),
                   help="how the model writes tool calls (default: as its chat template shows)")  # fmt: skip
    text = "tell <think> apart as reasoning_content (default: auto, for models that know it)"
    p.add_argument("--reasoning", choices=("auto", "on", "off"), default="auto", help=text)
    p.add_argument("--pooling", choices=("mean", "last"), default="mean", help="of embeddings (default: mean)")
    p.add_argument("--no-page", action="store_true", help="no page at /")
