"""A server whose model says what it is told: the text between « and » in the prompt. The engine, its cache and the
model run as ever; only what is drawn is replaced. Text without marks goes on with what the model draws.

Run as a program: `python echo_server.py [--special TOKEN ...] [--OPTION VALUE ...]` with the fields of Limits and
`tool_parser`, `delay` (seconds that a step takes more) and `broken` (the steps after which every step raises).
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent.parent))

from llmcore.inference.engine import Engine
from llmcore.serve.app import create_app
from llmcore.serve.limits import Limits
from llmcore.serve.run import serve
from tests.serve.tiny import SPECIAL, tiny_model


def echoing(engine: Engine, delay: float, broken: int | None) -> Engine:
    tokenizer, run, scripts, steps = engine.tokenizer, engine.runner.run, {}, 0
    end = tokenizer.special_tokens["<|im_end|>"]

    def script(sequence):
        if sequence.request.id not in scripts:
            scripts.clear() if len(scripts) > 1000 else None
            text = tokenizer.decode(sequence.tokens[: sequence.request.prompt_len])
            said = text.rpartition("«")[2].rpartition("»")[0] if "«" in text else None
            scripts[sequence.request.id] = None if said is None else [*tokenizer.encode(said, allow_special=True), end]
        return scripts[sequence.request.id]

    def replaced(work):
        nonlocal steps
        steps += 1
        if broken is not None and steps > broken:
            raise RuntimeError("a planted fault")
        time.sleep(delay)
        drawn = run(work)
        for sequence, what in drawn.items():
            said = script(sequence)
            if said is not None and what.tokens:
                drawn[sequence] = what._replace(tokens=said[sequence.num_output :][:1])
        return drawn

    engine.runner.run = replaced
    return engine


def main(arguments: list[str]) -> int:
    options = {"special": [], "delay": 0.0, "broken": None, "tool_parser": None}
    limits = {}
    for name, value in zip(arguments[::2], arguments[1::2]):
        name = name.removeprefix("--")
        if name == "special":
            options["special"].append(value)
        elif name == "api_keys":
            limits[name] = frozenset([value])
        elif name in options:
            options[name] = value if name == "tool_parser" else json.loads(value)
        else:
            limits[name] = json.loads(value)
    lm = tiny_model((*SPECIAL, *options["special"]))
    engine = Engine.from_language_model(lm, cache_tokens=8192)
    app = create_app(
        lm, engine=echoing(engine, options["delay"], options["broken"]), name="echo", limits=Limits(**limits),
        tool_parser=options["tool_parser"],
    )  # fmt: skip
    return serve(app, "127.0.0.1", 0, lambda text: print(text, file=sys.stderr, flush=True))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
