"""Whole models on a GPU: training and generation as on the CPU, and the captured decode step."""

from __future__ import annotations

import pytest
import torch

from llmcore.inference import generate
from llmcore.inference.decode_graph import can_capture
from llmcore.models import PRESETS, Transformer
from llmcore.training import OptimConfig, next_token_loss
from llmcore.training.logs import read_log
from tests.inference.test_decode_graph import decode
from tests.inference.test_generate import PROMPTS, make
from tests.training.tiny import make_trainer

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")


@pytest.mark.parametrize("preset", ["llama", "llama_moe", "gpt2"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.filterwarnings("ignore::llmcore.ops.BackendFallbackWarning")  # attention in float32
def test_learns_as_the_cpu_does(tmp_path, preset, dtype):
    """The loss curves are close: wrong gradients would part the two within a few steps."""
    curves = []
    for device in ("cpu", DEVICE):
        torch.manual_seed(3)
        model = Transformer(PRESETS[preset]("tiny", vocab_size=31)).to(device)
        trainer = make_trainer(
            tmp_path / str(len(curves)), model=model, optim=OptimConfig(lr=3e-3), loss=next_token_loss, dtype=dtype
        )
        trainer.run()
        curves.append([r["loss"] for r in read_log(trainer.run_dir / "log.jsonl") if r["kind"] in ("train", "eval")])
    assert curves[0][-1] < 0.9 * curves[0][0]
    assert curves[0] == pytest.approx(curves[1], rel=1e-4 if dtype == "fp32" else 1e-2)


@pytest.mark.parametrize("preset", ["llama", "llama_moe", "gpt2"])
def test_the_captured_step_gives_the_same_logits(preset):
    model = make(PRESETS[preset]("tiny"), torch.bfloat16).eval().to(DEVICE)
    assert can_capture(model)
    counts = [4, 4, 3, 3, 1, 1]
    for got, want in zip(decode(model, counts, True), decode(model, counts, False)):
        torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_step_is_captured_on_the_model_s_device():
    """Also where the process has captured on another device before."""
    logits = []
    for device in ("cuda:0", "cuda:1"):
        model = make(PRESETS["llama"]("tiny"), torch.bfloat16).eval().to(device)
        logits.append([x.cpu() for x in decode(model, [4, 3, 1], True)])
    for got, want in zip(*logits):
        torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


@pytest.mark.filterwarnings("ignore::llmcore.ops.BackendFallbackWarning")
def test_generates_what_the_cpu_generates():
    model = make(PRESETS["llama"]("tiny"))
    expected = generate(model, PROMPTS, max_tokens=12, temperature=0)
    assert generate(model.to(DEVICE), PROMPTS, max_tokens=12, temperature=0) == expected


def test_sampling_does_not_depend_on_the_batch():
    model = make(PRESETS["llama"]("tiny"), torch.bfloat16).to(DEVICE)
    together = generate(model, PROMPTS, max_tokens=6, seed=[3, 4, 5, 6])
    assert generate(model, PROMPTS[2:3], max_tokens=6, seed=[5])[0][:1] == together[2][:1]
    assert together == generate(model, PROMPTS, max_tokens=6, seed=[3, 4, 5, 6])
