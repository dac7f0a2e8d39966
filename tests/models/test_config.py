"""Configurations: what they fill in, what they refuse, and the way through JSON and back."""

from __future__ import annotations

import json

import pytest
import torch

from llmcore.models import PRESETS, ModelConfig, MoEConfig, Transformer, gpt2, llama, llama_dyt, llama_moe

BASE = {"vocab_size": 100, "dim": 48, "num_layers": 2, "num_heads": 4}
MOE = {"num_experts": 8, "top_k": 2, "ffn_dim": 16}


def test_sizes_that_follow():
    config = ModelConfig(**BASE)
    assert (config.num_kv_heads, config.head_dim, config.ffn_dim, config.rotary_dim) == (4, 12, 128, 12)
    assert ModelConfig(**BASE, activation="gelu").ffn_dim == 192
    assert ModelConfig(**BASE, rope_fraction=0.5).rotary_dim == 6
    assert ModelConfig(**BASE, head_dim=43, rope_fraction=28 / 43).rotary_dim == 28  # the product is 27.999...
    assert ModelConfig(**BASE | {"num_heads": 5}, head_dim=8).head_dim == 8


@pytest.mark.parametrize("preset", PRESETS)
def test_round_trip_through_json(preset):
    config = PRESETS[preset]("tiny", rope_base=500)
    again = ModelConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert isinstance(again.rope_base, float)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"num_heads": 5}, ValueError, "num_heads is 5; accepted: a divisor of dim = 48, unless head_dim is given"),
        ({"num_kv_heads": 3}, ValueError, "num_kv_heads is 3; accepted: a divisor of num_heads = 4"),
        ({"num_kv_heads": 0}, ValueError, "num_kv_heads is 0; accepted: a divisor of num_heads = 4"),
        ({"vocab_size": 0}, ValueError, "vocab_size is 0; accepted: 1 or more"),
        ({"norm": "rsm"}, ValueError, "norm is 'rsm'; accepted: 'rms', 'layer', 'dyt'"),
        ({"norm_placement": "mid"}, ValueError, "accepted: 'pre', 'post', 'sandwich'"),
        ({"position": "alibi"}, ValueError, "position is 'alibi'; accepted: 'rope', 'learned', 'none'"),
        ({"rope_fraction": 0.3}, ValueError, r"rope_fraction \* head_dim is 3.*an even whole number"),
        ({"window": 0}, ValueError, "window is 0; accepted: 1 or more"),
        ({"logit_softcap": -1.0}, ValueError, "logit_softcap is -1.0; accepted: above 0, or None"),
        ({"logit_softcap": float("inf")}, ValueError, "logit_softcap is inf; accepted: a finite number"),
        ({"norm_eps": float("nan")}, ValueError, "norm_eps is nan; accepted: a finite number"),
        ({"moe": MOE | {"scale": float("inf")}}, ValueError, "moe.scale is inf; accepted: a finite number"),
        ({"vocab_size": 2**63}, ValueError, "vocab_size is 9223372036854775808; accepted: what 64 bits hold"),
        ({"rope_base": 10**400}, ValueError, "rope_base is 10+; accepted: what 64 bits hold"),
        ({"dropout": 1.0}, ValueError, "dropout is 1.0; accepted: 0 to below 1"),
        ({"dim": "48"}, TypeError, r"dim is '48' \(str\); accepted: int"),
        ({"dim": True}, TypeError, r"dim is True \(bool\); accepted: int"),
        ({"qkv_bias": 1}, TypeError, r"qkv_bias is 1 \(int\); accepted: bool"),
        ({"window": 1.5}, TypeError, r"window is 1.5 \(float\); accepted: int or None"),
        ({"num_head": 4}, ValueError, "'num_head' is no key of a model configuration; did you mean 'num_heads'?"),
        ({"zzz": 4}, ValueError, "'zzz' is no key of a model configuration; accepted: vocab_size, dim"),
        ({"moe": MOE | {"topk": 2}}, ValueError, "'moe.topk' is no key .*; did you mean 'moe.top_k'?"),
        ({"moe": MOE | {"top_k": 9}}, ValueError, "moe.top_k is 9; accepted: 1 to 8, the experts a token can reach"),
        ({"moe": MOE | {"num_groups": 3}}, ValueError, "moe.num_groups is 3; accepted: a divisor"),
        ({"moe": MOE | {"num_groups": 8, "top_k": 2}}, ValueError, "moe.top_k is 2; accepted: 1 to 1"),
        ({"moe": MOE | {"balancing": "aux"}}, ValueError, "moe.balancing is 'aux'; accepted: 'aux_loss', 'bias'"),
        ({"moe": MOE | {"first_dense_layers": 2}}, ValueError, "moe.first_dense_layers is 2; accepted: less than"),
        ({"moe": MOE, "activation": "gelu"}, ValueError, "activation is 'gelu'; accepted: 'swiglu' or 'geglu'"),
        ({"moe": 8}, TypeError, r"moe is 8 \(int\); accepted: MoEConfig or None"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_refuses(change, error, message):
    with pytest.raises(error, match=message):
        ModelConfig.from_dict(BASE | change)


def test_missing_keys_are_named():
    with pytest.raises(ValueError, match="no 'vocab_size', 'num_layers'"):
        ModelConfig.from_dict({"dim": 8, "num_heads": 2})
    with pytest.raises(ValueError, match=r"no 'moe\.num_experts', 'moe\.ffn_dim'"):
        ModelConfig.from_dict(BASE | {"moe": {"top_k": 2}})


def test_presets_take_overrides():
    assert llama("tiny", num_kv_heads=1, vocab_size=77).vocab_size == 77
    assert llama("tiny", dim=96).head_dim == 24
    assert gpt2("tiny", qkv_bias=False).qkv_bias is False
    assert llama_dyt("tiny").norm == "dyt"
    moe = llama_moe("tiny", moe={"balancing": "bias"}).moe
    assert isinstance(moe, MoEConfig)
    assert (moe.balancing, moe.num_experts) == ("bias", 8)
    with pytest.raises(ValueError, match="llama has no size 'huge'; accepted: 'tiny', 'micro', 'mini'"):
        llama("huge")
    with pytest.raises(ValueError, match=r"did you mean 'window'\?"):
        llama("tiny", windo=4)


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (gpt2("small"), 124_439_808),
        (llama("135m"), 134_515_008),
        (llama("7b"), 6_738_415_616),
        (llama("8b"), 8_030_261_248),
        (llama_moe("8x7b"), 46_702_792_704),
    ],
    ids=("gpt2 small", "llama 135m", "llama 7b", "llama 8b", "mixtral 8x7b"),
)
def test_published_parameter_counts(config, count):
    with torch.device("meta"):
        assert Transformer(config).num_parameters() == count
