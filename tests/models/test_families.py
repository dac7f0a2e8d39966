"""Every family of decoders against `transformers` in float32, on tiny random weights that go through files: config.json
and safetensors of `transformers` are read without it, and what is written back it reads bit for bit.

The tests whose parameter is a family's case fill the README's table: docs/parity_matrix.py."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from llmcore.checkpoints import CheckpointError
from llmcore.inference import generate
from llmcore.layers import MoE
from llmcore.models import load_pretrained, save_pretrained
from llmcore.models.families import FAMILIES
from llmcore.training.losses import next_token_loss
from tests.models.parity import (
    DECODERS_AND_GPT2,
    LLAMA3,
    OTHERS,
    TOLERANCE,
    assert_logits,
    hidden_states,
    load_both,
    padded_batch,
    some_tokens,
    their_gradients,
    their_model,
)


def test_every_family_has_a_case():
    assert {name.split(",")[0] for name in (*DECODERS_AND_GPT2, *OTHERS)} == FAMILIES.keys()


@pytest.mark.parametrize("case", DECODERS_AND_GPT2)
def test_logits(case, tmp_path):
    assert_logits(*load_both(case, tmp_path), some_tokens(2, 37))


@pytest.mark.parametrize("case", DECODERS_AND_GPT2)
def test_gradients(case, tmp_path):
    """The loss that training takes, on the rows packed into one, and the gradient of every weight."""
    theirs, ours = load_both(case, tmp_path / "theirs")
    tokens = some_tokens(2, 37)
    batch = SimpleNamespace(
        tokens=tokens.flatten(),
        targets=F.pad(tokens[:, 1:], (0, 1), value=-100).flatten(),
        positions=None,
        cu_seqlens=torch.tensor([0, 37, 74], dtype=torch.int32),
        max_seqlen=37,
        num_targets=72,
    )
    for block in ours.blocks:
        if isinstance(block.mlp, MoE):
            block.mlp.balancing = "none"  # their loss has no such part unless asked for
    loss, expected = next_token_loss(ours, batch).total / 72, theirs(tokens, labels=tokens).loss
    torch.testing.assert_close(loss, expected, **TOLERANCE)
    expected.backward()
    loss.backward()
    for name, gradient in their_gradients(theirs, ours, tmp_path / "gradients").items():
        if name.endswith("expert_bias"):
            continue
        found = ours.get_parameter(name).grad
        torch.testing.assert_close(found, gradient, **TOLERANCE, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("case", DECODERS_AND_GPT2)
def test_cached_decode(case, tmp_path):
    """Over the cache, from a batch of uneven prompts: each token is the largest of the logits that they, and we without
    a cache, give to the whole text before it."""
    theirs, ours = load_both(case, tmp_path)
    tokens = some_tokens(2, 37)
    prompts = [tokens[0, 3:4].tolist(), tokens[1, :23].tolist(), tokens[0, 5:12].tolist()]
    for prompt, new in zip(prompts, generate(ours, prompts, max_tokens=12, temperature=0)):
        text = torch.tensor([prompt + new[:-1]])
        with torch.no_grad():
            for logits in (theirs(text).logits, ours.logits(ours(text).hidden)):
                logits = logits[0, len(prompt) - 1 :]
                best, chosen = logits.max(-1).values, logits.gather(1, torch.tensor(new)[:, None])[:, 0]
                assert (best - chosen).max() < 1e-4  # of two that close a rounding may choose
                assert sum(map(int.__eq__, new, logits.argmax(-1).tolist())) >= 11


@pytest.mark.parametrize("case", DECODERS_AND_GPT2)
def test_padding_and_packing(case, tmp_path):
    """Left-padded, right-padded and packed rows give the logits of each row alone, by us and by them."""
    theirs, ours = load_both(case, tmp_path)
    lengths = [9, 23, 1, 17]
    for side in ("left", "right"):
        tokens, mask = padded_batch(lengths, side)
        rows = [row[kept] for row, kept in zip(tokens, mask)]
        with torch.no_grad():
            expected = torch.cat([theirs(row[None]).logits[0] for row in rows])
            alone = torch.cat([ours.logits(ours(row[None]).hidden)[0] for row in rows])
            padded = ours(tokens, mask=mask).hidden
            cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
            packed = ours.logits(ours(torch.cat(rows), cu_seqlens=cu_seqlens).hidden)
        assert not padded[~mask].any()
        for found in (alone, packed, ours.logits(padded[mask])):
            torch.testing.assert_close(found, expected, **TOLERANCE)
        if side == "right":
            assert torch.equal(ours(tokens, mask=torch.tensor(lengths)).hidden, padded)


@pytest.mark.parametrize("case", DECODERS_AND_GPT2)
def test_saved_is_what_was_loaded(case, tmp_path):
    theirs, ours = load_both(case, tmp_path / "theirs")
    save_pretrained(ours, tmp_path / "ours", max_shard_bytes=30_000)
    assert (tmp_path / "ours" / "model.safetensors.index.json").is_file()  # more than one shard
    again = type(theirs).from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
    state = again.state_dict()
    assert state.keys() == theirs.state_dict().keys()
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(state[name], tensor), name
    tokens = some_tokens(2, 9)
    assert torch.equal(again(tokens).logits, theirs(tokens).logits)  # settings too

    once_more = load_pretrained(tmp_path / "ours")
    assert once_more.config == ours.config
    for name, tensor in ours.state_dict().items():
        assert torch.equal(once_more.state_dict()[name], tensor), name


def test_an_error_in_the_logits_names_its_layer(tmp_path):
    theirs, ours = load_both("llama, tied", tmp_path)
    tokens = torch.arange(20)[None]
    expected = theirs(tokens, output_hidden_states=True).hidden_states[:-1]
    for pair in zip(hidden_states(ours, lambda: ours(tokens)), expected, strict=True):
        torch.testing.assert_close(*pair, **TOLERANCE)
    with torch.no_grad():
        ours.blocks[1].mlp.down.weight[0, 0] += 1
    with pytest.raises(AssertionError, match="logits differ, first in the input of layer 2"):
        assert_logits(theirs, ours, tokens)


def test_older_names_of_rope_settings(tmp_path):
    """config.json as transformers 4 wrote it."""
    theirs = their_model("llama, tied")
    theirs.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    del values["rope_parameters"]
    values |= {"rope_theta": LLAMA3["rope_theta"], "rope_scaling": {**LLAMA3, "rope_type": None, "type": "llama3"}}
    del values["rope_scaling"]["rope_theta"]
    new = load_pretrained(tmp_path).config
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert load_pretrained(tmp_path).config == new


def test_cast_on_loading(tmp_path):
    their_model("glm4_moe").save_pretrained(tmp_path)
    model = load_pretrained(tmp_path, dtype=torch.bfloat16)
    assert model.lm_head_weight.dtype == torch.bfloat16
    assert model.blocks[1].mlp.expert_bias.dtype == torch.float32
    assert model.rope.cos.dtype == torch.float32
    assert torch.isfinite(model.logits(model(torch.arange(9)[None]).hidden)).all()


def test_refuses_counts_that_no_file_has(tmp_path):
    """At once: nothing is made for them."""
    their_model("llama, tied").save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    values = json.loads(file.read_text())
    for layers, message in ((2**40, "accepted: up to 16384"), (9999, r"num_layers is 9999; the file has \d+ tensors")):
        file.write_text(json.dumps(values | {"num_hidden_layers": layers}))
        with pytest.raises(CheckpointError, match=message):
            load_pretrained(tmp_path)
