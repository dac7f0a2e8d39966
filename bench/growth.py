"""How the time of the CPU kernels grows with the size of the work, beside a model of it.

    python bench/growth.py [--only NAME] [--threads N] [--out docs/images]

Each curve is measured points and the line of its model through its last point; what a point takes beyond that line is
printed. Plots are log-log. Writes growth-FAMILY.svg and growth.json; with --only, the other families in growth.json
stay. About two minutes, alone on the machine.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

sys.path.append(str(Path(__file__).resolve().parent.parent))  # behind the installed llmcore

from bench.compare import machine, seconds
from llmcore import ops

BF16 = torch.bfloat16
SECONDS = 0.8  # of measuring for a point


@dataclass(frozen=True)
class Curve:
    """`make(size)` gives what is timed, `model(size)` a number that its time should be in proportion to."""

    family: str
    label: str
    axis: str
    sizes: tuple[int, ...]
    make: Callable[[int], Callable[[], object]]
    model: Callable[[int], float]
    model_name: str


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(BF16)


def no_grad(call: Callable[[], object]) -> Callable[[], object]:
    def run() -> object:
        with torch.no_grad():
            return call()

    return run


def attention(
    batch: int, seq: int, heads: int, window: int | None = None, backward: bool = False
) -> Callable[[], object]:
    """Causal self-attention, head size 64, four query heads to a key head."""
    leaves = [randn(batch, seq, h, 64).requires_grad_(backward) for h in (heads, heads // 4, heads // 4)]
    if not backward:
        return no_grad(lambda: ops.attention(*leaves, causal=True, window=window))
    seed = randn(batch, seq, heads, 64)
    return lambda: torch.autograd.grad(ops.attention(*leaves, causal=True, window=window), leaves, seed)


def seen(seq: int, window: int | None = None) -> float:
    """Pairs of a query and a key that it sees."""
    reach = min(window or seq, seq)
    return seq * reach - reach * (reach - 1) / 2


def decode(batch: int, keys: int) -> Callable[[], object]:
    """One query for each sequence, 32 heads on 8 KV heads, head size 128."""
    block = 16
    blocks = -(-keys // block)
    cache = [randn(batch * blocks, block, 8, 128) for _ in range(2)]
    table = torch.randperm(batch * blocks, generator=torch.Generator().manual_seed(0)).int().view(batch, blocks)
    q, lengths = randn(batch, 32, 128), torch.full((batch,), keys, dtype=torch.int32)
    return no_grad(lambda: ops.paged_attention(q, *cache, table, lengths))


def loss(tokens: int, vocab: int) -> Callable[[], object]:
    hidden, weight = randn(tokens, 512).requires_grad_(), (randn(vocab, 512) / 16).requires_grad_()
    targets = torch.randint(vocab, (tokens,), generator=torch.Generator().manual_seed(0))
    return lambda: torch.autograd.grad(ops.linear_cross_entropy(hidden, weight, targets), (hidden, weight))


def experts(count: int, rows: int) -> Callable[[], object]:
    """The first product of a mixture of experts (512 to 1024), `rows` rows evenly spread over the experts."""
    x, weight = randn(rows, 512), randn(count, 1024, 512) / 16
    offsets = (torch.arange(count + 1) * rows // count).int()
    return no_grad(lambda: ops.grouped_gemm(x, weight, offsets))


def curves() -> Iterator[Curve]:
    lengths = (128, 256, 512, 1024, 2048, 4096, 8192)
    causal = "pairs of query and key"
    yield Curve("attention", "forward, 8 heads", "sequence length", lengths, lambda s: attention(1, s, 8), seen, causal)
    yield Curve(
        "attention", "forward + backward, 8 heads", "sequence length", lengths[:-1],
        lambda s: attention(1, s, 8, backward=True), seen, causal,
    )  # fmt: skip
    yield Curve(
        "attention", "window 256, 8 heads", "sequence length", lengths, lambda s: attention(1, s, 8, 256),
        lambda s: seen(s, 256), "S x window",
    )  # fmt: skip
    yield Curve(
        "attention-batch", "S 512, 8 heads", "batch", (1, 2, 4, 8, 16, 32), lambda b: attention(b, 512, 8), float, "B"
    )
    yield Curve(
        "attention-batch", "S 512, batch 1", "heads", (4, 8, 16, 32, 64), lambda h: attention(1, 512, h), float, "heads"
    )
    for batch in (1, 8):
        yield Curve(
            "decode", f"batch {batch}", "keys of each sequence", (128, 256, 512, 1024, 2048, 4096, 8192, 16384),
            lambda n, batch=batch: decode(batch, n), float, "KV length",
        )  # fmt: skip
    vocabularies = tuple(1 << p for p in range(10, 18))
    yield Curve("loss", "2048 tokens", "vocabulary", vocabularies, lambda v: loss(2048, v), float, "tokens x V")
    yield Curve(
        "loss", "V 8192", "tokens", (32, 128, 512, 1024, 2048, 4096, 8192), lambda n: loss(n, 8192), float, "tokens x V"
    )
    counts = (1, 2, 4, 8, 16, 32, 64, 128)
    yield Curve("experts", "64 rows each", "experts", counts, lambda e: experts(e, 64 * e), float, "rows")
    yield Curve("experts", "1 row each", "experts", counts, lambda e: experts(e, e), float, "weights read")
    yield Curve("experts", "4096 rows in all", "experts", counts, lambda e: experts(e, 4096), lambda e: 1.0, "rows")


def time_of(call: Callable[[], object]) -> float:
    """Seconds, the median of what fits into SECONDS, at least 5."""
    call()
    times: list[float] = []
    stop = time.perf_counter() + SECONDS
    while len(times) < 5 or (time.perf_counter() < stop and len(times) < 200):
        times.append(seconds(call))
    return median(times)


def measure(curve: Curve) -> dict:
    times = [time_of(curve.make(size)) for size in curve.sizes]
    unit = times[-1] / curve.model(curve.sizes[-1])
    lines = [unit * curve.model(size) for size in curve.sizes]
    over = [t / line for t, line in zip(times, lines)]
    points = "  ".join(f"{s}: {t * 1e3:.3g} ms ({o:.2f})" for s, t, o in zip(curve.sizes, times, over))
    print(f"{curve.family}: {curve.label}, model {curve.model_name}: {points}", flush=True)
    return {
        "family": curve.family, "label": curve.label, "axis": curve.axis, "model": curve.model_name,
        "sizes": curve.sizes, "seconds": times, "model_seconds": lines,
    }  # fmt: skip


def plot(results: list[dict], folder: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "growth", "font.size": 9})
    import matplotlib.pyplot as plt

    for family in dict.fromkeys(r["family"] for r in results):
        of_family = [r for r in results if r["family"] == family]
        axes_names = list(dict.fromkeys(r["axis"] for r in of_family))
        figure, axes = plt.subplots(1, len(axes_names), figsize=(5 * len(axes_names), 3.6), squeeze=False)
        for axis, name in zip(axes[0], axes_names):
            for r in (r for r in of_family if r["axis"] == name):
                (line,) = axis.loglog(r["sizes"], [s * 1e3 for s in r["seconds"]], "o", label=r["label"])
                model = [s * 1e3 for s in r["model_seconds"]]
                axis.loglog(r["sizes"], model, "--", color=line.get_color(), linewidth=1, label=f"model: {r['model']}")
            axis.set_xscale("log", base=2)
            axis.set_xlabel(name)
            axis.set_ylabel("ms")
            axis.grid(True, which="major", linewidth=0.3)
            axis.legend(fontsize=8)
        figure.tight_layout()
        figure.savefig(folder / f"growth-{family}.svg", metadata={"Date": None})
        plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="curves whose family and label contain this")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "growth.json"
    results = json.loads(path.read_text())["curves"] if options.only and path.exists() else []
    for curve in curves():
        if options.only in f"{curve.family} {curve.label}":
            result = measure(curve)
            same = [i for i, r in enumerate(results) if (r["family"], r["label"]) == (curve.family, curve.label)]
            if same:
                results[same[0]] = result
            else:
                results.append(result)
            path.write_text(json.dumps({"machine": machine(), "curves": results}, indent=1) + "\n")
    plot(results, options.out)


if __name__ == "__main__":
    main()
