"""The command line: ``llmcore quickstart | pretrain | generate | chat | solve | perplexity | serve | tokenizer train |
info``.

What a user got wrong is one line on stderr and exit code 2, a run that diverged is 1, Ctrl-C is 130; anything else is a
bug and shows its trace.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import sys
import warnings
from pathlib import Path

from llmcore.cli_models import add_commands
from llmcore.cli_serve import add_serve

USER_ERROR, DIVERGED = 2, 1


def _yield_while_waiting() -> None:
    """Start this process anew with OpenMP threads that sleep, not spin, while they wait for each other.

    Beside one other busy process on 2 cores, spinning makes a training step 2 to 10 times as slow, for it keeps the
    thread that is waited for off the core; on an idle machine it gains some percent. libgomp reads the setting when
    torch is loaded, and that has happened. What the user has set stands.
    """
    if sys.platform == "linux" and not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        arguments = [sys.executable, *sys.orig_argv[1:]]
        os.execve(sys.executable, arguments, {**os.environ, "OMP_WAIT_POLICY": "passive"})


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _overrides(args: argparse.Namespace) -> list[str]:
    """The recipe keys that the command line sets; --set speaks last."""
    device = [f"train.device={json.dumps(args.device)}"] if args.device else []
    return [*device, *args.set]


def _finish(run_dir: Path, result: object, resume_command: str) -> int:
    """Say how a run ended; its exit code."""
    if result.signal is not None:
        _say(f"stopped by {signal.Signals(result.signal).name} after step {result.step}; saved {result.checkpoint}")
        _say(f"resume with: {resume_command}")
        return 128 + result.signal
    print((run_dir / "report.md").read_text(encoding="utf-8"))
    model = shlex.quote(str(run_dir))
    print(f"run folder: {run_dir}\ngenerate with: llmcore generate --model {model} --prompt '    def __init__(self'")
    return 0


def _run(recipe: object, run_dir: Path, args: argparse.Namespace, *, resume: bool) -> int:
    from llmcore.training.pretrain import pretrain

    resume_command = f"llmcore pretrain --resume {shlex.quote(str(run_dir))}"
    try:
        result = pretrain(recipe, run_dir, command=args.command_line, resume=resume, say=_say)
    except KeyboardInterrupt:
        _say(f"aborted; resume with: {resume_command}")
        raise
    return _finish(run_dir, result, resume_command)


def quickstart(args: argparse.Namespace) -> int:
    from llmcore.training.config import SHIPPED, RecipeError, load_recipe
    from llmcore.training.pretrain import new_run_dir

    overrides = _overrides(args)
    if args.minutes is not None:
        if not 0 < args.minutes < float("inf"):
            raise RecipeError(f"--minutes is {args.minutes}; accepted is a number above 0")
        overrides.insert(0, f"train.max_seconds={args.minutes * 60}")
    if args.resume:
        if args.data is not None:
            raise RecipeError("--data goes with a new run; --resume goes on with the data of the old one")
        run_dir = Path(args.out) if args.out else _newest_run("quickstart")
        return _run(_own_recipe(run_dir, overrides), run_dir, args, resume=True)
    if args.data is not None:
        overrides.append(f"data.sources=[{{path = {json.dumps(args.data, ensure_ascii=False)}}}]")
    run_dir = Path(args.out) if args.out else new_run_dir("quickstart")
    return _run(load_recipe(SHIPPED / "quickstart.toml", overrides), run_dir, args, resume=False)


def _own_recipe(run_dir: Path, overrides: list[str]) -> object:
    from llmcore.training.config import load_recipe

    if not (run_dir / "recipe.toml").is_file():
        raise FileNotFoundError(f"{run_dir} is no run folder: it has no recipe.toml")
    return load_recipe(run_dir / "recipe.toml", overrides)


def _newest_run(name: str) -> Path:
    runs = sorted(Path("runs").glob(f"{name}-*/recipe.toml"), key=lambda p: p.stat().st_mtime)
    if not runs:
        raise FileNotFoundError(f"no run of {name} under ./runs to resume; name one with --out")
    return runs[-1].parent


def pretrain(args: argparse.Namespace) -> int:
    from llmcore.training.config import RecipeError, load_recipe
    from llmcore.training.pretrain import new_run_dir

    if (args.recipe is None) == (args.resume is None):
        raise RecipeError("give either a RECIPE.toml to start a run or --resume RUN to go on with one")
    if args.resume:
        if args.out:
            raise RecipeError("--out goes with a new run; --resume goes on in the folder of the old one")
        run_dir = Path(args.resume)
        return _run(_own_recipe(run_dir, _overrides(args)), run_dir, args, resume=True)
    recipe = load_recipe(args.recipe, _overrides(args))
    return _run(recipe, Path(args.out) if args.out else new_run_dir(recipe.name), args, resume=False)


def tokenizer_train(args: argparse.Namespace) -> int:
    from llmcore.tokenizers import train_tokenizer
    from llmcore.training.config import SourceConfig
    from llmcore.training.corpus import read_source

    def texts():
        for path in args.files:
            source = read_source(SourceConfig(path=path, text_field=args.text_field))
            yield from (document.text for document in source)
            if source.skips.total:
                _say(f"{path}: {source.skips}")

    tokenizer = train_tokenizer(texts(), kind=args.kind, vocab_size=None if args.kind == "byte" else args.vocab_size)
    tokenizer.save(args.out)
    print(f"{args.kind} tokenizer of {tokenizer.vocab_size} tokens saved in {args.out}")
    return 0


def info(args: argparse.Namespace) -> int:
    import llmcore

    build = llmcore.build_info()
    print(f"llmcore {build['version']}, built with {build['compiler']} against torch {build['torch']}")
    print(f"CPU kernels built for: {build['isas']}")
    print(f"this machine runs: {' '.join(build['cpu_isas'])}; in use: {build['active_cpu_isa']}")
    print(f"CUDA kernels: {build['cuda']}")
    print("\nwhich backend serves which dtype")
    for op, backends in llmcore.ops.support().items():
        print(f"  {op}: " + "; ".join(f"{name} {' '.join(dtypes) or '-'}" for name, dtypes in backends.items()))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="llmcore", description="Large language models on kernels that can be read.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, function: object, text: str, to: object = commands) -> argparse.ArgumentParser:
        command = to.add_parser(name, help=text, description=text)
        command.set_defaults(function=function)
        return command

    device = {"metavar": "DEVICE", "help": "auto (the GPU where there is one), cpu, cuda or cuda:N"}
    setting = {"action": "append", "default": [], "metavar": "KEY=VALUE", "help": "override a recipe key (repeatable)"}
    text = "Train a small model on real text and generate from it, offline: about 5 minutes on 2 cores."
    p = add("quickstart", quickstart, text)
    source = "a folder or file of text, JSONL or Parquet (default: Python's standard library)"
    p.add_argument("--data", metavar="PATH", help=source)
    p.add_argument("--out", metavar="RUN", help="the run folder (default: runs/quickstart-<time>)")
    text = "training time; the tokenizer and the data before it take about half a minute more (default: 4)"
    p.add_argument("--minutes", type=float, help=text)
    p.add_argument("--resume", action="store_true", help="go on with the run in --out (default: the newest)")
    p.add_argument("--device", **device)
    p.add_argument("--set", **setting)

    p = add("pretrain", pretrain, "Train a model as a recipe says.")
    p.add_argument("recipe", nargs="?", metavar="RECIPE.toml", help="a file, or the name of a shipped recipe")
    p.add_argument("--set", **setting)
    p.add_argument("--out", metavar="RUN", help="the run folder (default: runs/<name>-<time>)")
    p.add_argument("--resume", metavar="RUN", help="go on with this run, by its own recipe")
    p.add_argument("--device", **device)

    add_commands(add)
    add_serve(add, _say)

    p = commands.add_parser("tokenizer", help="Train a tokenizer.", description="Train a tokenizer.")
    p = add("train", tokenizer_train, "Train a tokenizer on text.", p.add_subparsers(required=True, metavar="COMMAND"))
    p.add_argument("files", nargs="+", metavar="PATH", help="files or folders of text, JSONL or Parquet; or stdlib")
    p.add_argument("--text-field", default="text", help="where JSONL and Parquet keep the text (default: text)")
    p.add_argument("--kind", choices=("bpe", "unigram", "word", "byte"), default="bpe", help="default: bpe")
    text = "tokens in all; not used for byte (default: 4096)"
    p.add_argument("--vocab-size", type=int, default=4096, metavar="N", help=text)
    p.add_argument("--out", required=True, metavar="DIR", help="the folder of the tokenizer")

    add("info", info, "What this build holds and which kernel serves what.")
    return parser


def main(argv: list[str] | None = None) -> int:
    own_process = argv is None
    argv = sys.argv[1:] if argv is None else argv
    args = _parser().parse_args(argv)
    if own_process and args.function in (quickstart, pretrain):
        _yield_while_waiting()
    args.command_line = shlex.join(["llmcore", *argv])
    warnings.showwarning = lambda message, *_, **__: _say(f"warning: {message}")
    from llmcore.checkpoints import CheckpointError
    from llmcore.training import NonFiniteError

    try:
        code = args.function(args)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:  # whoever read our output has gone, as in `llmcore info | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (CheckpointError, NonFiniteError, ValueError, OSError, ImportError) as error:
        _say(f"llmcore: error: {' '.join(str(error).split())}")
        return DIVERGED if isinstance(error, NonFiniteError) else USER_ERROR


if __name__ == "__main__":
    sys.exit(main())
