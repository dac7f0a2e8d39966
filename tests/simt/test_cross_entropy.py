"""linear_cross_entropy's CUDA side on the emulator beyond the registry's samples: several chunks, every team and tail
of the kernel, targets outside the vocabulary, and what must not happen: waiting for the device, or logits of all
tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import llmcore
from llmcore.ops import Sample, check_device_errors, linear_cross_entropy, linear_cross_entropy_cuda, registry
from llmcore.ops.registry import FLOATS
from tests.ops.checks import check_sample, copied, run_with_gradients
from tests.ops.test_linear_cross_entropy import BAD_CALLS, call_with
from tests.simt.emulation import MODES, emulator

SPEC = registry["linear_cross_entropy"]
EVERYTHING = {"softcap": 5.0, "z_loss": 1e-2, "label_smoothing": 0.1}
one_mode = pytest.mark.parametrize("emulated", [("random", "random")], indirect=True, ids="-".join)
each_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: str(dtype).removeprefix("torch."))


def sample(tokens: int, dim: int, vocab: int, dtype: torch.dtype, ignored: float = 0.0, **kwargs) -> Sample:
    make = torch.Generator().manual_seed(vocab)
    hidden, weight = torch.randn(tokens, dim, generator=make), torch.randn(vocab, dim, generator=make)
    targets = torch.randint(vocab, (tokens,), generator=make)
    targets[torch.rand(tokens, generator=make) < ignored] = -100
    return Sample(f"{tokens}x{dim}x{vocab}", (hidden.to(dtype), weight.to(dtype), targets), kwargs, (0, 1))


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of 7 tokens."""
    monkeypatch.setattr(linear_cross_entropy_cuda, "CHUNK_BYTES", 0)
    monkeypatch.setattr(linear_cross_entropy_cuda, "MIN_CHUNK", 7)


@pytest.mark.parametrize(
    ("dtype", "label"), [(dtype, s.label) for dtype in FLOATS for s in SPEC.samples(dtype, "cpu")], ids=str
)
@one_mode
def test_chunks(dtype, label, small_chunks, emulated):
    with llmcore.backend("kernel"):
        check_sample(SPEC, next(s for s in SPEC.samples(dtype, "cpu") if s.label == label))


# Around a thread's 8 logits, a warp's 256, the rows that a warp takes, a CTA's 4096 and its second and third round.
@pytest.mark.parametrize("vocab", [1, 2, 7, 8, 9, 255, 256, 257, 513, 2047, 2048, 2049, 4095, 4096, 4097, 8193, 12301])
@each_dtype
def test_rows_of_every_length(vocab, dtype, emulated):
    for reduction in ("mean", "none"):
        check_sample(SPEC, sample(5, 3, vocab, dtype, ignored=0.2, reduction=reduction, **EVERYTHING))


@each_dtype
@one_mode
def test_large_vocabulary(dtype, emulated):
    check_sample(SPEC, sample(3, 4, 262144, dtype, z_loss=1e-3, label_smoothing=0.1))
    check_sample(SPEC, sample(2, 4, 262143, dtype, reduction="none"))


@pytest.mark.parametrize(("arguments", "message"), BAD_CALLS)
@pytest.mark.parametrize("gradient", [False, True])
def test_refuses_what_the_cpu_refuses(arguments, message, gradient):
    with emulator(), pytest.raises((RuntimeError, ValueError), match=message):
        call_with(arguments, gradient)


@pytest.mark.parametrize("name", ["dloss", "lse"])
def test_backward_checks_what_it_is_given(name):
    hidden, weight, targets = sample(6, 4, 9, torch.float32).args
    call = {"dloss": torch.ones(6), "lse": torch.ones(6)}
    call[name] = torch.ones(5)
    with emulator(), pytest.raises(RuntimeError, match=rf"_backward: {name} has shape \(5,\); expected \(6\)"):
        torch.ops.llmcore.linear_cross_entropy_backward(
            call["dloss"], hidden, weight, targets, call["lse"], -100, 0.0, 0.0, 0.0, True, True
        )


# ---- ignored tokens and bad targets


@each_dtype
@one_mode
def test_ignored_tokens_are_not_read(dtype, small_chunks, emulated):
    """Neither their hidden nor the gradient that reaches their loss."""
    hidden, weight, targets = sample(20, 8, 300, dtype).args
    targets[3:11] = -100
    hidden[targets == -100] = torch.nan
    hidden.requires_grad_(), weight.requires_grad_()
    losses = linear_cross_entropy(hidden, weight, targets, reduction="none")
    assert losses.isfinite().all()
    losses.backward(torch.where(targets == -100, torch.nan, 1.0))
    assert weight.grad.isfinite().all()
    assert (hidden.grad[targets == -100] == 0).all()


@each_dtype
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_targets_outside_the_vocabulary(dtype, reduction, small_chunks, emulated):
    """Their loss is NaN, all gradients are as if they were ignored, and the error waits to be asked for."""
    hidden, weight, targets = sample(40, 8, 300, dtype, **EVERYTHING).args
    bad = targets.clone()
    bad[[17, 18, 30]] = torch.tensor([50300, -1, 2**62])
    ignored = targets.index_fill(0, torch.tensor([17, 18, 30]), -100)
    gradients = {}
    for name, ids in (("bad", bad), ("ignored", ignored)):
        inputs = hidden.clone(), weight.clone()
        inputs[0][[17, 18, 30]] = torch.nan
        for t in inputs:
            t.requires_grad_()
        loss = linear_cross_entropy(*inputs, ids, reduction=reduction, **EVERYTHING)
        if name == "bad" and reduction == "none":
            assert loss.isnan().nonzero().flatten().tolist() == [17, 18, 30]
        elif name == "bad":
            assert loss.isnan()
        gradients[name] = torch.autograd.grad(loss, inputs, torch.ones_like(loss))
    assert all(torch.equal(a, b) for a, b in zip(*gradients.values()))
    with pytest.raises(RuntimeError) as raised:
        check_device_errors("cpu")
    assert str(raised.value) == (
        "linear_cross_entropy: 3 targets lie outside the vocabulary, the first is targets[17] = 50300; "
        "accepted: 0 to 299, or -100 to ignore the token"
    )
    check_device_errors("cpu")  # the record is empty again


@pytest.mark.parametrize(
    ("target", "ignore_index", "message"),
    [
        (9, -100, r"1 target lies outside the vocabulary, the first is targets\[4\] = 9; accepted: 0 to 8, or -100 to"),
        (-100, -1, r"targets\[4\] = -100; accepted: 0 to 8, or -1 to"),
        (-(2**63), -100, r"targets\[4\] = -2147483648 or less;"),
        (2**31, -100, r"targets\[4\] = 2147483647 or more;"),
    ],
)
def test_the_error_names_what_it_found(target, ignore_index, message, emulated):
    hidden, weight, targets = sample(6, 4, 9, torch.float32).args
    targets[4] = target
    assert linear_cross_entropy(hidden, weight, targets, ignore_index=ignore_index).isnan()
    with pytest.raises(RuntimeError, match=message):
        check_device_errors("cpu")


@one_mode
def test_an_ignore_index_within_the_vocabulary(emulated):
    hidden, weight, targets = sample(6, 4, 9, torch.float32).args
    losses = linear_cross_entropy(hidden, weight, targets, ignore_index=int(targets[2]), reduction="none")
    assert losses[2] == 0
    check_device_errors("cpu")


# ---- numbers


def test_same_bits_under_every_schedule(small_chunks):
    call = sample(30, 16, 5000, torch.bfloat16, ignored=0.2, label_smoothing=0.1)
    results = []
    for mode in MODES:
        with emulator(*mode, seed=2):
            outputs, gradients = run_with_gradients(SPEC.op, copied(call), [torch.ones(())])
            results.append(outputs + gradients)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@one_mode
def test_autocast_leaves_the_numbers_alone(emulated):
    hidden, weight, targets = sample(20, 32, 300, torch.float32).args
    expected = linear_cross_entropy(hidden, weight, targets)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(linear_cross_entropy(hidden, weight, targets), expected)


@one_mode
def test_it_compiles(emulated):
    hidden, weight, targets = sample(20, 32, 300, torch.float32).args
    compiled = torch.compile(linear_cross_entropy, backend="aot_eager", fullgraph=True)
    for reduction in ("mean", "none"):
        losses = [f(hidden, weight, targets, reduction=reduction) for f in (linear_cross_entropy, compiled)]
        assert torch.equal(*losses)


@one_mode
def test_float16_gradients_use_the_range_of_float16(emulated):
    """A vocabulary so large that probabilities are below the smallest float16, behind a loss scale and without one."""
    hidden, weight, targets = sample(4, 8, 40000, torch.float16).args
    hidden, weight = hidden * 1e-3, weight * 1e-3
    for scale in (1.0, 65536.0):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        (linear_cross_entropy(*leaves, targets) * scale).backward()
        exact = hidden.double().requires_grad_(), weight.double().requires_grad_()
        (llmcore.reference.linear_cross_entropy(*exact, targets) * scale).backward()
        for leaf, right in zip(leaves, exact):
            error = (leaf.grad - right.grad).abs().max()
            assert error <= 2e-3 * right.grad.abs().max() + 2**-24


# ---- what must not happen


class Watch(TorchDispatchMode):
    """Refuses what would make the host wait, and keeps the size of the largest tensor."""

    largest = 0
    waits = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique", "repeat_interleave")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        assert not name.startswith(self.waits), f"{name} waits for the device"
        indices = args[1] if name == "index" else ()
        assert not any(isinstance(i, Tensor) and i.dtype == torch.bool for i in indices), "a mask waits for the device"
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, Tensor):
                self.largest = max(self.largest, t.untyped_storage().nbytes())
        return out


@each_dtype
@one_mode
def test_no_waiting_and_no_logits_of_all_tokens(dtype, small_chunks, emulated):
    hidden, weight, targets = sample(200, 3, 3000, dtype, ignored=0.1).args
    arguments = (-100, 5.0, 1e-2, 0.1)
    functions = linear_cross_entropy_cuda.IMPLEMENTATIONS
    with Watch() as watch:
        loss, lse = functions["linear_cross_entropy"](hidden, weight, targets, *arguments)
        functions["linear_cross_entropy_backward"](
            torch.ones_like(loss), hidden, weight, targets, lse, *arguments, True, True
        )
        functions["linear_cross_entropy_with_grad"](hidden, weight, targets, *arguments, True, True, True)
    assert watch.largest == 7 * 3000 * 4


@pytest.mark.parametrize(
    ("vocab", "tokens", "rows"),
    [(50257, 8192, 2560), (131072, 8192, 1024), (262144, 8192, 512), (8, 100, 100), (1 << 24, 900, 128)],
)
def test_chunk_size(vocab, tokens, rows):
    assert linear_cross_entropy_cuda._chunk_size(tokens, vocab) == rows


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(4, 9)}, r"logits has shape \(4, 9\) and strides \(9, 1\); expected"),
        ({"logits": torch.zeros(4, 16)[:, 1:9]}, "aligned to 16 bytes"),
        ({"logits": torch.zeros(4, 8).half()}, "logits has dtype float16; expected float32"),
        ({"targets": torch.zeros(3).long()}, r"targets has shape \(3,\); expected \(4\)"),
        ({"lse": torch.zeros(8)[::2]}, "lse is not contiguous"),
        ({"dloss": torch.zeros(2)}, r"dloss has shape \(2,\); expected \(4,\) or \(1,\)"),
        ({"gradient": "float64"}, "gradient is 'float64'; accepted: float32, bfloat16, float16"),
    ],
)
def test_the_kernel_s_own_op_refuses(change, message):
    call = {
        "logits": torch.zeros(4, 8),
        "targets": torch.zeros(4).long(),
        "loss": torch.zeros(4),
        "lse": torch.zeros(4),
    }
    call |= {"dloss": torch.ones(1), "first": 0, "ignore_index": -100, "softcap": 0.0, "z_loss": 0.0}
    call |= {"label_smoothing": 0.0, "gradient": "float32", **change}
    with pytest.raises(RuntimeError, match=message):
        torch.ops.llmcore.cross_entropy_chunk_(**call)
