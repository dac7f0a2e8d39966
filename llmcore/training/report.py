"""``report.md``: what a run was and what came of it. Every number is the run's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmcore.training.logs import clock, read_log
from llmcore.training.state import versions


def _fence(text: str) -> str:
    """``text`` as a code block whose fence it can't close."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}text\n{text}\n{fence}"


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def _table(rows: list[tuple[str, str]]) -> list[str]:
    return ["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows)]


def write_report(
    run_dir: Path,
    recipe: Any,
    model: Any,
    corpus: Any,
    result: Any,
    samples: list[tuple[str, str]],
    command: str,
) -> Path:
    """Write ``run_dir/report.md`` from the run's log, data sets, model and result, and the generated ``samples``."""
    log = read_log(run_dir / "log.jsonl")
    trained = [r for r in log if r["kind"] == "train"]
    evaluated = [r for r in log if r["kind"] == "eval"]
    c, moe, weight = model.config, model.config.moe, next(model.parameters())
    heads = f"{c.num_heads} heads over {c.num_kv_heads} key/value heads of {c.head_dim}"
    train_tokens = sum(s.num_tokens for s in corpus.train_sets.values())
    rows = [("command", f"`{_cell(command)}`")]
    for source, name in zip(recipe.data.sources, corpus.train_sets):
        parts = corpus.train_sets[name], corpus.validation_sets[name]
        counts = " + ".join(f"{len(p):,} documents, {p.num_tokens:,} tokens" for p in parts)
        rows.append(("corpus", f"{_cell(source.path)}: {counts} held out"))
        if parts[0].skips.total:
            rows.append(("left out", _cell(parts[0].skips)))
    tokenizer = recipe.tokenizer.path or recipe.tokenizer.kind
    rows += [
        ("tokenizer", f"{_cell(tokenizer)}, {corpus.tokenizer.vocab_size:,} tokens"),
        (
            "model",
            f"{recipe.model.get('preset', 'llama')}, {model.num_parameters():,} parameters"
            + (f" ({model.num_parameters(active=True):,} active)" if moe else "")
            + f": {c.num_layers} layers of {c.dim}, {heads}"
            + (f", {moe.num_experts} experts of which each token takes {moe.top_k}" if moe else ""),
        ),
        ("compute", f"{str(weight.dtype).removeprefix('torch.')} on {weight.device}"),
        ("optimizer", f"{recipe.optim.kind}, peak learning rate {recipe.optim.lr:g}, {recipe.schedule.kind} schedule"),
        ("steps", f"{result.step:,}"),
        ("tokens", f"{result.tokens:,} ({result.tokens / train_tokens:.2f} epochs)"),
        ("training time", f"{clock(result.elapsed)}, evaluation and checkpoints included"),
        ("speed", f"{result.tokens / result.elapsed:,.0f} tokens/s over that time"),
    ]
    if trained:
        rows.append(("training loss", f"{trained[0]['loss']:.4f} -> {trained[-1]['loss']:.4f} nats/token"))
    if evaluated:
        first, last = evaluated[0], evaluated[-1]
        rows.append(("held-out loss", f"{first['loss']:.4f} -> {last['loss']:.4f} nats/token"))
        if "bits_per_byte" in last:
            rows.append(("held-out bits/byte", f"{first['bits_per_byte']:.3f} -> {last['bits_per_byte']:.3f}"))
    rows.append(("versions", ", ".join(f"{name} {value}" for name, value in versions().items())))
    lines = [f"# {recipe.name}", "", *_table(rows), ""]
    if (run_dir / "loss.png").is_file():
        lines += ["![loss](loss.png)", ""]
    if evaluated:
        lines += ["## Held-out loss", "", "| step | nats/token |", "| --- | --- |"]
        lines += [f"| {r['step']} | {r['loss']:.4f} |" for r in evaluated] + [""]
    if samples:
        s = recipe.sample
        lines += [
            "## Samples",
            "",
            f"Temperature {s.temperature:g}, top-p {s.top_p:g}; each begins with its prompt.",
            "",
        ]
        for prompt, text in samples:
            lines += [_fence(prompt + text), ""]
    path = run_dir / "report.md"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path
