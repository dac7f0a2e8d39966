"""The training loop. There is one: a stage differs from another in its data and its loss function only."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmcore.checkpoints import Checkpoint, CheckpointError, copy_tensors, find_latest, model_tensors, save_checkpoint
from llmcore.inference.device import check_device_name
from llmcore.ops import check_device_errors
from llmcore.training.logs import Display, RunLog, clock, plot_losses, read_log
from llmcore.training.losses import Loss, add_metrics, mean_metrics, next_token_loss
from llmcore.training.optim import NonFiniteError, OptimConfig, Optimizer
from llmcore.training.schedules import ScheduleConfig, learning_rate_factor, progress
from llmcore.training.state import StopSignals, compute_dtype, random_state, set_random_state, versions

LossFunction = Callable[[nn.Module, Any], Loss]


def _check_data(model: nn.Module) -> None:
    """Raises what CUDA kernels found wrong in the batches. Called where the host has just waited for the loss: a target
    outside the vocabulary is better known by its index than by the NaN it makes."""
    device = next(model.parameters()).device
    if device.type == "cuda":
        check_device_errors(device)


@dataclass(frozen=True)
class TrainConfig:
    """How long and how often. Steps are optimizer steps, times are seconds, a limit of 0 is none.

    With ``eval_every`` 0 the model is evaluated before and after training only, with ``save_every`` 0 saved after it.

    The run ends at ``steps`` or at ``max_seconds`` of training time, whichever comes first.
    """

    steps: int = 1000
    max_seconds: float = 0.0
    accumulation: int = 1  # micro-batches per optimizer step
    device: str = "auto"  # cpu | cuda | cuda:N | auto (the GPU where there is one)
    dtype: str = "auto"  # compute: fp32 | bf16 | auto (bf16 where the hardware has it)
    eval_every: int = 100
    save_every: int = 500
    keep_last: int = 2
    log_every: int = 10
    seed: int = 0
    tensorboard: bool = True

    def __post_init__(self) -> None:
        if self.dtype not in ("fp32", "bf16", "auto"):
            raise ValueError(f"train.dtype is {self.dtype!r}; accepted are 'fp32', 'bf16' and 'auto'")
        check_device_name("train.device", self.device)
        for name, least in (("accumulation", 1), ("keep_last", 1), ("log_every", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"train.{name} is {getattr(self, name)}; accepted is {least} or more")
        for name in ("steps", "max_seconds", "eval_every", "save_every"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"train.{name} is {getattr(self, name)}; accepted is 0 or more")
        if not self.steps and not self.max_seconds:
            raise ValueError("train.steps and train.max_seconds are both 0: the run would never end")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"train.seed is {self.seed}; accepted is 0 to {2**32 - 1}")


@dataclass(frozen=True)
class TrainResult:
    """``signal`` is the signal that stopped the run, or None when it ran to its end."""

    step: int
    tokens: int
    elapsed: float
    signal: int | None
    checkpoint: Path | None


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    loss_fn: LossFunction = next_token_loss,
    token_bytes: Tensor | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """The mean loss over every target of ``batches``, in nats per token; None when ``stop()`` cut it short.

    With ``token_bytes`` (vocab,) int64, the bytes of text each token stands for, also ``bits_per_byte``, which can be
    compared across tokenizers. Batches are brought to the model's device.
    """
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    nll, targets, num_bytes = 0.0, 0, 0
    try:
        for batch in batches:
            if stop():
                return None
            loss = loss_fn(model, on_device(batch, device))
            nll += float(loss.metrics["nll"])
            targets += loss.num_targets
            if token_bytes is not None:
                num_bytes += int(token_bytes[batch.targets[batch.targets >= 0]].sum())
        _check_data(model)
    finally:
        model.train(was_training)
    if not targets:
        raise ValueError("the held-out data has no target token to evaluate on")
    result = {"loss": nll / targets}
    if num_bytes:
        result["bits_per_byte"] = nll / math.log(2) / num_bytes
    return result


def on_device(batch: Any, device: torch.device) -> Any:
    """``batch`` on ``device``. Loaders give batches on the CPU, so a batch for a GPU has ``to(device)``."""
    return batch if device.type == "cpu" else batch.to(device)


class Trainer:
    """Trains ``model`` on ``loader``, on the device where ``model`` is, and keeps the run folder ``run_dir``.

    ``loader`` is an endless iterator of batches with ``state_dict()`` and ``load_state_dict()`` (a JSON cursor);
    ``eval_batches()`` gives the held-out batches afresh. A batch has ``tokens`` (any count of them) and what
    ``loss_fn`` reads. ``model_config`` is the JSON form of the model's configuration, saved beside its weights.

    With ``max_seconds`` the learning-rate schedule follows progress = max(step / steps, elapsed / max_seconds).
    Elapsed time is training time and part of the saved state: a run that is resumed goes on with the rest of its
    budget and of its schedule. Such a run is not repeatable bit for bit; one without a time budget is, resumed or not.
    """

    def __init__(
        self,
        model: nn.Module,
        loader: Any,
        run_dir: str | Path,
        *,
        train: TrainConfig,
        optim: OptimConfig | None = None,
        schedule: ScheduleConfig | None = None,
        loss_fn: LossFunction = next_token_loss,
        eval_batches: Callable[[], Iterable[Any]] | None = None,
        token_bytes: Tensor | None = None,
        model_config: dict[str, Any] | None = None,
        title: str = "",
    ) -> None:
        self.model, self.loader, self.run_dir = model, loader, Path(run_dir)
        self.config, self.schedule = train, schedule or ScheduleConfig()
        self.loss_fn, self.eval_batches, self.token_bytes = loss_fn, eval_batches, token_bytes
        self.model_config, self.title = model_config or {}, title
        self.device = next(model.parameters()).device
        self.dtype = compute_dtype(train.dtype, self.device)
        for parameter in model.parameters():  # weights only: buffers such as RoPE tables keep their own dtype
            parameter.data = parameter.data.to(self.dtype)
        self.optimizer = Optimizer(model, optim or OptimConfig())
        self.checkpoints = self.run_dir / "checkpoints"
        self.step = self.tokens = 0
        self.saved: Path | None = None
        self._saved_step = self._evaluated_step = -1
        self._elapsed_before = 0.0
        self._started = time.perf_counter()
        self._tokens_per_second = 0.0

    # -- state ---------------------------------------------------------------------------------------------------

    @property
    def elapsed(self) -> float:
        """Seconds of training, those before a resume included."""
        return self._elapsed_before + time.perf_counter() - self._started

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take over the whole state of ``checkpoint``; raises ``CheckpointError`` when it is not of this model."""
        state = checkpoint.state
        if missing := {"tokens", "elapsed", "evaluated_step", "data", "random"} - state.keys():
            raise CheckpointError(f"{checkpoint.path / 'state.json'}: {min(missing)!r} is missing")
        copy_tensors(model_tensors(self.model), checkpoint.model, checkpoint.path / "model.safetensors")
        self.optimizer.load_state_dict(checkpoint.optimizer, checkpoint.path / "optimizer.safetensors")
        self.loader.load_state_dict(state["data"])
        self.step, self.tokens = checkpoint.step, state["tokens"]
        self._elapsed_before = state["elapsed"]
        self.saved, self._saved_step = checkpoint.path, checkpoint.step
        self._evaluated_step = state["evaluated_step"]
        set_random_state(state["random"])

    def save(self) -> None:
        """Write a checkpoint unless this step has one. Non-finite weights raise instead: they are worth nothing."""
        if self.step == self._saved_step:
            return
        for name, parameter in self.model.named_parameters():
            if not torch.isfinite(parameter).all():
                raise NonFiniteError(self._stopped(self.step, f"the weights of {name!r} are no longer finite"))
        state = {
            "tokens": self.tokens,
            "elapsed": self.elapsed,
            "evaluated_step": self._evaluated_step,
            "data": self.loader.state_dict(),
            "random": random_state(),
            "versions": versions(),
        }
        self.saved = save_checkpoint(
            self.checkpoints,
            self.step,
            model=model_tensors(self.model),
            config=self.model_config,
            optimizer=self.optimizer.state_dict(),
            state=state,
            keep_last=self.config.keep_last,
        )
        self._saved_step = self.step

    def _stopped(self, step: int, reason: str) -> str:
        kept = f"the last good checkpoint is {self.saved}" if self.saved else "no checkpoint was written yet"
        return f"step {step}: {reason}; stopped, nothing was saved; {kept}. A lower optim.lr may help"

    # -- one step ------------------------------------------------------------------------------------------------

    def progress(self, step: int) -> float:
        return progress(step, self.config.steps, self.elapsed, self.config.max_seconds)

    def take_step(self) -> dict[str, Any]:
        """One optimizer step over ``accumulation`` micro-batches. Gives the step's means and counts."""
        started = time.perf_counter()
        lr = self.optimizer.config.lr * learning_rate_factor(self.progress(self.step + 1), self.schedule)
        metrics: dict[str, Tensor | float] = {}
        targets = tokens = 0
        for _ in range(self.config.accumulation):
            batch = next(self.loader)
            loss = self.loss_fn(self.model, on_device(batch, self.device))
            loss.total.backward()
            self.optimizer.accumulate()
            add_metrics(metrics, loss.metrics)
            targets += loss.num_targets
            tokens += batch.tokens.numel()
        if not targets:
            raise ValueError(f"step {self.step + 1}: its {self.config.accumulation} batches hold no target token")
        gradient_norm = self.optimizer.gradient_norm(targets)  # first, so that there is one wait for all numbers
        means, norm = mean_metrics(metrics, targets), float(gradient_norm)
        _check_data(self.model)
        if not math.isfinite(norm) or not all(math.isfinite(v) for v in means.values()):
            self.optimizer.zero_grad()
            values = f"loss {means['nll']:g}, gradient norm {norm:g}"
            raise NonFiniteError(self._stopped(self.step + 1, f"the loss or the gradient is not finite ({values})"))
        result = {"loss": means.pop("nll"), **means, "lr": lr, "grad_norm": norm}
        if (load := metrics.get("expert_load")) is not None:
            # per layer: the fullest expert, and the emptiest, which shows one that no token reaches; read here, where
            # the device has nothing left to do that the host would wait for
            share = load.float() / load.float().mean(-1, keepdim=True)
            result["expert_load_max_over_mean"] = share.amax(-1).tolist()
            result["expert_load_min_over_mean"] = share.amin(-1).tolist()
        self.optimizer.step(lr, gradient_norm)
        if load is not None and hasattr(self.model, "update_expert_bias"):
            # once per optimizer step, from the load of all its micro-batches (arXiv 2408.15664)
            self.model.update_expert_bias(load)
        self.step += 1
        self.tokens += tokens
        rate = tokens / (time.perf_counter() - started)
        smooth = 0.9 if self._tokens_per_second else 0.0
        self._tokens_per_second = smooth * self._tokens_per_second + (1 - smooth) * rate
        return {**result, "targets": targets}

    # -- the run -------------------------------------------------------------------------------------------------

    def _evaluate(self, log: RunLog, display: Display, stop: StopSignals) -> None:
        if self.eval_batches is None or self._evaluated_step == self.step:
            return
        result = evaluate(
            self.model,
            self.eval_batches(),
            loss_fn=self.loss_fn,
            token_bytes=self.token_bytes,
            stop=lambda: stop.signal is not None,
        )
        if result is None:
            return
        if not math.isfinite(result["loss"]):
            raise NonFiniteError(self._stopped(self.step, f"the held-out loss is {result['loss']}"))
        self._evaluated_step = self.step
        log.write("eval", self.step, **result, elapsed=self.elapsed)
        bits = f"  bits/byte {result['bits_per_byte']:.3f}" if "bits_per_byte" in result else ""
        display.line(f"step {self.step}: held-out loss {result['loss']:.4f}{bits}")

    def _log_steps(self, log: RunLog, steps: list[dict[str, Any]]) -> None:
        """One record for a stretch of steps: means over its targets; of the rest, the last step's values."""
        targets = sum(s["targets"] for s in steps)
        record = {k: v for k, v in steps[-1].items() if k != "targets"}
        for name in ("loss", "aux_loss"):
            if name in record:
                record[name] = sum(s[name] * s["targets"] for s in steps) / targets
        rate = round(self._tokens_per_second, 1)
        log.write("train", self.step, **record, tokens=self.tokens, tokens_per_second=rate, elapsed=self.elapsed)

    def _show(self, display: Display, step: dict[str, Any]) -> None:
        done = self.progress(self.step)
        left = clock(self.elapsed * (1 - done) / done) if done else "?"
        # a narrow terminal cuts the end off
        text = f"loss {step['loss']:.4f}  {self._tokens_per_second:,.0f} tokens/s  {left} left  lr {step['lr']:.2e}"
        display.step(self.step, self.config.steps, done, text)

    def run(self, resume: Checkpoint | None = None) -> TrainResult:
        """Train to the end, or until SIGINT or SIGTERM: then the step is finished, saved and ``signal`` set.

        A non-finite loss or gradient raises :class:`NonFiniteError` naming the step, before the weights change.
        """
        if resume is not None:
            self.restore(resume)
        elif find_latest(self.checkpoints) is not None:
            raise FileExistsError(f"{self.checkpoints} already holds a run; resume it or take another folder")
        self._started = time.perf_counter()
        self.model.train()
        with StopSignals() as stop, Display(log_every=self.config.log_every) as display:
            log = RunLog(self.run_dir, step=self.step, tensorboard=self.config.tensorboard, echo=display.line)
            try:
                log.write("start", self.step)
                self._steps(log, display, stop)
                self.save()
                elapsed = self.elapsed
                log.write("stop", self.step, signal=stop.signal, elapsed=elapsed)
            except NonFiniteError as error:
                log.write("stop", self.step, reason=str(error), elapsed=self.elapsed)
                raise
            except FloatingPointError as error:  # experts refuse what is not finite before there is a loss
                reason = self._stopped(self.step, str(error))
                log.write("stop", self.step, reason=reason, elapsed=self.elapsed)
                raise NonFiniteError(reason) from None
            finally:
                log.close()
        if not plot_losses(read_log(log.path), self.run_dir / "loss.png", self.title):
            display.line("loss.png was not drawn: the package matplotlib isn't installed")
        return TrainResult(self.step, self.tokens, elapsed, stop.signal, self.saved)

    def _steps(self, log: RunLog, display: Display, stop: StopSignals) -> None:
        config, due = self.config, lambda every: every and self.step % every == 0
        unlogged: list[dict[str, Any]] = []
        if self.step == 0 or due(config.eval_every):  # at the start, or where a signal kept a run from it
            self._evaluate(log, display, stop)
        while stop.signal is None and self.progress(self.step) < 1.0:
            unlogged.append(self.take_step())
            self._show(display, unlogged[-1])
            if due(config.log_every):
                self._log_steps(log, unlogged)
                unlogged = []
            if due(config.eval_every):
                self._evaluate(log, display, stop)
            if due(config.save_every):
                self.save()
        if unlogged:
            self._log_steps(log, unlogged)
        if stop.signal is None:
            self._evaluate(log, display, stop)
