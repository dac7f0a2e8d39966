from __future__ import annotations

import itertools
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from tiny import UNIFORM, VOCAB, Loader, Model, loss_fn, make_batch, make_trainer

import llmcore
from llmcore.checkpoints import CheckpointError, find_latest, list_checkpoints, load_checkpoint
from llmcore.layers import MoE
from llmcore.models import PRESETS, Transformer
from llmcore.training import Loss, NonFiniteError, OptimConfig, TrainConfig, evaluate, loop, next_token_loss
from llmcore.training.logs import RunLog, clock, plot_losses, read_log
from llmcore.training.state import StopSignals, random_state, seed_everything, set_random_state

IMPORTED_FROM = Path(llmcore.__file__).parent.parent  # where a subprocess finds the llmcore under test


def final_state(trainer) -> dict[str, torch.Tensor]:
    tensors = {**trainer.model.state_dict(), **trainer.optimizer.state_dict()}
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different


def run_from(run_dir: Path, step: int | None = None, **config):
    """A fresh process would do just this: build everything anew, then resume."""
    seed_everything(99)  # whatever the generators hold must not matter
    trainer = make_trainer(run_dir, **config)
    path = find_latest(run_dir / "checkpoints") if step is None else run_dir / "checkpoints" / f"step-{step:06d}"
    trainer.run(resume=load_checkpoint(path))
    return trainer


def test_it_learns_and_keeps_a_run_folder(tmp_path):
    trainer = make_trainer(tmp_path, steps=150, eval_every=50, log_every=10)
    result = trainer.run()
    assert (result.step, result.signal) == (150, None)
    assert result.tokens == 150 * 4 * 16
    log = read_log(tmp_path / "log.jsonl")
    evals = [r for r in log if r["kind"] == "eval"]
    assert [r["step"] for r in evals] == [0, 50, 100, 150]
    assert evals[0]["loss"] == pytest.approx(UNIFORM, rel=0.3)
    assert evals[-1]["loss"] < 0.1 * evals[0]["loss"]
    assert evals[0]["bits_per_byte"] == pytest.approx(evals[0]["loss"] / math.log(2) / 2)
    trains = [r for r in log if r["kind"] == "train"]
    assert [r["step"] for r in trains] == list(range(10, 151, 10))
    assert {"loss", "lr", "grad_norm", "tokens", "tokens_per_second", "elapsed"} <= trains[0].keys()
    assert (tmp_path / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert load_checkpoint(result.checkpoint).config == {"hidden": 24}
    assert len(list_checkpoints(tmp_path / "checkpoints")) == 2


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("experts", [0, 4])
def test_resumed_is_uninterrupted_bit_for_bit(tmp_path, dtype, kind, experts):
    def options():
        torch.manual_seed(3)
        optim = OptimConfig(kind=kind, lr=1e-2)
        return {"model": Model(experts=experts), "optim": optim, "dtype": dtype, "accumulation": 2, "keep_last": 9}

    seed_everything(5)
    whole = make_trainer(tmp_path, **options())
    whole.run()
    for step in (4, 8):
        again = run_from(tmp_path, step, **options())
        assert again.step == 12
        assert again.tokens == whole.tokens
        assert_same(final_state(again), final_state(whole))
    assert again.loader.state_dict() == whole.loader.state_dict()


def test_accumulation_is_one_big_batch(tmp_path):
    """Four micro-batches with different numbers of targets move the weights as their concatenation does."""
    big = Loader(rows=8)

    class Parts(Loader):
        def __next__(self):
            if not getattr(self, "parts", None):
                whole = next(big)
                tokens, targets = whole.tokens.view(8, -1), whole.targets.view(8, -1).clone()
                targets[:2, 3:] = -100
                self.parts = [make_batch(tokens[i : i + 2], targets[i : i + 2]) for i in range(0, 8, 2)]
                self.whole = make_batch(tokens, targets)
            return self.parts.pop(0)

    class Whole(Parts):
        def __next__(self):
            Parts.__next__(self)
            self.parts = []
            return self.whole

    states = []
    for loader, k in ((Parts(), 4), (Whole(), 1)):
        big.index = 0
        torch.manual_seed(3)
        model = Model(dropout=0.0)
        trainer = make_trainer(tmp_path / str(k), model=model, loader=loader, accumulation=k, steps=5)
        trainer.run()
        records = [r for r in read_log(tmp_path / str(k) / "log.jsonl") if r["kind"] == "train"]
        # Adam forgives a wrong scale of the gradient; its logged norm doesn't
        curve = [value for r in records for value in (r["loss"], r["grad_norm"])]
        states.append((curve, final_state(trainer)))
    assert states[0][0] == pytest.approx(states[1][0], rel=1e-5)
    for name, tensor in states[0][1].items():
        torch.testing.assert_close(tensor, states[1][1][name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("preset", ["llama", "llama_moe", "gpt2"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_kernels_and_reference_learn_alike(tmp_path, preset, dtype):
    """The loss curve through the kernels is the reference's: wrong gradients would part the two within a few steps."""
    curves = []
    for backend in ("kernel", "reference"):
        torch.manual_seed(3)
        model = Transformer(PRESETS[preset]("tiny", vocab_size=VOCAB))
        run_dir, optim = tmp_path / backend, OptimConfig(lr=3e-3)
        with llmcore.backend(backend):
            make_trainer(run_dir, model=model, optim=optim, loss=next_token_loss, dtype=dtype, steps=12).run()
        curves.append([r["loss"] for r in read_log(run_dir / "log.jsonl") if r["kind"] in ("train", "eval")])
    assert curves[0][-1] < 0.9 * curves[0][0]
    assert curves[0] == pytest.approx(curves[1], rel=1e-5 if dtype == "fp32" else 5e-3)


def test_evaluation_is_weighted_by_tokens_and_leaves_the_model_training():
    torch.manual_seed(3)
    model = Model(dropout=0.5)
    tokens = torch.arange(16 * 4).view(4, 16) % VOCAB
    few = torch.full_like(tokens, -100)
    few[0, 0] = 1
    batches = [make_batch(tokens, few), make_batch(tokens, (tokens + 1) % VOCAB)]
    result = evaluate(model, batches, loss_fn=loss_fn)
    model.eval()
    nll = sum(float(loss_fn(model, b).total.detach()) for b in batches)
    assert result == {"loss": pytest.approx(nll / 65, rel=1e-6)}
    model.train()
    evaluate(model, batches, loss_fn=loss_fn)
    assert model.training
    with pytest.raises(ValueError, match="no target"):
        evaluate(model, [make_batch(tokens, torch.full_like(tokens, -100))], loss_fn=loss_fn)


def test_errors_found_on_a_cuda_device_are_raised_where_the_loss_is_read(tmp_path, monkeypatch):
    def error(device):
        raise RuntimeError(f"found on {device}")

    monkeypatch.setattr(loop, "check_device_errors", error)
    trainer = make_trainer(tmp_path)
    before = [p.clone() for p in trainer.model.parameters()]
    # to the loop the model is on a CUDA device: the parameters that it asks for theirs
    on_cuda = SimpleNamespace(parameters=lambda: iter([SimpleNamespace(device=torch.device("cuda", 1))]))
    check = loop._check_data
    check(trainer.model)
    monkeypatch.setattr(loop, "_check_data", lambda model: check(on_cuda))
    with pytest.raises(RuntimeError, match="found on cuda:1"):
        trainer.take_step()
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters()))
    tokens = torch.zeros(1, 16).long()
    with pytest.raises(RuntimeError, match="found on cuda:1"):
        evaluate(trainer.model, [make_batch(tokens, tokens)], loss_fn=loss_fn)


@pytest.mark.parametrize("where", ["loss", "gradient", "weights", "experts"])
def test_non_finite_stops_and_keeps_the_good_checkpoint(tmp_path, where):
    calls = 0

    def bad_loss(model, batch):
        nonlocal calls
        loss = loss_fn(model, batch)
        if torch.is_grad_enabled():
            calls += 1
            if calls == 7 and where == "loss":
                return Loss(loss.total * math.nan, loss.num_targets, {"nll": loss.metrics["nll"] * math.nan})
            if calls == 7 and where == "gradient":  # a finite loss whose gradient is not
                zero = (model.lm_head_weight[0, 0] * 0).abs().sqrt()
                return Loss(loss.total + zero, loss.num_targets, loss.metrics)
            if calls == 7 and where == "experts":
                MoE(8, 8, 4, 2)(torch.full((1, 8), math.nan))
            if calls == 8 and where == "weights":
                with torch.no_grad():
                    model.hidden.bias[0] = math.inf
        return loss

    trainer = make_trainer(tmp_path, loss=bad_loss, eval_every=0)
    with pytest.raises(NonFiniteError) as caught:
        trainer.run()
    message = str(caught.value)
    expected = {"weights": "hidden.bias", "experts": "step 6: the router's scores of token 0 are not finite"}
    assert expected.get(where, "gradient norm nan") in message
    assert where in expected or "step 7" in message
    assert "step-000004" in message
    good = load_checkpoint(find_latest(tmp_path / "checkpoints"))
    assert good.step == 4
    assert all(torch.isfinite(t).all() for t in good.model.values())
    if where != "weights":
        assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
        assert trainer.step == 6
    assert "reason" in read_log(tmp_path / "log.jsonl")[-1]


def test_expert_load_is_logged_and_the_bias_updated_once_per_step(tmp_path):
    model = Model(experts=4)
    updates = []
    original = model.update_expert_bias
    model.update_expert_bias = lambda load: (updates.append(load.clone()), original(load))
    make_trainer(tmp_path, model=model, accumulation=3, steps=4).run()
    assert len(updates) == 4
    assert all(int(u.sum()) == 2 * 3 * 4 * 16 for u in updates)  # two layers, three micro-batches of 64 tokens
    record = next(r for r in read_log(tmp_path / "log.jsonl") if r["kind"] == "train")
    first = updates[0].float()
    assert record["expert_load_max_over_mean"] == pytest.approx((first.amax(-1) / first.mean(-1)).tolist())
    assert record["expert_load_min_over_mean"] == pytest.approx((first.amin(-1) / first.mean(-1)).tolist())


def test_time_budget_ends_the_run_and_drives_the_schedule(tmp_path, monkeypatch):
    ticks = itertools.count()  # the machine's own speed must not matter: the clock goes 5 ms further at every look
    clock = SimpleNamespace(perf_counter=lambda: next(ticks) * 0.005)
    monkeypatch.setattr("llmcore.training.loop.time", clock)
    trainer = make_trainer(tmp_path, steps=0, max_seconds=0.6, eval_every=0, save_every=0)
    result = trainer.run()
    assert 0.6 <= result.elapsed < 0.8
    rates = [r["lr"] for r in read_log(tmp_path / "log.jsonl") if r["kind"] == "train"]
    assert max(rates) > 9e-3
    assert rates[-1] < 2e-3
    state = load_checkpoint(result.checkpoint).state
    assert state["elapsed"] >= 0.6
    again = make_trainer(tmp_path, steps=0, max_seconds=0.6, eval_every=0)
    assert again.run(resume=load_checkpoint(result.checkpoint)).step == result.step  # the budget is spent


def test_resume_refuses_another_model_and_a_used_folder(tmp_path):
    make_trainer(tmp_path).run()
    with pytest.raises(FileExistsError, match="already holds a run"):
        make_trainer(tmp_path).run()
    checkpoint = load_checkpoint(find_latest(tmp_path / "checkpoints"))
    bare = replace(checkpoint, state={"tokens": 1})
    with pytest.raises(CheckpointError, match=r"state\.json: 'data' is missing"):
        make_trainer(tmp_path).run(resume=bare)
    with pytest.raises(CheckpointError, match="expert_bias"):
        make_trainer(tmp_path, model=Model(experts=4)).run(resume=checkpoint)
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*torch\.float32; this model holds it as torch\.bf"):
        make_trainer(tmp_path, dtype="bf16").run(resume=checkpoint)


def test_random_states_round_trip_through_json():
    seed_everything(4)
    random.gauss(0, 1), numpy.random.standard_normal()  # leave a cached second gaussian behind
    state = json.loads(json.dumps(random_state()))

    def draw():
        return random.gauss(0, 1), random.random(), numpy.random.standard_normal(3).tolist(), torch.randn(3).tolist()

    want = draw()
    draw()
    set_random_state(state)
    assert draw() == want


def test_second_signal_aborts_at_once(capfd):
    before = signal.getsignal(signal.SIGINT)  # a shell starts its background jobs with SIGINT ignored
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        assert stop.signal == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGINT) is before
    assert "finishing this step" in capfd.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_saves_and_the_resumed_run_ends_the_same(tmp_path, number):
    seed_everything(5)
    whole = make_trainer(tmp_path / "whole", eval_every=0)
    whole.run()

    def kicking(model, batch):
        if model.training and kicked.loader.index == 6:
            os.kill(os.getpid(), number)
        return loss_fn(model, batch)

    seed_everything(5)
    kicked = make_trainer(tmp_path / "cut", loss=kicking, eval_every=0)
    result = kicked.run()
    assert (result.step, result.signal) == (6, number)
    assert result.checkpoint.name == "step-000006"
    again = run_from(tmp_path / "cut", eval_every=0)
    assert again.step == 12
    assert_same(final_state(again), final_state(whole))


def start_or_resume(run: Path) -> None:
    """What a user's command does: the newest whole checkpoint if there is one, else the beginning."""
    torch.set_num_threads(1)
    seed_everything(5)
    trainer = make_trainer(run, steps=100, eval_every=50, save_every=4)
    latest = find_latest(run / "checkpoints")
    trainer.run(resume=load_checkpoint(latest) if latest else None)


SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import test_loop
test_loop.start_or_resume(Path(sys.argv[2]))
"""


def test_kill_9_at_random_moments_then_resume_is_bit_for_bit_the_same(tmp_path):
    rng, threads = random.Random(1), torch.get_num_threads()
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    log, killed = cut / "log.jsonl", 0
    for _ in range(2):
        command = [sys.executable, "-c", SCRIPT, str(Path(__file__).parent), str(cut)]
        length = log.stat().st_size if log.exists() else 0
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=IMPORTED_FROM)
        while process.poll() is None and (not log.exists() or log.stat().st_size <= length + 200):
            time.sleep(0.005)
        time.sleep(rng.uniform(0.0, 0.2))
        killed += process.poll() is None
        process.kill()
        process.communicate()
    assert killed
    try:
        start_or_resume(whole)
        start_or_resume(cut)
    finally:
        torch.set_num_threads(threads)
    ends = [load_checkpoint(find_latest(run / "checkpoints")) for run in (whole, cut)]
    assert ends[0].step == ends[1].step == 100
    assert_same(ends[0].model, ends[1].model)
    assert_same(ends[0].optimizer, ends[1].optimizer)
    logs = [read_log(run / "log.jsonl") for run in (whole, cut)]
    curves = [[(r["step"], r["loss"]) for r in log if r["kind"] in ("train", "eval")] for log in logs]
    assert curves[0] == curves[1]


def test_log_survives_a_torn_line_and_forgets_steps_taken_again(tmp_path):
    log = RunLog(tmp_path, step=0, tensorboard=False)
    for step in (1, 2, 3):
        log.write("train", step, loss=float(step))
    log.close()
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('5\n{"a": 1}\n{"kind": "train", "st')
    log = RunLog(tmp_path, step=2, tensorboard=False)
    log.write("start", 2)
    log.write("train", 3, loss=30.0)
    log.close()
    records = read_log(tmp_path / "log.jsonl")
    assert [(r["step"], r["loss"]) for r in records if r["kind"] == "train"] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    log = RunLog(tmp_path, step=0, tensorboard=False)
    log.write("start", 0)  # killed before its first checkpoint: all anew
    log.close()
    assert [r["kind"] for r in read_log(tmp_path / "log.jsonl")] == ["start"]
    assert read_log(tmp_path / "absent.jsonl") == []


def test_tensorboard_events_hold_the_losses(tmp_path):
    loading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    make_trainer(tmp_path, tensorboard=True, steps=3).run()
    events = loading.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    got = [(e.step, e.value) for e in events.Scalars("train/loss")]
    want = [(r["step"], r["loss"]) for r in read_log(tmp_path / "log.jsonl") if r["kind"] == "train"]
    assert [s for s, _ in got] == [s for s, _ in want]
    assert [v for _, v in got] == pytest.approx([v for _, v in want], rel=1e-6)
    time.sleep(1.1)  # event files are read in the order of their names, which hold the second
    log = RunLog(tmp_path, step=0, tensorboard=True)  # killed before its first checkpoint: all anew
    log.write("train", 1, loss=9.0)
    log.close()
    events = loading.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 9.0)]


def test_missing_tensorboard_is_said_once(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    said = []
    log = RunLog(tmp_path, step=0, tensorboard=True, echo=said.append)
    log.write("train", 1, loss=1.0)
    log.close()
    assert len(said) == 1
    assert "tensorboard isn't installed" in said[0]


def test_missing_matplotlib_is_no_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert plot_losses([], tmp_path / "loss.png", "t") is False


def test_clock():
    assert (clock(5), clock(65), clock(3661)) == ("0:05", "1:05", "1:01:01")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dtype": "fp16"}, "train.dtype is 'fp16'"),
        ({"accumulation": 0}, "train.accumulation is 0"),
        ({"steps": -1}, "train.steps is -1"),
        ({"steps": 0}, "would never end"),
        ({"max_seconds": math.nan}, "train.max_seconds is nan"),
        ({"seed": -1}, "train.seed is -1"),
    ],
)
def test_bad_values_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**values)
