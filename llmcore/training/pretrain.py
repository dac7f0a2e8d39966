"""The pretraining stage: a recipe in, a run folder out.

runs/<name>-<timestamp>/
  recipe.toml      the recipe with every default written out
  tokenizer/       tokenizer.json and its settings
  data/            the tokenised corpus
  checkpoints/     see llmcore.checkpoints
  log.jsonl        one record per logged step and evaluation
  loss.png  report.md  tensorboard/
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from llmcore.checkpoints import CheckpointError, find_latest, list_checkpoints, load_checkpoint
from llmcore.inference import generate
from llmcore.inference.device import find_device
from llmcore.models import ModelConfig, Transformer
from llmcore.tokenizers import Tokenizer
from llmcore.tokenizers._atomic import write_atomic
from llmcore.training.config import Recipe, to_toml
from llmcore.training.corpus import build_corpus, read_source, token_bytes
from llmcore.training.loop import Trainer, TrainResult
from llmcore.training.report import write_report
from llmcore.training.state import compute_dtype, seed_everything


def new_run_dir(name: str, parent: str | Path = "runs") -> Path:
    """A path ``parent/<name>-<local time>`` that doesn't exist yet."""
    base = Path(parent) / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    path, number = base, 1
    while path.exists():
        number += 1
        path = base.with_name(f"{base.name}-{number}")
    return path


def pretrain(
    recipe: Recipe, run_dir: str | Path, *, command: str, resume: bool = False, say: Callable[[str], None] = print
) -> TrainResult:
    """Run ``recipe`` in ``run_dir``; with ``resume`` go on from its last whole checkpoint (from the start without one).

    ``command`` is quoted in the report. Raises ``FileExistsError`` for a folder that holds a run already,
    ``ValueError`` and ``OSError`` for a recipe or corpus that can't be used, ``CheckpointError`` for a checkpoint of
    another model, ``NonFiniteError`` when training diverged.
    """
    run_dir = Path(run_dir)
    if not resume and (run_dir / "recipe.toml").exists():
        raise FileExistsError(f"{run_dir} already holds a run; resume it with --resume or take another folder")
    elif not resume:
        for source in recipe.data.sources:
            read_source(source)  # a path that isn't there is an error before there is a folder
    checkpoints = run_dir / "checkpoints"
    latest = find_latest(checkpoints) if resume else None
    if resume and latest is None and list_checkpoints(checkpoints):
        raise CheckpointError(
            f"{checkpoints} holds no checkpoint that is whole; move the damaged ones away to resume from the first step"
        )
    # what "auto" is on this machine stays the run's, on whatever machine it is resumed
    device = find_device(recipe.train.device, "train.device")
    dtype = {torch.float32: "fp32", torch.bfloat16: "bf16"}[compute_dtype(recipe.train.dtype, device)]
    recipe = replace(recipe, train=replace(recipe.train, dtype=dtype))
    new = not run_dir.exists()
    run_dir.mkdir(parents=True, exist_ok=True)
    if latest is None:
        write_atomic(run_dir / "recipe.toml", to_toml(recipe))
    seed_everything(recipe.train.seed)
    try:
        corpus = build_corpus(recipe.data, recipe.tokenizer, run_dir, seed=recipe.train.seed, say=say)
        config = recipe.model_config(corpus.tokenizer.vocab_size)
        prompts = encode_prompts(recipe.sample.prompts, corpus.tokenizer, config)
    except ValueError:  # a corpus of no use: there is nothing to resume
        if new:
            shutil.rmtree(run_dir)
        raise
    model = Transformer(config).to(device)  # drawn on the CPU: the same weights on every device
    tokens = sum(s.num_tokens for s in corpus.train_sets.values())
    say(f"model of {model.num_parameters():,} parameters; corpus of {tokens:,} training tokens; run folder {run_dir}")
    if resume:
        say(f"resuming from {latest}" if latest else "no whole checkpoint there yet: starting from the first step")
    trainer = Trainer(
        model,
        corpus.loader,
        run_dir,
        train=recipe.train,
        optim=recipe.optim,
        schedule=recipe.schedule,
        eval_batches=corpus.eval_batches,
        token_bytes=token_bytes(corpus.tokenizer),
        model_config=model.config.to_dict(),
        title=f"{recipe.name}: {model.num_parameters() / 1e6:.1f} M parameters",
    )
    checkpoint = load_checkpoint(latest) if latest else None
    if checkpoint is not None:
        trainer.restore(checkpoint)  # a recipe that does not fit the run must not take the place of its own
        write_atomic(run_dir / "recipe.toml", to_toml(recipe))
    result = trainer.run(resume=checkpoint)
    if result.signal is None:
        samples = sample(model, corpus.tokenizer, recipe, prompts)
        write_report(run_dir, recipe, model, corpus, result, samples, command)
    return result


def encode_prompts(prompts: list[str], tokenizer: Tokenizer, config: ModelConfig) -> list[list[int]]:
    """The tokens of each prompt; of an empty one what a document begins after, the end of the one before it.

    A prompt that leaves the model no position to go on raises ``ValueError``: before training, not after it.
    """
    ids = [tokenizer.encode(prompt) or [tokenizer.eos_id] for prompt in prompts]
    for index, tokens in enumerate(ids):
        if config.position_limit is not None and len(tokens) >= config.max_positions:
            raise ValueError(
                f"sample.prompts[{index}] has {len(tokens)} tokens; accepted is fewer than model.max_positions = "
                f"{config.max_positions}"
            )
    return ids


def sample(model: Transformer, tokenizer: Tokenizer, recipe: Recipe, ids: list[list[int]]) -> list[tuple[str, str]]:
    """A continuation of each of the recipe's prompts, as (prompt, continuation); seeded, so repeatable."""
    settings, prompts = recipe.sample, recipe.sample.prompts
    room = model.config.max_positions - max(map(len, ids), default=0)
    if model.config.position_limit is not None:
        settings = replace(settings, max_tokens=min(settings.max_tokens, room))
    continued = generate(
        model,
        ids,
        max_tokens=settings.max_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        seed=recipe.train.seed,
        stop_ids=[i for i in [tokenizer.eos_id] if i is not None],
    )
    return [(p, tokenizer.decode(new, skip_special_tokens=True)) for p, new in zip(prompts, continued)]
