"""Multi-token prediction against the paper's equations written out, its loss, and its tensors in published folders."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from llmcore.models import Transformer, llama, llama_moe, load_pretrained, save_pretrained
from llmcore.training.losses import multi_token_loss, next_token_loss, shifted_targets
from tests.models.parity import TOLERANCE, randomise, some_tokens, their_model

MOE = {"num_experts": 8, "top_k": 2, "ffn_dim": 48, "shared_experts": 1, "first_dense_layers": 1}


def make(**options):
    return randomise(Transformer(llama("tiny", **{"vocab_size": 99, "mtp_layers": 2} | options)))


def rms(x, weight, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def by_hand(model, tokens, depth):
    """The logits of module `depth` (from 1) for one sequence: equations 21 to 23. Module k sees T - k tokens, and
    nothing behind them."""
    eps, hidden = model.config.norm_eps, model(tokens[None]).hidden[0]
    for k in range(1, depth + 1):
        module = model.mtp[k - 1]
        inputs = [
            torch.cat(
                (
                    rms(model.embed_tokens.weight[tokens[i + k]], module.embed_norm.weight, eps),
                    rms(hidden[i], module.hidden_norm.weight, eps),
                )
            )
            for i in range(len(tokens) - k)
        ]
        x = torch.stack(inputs) @ module.proj.weight.T
        branch, residual, _ = module.block(x[None], None, rope=model.rope)
        hidden = (branch + residual)[0]
    return rms(hidden, module.norm.weight, eps) @ model.lm_head_weight.T


@pytest.mark.parametrize("tied", [True, False], ids=("tied", "untied"))
def test_equations(tied):
    model, tokens = make(tied_embeddings=tied), some_tokens(2, 13)
    hidden = model(tokens).hidden
    outputs = model.look_ahead(hidden, tokens)
    packed = model.look_ahead(
        hidden.flatten(0, 1), tokens.flatten(), cu_seqlens=torch.tensor([0, 13, 26], dtype=torch.int32)
    )
    assert len(outputs) == 2
    for depth, out in enumerate(outputs, 1):
        for row in range(2):
            expected = by_hand(model, tokens[row], depth)
            assert expected.std() > 0.1
            torch.testing.assert_close(model.logits(out.hidden)[row, :-depth], expected, **TOLERANCE)
            found = packed[depth - 1].hidden.view_as(hidden)[row, :-depth]
            torch.testing.assert_close(model.logits(found), expected, **TOLERANCE)


def batch_of(tokens, lengths):
    """Rows cut to `lengths` and packed."""
    rows = [row[:n] for row, n in zip(tokens, lengths)]
    targets = torch.cat([F.pad(row[1:], (0, 1), value=-100) for row in rows])
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    return SimpleNamespace(
        tokens=torch.cat(rows), targets=targets, positions=None, cu_seqlens=cu_seqlens, max_seqlen=max(lengths),
        num_targets=int((targets >= 0).sum()),
    )  # fmt: skip


def test_targets_of_further_tokens():
    targets = torch.tensor([11, 12, 13, -100, -100, 21, 22, -100])
    cu_seqlens = torch.tensor([0, 4, 5, 5, 8], dtype=torch.int32)
    assert shifted_targets(targets, cu_seqlens, 1).tolist() == [12, 13, -100, -100, -100, 22, -100, -100]
    assert shifted_targets(targets, cu_seqlens, 2).tolist() == [13, -100, -100, -100, -100, -100, -100, -100]
    assert shifted_targets(targets[:0], torch.tensor([0, 0], dtype=torch.int32), 1).tolist() == []


def test_loss_and_gradients():
    """Of sequences of 13, 1 and 7 tokens: equation 24 over the tokens that there are, and 25 with two modules."""
    model, tokens, lengths = make(), some_tokens(3, 13), (13, 1, 7)
    batch = batch_of(tokens, lengths)
    loss = multi_token_loss(model, batch, weight=0.3)
    expected = next_token_loss(model, batch).total
    further = 0
    for depth in (1, 2):
        for row, n in zip(tokens, lengths):
            if n > depth + 1:
                logits = by_hand(model, row[:n], depth)[:-1]
                further = further + F.cross_entropy(logits, row[depth + 1 : n], reduction="sum") / 2
    torch.testing.assert_close(loss.total, expected + 0.3 * further, **TOLERANCE)
    torch.testing.assert_close(loss.metrics["mtp_nll"], further.detach(), **TOLERANCE)
    parameters = dict(model.named_parameters())
    pair = [torch.autograd.grad(v, list(parameters.values())) for v in (loss.total, expected + 0.3 * further)]
    for name, found, wanted in zip(parameters, *pair):
        assert wanted.abs().max() > 0, name
        floor = 1e-4 * float(wanted.abs().max())
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=floor, msg=lambda m, n=name: f"{n}: {m}")
    with pytest.raises(ValueError, match="mtp_layers is 0; accepted: 1 or more for a loss over several tokens"):
        multi_token_loss(Transformer(llama("tiny")), batch)


def test_experts_of_the_modules():
    config = llama_moe("tiny", vocab_size=99, mtp_layers=1, moe=MOE | {"balancing": "bias"})
    model = randomise(Transformer(config))
    loss = multi_token_loss(model, batch_of(some_tokens(2, 13), (13, 9)))
    load = loss.metrics["expert_load"]
    assert load.shape == (3, 8)  # two layers with experts and the module
    assert load.sum(1).tolist() == [44] * 3
    before = model.mtp[0].block.mlp.expert_bias.clone()
    model.update_expert_bias(load[:2])
    assert torch.equal(model.mtp[0].block.mlp.expert_bias, before)
    model.update_expert_bias(load)
    assert not torch.equal(model.mtp[0].block.mlp.expert_bias, before)
    aux = Transformer(llama_moe("tiny", vocab_size=99, mtp_layers=1, moe=MOE))
    assert "aux_loss" in multi_token_loss(aux, batch_of(some_tokens(2, 13), (13, 9))).metrics


def test_costs_a_pass_nothing():
    with_mtp, without = make(), Transformer(llama("tiny", vocab_size=99))
    assert with_mtp.num_parameters(active=True) == without.num_parameters(active=True)
    assert with_mtp.num_parameters() > without.num_parameters()
    with pytest.raises(ValueError, match="norm_placement is 'post'; accepted: 'pre' with mtp_layers"):
        llama("tiny", mtp_layers=1, norm_placement="post")


NAMES = {
    "enorm.weight": "embed_norm.weight", "hnorm.weight": "hidden_norm.weight", "eh_proj.weight": "proj.weight",
    "shared_head.norm.weight": "norm.weight", "self_attn.kv_b_proj.weight": "block.attention.kv_b.weight",
    "self_attn.o_proj.weight": "block.attention.out.weight", "mlp.gate.weight": "block.mlp.router.weight",
    "mlp.gate.e_score_correction_bias": "block.mlp.expert_bias",
    "mlp.shared_experts.down_proj.weight": "block.mlp.shared.down.weight",
}  # fmt: skip


@pytest.mark.parametrize("case", ["deepseek_v3", "glm4_moe"])
def test_published_names(case, tmp_path):
    """Layer num_hidden_layers of a folder: a layer like the last one, and the tensors of the module around it."""
    theirs = their_model(case)
    theirs.save_pretrained(tmp_path)
    file, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    assert load_pretrained(tmp_path).mtp is None
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_nextn_predict_layers": 1}))
    assert load_pretrained(tmp_path).mtp is None  # transformers writes the setting, but no tensors

    tensors, generator = load_file(file), torch.Generator().manual_seed(4)
    module = {}
    for name, tensor in tensors.items():
        if name.startswith("model.layers.2."):
            module[name.replace(".2.", ".3.", 1)] = torch.randn(tensor.shape, generator=generator) * 0.1
    for name, shape in (("enorm", (32,)), ("hnorm", (32,)), ("shared_head.norm", (32,)), ("eh_proj", (32, 64))):
        module[f"model.layers.3.{name}.weight"] = torch.randn(shape, generator=generator)
    module["model.layers.3.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    module["model.layers.3.shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    save_file(tensors | module, file, metadata={"format": "pt"})
    model = load_pretrained(tmp_path)
    found = 0
    for name, ours in NAMES.items():
        if f"model.layers.3.{name}" in module:
            found += 1
            assert torch.equal(model.mtp[0].state_dict()[ours], module[f"model.layers.3.{name}"]), name
    assert found >= 7
    tokens = some_tokens(1, 11)
    torch.testing.assert_close(model.logits(model(tokens).hidden), theirs(tokens).logits, **TOLERANCE)
    ahead = model.logits(model.look_ahead(model(tokens).hidden, tokens)[0].hidden)[0, :-1]
    torch.testing.assert_close(ahead, by_hand(model, tokens[0], 1), **TOLERANCE)

    save_pretrained(model, tmp_path / "again")
    written = load_file(tmp_path / "again" / "model.safetensors")
    assert written.keys() == (tensors | module).keys()
    for name, tensor in (tensors | module).items():
        assert torch.equal(written[name], tensor), name
