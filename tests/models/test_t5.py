"""T5 against `transformers`, as test_families.py has it of the decoders."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmcore.inference import generate_seq2seq
from llmcore.layers import CrossAttention, RelativeBias
from llmcore.models import load_pretrained, save_pretrained
from tests.models.parity import TOLERANCE, load_both, padded_batch, some_tokens, their_gradients, their_model

transformers = pytest.importorskip("transformers")

BOTH = ["t5", "t5, gated"]
CASES = [*BOTH, "t5, encoder"]


def targets(rows, length):
    return some_tokens(rows, length).flip(0, 1)


def run_theirs(theirs, source, target, mask=None, target_mask=None):
    """What the encoder gives; with a decoder, its logits."""
    if isinstance(theirs, transformers.T5EncoderModel):
        return [theirs(source, attention_mask=mask).last_hidden_state]
    out = theirs(source, attention_mask=mask, decoder_input_ids=target, decoder_attention_mask=target_mask)
    return [out.encoder_last_hidden_state, out.logits]


def run_ours(ours, source, target, mask=None, target_mask=None):
    if not ours.config.encoder_layers:
        return [ours(source, mask=mask).hidden]
    out = ours(source, target, source_mask=mask, target_mask=target_mask)
    return [out.encoded, ours.logits(out.hidden)]


@pytest.mark.parametrize("case", CASES)
def test_logits(case, tmp_path):
    theirs, ours = load_both(case, tmp_path)
    source, target = some_tokens(2, 37), targets(2, 29)  # beyond the distance from which buckets are one
    for found, expected in zip(run_ours(ours, source, target), run_theirs(theirs, source, target), strict=True):
        assert expected.std() > 0.03
        torch.testing.assert_close(found, expected, **TOLERANCE)


@pytest.mark.parametrize("case", CASES)
def test_gradients(case, tmp_path):
    """Of padded rows, which we pack; the biases by distance among them."""
    theirs, ours = load_both(case, tmp_path / "theirs")
    source, mask = padded_batch([31, 37], "right")
    target, target_mask = targets(2, 29), torch.arange(29) < torch.tensor([[29], [20]])
    pairs = zip(
        run_ours(ours, source, target, mask, target_mask),
        run_theirs(theirs, source, target, mask.long(), target_mask.long()),
        (mask, target_mask),
    )
    generator = torch.Generator().manual_seed(2)
    for found, expected, kept in pairs:
        seed = torch.randn(expected[kept].shape, generator=generator)
        expected[kept].backward(seed, retain_graph=True)
        found[kept].backward(seed, retain_graph=True)
    gradients = their_gradients(theirs, ours, tmp_path / "gradients")
    assert gradients.keys() == dict(ours.named_parameters()).keys()
    for name, gradient in gradients.items():
        floor = 1e-5 * max(1.0, float(gradient.abs().max()))
        found = ours.get_parameter(name).grad
        torch.testing.assert_close(found, gradient, rtol=1e-4, atol=floor, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("case", CASES)
def test_padding_and_packing(case, tmp_path):
    theirs, ours = load_both(case, tmp_path)
    lengths, target_lengths = [9, 31, 1, 17], [5, 2, 22, 1]
    for side in ("left", "right"):
        source, mask = padded_batch(lengths, side)
        target, target_mask = padded_batch(target_lengths, "right")
        with torch.no_grad():
            rows = [
                run_theirs(theirs, s[kept][None], t[seen][None])
                for s, kept, t, seen in zip(source, mask, target, target_mask)
            ]
            found = run_ours(ours, source, target, mask, target_mask)
        for out, alone, kept in zip(found, zip(*rows), (mask, target_mask)):
            torch.testing.assert_close(out[kept], torch.cat([row[0] for row in alone]), **TOLERANCE)
        assert not found[0][~mask].any()


@pytest.mark.parametrize("case", BOTH)
def test_cached_decode(case, tmp_path, monkeypatch):
    """Greedy over the cache: what they generate, what we do without a cache, and the encoder's keys are made once."""
    theirs, ours = load_both(case, tmp_path)
    source, mask = padded_batch([9, 31, 1, 17], "right")
    sources = [row[kept].tolist() for row, kept in zip(source, mask)]
    calls = []
    plain = CrossAttention.keys_values
    monkeypatch.setattr(CrossAttention, "keys_values", lambda self, hidden: calls.append(1) or plain(self, hidden))
    ended = generate_seq2seq(ours, sources, max_tokens=25, temperature=0)[1][7]  # a token to end one of them early
    calls.clear()
    found = generate_seq2seq(ours, sources, max_tokens=25, temperature=0, stop_ids=[ended])
    assert len(calls) == ours.config.num_layers
    assert len({len(new) for new in found}) > 1
    for tokens, new in zip(sources, found):
        assert new[-1] == ended or len(new) == 25
        text, tokens = torch.tensor([[0, *new[:-1]]]), torch.tensor([tokens])
        with torch.no_grad():
            without_cache = run_ours(ours, tokens, text)[1][0]
            for logits in (run_theirs(theirs, tokens, text)[1][0], without_cache):
                best, chosen = logits.max(-1).values, logits.gather(1, torch.tensor(new)[:, None])[:, 0]
                assert (best - chosen).max() < 1e-4
                assert sum(map(int.__eq__, new, logits.argmax(-1).tolist())) >= len(new) - 1
    with pytest.raises(ValueError, match="source 1 is empty; accepted: at least one token"):
        generate_seq2seq(ours, [[3], []], max_tokens=2)
    assert generate_seq2seq(ours, [], max_tokens=2) == []


@pytest.mark.parametrize("case", CASES)
def test_saved_is_what_was_loaded(case, tmp_path):
    theirs, ours = load_both(case, tmp_path / "theirs")
    save_pretrained(ours, tmp_path / "ours", max_shard_bytes=30_000)
    again = type(theirs).from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
    state = again.state_dict()
    assert state.keys() == theirs.state_dict().keys()
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(state[name], tensor), name
    source, target = some_tokens(2, 9), targets(2, 5)
    for found, expected in zip(run_theirs(again, source, target), run_theirs(theirs, source, target), strict=True):
        assert torch.equal(found, expected)
    once_more = load_pretrained(tmp_path / "ours")
    assert once_more.config == ours.config
    for name, tensor in ours.state_dict().items():
        assert torch.equal(once_more.state_dict()[name], tensor), name


def test_an_output_matrix_of_its_own(tmp_path):
    """T5 v1.1 and Flan-T5 have one in their files."""
    their_model("t5, gated").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    matrix = torch.randn(99, 32, generator=torch.Generator().manual_seed(3))
    save_file(load_file(file) | {"lm_head.weight": matrix}, file, metadata={"format": "pt"})
    theirs = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert torch.equal(theirs.lm_head.weight, matrix)
    ours, source, target = load_pretrained(tmp_path), some_tokens(2, 9), targets(2, 5)
    assert torch.equal(ours.lm_head.weight, matrix)
    expected = run_theirs(theirs, source, target)[1]
    torch.testing.assert_close(run_ours(ours, source, target)[1], expected, **TOLERANCE)
    save_pretrained(ours, tmp_path / "again")
    again = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "again").eval()
    torch.testing.assert_close(run_theirs(again, source, target)[1], expected, rtol=0, atol=0)


@pytest.mark.parametrize("bidirectional", [True, False], ids=("both ways", "past alone"))
@pytest.mark.parametrize(("buckets", "reach"), [(32, 128), (8, 20), (4, 5)])
def test_buckets(bidirectional, buckets, reach):
    from transformers.models.t5.modeling_t5 import T5Attention

    offsets = torch.arange(-reach, reach + 1)
    expected = T5Attention._relative_position_bucket(offsets, bidirectional, buckets, reach)
    assert RelativeBias(2, buckets, reach, bidirectional).buckets().tolist() == expected.tolist()
    far = T5Attention._relative_position_bucket(torch.tensor([-9999, 9999]), bidirectional, buckets, reach)
    assert far.tolist() == expected[[0, -1]].tolist()
