"""LoRA adapters: to a client each is a model."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from llmcore.inference import Engine, load
from llmcore.inference.params import SamplingParams
from tests.serve.running import SERVE

CHAT = {"messages": [{"role": "user", "content": "the cat"}], "max_tokens": 10, "temperature": 0.0}


@pytest.fixture
def adapter(tmp_path, folder):
    config = json.loads((folder / "config.json").read_text())
    torch.manual_seed(1)
    dim, tensors = config["hidden_size"], {}
    for layer in range(config["num_hidden_layers"]):
        stem = f"base_model.model.model.layers.{layer}.mlp.down_proj"
        tensors[f"{stem}.lora_A.weight"] = torch.randn(4, config["intermediate_size"])
        tensors[f"{stem}.lora_B.weight"] = torch.randn(dim, 4)
    path = tmp_path / "adapter"
    path.mkdir()
    save_file(tensors, path / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", "target_modules": ["down_proj"]}
    (path / "adapter_config.json").write_text(json.dumps(settings))
    return path


def test_each_is_a_model(start, folder, adapter):
    server = start(SERVE, folder, "--port", 0, "--name", "tiny", "--adapter", f"other={adapter}")
    status, _, body = server.request("GET", "/v1/models")
    assert status == 200
    assert [model["id"] for model in json.loads(body)["data"]] == ["tiny", "other"]
    lm = load(folder)
    engine = Engine.from_language_model(lm, cache_tokens=1024, adapters={"other": adapter})
    texts = {}
    for name, which in (("tiny", None), ("other", "other"), ("tiny", None)):
        status, body = server.post("/v1/chat/completions", CHAT | {"model": name})
        assert status == 200, body
        texts[name] = body["choices"][0]["message"]["content"]
        params = SamplingParams(max_tokens=10, temperature=0.0, adapter=which)
        (wanted,) = engine.generate([lm.encode(CHAT["messages"])], params)
        assert texts[name] == wanted.choices[0].text
        assert body["model"] == name
    assert texts["tiny"] != texts["other"]
    status, body = server.post("/v1/chat/completions", CHAT | {"model": "third"})
    assert status == 404
    assert body["error"]["message"] == "model is 'third'; accepted: 'tiny', 'other'"
    assert server.post("/v1/embeddings", {"model": "other", "input": "x"})[0] == 400
    server.idle()
