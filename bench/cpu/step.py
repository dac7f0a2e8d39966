"""A whole training step and whole generations of a 46 M Llama, beside transformers with the same weights.

The rows against torch.compile take most of a minute to compile; `--only "peer: eager"` leaves them out.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator

import torch

from bench.cpu import Row, name_of
from bench.model import AGREE, check, our_generation, our_step, text, their_generation, their_model, their_step
from bench.peak import peak_bytes
from llmcore.models import Transformer, llama

SIZE = {"dim": 512, "num_layers": 12, "num_heads": 8, "num_kv_heads": 4, "ffn_dim": 1536, "vocab_size": 8192}
ROWS, ROW_LEN = 4, 512
PROMPT, NEW = 128, 32
MIB = 1 << 20
MUST = {"transformers": 1.3, "compiled": 1.2}
AIM = {"transformers": 1.5, "compiled": 1.4}


def our_model(dtype: torch.dtype, **overrides) -> Transformer:
    torch.manual_seed(0)
    return Transformer(llama("mini", **{**SIZE, "max_positions": 1024, "tied_embeddings": False, **overrides})).to(
        dtype
    )


def tokens_of_a_step(vocab: int) -> torch.Tensor:
    return text(ROWS, ROW_LEN, vocab, torch.device("cpu"))


def peak_call(name: str, dtype: str, whole: bool) -> tuple[Callable, Callable]:
    """For bench/peak.py: a step. `whole`: with the making of the model and of the optimizer's state, which are there
    before the second step; else what rises above them."""
    kind = getattr(torch, dtype)

    def build(**overrides) -> Callable[[], float]:
        ours = our_model(kind, **overrides)
        tokens = tokens_of_a_step(ours.config.vocab_size)
        return our_step(ours, tokens) if name == "llmcore" else their_step(their_model(ours), tokens, False)

    small = build(num_layers=1, dim=64, num_heads=2, num_kv_heads=1, ffn_dim=64, vocab_size=512)
    if not whole:
        step = build()
        step()
        return step, small

    def from_nothing() -> Callable[[], float]:
        step = build()
        step()
        step()
        return step

    return from_nothing, small


def _step_row(dtype: torch.dtype, compiled: bool) -> Row:
    ours = our_model(dtype)
    theirs = their_model(ours)
    tokens = tokens_of_a_step(SIZE["vocab_size"])
    peer = "compiled" if compiled else "transformers"
    calls = {"llmcore": our_step(ours, tokens), peer: their_step(theirs, tokens, compiled)}

    def equal_losses() -> None:  # before either has moved far
        check("the losses", calls["llmcore"](), calls[peer](), AGREE[dtype])

    def memory() -> dict[str, float]:
        figures = {}
        for label, whole in (("peak", True), ("rise", False)):
            own, other = (
                peak_bytes("bench.cpu.step:peak_call", name, name_of(dtype), whole) for name in ("llmcore", peer)
            )
            figures |= {f"{label}_mib": own // MIB, f"{peer}_{label}_mib": other // MIB}
            figures[f"{label}_share"] = round(own / other, 3)
        return figures

    return Row(
        kernel="training step",
        case=f"12 layers, d 512, {ROWS} x {ROW_LEN}, peer: {'compiled' if compiled else 'eager'}",
        dtype=name_of(dtype),
        direction="step",
        calls=calls,
        check=equal_losses,
        must={peer: MUST[peer]} if dtype == torch.bfloat16 else {},
        aim={peer: AIM[peer]} if dtype == torch.bfloat16 else {},
        work=ours.flops_per_token(ROW_LEN) * tokens.numel(),
        ceiling=f"gemm_{name_of(dtype)}_gflops",
        notes=None if compiled else memory,
    )


def _generation_row(ours: Transformer, theirs, batch: int) -> Row:
    prompts = text(batch, PROMPT, SIZE["vocab_size"], torch.device("cpu"))
    dtype = ours.lm_head_weight.dtype

    @torch.no_grad()
    def equal_logits() -> None:
        check("the logits", ours.logits(ours(prompts[:1]).hidden), theirs(prompts[:1]).logits, AGREE[dtype])

    return Row(
        kernel="generate",
        case=f"12 layers, d 512, {batch} sequences, {PROMPT} + {NEW} tokens, peer: eager",
        dtype=name_of(dtype),
        direction="forward",
        calls={
            "llmcore": our_generation(ours, prompts, NEW),
            "transformers": their_generation(theirs, prompts, False, NEW),
        },
        check=equal_logits,
    )


def rows() -> Iterator[Row]:
    if importlib.util.find_spec("transformers") is None:
        print("training step: left out, transformers is not installed")
        return
    for dtype in (torch.bfloat16, torch.float32):
        yield _step_row(dtype, compiled=False)
    ours = our_model(torch.bfloat16).eval()
    theirs = their_model(ours).eval()
    for batch in (1, 16):
        yield _generation_row(ours, theirs, batch)
    yield _step_row(torch.bfloat16, compiled=True)
