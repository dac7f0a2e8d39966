"""A small language model and an endless loader with the interfaces the loop needs, quick enough for any test."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from llmcore.training import Loss, OptimConfig, ScheduleConfig, TrainConfig, Trainer

VOCAB, ROW = 31, 16


@dataclass
class Batch:
    tokens: Tensor
    targets: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    num_targets: int
    rows: int

    def to(self, device: torch.device | str) -> Batch:
        names = ("tokens", "targets", "positions", "cu_seqlens")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})


def make_batch(tokens: Tensor, targets: Tensor) -> Batch:
    """From (rows, ROW) token ids."""
    rows = len(tokens)
    positions = torch.arange(ROW).repeat(rows)
    bounds = torch.arange(0, rows * ROW + 1, ROW, dtype=torch.int32)
    return Batch(tokens.flatten(), targets.flatten(), positions, bounds, ROW, int((targets >= 0).sum()), rows)


class Loader:
    """Noisy counting modulo VOCAB; targets are randomly dropped, so that batches differ in their count."""

    def __init__(self, rows: int = 4, seed: int = 0) -> None:
        self.rows, self.seed, self.index = rows, seed, 0

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> Batch:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.index)
        self.index += 1
        start = torch.randint(VOCAB, (self.rows, 1), generator=generator)
        text = (start + torch.arange(ROW + 1)) % VOCAB
        keep = torch.rand(self.rows, ROW, generator=generator) > 0.2
        return make_batch(text[:, :-1], text[:, 1:].where(keep, -100))

    def state_dict(self) -> dict:
        return {"index": self.index}

    def load_state_dict(self, state: dict) -> None:
        self.index = state["index"]


class Model(nn.Module):
    """Two tokens of context, dropout (so that random states matter) and, with ``experts``, a made-up expert load."""

    def __init__(self, dropout: float = 0.1, experts: int = 0) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 24)
        self.hidden = nn.Linear(48, 24)
        self.norm = nn.LayerNorm(24)
        self.lm_head = nn.Linear(24, VOCAB, bias=False)
        self.dropout, self.experts = nn.Dropout(dropout), experts
        if experts:
            self.register_buffer("expert_bias", torch.zeros(2, experts))

    @property
    def lm_head_weight(self) -> Tensor:
        return self.lm_head.weight

    def forward(self, tokens, *, positions=None, cu_seqlens=None, max_seqlen=None, cache=None):
        x = self.embed(tokens)
        before = torch.cat([torch.zeros_like(x[:1]), x[:-1]]) * (positions > 0)[:, None].to(x.dtype)
        h = self.norm(x + torch.tanh(self.hidden(self.dropout(torch.cat([x, before], -1)))))
        load = torch.bincount(tokens % self.experts, minlength=self.experts).repeat(2, 1) if self.experts else None
        aux = h.float().pow(2).mean() * 1e-3 if self.experts else None
        return SimpleNamespace(hidden=h, aux_loss=aux, expert_load=load)

    def update_expert_bias(self, load: Tensor) -> None:
        self.expert_bias += 0.01 * torch.sign(load.float().mean(-1, keepdim=True) - load)


def loss_fn(model, batch) -> Loss:
    """Plain torch stand-in for ``next_token_loss``."""
    output = model(batch.tokens, positions=batch.positions)
    logits = output.hidden.float() @ model.lm_head_weight.float().T
    total = nn.functional.cross_entropy(logits, batch.targets, ignore_index=-100, reduction="sum")
    metrics = {"nll": total.detach()}
    if output.expert_load is not None:
        metrics["expert_load"] = output.expert_load
    return Loss(total, batch.num_targets, metrics)


def make_trainer(run_dir, *, model=None, loader=None, optim=None, loss=loss_fn, title="", **config) -> Trainer:
    if model is None:
        torch.manual_seed(3)
        model = Model()
    defaults = {"steps": 12, "eval_every": 5, "save_every": 4, "log_every": 1, "dtype": "fp32", "tensorboard": False}
    return Trainer(
        model,
        loader or Loader(),
        run_dir,
        train=TrainConfig(**{**defaults, **config}),
        optim=optim or OptimConfig(lr=1e-2),
        schedule=ScheduleConfig(warmup=0.1),
        loss_fn=loss,
        eval_batches=lambda: [make_batch(*_held_out())],
        token_bytes=torch.full((VOCAB,), 2),
        model_config={"hidden": 24},
        title=title,
    )


def _held_out() -> tuple[Tensor, Tensor]:
    text = (torch.arange(6)[:, None] * 5 + torch.arange(ROW + 1)) % VOCAB
    return text[:, :-1], text[:, 1:]


UNIFORM = math.log(VOCAB)
