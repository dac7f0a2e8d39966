"""Parity with `transformers` beyond the families of test_families.py: a model whose configuration no family describes,
and the loss of balancing."""

from __future__ import annotations

import pytest
import torch

from llmcore.layers import MoE
from llmcore.models import Transformer, gpt2
from tests.models.parity import TOLERANCE, randomise, some_tokens

transformers = pytest.importorskip("transformers")


def test_auxiliary_loss_of_mixtral():
    """Theirs counts a token once per choice, so that it is top_k in balance, where ours is 1."""
    torch.manual_seed(0)
    layer = MoE(16, 12, 6, 2, aux_weight=1.0)
    torch.nn.init.normal_(layer.router.weight)
    x = torch.randn(2, 37, 16)
    logits = layer.router(x.flatten(0, 1))
    expected = transformers.models.mixtral.modeling_mixtral.load_balancing_loss_func((logits,), 6, top_k=2) / 2
    loss = layer(x).aux_loss
    torch.testing.assert_close(loss, expected, **TOLERANCE)
    gradients = [torch.autograd.grad(value, layer.router.weight)[0] for value in (loss, expected)]
    assert gradients[1].abs().max() > 0.01
    torch.testing.assert_close(*gradients, **TOLERANCE)


def gpt1_weights(state):
    """Our names; the Conv1D of theirs is a transposed Linear."""
    names = {
        "ln_1": "attention_norm", "attn.c_attn": "attention.qkv", "attn.c_proj": "attention.out", "ln_2": "mlp_norm",
        "mlp.c_fc": "mlp.up", "mlp.c_proj": "mlp.down",
    }  # fmt: skip
    new = {f"embed_{what}.weight": state[f"transformer.{what}_embed.weight"] for what in ("tokens", "positions")}
    for layer in range(3):
        for theirs, ours in names.items():
            for kind in ("weight", "bias"):
                tensor = state[f"transformer.h.{layer}.{theirs}.{kind}"]
                matrix = ".c_" in theirs and kind == "weight"
                new[f"blocks.{layer}.{ours}.{kind}"] = tensor.T if matrix else tensor
    return new


def test_gpt1_with_norms_after_the_residual():
    """A decoder with norm_placement "post"."""
    sizes = {"vocab_size": 99, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
    theirs = randomise(transformers.OpenAIGPTLMHeadModel(transformers.OpenAIGPTConfig(**sizes)))
    options = {"vocab_size": 99, "dim": 32, "num_layers": 3, "num_heads": 4, "max_positions": 64}
    ours = Transformer(gpt2("tiny", **options, norm_placement="post")).eval()
    ours.load_state_dict(gpt1_weights(theirs.state_dict()))
    tokens = some_tokens(2, 37)
    expected = theirs(tokens, labels=tokens)
    logits = ours.logits(ours(tokens).hidden)
    assert expected.logits.std() > 0.1
    torch.testing.assert_close(logits, expected.logits, **TOLERANCE)
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    expected.loss.backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters(remove_duplicate=False)}
    for name, gradient in gpt1_weights(gradients).items():
        found = ours.get_parameter(name).grad
        torch.testing.assert_close(found, gradient, **TOLERANCE, msg=lambda m, n=name: f"{n}: {m}")
