"""The decoder: what a token may see, packed against padded, kernels against the reference, and its bookkeeping."""

from __future__ import annotations

import copy
import math
import textwrap
from pathlib import Path

import pytest
import torch

import llmcore
from llmcore.models import PRESETS, Transformer, gpt2, llama, llama_dyt, llama_moe

# every preset, and what the presets leave out
CONFIGS = {name: preset("tiny") for name, preset in PRESETS.items()} | {
    "mha": llama("tiny", num_kv_heads=4),
    "mqa": llama("tiny", num_kv_heads=1),
    "post": llama("tiny", norm_placement="post", norm="layer", norm_bias=False),
    "sandwich": llama("tiny", norm_placement="sandwich", activation="geglu", logit_softcap=5.0, attention_softcap=5.0),
    "options": llama(
        "tiny", qk_norm=True, window=7, attention_sinks=True, rope_fraction=0.5, rope_interleaved=True, qkv_bias=True,
        tied_embeddings=False,
    ),
    "no positions": llama("tiny", position="none"),
    "bias-balanced moe": llama_moe(
        "tiny", moe={"score": "sigmoid", "balancing": "bias", "num_groups": 4, "topk_groups": 2, "scale": 2.5}
    ),
}  # fmt: skip


@pytest.fixture(params=CONFIGS)
def model(request):
    return make(request.param)


def make(name: str) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(CONFIGS[name])
    with torch.no_grad():  # far enough from the start that every part of the model shows in the logits
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def text(length: int, start: int = 0) -> torch.Tensor:
    """Bytes of a source file of the standard library."""
    source = Path(textwrap.__file__).read_bytes()
    return torch.tensor(list(source[start : start + length]))


def logits(model, *args, **kwargs):
    return model.logits(model(*args, **kwargs).hidden)


def test_shapes_and_gradients(model):
    tokens = text(40).view(2, 20)
    out = model(tokens)
    assert out.hidden.shape == (2, 20, 64)
    assert model.logits(out.hidden).shape == (2, 20, 512)
    moe = model.config.moe
    if moe is None:
        assert (out.aux_loss, out.expert_load) == (None, None)
    else:
        assert out.expert_load.sum(-1).tolist() == [40 * moe.top_k] * 2  # two MoE layers after a dense one
        assert (out.aux_loss is None) == (moe.balancing == "bias")
    model.logits(out.hidden).logsumexp(-1).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0, name


def test_no_token_sees_the_future(model):
    tokens = text(30)[None]
    before = logits(model, tokens)
    for changed in (29, 17, 1):
        other = tokens.clone()
        other[0, changed] = (other[0, changed] + 1) % 512
        after = logits(model, other)
        torch.testing.assert_close(after[:, :changed], before[:, :changed], rtol=1e-5, atol=1e-5)
        assert (after[0, changed] - before[0, changed]).abs().max() > 1e-2


def test_window_bounds_the_reach():
    """Through two layers with a window of 7 a token reaches 2 * 6 tokens back, and no further."""
    model = make("options")
    tokens = text(30)[None]
    other = tokens.clone()
    other[0, 5] = (other[0, 5] + 1) % 512
    difference = (logits(model, other) - logits(model, tokens)).abs().amax(-1)[0]
    assert (difference[5:18] > 1e-4).all()
    assert (difference[18:] < 1e-5).all()


def test_packed_equals_each_document_alone(model):
    lengths = [23, 1, 40, 8]
    documents = [text(n, 100 * i) for i, n in enumerate(lengths)]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    packed = logits(model, torch.cat(documents), cu_seqlens=cu_seqlens)
    alone = torch.cat([logits(model, d[None])[0] for d in documents])
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-5)
    positions = torch.cat([torch.arange(n) for n in lengths])
    given = logits(model, torch.cat(documents), cu_seqlens=cu_seqlens, positions=positions, max_seqlen=40)
    torch.testing.assert_close(given, packed, rtol=0, atol=0)


def test_packed_gradients_equal_padded(model):
    lengths = [23, 9, 16]
    documents = [text(n, 50 * i) for i, n in enumerate(lengths)]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    padded = torch.nn.utils.rnn.pad_sequence(documents, batch_first=True)
    real = torch.nn.utils.rnn.pad_sequence([torch.ones(n, dtype=torch.bool) for n in lengths], batch_first=True)
    seed = torch.randn(sum(lengths), 512, generator=torch.Generator().manual_seed(0))
    parameters = list(model.parameters())
    gradients = [
        torch.autograd.grad(out, parameters, seed)
        for out in (logits(model, torch.cat(documents), cu_seqlens=cu_seqlens), logits(model, padded)[real])
    ]
    for (name, _), packed, alone in zip(model.named_parameters(), *gradients):
        torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-4 * float(alone.abs().max()), msg=name)


def outputs_and_gradients(model, backend, tokens):
    model.zero_grad()
    with llmcore.backend(backend):
        out = logits(model, tokens)
        out.double().logsumexp(-1).sum().backward()
    return {"logits": out.detach()} | {n: p.grad for n, p in model.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_kernels_equal_reference(name, dtype):
    """The suite's rule on a whole model: kernels may be at most twice (gradients: three times) as far from float64 as
    plain torch in the same dtype is, plus two roundings.

    Distances are relative root mean squares over the elements of a tensor and over three texts. One element's two
    errors say nothing about each other, so all scalars (DyT's alphas) are one group."""
    model = make(name)
    if model.config.moe is not None and dtype != torch.float32:
        pytest.skip("a rounding that changes an expert's choice is no error of a kernel")
    model.to(dtype)
    plain_model, exact_model = copy.deepcopy(model), copy.deepcopy(model).double()
    errors: dict[str, list[tuple[float, float]]] = {}
    for start in (0, 100, 200):
        tokens = text(50, start).view(2, 25)
        kernel = outputs_and_gradients(model, "kernel", tokens)
        plain = outputs_and_gradients(plain_model, "reference", tokens)
        for what, wanted in outputs_and_gradients(exact_model, "reference", tokens).items():
            size = wanted.norm()
            assert size > 0, what
            pair = tuple(float((got[what].double() - wanted).norm() / size) for got in (kernel, plain))
            errors.setdefault(what if wanted.numel() > 1 else "scalars", []).append(pair)
    for what, pairs in errors.items():
        error, plain_error = torch.tensor(pairs).square().mean(0).sqrt().tolist()
        allowed = (2 if what == "logits" else 3) * plain_error + 2 * torch.finfo(dtype).eps
        assert error <= allowed, f"{what}: error {error:.2e}, plain torch {plain_error:.2e}, allowed {allowed:.2e}"


def test_compiles_without_a_graph_break():
    model = make("llama_moe")
    tokens, cu_seqlens = text(40), torch.tensor([0, 13, 40], dtype=torch.int32)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(tokens, cu_seqlens=cu_seqlens).hidden, model(tokens, cu_seqlens=cu_seqlens).hidden)


def test_casting_keeps_what_must_be_float32():
    model = make("bias-balanced moe").bfloat16()
    assert model.rope.cos.dtype == torch.float32
    assert model.blocks[1].mlp.expert_bias.dtype == torch.float32
    assert model(text(20)[None]).hidden.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["gpt2", "llama_moe"])
def test_initial_weights(name):
    torch.manual_seed(0)
    model = Transformer(CONFIGS[name])
    narrow = 0.02 / math.sqrt(2 * model.config.num_layers)
    for key, parameter in model.named_parameters():
        if parameter.ndim == 1:
            expected = 0.0 if key.endswith("bias") else 1.0
            assert (parameter == expected).all(), key
        else:
            writes_stream = "attention.out" in key or ".down" in key
            assert parameter.std().item() == pytest.approx(narrow if writes_stream else 0.02, rel=0.08), key
    # so the first loss is that of a uniform guess (by tied embeddings a token speaks for itself, so not on real text)
    tokens, targets = torch.randint(512, (2, 200))
    loss = torch.nn.functional.cross_entropy(logits(model, tokens[None])[0], targets)
    assert loss.item() == pytest.approx(math.log(512), abs=0.05)


def test_dropout_only_in_training():
    torch.manual_seed(0)
    model = Transformer(llama("tiny", dropout=0.5))
    tokens = text(20)[None]
    assert not torch.equal(logits(model, tokens), logits(model, tokens))
    model.eval()
    assert torch.equal(logits(model, tokens), logits(model, tokens))


def test_tied_and_untied():
    tied, untied = Transformer(llama("tiny")), Transformer(llama("tiny", tied_embeddings=False))
    assert tied.lm_head_weight is tied.embed_tokens.weight
    assert untied.lm_head_weight.data_ptr() != untied.embed_tokens.weight.data_ptr()
    assert untied.num_parameters() - tied.num_parameters() == 512 * 64
    assert tied.num_parameters(active=True) == untied.num_parameters(active=True)


def test_active_parameters_of_experts():
    model = make("llama_moe")
    expert = 3 * 64 * 48  # gate, up and down
    assert model.num_parameters() - model.num_parameters(active=True) == 2 * (8 - 2) * expert


def test_flops_per_token():
    model, windowed = Transformer(gpt2("tiny")), Transformer(gpt2("tiny", window=4))
    weights = model.num_parameters(active=True)
    assert weights == model.num_parameters() - 256 * 64
    seen = sum(range(1, 33))  # pairs of a query and a key it sees
    assert model.flops_per_token(32) == pytest.approx(6 * weights + 12 * 2 * 64 * seen / 32)
    seen = 1 + 2 + 3 + 29 * 4
    assert windowed.flops_per_token(32) == pytest.approx(6 * weights + 12 * 2 * 64 * seen / 32)


def test_update_expert_bias_reaches_each_layer():
    model = make("bias-balanced moe")
    load = torch.zeros(2, 8, dtype=torch.int64)
    load[0, 3], load[1, 5] = 80, 80
    model.update_expert_bias(load)
    for layer, busy in ((1, 3), (2, 5)):
        expected = torch.full((8,), 1e-3)
        expected[busy] = -1e-3
        torch.testing.assert_close(model.blocks[layer].mlp.expert_bias, expected)
    with pytest.raises(ValueError, match=r"expert_load has shape \(8,\); accepted: \(2, 8\)"):
        model.update_expert_bias(load[0])
    Transformer(llama_dyt("tiny")).update_expert_bias(torch.ones(2, 8))  # nothing to do, and no error


def test_learns_a_text():
    """Forty steps of AdamW on 256 bytes get well below the entropy of single bytes, with and without norms."""
    tokens = text(256)[None]
    frequency = torch.bincount(tokens[0]) / 256
    entropy = -(frequency * frequency.clamp(min=1e-9).log()).sum().item()
    for config in (llama("tiny"), llama_dyt("tiny")):
        torch.manual_seed(0)
        model = Transformer(config)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(40):
            loss = torch.nn.functional.cross_entropy(logits(model, tokens)[0, :-1], tokens[0, 1:])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert loss.item() < entropy - 1


def test_refuses():
    model = Transformer(gpt2("tiny"))
    tokens = text(20)
    with pytest.raises(ValueError, match=r"token id 512 at index \(0, 7\); accepted: 0 to vocab_size - 1 = 511"):
        model(torch.where(torch.arange(20) == 7, 512, tokens)[None])
    with pytest.raises(ValueError, match=r"token id -100 at index \(0, 3\)"):
        model(torch.where(torch.arange(20) == 3, -100, tokens)[None])
    with pytest.raises(ValueError, match=r"position 256 at index \(0, 0\); accepted: 0 to max_positions - 1 = 255"):
        model(tokens[None], positions=torch.full((1, 20), 256))
    with pytest.raises(ValueError, match=r"a sequence has 257 tokens; accepted: max_positions = 256"):
        model(text(257)[None])
    with pytest.raises(ValueError, match=r"tokens has shape \(20,\); accepted: \(batch, seq\), or \(total,\)"):
        model(tokens)
    with pytest.raises(ValueError, match=r"positions has shape \(20,\); accepted: \(1, 20\), tokens'"):
        model(tokens[None], positions=tokens)
    with pytest.raises(TypeError, match=r"tokens has dtype torch.float32; accepted: torch.int32, torch.int64"):
        model(tokens[None].float())
    with pytest.raises(ValueError, match=r"tokens has shape \(1, 20\); accepted: \(total,\) with cu_seqlens"):
        model(tokens[None], cu_seqlens=torch.tensor([0, 20], dtype=torch.int32))


@pytest.mark.parametrize("position", ["rope", "learned", "none"])
@pytest.mark.parametrize(
    "bad", [[0, 19], [3, 20], [0, 21], [0, 15, 10, 20], [-1, 20], [0], [], [[0, 20]], [0.0, 20.0]], ids=str
)
def test_refuses_offsets_that_do_not_cover_the_tokens(bad, position):
    model = Transformer(llama("tiny", position=position))
    cu_seqlens = torch.tensor(bad) if bad == [0.0, 20.0] else torch.tensor(bad, dtype=torch.int32)
    with pytest.raises(
        ValueError, match=r"cu_seqlens is tensor\(.*accepted: torch.int32 offsets rising from 0 to 20 tokens"
    ):
        model(text(20), cu_seqlens=cu_seqlens)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)], ids=str)
def test_an_empty_batch_gives_an_empty_result(model, shape):
    out = model(torch.zeros(shape, dtype=torch.long))
    assert out.hidden.shape == (*shape, 64)
    (model.logits(out.hidden).sum() + (0 if out.aux_loss is None else out.aux_loss)).backward()
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)
