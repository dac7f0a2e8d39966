from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import llmcore
from llmcore import cli
from llmcore.checkpoints import find_latest, load_checkpoint
from llmcore.tokenizers import Tokenizer
from llmcore.training.logs import read_log

IMPORTED_FROM = Path(llmcore.__file__).parent.parent  # where a subprocess finds the llmcore under test

NAMES = ["alpha", "beta", "gamma", "delta", "total", "index", "value", "node", "left", "right"]


def program(seed: int) -> str:
    """A small Python function, different for each seed."""
    rng = random.Random(seed)
    a, b, c = rng.sample(NAMES, 3)
    head = f"def get_{a}({b}, {c}):\n    {a} = {b} + {c}\n"
    return head + f"    if {a} > {rng.randrange(100)}:\n        return {b}\n    return {a}\n"


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("programs")
    for seed in range(120):
        (folder / f"{seed:03d}.py").write_text("".join(program(seed * 10 + i) for i in range(4)))
    return folder


SETTINGS = """
    model.size=tiny tokenizer.vocab_size=320 data.row_len=64 data.eval_batches=2 sample.max_tokens=12
    train.max_seconds=0 train.steps=30 train.eval_every=10 train.save_every=10 train.tensorboard=false
"""
SMALL = [part for setting in SETTINGS.split() for part in ("--set", setting)]


@pytest.fixture(scope="session")
def run(folder, tmp_path_factory):
    """A finished quickstart: (run folder, what it printed)."""
    out = tmp_path_factory.mktemp("runs") / "quick"
    command = ["quickstart", "--data", str(folder), "--out", str(out), *SMALL]
    printed = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", lambda *a, file=None, **_: printed.append(" ".join(map(str, a))))
        assert cli.main(command) == 0
    return out, "\n".join(printed)


def error_of(capsys, *argv: str) -> str:
    """The one line that a user's mistake gives."""
    try:
        code = cli.main(list(argv))
    except SystemExit as stop:  # argparse
        code = stop.code
    captured = capsys.readouterr()
    assert code == 2
    assert "Traceback" not in captured.err
    assert captured.out == ""
    return captured.err.strip().splitlines()[-1]


def test_quickstart_fills_the_run_folder(run, folder):
    out, printed = run
    for name in ("recipe.toml", "log.jsonl", "loss.png", "report.md", "tokenizer/tokenizer.json", "checkpoints/latest"):
        assert (out / name).is_file(), name
    evals = [r for r in read_log(out / "log.jsonl") if r["kind"] == "eval"]
    assert [r["step"] for r in evals] == [0, 10, 20, 30]
    assert evals[-1]["loss"] < evals[0]["loss"] - 1
    report = (out / "report.md").read_text()
    assert f"| held-out loss | {evals[0]['loss']:.4f} -> {evals[-1]['loss']:.4f} nats/token |" in report
    assert "| steps | 30 |" in report
    assert f"| tokens | {30 * 8 * 64:,} " in report
    stop = read_log(out / "log.jsonl")[-1]
    assert f"| speed | {30 * 8 * 64 / stop['elapsed']:,.0f} tokens/s" in report
    checkpoint = load_checkpoint(find_latest(out / "checkpoints"))
    count = sum(t.numel() for n, t in checkpoint.model.items() if "bias" not in n and "rope" not in n)
    assert f"{count:,} parameters" in report
    assert str(folder) in report
    assert "llmcore quickstart --data" in report
    assert torch.__version__ in report
    assert "```text\n    def __init__(self" in report
    assert "```text\nimport" in report
    assert report in printed
    assert str(out) in printed


def test_generate_from_run_and_from_checkpoint(run, capsys):
    out, _ = run
    base = ["--prompt", "def get_", "--max-tokens", "20", "--seed", "3"]
    texts = []
    for model in (out, find_latest(out / "checkpoints"), out):
        assert cli.main(["generate", "--model", str(model), *base]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0].startswith("def get_")
    assert len(texts[0]) > len("def get_\n")
    assert texts[0] == texts[1] == texts[2]
    greedy = []
    for seed in ("1", "2"):
        assert cli.main(["generate", "--model", str(out), "--temperature", "0", *base[:-1], seed]) == 0
        greedy.append(capsys.readouterr().out)
    assert greedy[0] == greedy[1]
    assert cli.main(["generate", "--model", str(out), "--prompt", "", "--max-tokens", "3"]) == 0


def test_generate_streams_what_decode_gives(run, capsys):
    """Pieces printed token by token, multi-byte characters included, add up to the decoded whole."""
    from llmcore.inference import generate, load_model

    out, _ = run
    model, tokenizer = load_model(out)
    prompt = "def é"
    flags = ["--temperature", "3", "--max-tokens", "60"]  # hot enough to draw stray bytes
    for seed in range(4):
        assert cli.main(["generate", "--model", str(out), "--prompt", prompt, "--seed", str(seed), *flags]) == 0
        settings = {"max_tokens": 60, "temperature": 3.0, "seed": seed, "stop_ids": [tokenizer.eos_id]}
        new = generate(model, [tokenizer.encode(prompt)], **settings)[0]
        assert capsys.readouterr().out == prompt + tokenizer.decode(new, skip_special_tokens=True) + "\n"


def test_generate_refuses_bad_settings(run, capsys, tmp_path):
    out, _ = run
    base = ["generate", "--model", str(out), "--prompt", "x"]
    assert "temperature" in error_of(capsys, *base, "--temperature", "-1")
    assert "seed is 1000000000000000000000" in error_of(capsys, *base, "--seed", str(10**21))
    assert "max_tokens is 0" in error_of(capsys, *base, "--max-tokens", "0")
    missing = error_of(capsys, "generate", "--model", str(tmp_path / "no"), "--prompt", "x")
    assert "no such file or folder; accepted: a run or checkpoint folder" in missing
    assert "and no checkpoint; accepted:" in error_of(capsys, "generate", "--model", str(tmp_path), "--prompt", "x")
    assert "--device is 'gpu'; accepted: auto, cpu, cuda" in error_of(capsys, *base, "--device", "gpu")


def test_a_run_is_not_overwritten(run, folder, capsys):
    out, _ = run
    assert "already holds a run" in error_of(capsys, "quickstart", "--data", str(folder), "--out", str(out), *SMALL)


def test_a_run_of_damaged_checkpoints_is_not_begun_again(run, capsys, tmp_path):
    """Resume falls back on the last whole checkpoint, and never trains over damaged ones from the first step."""
    damaged = tmp_path / "run"
    shutil.copytree(run[0], damaged)
    newest, older = sorted((damaged / "checkpoints").glob("step-*"), reverse=True)
    (newest / "model.safetensors").write_bytes(b"cut short")
    assert cli.main(["pretrain", "--resume", str(damaged)]) == 0
    shown = capsys.readouterr().err
    assert f"resuming from {older}" in shown
    assert "checkpoint passed over" in shown
    recipe = (damaged / "recipe.toml").read_text()
    assert "has shape" in error_of(capsys, "pretrain", "--resume", str(damaged), "--set", "model.dim=48")
    assert (damaged / "recipe.toml").read_text() == recipe
    for folder in (newest, older):
        (folder / "state.json").unlink()
    error = error_of(capsys, "pretrain", "--resume", str(damaged))
    assert "holds no checkpoint that is whole" in error
    assert newest.is_dir()


def test_mistakes_in_recipes_and_arguments(capsys, tmp_path, folder):
    assert "did you mean 'steps'" in error_of(capsys, "pretrain", "llama-tiny.toml", "--set", "train.step=3")
    assert "shipped are" in error_of(capsys, "pretrain", "no.toml")
    assert "either" in error_of(capsys, "pretrain")
    assert "is no run folder" in error_of(capsys, "pretrain", "--resume", str(tmp_path))
    assert "train.device is 'gpu'; accepted: auto, cpu, cuda" in error_of(
        capsys, "pretrain", "llama-tiny.toml", "--device", "gpu"
    )
    assert "train.device is 'cuda:99'" in error_of(capsys, "pretrain", "llama-tiny.toml", "--device", "cuda:99")
    assert "--minutes is 0.0" in error_of(capsys, "quickstart", "--minutes", "0")
    assert "does not exist" in error_of(
        capsys, "quickstart", "--data", str(tmp_path / "none"), "--out", str(tmp_path / "r"), *SMALL
    )
    assert not (tmp_path / "r").exists()
    (tmp_path / "binary").mkdir()
    (tmp_path / "binary" / "a.txt").write_bytes(random.Random(0).randbytes(1000))
    assert "holds no documents (1 skipped: 1 invalid UTF-8" in error_of(
        capsys, "quickstart", "--data", str(tmp_path / "binary"), "--out", str(tmp_path / "r"), *SMALL
    )
    assert not (tmp_path / "r").exists()
    assert "tokenizer.kind is 'bep'; did you mean 'bpe'?" in error_of(
        capsys, "quickstart", "--data", str(folder), "--set", "tokenizer.kind=bep"
    )
    assert "invalid choice" in error_of(capsys, "tokenizer", "train", "x", "--kind", "abc", "--out", "y")
    assert "too small" in error_of(
        capsys, "tokenizer", "train", str(folder), "--vocab-size", "9", "--out", str(tmp_path / "t")
    )
    assert "vocab_size is 99999999999; accepted: at most" in error_of(
        capsys, "tokenizer", "train", str(folder), "--vocab-size", "99999999999", "--out", str(tmp_path / "t")
    )
    long = ["--set", f'sample.prompts=["{"+-*/" * 200}"]']
    assert re.search(
        r"sample.prompts\[0\] has \d+ tokens; accepted is fewer than model.max_positions = 256",
        error_of(capsys, "quickstart", "--data", str(folder), "--out", str(tmp_path / "r"), *SMALL, *long),
    )
    assert not (tmp_path / "r").exists()
    assert "--out goes with a new run" in error_of(capsys, "pretrain", "--resume", "x", "--out", "y")
    assert "--data goes with a new run" in error_of(capsys, "quickstart", "--resume", "--data", "x")
    assert "path is empty" in error_of(capsys, "quickstart", "--data", "")


@pytest.mark.parametrize("native", [True, False])
def test_a_run_keeps_its_dtype_on_another_machine(capsys, tmp_path, folder, monkeypatch, native):
    out = tmp_path / "run"
    monkeypatch.setattr("llmcore.training.state.has_native_bf16", lambda _: native)
    assert cli.main(["quickstart", "--data", str(folder), "--out", str(out), *SMALL, "--set", "train.steps=2"]) == 0
    monkeypatch.setattr("llmcore.training.state.has_native_bf16", lambda _: not native)
    assert cli.main(["pretrain", "--resume", str(out), "--set", "train.steps=3"]) == 0
    assert f"| compute | {'bfloat16' if native else 'float32'} on cpu |" in (out / "report.md").read_text()


def test_a_failed_write_leaves_the_run_its_recipe(run, capsys, tmp_path, monkeypatch):
    copy = tmp_path / "run"
    shutil.copytree(run[0], copy)
    recipe = (copy / "recipe.toml").read_text()

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "replace", full)
    error = error_of(capsys, "pretrain", "--resume", str(copy), "--set", "train.log_every=7")
    assert "No space left on device" in error
    assert (copy / "recipe.toml").read_text() == recipe


def test_an_empty_prompt_begins_a_document(tmp_path, folder):
    settings = [*SMALL, "--set", 'sample.prompts=["", "def"]', "--set", "train.steps=2"]
    assert cli.main(["quickstart", "--data", str(folder), "--out", str(tmp_path / "run"), *settings]) == 0
    assert (tmp_path / "run" / "report.md").read_text().count("```text\n") == 2


def test_divergence_is_one_line(capsys, tmp_path, folder):
    command = ["quickstart", "--data", str(folder), "--out", str(tmp_path / "run"), *SMALL]
    settings = ["--set", "optim.lr=1e36", "--set", "train.steps=50", "--set", "schedule.warmup=0"]
    assert cli.main([*command, *settings]) == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(r"llmcore: error: step \d+: .*stopped, nothing was saved; no checkpoint was written yet", line)


def test_tokenizer_train(capsys, tmp_path, folder):
    assert cli.main(["tokenizer", "train", str(folder), "--vocab-size", "300", "--out", str(tmp_path / "t")]) == 0
    assert "300 tokens" in capsys.readouterr().out
    tokenizer = Tokenizer.load(tmp_path / "t")
    assert tokenizer.decode(tokenizer.encode(program(5))) == program(5)


def test_tokenizer_train_on_a_folder_of_json_lines(capsys, tmp_path):
    (tmp_path / "c").mkdir()
    lines = [json.dumps({"body": program(seed)}) for seed in range(20)]
    (tmp_path / "c" / "a.jsonl").write_text("\n".join([*lines, "{"]))
    command = ["tokenizer", "train", str(tmp_path / "c"), "--vocab-size", "300", "--out", str(tmp_path / "t")]
    assert "no field 'text'" in error_of(capsys, *command)
    assert cli.main([*command, "--text-field", "body"]) == 0
    assert f"1 bad JSON ({tmp_path}/c/a.jsonl:21)" in capsys.readouterr().err
    assert Tokenizer.load(tmp_path / "t").vocab_size == 300


def test_info(capsys):
    assert cli.main(["info"]) == 0
    shown = capsys.readouterr().out
    assert "rms_norm: cpu float32" in shown
    build = llmcore.build_info()
    assert f"CPU kernels built for: {build['isas']}\n" in shown
    assert f"in use: {build['active_cpu_isa']}\n" in shown
    assert f"CUDA kernels: {build['cuda']}\n" in shown


def test_expert_and_gpt2_recipes_run(tmp_path, folder):
    for recipe in ("moe-tiny.toml", "gpt2-tiny.toml", "llama-tiny.toml"):
        out = tmp_path / recipe
        settings = [*SMALL, "--set", "train.steps=12", "--set", f'data.sources=[{{path = "{folder}"}}]']
        assert cli.main(["pretrain", recipe, "--out", str(out), *settings]) == 0
        records = read_log(out / "log.jsonl")
        losses = [r["loss"] for r in records if r["kind"] == "eval"]
        assert losses[-1] < losses[0] - 0.5
        train = [r for r in records if r["kind"] == "train"]
        assert ("expert_load_max_over_mean" in train[-1]) == (recipe == "moe-tiny.toml")
    state = load_checkpoint(find_latest(tmp_path / "moe-tiny.toml" / "checkpoints"))
    biases = [t for n, t in state.model.items() if "expert_bias" in n]
    assert biases
    assert all(b.abs().sum() > 0 for b in biases)


def start(*argv: str) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        environment.pop(name, None)
    command = [sys.executable, "-m", "llmcore", *argv]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, cwd=IMPORTED_FROM)


def test_ctrl_c_then_resume_equals_an_uninterrupted_run(tmp_path, folder):
    settings = [*SMALL, "--set", "train.steps=24", "--set", f'data.sources=[{{path = "{folder}"}}]']
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert cli.main(["pretrain", "llama-tiny", "--out", str(tmp_path / "whole"), *settings]) == 0
        out = tmp_path / "cut"
        process = start("pretrain", "llama-tiny", "--out", str(out), *settings, "--set", "train.log_every=1")
        while process.poll() is None and sum(r["kind"] == "train" for r in read_log(out / "log.jsonl")) < 3:
            time.sleep(0.01)
        if sys.platform == "linux":  # training does not spin while it waits
            assert b"OMP_WAIT_POLICY=passive" in Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0")
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 130, errors
        assert f"resume with: llmcore pretrain --resume {out}" in errors
        assert "Traceback" not in errors
        step = load_checkpoint(find_latest(out / "checkpoints")).step
        assert 3 <= step < 24
        assert cli.main(["pretrain", "--resume", str(out)]) == 0
    finally:
        torch.set_num_threads(threads)
    whole, cut = (load_checkpoint(find_latest(tmp_path / n / "checkpoints")) for n in ("whole", "cut"))
    assert whole.step == cut.step == 24
    different = [n for n in whole.model if not torch.equal(whole.model[n], cut.model[n])]
    assert not different
    assert whole.state["data"] == cut.state["data"]
