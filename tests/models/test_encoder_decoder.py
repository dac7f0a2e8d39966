"""The encoder-decoder: against torch.nn.Transformer, at a task it must learn, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from llmcore.inference import generate_seq2seq
from llmcore.layers import Memory, sinusoidal
from llmcore.models import EncoderDecoder, ModelConfig, Transformer, attention_is_all_you_need, build_model, llama
from tests.models.parity import TOLERANCE, randomise

OPTIONS = {"vocab_size": 60, "qkv_bias": True, "attention_out_bias": True}  # torch's has biases everywhere


def waves(length, dim):
    """The paper's formula, number by number."""
    table = torch.zeros(length, dim)
    for position in range(length):
        for i in range(dim):
            angle = position / 10000 ** (i // 2 * 2 / dim)
            table[position, i] = math.cos(angle) if i % 2 else math.sin(angle)
    return table


def test_sinusoidal():
    for dim in (6, 7):
        torch.testing.assert_close(sinusoidal(torch.arange(50), dim, torch.float32), waves(50, dim), rtol=0, atol=1e-5)


def torch_layers(ours):
    """torch's two stacks with our weights."""
    c = ours.config
    shape = (c.dim, c.num_heads, c.ffn_dim, 0.0, "relu", c.norm_eps)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(*shape, batch_first=True), 2, enable_nested_tensor=False)
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(*shape, batch_first=True), 2)
    names = {
        "self_attn.in_proj_": "attention.qkv.", "self_attn.out_proj.": "attention.out.", "linear1.": "mlp.up.",
        "linear2.": "mlp.down.", "norm1.": "attention_norm.",
    }  # fmt: skip
    norms = {False: {"norm2.": "mlp_norm."}, True: {"norm2.": "cross_attention_norm.", "norm3.": "mlp_norm."}}
    cross = {"multihead_attn.out_proj.": "cross_attention.out."}
    for theirs, stack, decodes in ((encoder, ours.encoder, False), (decoder, ours.decoder, True)):
        for layer, block in zip(theirs.layers, stack.blocks):
            state = {}
            for name, other in (names | norms[decodes] | (cross if decodes else {})).items():
                for kind in ("weight", "bias"):
                    state[name + kind] = block.get_parameter(other + kind).detach()
            if decodes:
                for kind in ("weight", "bias"):
                    parts = [block.get_parameter(f"cross_attention.{p}.{kind}").detach() for p in ("q", "kv")]
                    state[f"multihead_attn.in_proj_{kind}"] = torch.cat(parts)
            layer.load_state_dict(state)
    return encoder.eval(), decoder.eval()


def test_parity_with_torch():
    ours = randomise(EncoderDecoder(attention_is_all_you_need("tiny", **OPTIONS)))
    encoder, decoder = torch_layers(ours)
    generator = torch.Generator().manual_seed(1)
    source, target = (torch.randint(0, 60, (3, n), generator=generator) for n in (17, 11))
    padding = torch.arange(17) >= torch.tensor([[17], [5], [9]])

    def embed(tokens):
        return ours.embed_tokens(tokens) * 8 + waves(tokens.shape[1], 64)

    future = nn.Transformer.generate_square_subsequent_mask(11)
    for mask in (None, padding):
        encoded = encoder(embed(source), src_key_padding_mask=mask)
        hidden = decoder(embed(target), encoded, tgt_mask=future, memory_key_padding_mask=mask)
        out = ours(source, target, source_mask=None if mask is None else ~mask)
        kept = torch.ones_like(source, dtype=torch.bool) if mask is None else ~mask
        torch.testing.assert_close(out.encoded[kept], encoded[kept], **TOLERANCE)
        torch.testing.assert_close(out.hidden, hidden, **TOLERANCE)
        torch.testing.assert_close(ours.logits(out.hidden), hidden @ ours.embed_tokens.weight.T, **TOLERANCE)
        seed = torch.randn(hidden.shape, generator=generator)
        pair = [torch.autograd.grad(h, ours.embed_tokens.weight, seed)[0] for h in (out.hidden, hidden)]
        torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-4 * float(pair[1].abs().max()))


@pytest.fixture
def one_thread():
    """Steps so small are not worth waking threads for."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_learns_to_reverse(one_thread):
    """Sources of uneven lengths come out backwards, by greedy generation over the cache."""
    torch.manual_seed(0)
    rows, longest, steps = 64, 4, 300
    model = EncoderDecoder(attention_is_all_you_need("tiny", num_layers=1, encoder_layers=1, vocab_size=8))
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min((s + 1) / 20, max(0.05, 1 - s / steps)))
    lengths = torch.randint(2, longest + 1, (rows,))

    def batch():
        source = torch.randint(2, 8, (rows, longest))
        places = lengths[:, None] - 1 - torch.arange(longest)
        target = torch.where(places >= 0, source.gather(1, places.clamp(min=0)), -100)
        target = F.pad(target, (0, 1), value=-100)
        target[torch.arange(rows), lengths] = 1  # the end
        return source, target

    for _ in range(steps):
        source, target = batch()
        given = F.pad(target[:, :-1], (1, 0)).clamp(min=0)  # begins with 0
        out = model(source, given, source_mask=lengths, target_mask=lengths + 1)
        F.cross_entropy(model.logits(out.hidden).flatten(0, 1), target.flatten()).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    source, _ = batch()
    sources = [row[:n].tolist() for row, n in zip(source, lengths)]
    found = generate_seq2seq(model, sources, max_tokens=8, temperature=0, stop_ids=[1])
    assert model.training
    right = sum(new == [*tokens[::-1], 1] for tokens, new in zip(sources, found))
    assert right >= 62, f"{right} of {rows}"


def test_round_trip_and_kinds():
    config = attention_is_all_you_need("tiny")
    assert ModelConfig.from_dict(config.to_dict()) == config
    assert isinstance(build_model(config), EncoderDecoder)
    assert type(build_model(llama("tiny"))) is Transformer
    model = build_model(config)
    assert model.num_parameters() == sum(p.numel() for p in set(model.parameters()))
    assert (attention_is_all_you_need().dim, attention_is_all_you_need("big").num_heads) == (512, 16)
    assert model.embed_tokens.weight.std().item() == pytest.approx(1 / 8, rel=0.05)


def test_refuses():
    with pytest.raises(ValueError, match="encoder_layers is 0; accepted: 1 or more in an encoder-decoder"):
        EncoderDecoder(llama("tiny"))
    with pytest.raises(ValueError, match="not that of a decoder alone"):
        Transformer(attention_is_all_you_need("tiny"))
    with pytest.raises(ValueError, match="causal is False; accepted: True with encoder_layers"):
        attention_is_all_you_need("tiny", causal=False)
    with pytest.raises(ValueError, match=r"logit_scale is 0.5; accepted: 1.0 without encoder_layers"):
        llama("tiny", logit_scale=0.5)
    with pytest.raises(ValueError, match="relative_buckets is 6; accepted: a multiple of 4"):
        attention_is_all_you_need("tiny", position="relative", relative_buckets=6)
    model, tokens = EncoderDecoder(attention_is_all_you_need("tiny")), torch.zeros(2, 5, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"shapes \(2, 5\) and \(1, 5\); accepted: \(batch, seq\) of the same batch"):
        model(tokens, tokens[:1])
    with pytest.raises(ValueError, match=r"token id 512 at index \(0, 0\)"):
        model(torch.full_like(tokens, 512), tokens)
    encoded = model.encode(tokens)
    packed = Memory(model.memory(encoded).keys_values, torch.tensor([0, 10], dtype=torch.int32))
    with pytest.raises(ValueError, match="accepted: packed with a packed memory, else rows"):
        model.decode(tokens, packed)
