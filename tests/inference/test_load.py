"""A model from disk: found from anywhere, equal to what was saved, and refused with a reason."""

from __future__ import annotations

import gc

import pytest
import torch

from llmcore.checkpoints import CheckpointError, model_tensors, save_checkpoint
from llmcore.inference import load, load_model
from llmcore.models import Transformer, llama, llama_moe
from llmcore.tokenizers import train_tokenizer


def save_run(run, model, tensors=None, **changes):
    """A run folder with one checkpoint, whose configuration is the model's with `changes`."""
    train_tokenizer([], kind="byte").save(run / "tokenizer")
    tensors = model_tensors(model) if tensors is None else tensors
    return save_checkpoint(run / "checkpoints", 3, model=tensors, config=model.config.to_dict() | changes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_round_trip(tmp_path, dtype):
    model = Transformer(llama_moe("tiny", moe={"balancing": "bias"})).to(dtype)
    model.blocks[1].mlp.expert_bias.normal_()
    save_run(tmp_path, model)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    again, tokenizer = load_model(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    assert tokenizer.decode(tokenizer.encode("text")) == "text"
    assert again.config == model.config
    assert not again.training
    for (name, saved), loaded in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert loaded.dtype == saved.dtype, name
        assert torch.equal(loaded, saved), name
    tokens = torch.arange(20)[None]
    assert torch.equal(again(tokens).hidden, model.eval()(tokens).hidden)


@pytest.mark.parametrize(
    ("folder", "path"),
    [(".", "."), (".", "checkpoints"), ("checkpoints", "."), ("checkpoints", "step-000003"),
     ("checkpoints/step-000003", ".")],
)  # fmt: skip
def test_is_found_from_any_folder(tmp_path, monkeypatch, folder, path):
    save_run(tmp_path, Transformer(llama("tiny")))
    monkeypatch.chdir(tmp_path / folder)
    load_model(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_head": 4}, "config.json: 'num_head' is no key of a model configuration; did you mean 'num_heads'?"),
        ({"dim": "64"}, r"config.json: dim is '64' \(str\); accepted: int"),
        ({"norm": "batch"}, "config.json: norm is 'batch'; accepted: 'rms', 'layer', 'dyt'"),
        ({"ffn_dim": 64}, r"'blocks.0.mlp.gate_up.weight' has shape \(256, 64\); this model has \(128, 64\)"),
        ({"num_layers": 3}, "'blocks.2.attention.out.weight' is missing"),
        ({"num_layers": 2**40}, "config.json: num_layers is 1099511627776; the file has 14 tensors"),
        ({"num_layers": 1}, "'blocks.1.attention.out.weight' has no place in this model"),
        ({"vocab_size": 2**40}, r"'embed_tokens.weight' has shape \(512, 64\); this model has \(1099511627776, 64\)"),
        ({"vocab_size": 2**60}, "config.json: .*overflow"),
        ({"max_positions": 2**50}, "config.json: max_positions is 1125899906842624: .*memory"),
    ],
    ids=str,
)
def test_refuses_a_configuration_that_does_not_fit(tmp_path, changes, message):
    save_run(tmp_path, Transformer(llama("tiny")), **changes)
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path)


def test_refuses_tensors_of_another_kind(tmp_path):
    model = Transformer(llama("tiny"))
    tensors = model_tensors(model)
    save_run(tmp_path, model, tensors | {"norm.weight": torch.ones(64, dtype=torch.int32)})
    with pytest.raises(CheckpointError, match=r"'norm.weight' is torch.int32; this model holds it as torch.float32"):
        load_model(tmp_path)


def test_refuses_a_folder_without_a_tokenizer(tmp_path):
    path = save_run(tmp_path, Transformer(llama("tiny")))
    (tmp_path / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"step-000003: no tokenizer/tokenizer\.json beside it"):
        load_model(path)


@pytest.mark.parametrize("enabled", [True, False])
def test_the_garbage_collector_is_as_it_was(tmp_path, enabled):
    before = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        with pytest.raises(CheckpointError):
            load(tmp_path)
        (tmp_path / "model.gguf").write_bytes(b"GGUF")
        with pytest.raises(CheckpointError, match="has 4 bytes"):
            load(tmp_path / "model.gguf")
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if before else gc.disable)()
