"""BERT against `transformers`, as test_families.py has it of the decoders."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmcore.models import Encoder, ModelConfig, Packing, Transformer, load_pretrained, mean_pool, save_pretrained
from llmcore.models.families import FAMILIES
from tests.models.parity import BERT, TOLERANCE, load_both, padded_batch, randomise, some_tokens, their_gradients

transformers = pytest.importorskip("transformers")

CASES = ["bert", "bert, masked tokens"]


def outputs_of_theirs(theirs, tokens, **where):
    """What there is of hidden states, the pooled vector and logits."""
    out = theirs(tokens, output_hidden_states=True, **where)
    return {"hidden": out.hidden_states[-1], "pooled": out.get("pooler_output"), "logits": out.get("logits")}


def outputs_of_ours(ours, tokens, **where):
    out = ours(tokens, **where)
    logits = None if ours.config.head == "none" else ours.logits(out.hidden)
    return {"hidden": out.hidden, "pooled": out.pooled, "logits": logits}


def assert_same(found, expected):
    assert sum(value is not None for value in expected.values()) == 2
    for name, value in expected.items():
        if value is None:
            assert found[name] is None
        else:
            assert value.std() > 0.1
            torch.testing.assert_close(found[name], value, **TOLERANCE, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("case", CASES)
def test_logits(case, tmp_path):
    theirs, ours = load_both(case, tmp_path)
    tokens, types = some_tokens(2, 37), torch.arange(74).view(2, 37) % 3
    assert_same(outputs_of_ours(ours, tokens), outputs_of_theirs(theirs, tokens))
    with_types = outputs_of_ours(ours, tokens, token_types=types)
    assert_same(with_types, outputs_of_theirs(theirs, tokens, token_type_ids=types))
    assert (with_types["hidden"] - outputs_of_ours(ours, tokens)["hidden"]).abs().max() > 0.1


@pytest.mark.parametrize("case", CASES)
def test_gradients(case, tmp_path):
    """Of rows packed into one against theirs side by side."""
    theirs, ours = load_both(case, tmp_path / "theirs")
    tokens = some_tokens(2, 37)
    expected = outputs_of_theirs(theirs, tokens)
    found = outputs_of_ours(ours, tokens.flatten(), cu_seqlens=torch.tensor([0, 37, 74], dtype=torch.int32))
    generator = torch.Generator().manual_seed(2)
    for name, value in expected.items():
        if value is not None:
            seed = torch.randn(value.shape, generator=generator)
            value.backward(seed, retain_graph=True)
            found[name].backward(seed.view_as(found[name]), retain_graph=True)
    gradients = their_gradients(theirs, ours, tmp_path / "gradients")
    assert gradients.keys() == dict(ours.named_parameters()).keys()
    for name, gradient in gradients.items():
        found = ours.get_parameter(name).grad
        if name == "embed_tokens.weight":  # theirs takes no gradient for token 0, its padding
            found, gradient = found[1:], gradient[1:]
        floor = 1e-5 * max(1.0, float(gradient.abs().max()))
        torch.testing.assert_close(found, gradient, rtol=1e-4, atol=floor, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("case", CASES)
def test_padding_and_packing(case, tmp_path):
    """Padded on either side, by mask or by lengths, and packed: as each row alone, and as their padded batch."""
    theirs, ours = load_both(case, tmp_path)
    lengths = [9, 23, 1, 17]
    for side in ("left", "right"):
        tokens, mask = padded_batch(lengths, side)
        places = (mask.cumsum(1) - 1).clamp(min=0)
        rows = [row[kept] for row, kept in zip(tokens, mask)]
        with torch.no_grad():
            batch = outputs_of_theirs(theirs, tokens, attention_mask=mask.long(), position_ids=places)
            alone = [outputs_of_theirs(theirs, row[None]) for row in rows]
            padded = ours(tokens, mask=mask)
            packed = ours(torch.cat(rows), cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).int())
        expected = torch.cat([out["hidden"][0] for out in alone])
        torch.testing.assert_close(batch["hidden"][mask], expected, **TOLERANCE)
        torch.testing.assert_close(padded.hidden[mask], expected, **TOLERANCE)
        torch.testing.assert_close(packed.hidden, expected, **TOLERANCE)
        assert not padded.hidden[~mask].any()
        if ours.pooler is not None:
            pooled = torch.cat([out["pooled"] for out in alone])
            for out in (padded, packed):
                torch.testing.assert_close(out.pooled, pooled, **TOLERANCE)
        if side == "right":
            again = ours(tokens, mask=torch.tensor(lengths))
            assert torch.equal(again.hidden, padded.hidden)


def test_padding_is_not_computed_on(tmp_path):
    _, ours = load_both("bert", tmp_path)
    seen = []
    ours.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    tokens, mask = padded_batch([9, 23, 1, 17], "left")
    ours(tokens, mask=mask)
    assert seen == [(50, 32)]


@pytest.mark.parametrize("case", CASES)
def test_saved_is_what_was_loaded(case, tmp_path):
    theirs, ours = load_both(case, tmp_path / "theirs")
    save_pretrained(ours, tmp_path / "ours", max_shard_bytes=30_000)
    again = type(theirs).from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
    state = again.state_dict()
    assert state.keys() == theirs.state_dict().keys()
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(state[name], tensor), name
    tokens = some_tokens(2, 9)
    for name, value in outputs_of_theirs(again, tokens).items():
        expected = outputs_of_theirs(theirs, tokens)[name]
        assert value is expected is None or torch.equal(value, expected)
    once_more = load_pretrained(tmp_path / "ours")
    assert once_more.config == ours.config
    for name, tensor in ours.state_dict().items():
        assert torch.equal(once_more.state_dict()[name], tensor), name


def test_files_decide_what_config_json_leaves_open(tmp_path):
    """A BertModel without a pooler, a file of BertForPreTraining, and the names that TensorFlow gave to norms."""
    config = transformers.BertConfig(**BERT)
    randomise(transformers.BertModel(config, add_pooling_layer=False)).save_pretrained(tmp_path / "bare")
    bare = load_pretrained(tmp_path / "bare")
    assert bare.pooler is None
    assert bare(some_tokens(1, 5)).pooled is None
    save_pretrained(bare, tmp_path / "again")
    assert load_pretrained(tmp_path / "again").config == bare.config

    both = randomise(transformers.BertForPreTraining(config))
    both.save_pretrained(tmp_path / "both")
    file = tmp_path / "both" / "model.safetensors"
    old = {}
    for name, tensor in load_file(file).items():
        name = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        old[name] = tensor
    save_file(old, file, metadata={"format": "pt"})
    ours, tokens = load_pretrained(tmp_path / "both"), some_tokens(2, 11)
    out, expected = ours(tokens), both(tokens)
    torch.testing.assert_close(ours.logits(out.hidden), expected.prediction_logits, **TOLERANCE)
    torch.testing.assert_close(out.pooled, both.bert(tokens).pooler_output, **TOLERANCE)


def test_mean_of_the_tokens():
    hidden = torch.randn(10, 4)
    pooled = mean_pool(hidden, torch.tensor([0, 3, 3, 10], dtype=torch.int32))
    torch.testing.assert_close(pooled, torch.stack([hidden[:3].mean(0), torch.zeros(4), hidden[3:].mean(0)]))


ENCODER = {
    "vocab_size": 50, "dim": 16, "num_layers": 1, "num_heads": 2, "norm": "layer", "position": "learned",
    "max_positions": 20, "causal": False,
}  # fmt: skip


def test_refuses():
    with pytest.raises(ValueError, match="causal is True; accepted: False in an encoder"):
        Encoder(ModelConfig(**ENCODER | {"causal": True}))
    with pytest.raises(ValueError, match="not that of a decoder alone"):
        Transformer(ModelConfig(**ENCODER))
    with pytest.raises(ValueError, match="pooler is True; accepted: False unless causal is False"):
        ModelConfig(**ENCODER | {"causal": True, "pooler": True})
    model, tokens = Encoder(ModelConfig(**ENCODER, head="none", token_types=2)), some_tokens(2, 5) % 50
    with pytest.raises(ValueError, match="the model has no head"):
        model.logits(model(tokens).hidden)
    with pytest.raises(ValueError, match="a cache is given; accepted: None for an encoder"):
        model.positions_of(tokens, cache=object())
    with pytest.raises(ValueError, match=r"token type 2 at index \(0, 0\); accepted: 0 to token_types - 1 = 1"):
        model(tokens, token_types=torch.full_like(tokens, 2))
    with pytest.raises(ValueError, match=r"token_types has shape \(5,\) in a model of 2; accepted: \(2, 5\), tokens'"):
        model(tokens, token_types=tokens[0])
    with pytest.raises(ValueError, match="row 1 of the mask has padding between its tokens"):
        model(tokens, mask=torch.tensor([[1, 1, 0, 0, 0], [1, 0, 1, 0, 0]]))
    with pytest.raises(ValueError, match=r"mask has shape \(2, 4\); accepted: \(2, 5\), or \(2,\) lengths"):
        model(tokens, mask=torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"mask is \[3, 6\]; accepted as lengths: 0 to 5 each"):
        model(tokens, mask=torch.tensor([3, 6]))


@pytest.mark.parametrize("given", [[], "BertModel", ["BertForTokenClassification"], ["BertModel", "BertForMaskedLM"]])
def test_refuses_other_architectures(given):
    with pytest.raises(ValueError, match=r"bert: architectures is .*; accepted: one of BertModel, BertForMaskedLM"):
        FAMILIES["bert"].config(BERT | {"architectures": given})


def test_packing_of_nothing():
    packing = Packing.of(torch.zeros(2, 3, dtype=torch.bool), (2, 3))
    assert packing.cu_seqlens.tolist() == [0, 0, 0]
    assert torch.equal(packing.unpack(packing.pack(torch.ones(2, 3, 4))), torch.zeros(2, 3, 4))
    assert Packing.of(torch.zeros(0, 3, dtype=torch.bool), (0, 3)).max_seqlen == 0
