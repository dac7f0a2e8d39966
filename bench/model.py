"""Tokens per second of a whole Llama in training and in generation, beside transformers with the same weights.

    python bench/model.py [--device auto] [--size 135m] [--rows 8] [--row-len 2048] [--rounds 5] [--json FILE]

Training is a step on full rows: loss, gradients, clipping to norm 1, AdamW. llmcore keeps float32 masters of bfloat16
weights; the peers train bfloat16 weights alone, by torch's fused AdamW. Generation is greedy from prompts of 128
tokens. Peers: transformers with SDPA as it is, and under torch.compile (generation: its static cache). Losses and
logits must agree before anything is timed; a peer that is not there is left out with its reason.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F

sys.path.append(str(Path(__file__).resolve().parent.parent))  # behind the installed llmcore

from llmcore.inference import generate
from llmcore.inference.device import find_device
from llmcore.models import Transformer, llama
from llmcore.models.families import FAMILIES
from llmcore.training import OptimConfig, Optimizer, compute_dtype, next_token_loss

PROMPT, NEW, BATCHES = 128, 128, (1, 32)
AGREE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # relative, of losses and logits


def their_model(ours: Transformer):
    """transformers' Llama with our weights."""
    import transformers

    c = ours.config
    config = transformers.LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.dim, intermediate_size=c.ffn_dim, num_hidden_layers=c.num_layers,
        num_attention_heads=c.num_heads, num_key_value_heads=c.num_kv_heads, max_position_embeddings=c.max_positions,
        rms_norm_eps=c.norm_eps, rope_theta=c.rope_base, tie_word_embeddings=c.tied_embeddings,
        attn_implementation="sdpa",
    )  # fmt: skip
    theirs = transformers.LlamaForCausalLM(config).to(ours.lm_head_weight)
    state = ours.state_dict()
    for rule in FAMILIES["llama"].rules(c):
        for name, tensor in zip(rule.theirs, rule.split(state[rule.ours])):
            theirs.get_parameter(name).data.copy_(tensor)
    return theirs


def text(rows: int, length: int, vocab: int, device: torch.device) -> torch.Tensor:
    """(rows, length) token ids."""
    return torch.randint(0, vocab, (rows, length), generator=torch.Generator().manual_seed(0)).to(device)


def our_step(model: Transformer, tokens: torch.Tensor) -> Callable[[], float]:
    rows, length = tokens.shape
    optimizer = Optimizer(model, OptimConfig(lr=1e-5, grad_clip=1.0))
    batch = SimpleNamespace(
        tokens=tokens.flatten(),
        targets=F.pad(tokens[:, 1:], (0, 1), value=-100).flatten(),
        positions=torch.arange(length, device=tokens.device).repeat(rows),
        cu_seqlens=torch.arange(0, rows * length + 1, length, dtype=torch.int32, device=tokens.device),
        max_seqlen=length,
        num_targets=rows * (length - 1),
    )

    def step() -> float:
        loss = next_token_loss(model, batch)
        loss.total.backward()
        optimizer.accumulate()
        optimizer.step(1e-5, optimizer.gradient_norm(loss.num_targets))
        return float(loss.total.detach()) / loss.num_targets

    return step


def their_step(theirs, tokens: torch.Tensor, compiled: bool) -> Callable[[], float]:
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    model = torch.compile(theirs) if compiled else theirs

    def step() -> float:
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def our_generation(model: Transformer, prompts: torch.Tensor, new: int = NEW) -> Callable[[], float]:
    def run() -> float:
        generate(model, prompts, max_tokens=new, temperature=0)
        return 0.0

    return run


def their_generation(theirs, prompts: torch.Tensor, compiled: bool, new: int = NEW) -> Callable[[], float]:
    theirs.generation_config.eos_token_id = None
    options = {"cache_implementation": "static"} if compiled else {}

    def run() -> float:
        theirs.generate(
            prompts, attention_mask=torch.ones_like(prompts), do_sample=False, max_new_tokens=new, pad_token_id=0,
            **options,
        )  # fmt: skip
        return 0.0

    return run


def seconds(call: Callable[[], float], device: torch.device) -> float:
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def compare(
    what: str, calls: dict[str, Callable], tokens: int, device: torch.device, rounds: int, must: dict | None = None
) -> dict:
    """Medians of tokens per second, taken in turns. must: peer -> how many times its speed llmcore's must be."""
    left_out = {}
    for name, call in list(calls.items()):
        try:
            call()  # compiles, warms up
        except Exception as error:
            if name == "llmcore":
                raise
            left_out[name] = f"{type(error).__name__}: {error}".splitlines()[0][:120]
            del calls[name]
    times = {name: [] for name in calls}
    for turn in range(rounds):
        for name in list(calls) if turn % 2 else list(reversed(calls)):
            times[name].append(seconds(calls[name], device))
    rate = {name: tokens / statistics.median(t) for name, t in times.items()}
    ratio = {name: rate["llmcore"] / r for name, r in rate.items() if name != "llmcore"}
    row = {"what": what, "tokens_per_second": rate, "ratio": ratio, "must": must or {}, "left_out": left_out}
    ratios = "  ".join(f"{r:5.2f}x {name}" for name, r in ratio.items())
    reasons = "  ".join(f"{name}: {reason}" for name, reason in left_out.items())
    print(f"{what:36} {rate['llmcore']:12,.0f} tokens/s  {ratios}  {reasons}", flush=True)
    return row


def check(name: str, got: float | torch.Tensor, want: float | torch.Tensor, limit: float) -> None:
    got, want = (torch.as_tensor(x).double() for x in (got, want))
    error = float((got - want).norm() / want.norm())
    if not error <= limit:
        raise AssertionError(f"{name} differ by {error:.1e}; accepted: {limit:g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--size", default="135m", help="of llmcore.models.llama")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--row-len", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the results there")
    options = parser.parse_args()
    device = find_device(options.device, "--device")
    dtype = compute_dtype("auto", device)
    torch.manual_seed(0)
    ours = Transformer(llama(options.size)).to(device, dtype)
    has_peer = importlib.util.find_spec("transformers") is not None
    theirs = their_model(ours) if has_peer else None
    vocab = ours.config.vocab_size
    rows = []

    prompts = text(max(BATCHES), PROMPT, vocab, device)
    if theirs is not None:
        with torch.no_grad():
            check("the logits", ours.logits(ours(prompts[:1]).hidden), theirs(prompts[:1]).logits, AGREE[dtype])
    for batch in BATCHES:
        calls = {"llmcore": our_generation(ours, prompts[:batch])}
        for compiled in (False, True) if theirs is not None else ():
            name = "transformers compiled" if compiled else "transformers"
            calls[name] = their_generation(theirs, prompts[:batch], compiled)
        rows.append(compare(f"generate, batch {batch}, {PROMPT} + {NEW}", calls, batch * NEW, device, options.rounds))

    tokens = text(options.rows, options.row_len, vocab, device)
    calls = {"llmcore": our_step(ours, tokens)}
    for compiled in (False, True) if theirs is not None else ():
        calls["transformers compiled" if compiled else "transformers"] = their_step(theirs, tokens, compiled)
    if theirs is not None:  # before either has moved far
        check("the losses", calls["llmcore"](), calls["transformers"](), AGREE[dtype])
    what = f"train, {options.rows} x {options.row_len}"
    is_target = device.type == "cuda" and (options.size, options.rows, options.row_len) == ("135m", 8, 2048)
    must = {"transformers compiled": 1.2} if is_target else {}
    rows.append(compare(what, calls, tokens.numel(), device, options.rounds, must))

    if options.json:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        machine = {"device": name, "torch": torch.__version__, "dtype": str(dtype).removeprefix("torch.")}
        result = {"machine": machine, "model": f"llama {options.size}", "results": rows}
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
