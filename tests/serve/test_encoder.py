"""`llmcore serve` of a BERT folder: embeddings alone."""

from __future__ import annotations

import pytest
import tokenizers
import torch

from llmcore.inference import load_embedder
from llmcore.models import Encoder, ModelConfig, save_pretrained
from tests.serve.running import SERVE

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "cat", "sat", "on", "mat", "a", "."]
CONFIG = ModelConfig(
    vocab_size=len(WORDS), dim=16, num_layers=2, num_heads=2, ffn_dim=24, max_positions=20, token_types=2,
    activation="gelu_erf", norm="layer", norm_eps=1e-12, norm_placement="post", embedding_norm=True, position="learned",
    causal=False, head="none", pooler=True, qkv_bias=True, attention_out_bias=True, mlp_bias=True, init_std=0.3,
)  # fmt: skip


def test_bert(start, tmp_path):
    torch.manual_seed(0)
    save_pretrained(Encoder(CONFIG), tmp_path)
    words = tokenizers.Tokenizer(tokenizers.models.WordPiece({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    words.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    words.add_special_tokens(WORDS[:4])
    words.save(str(tmp_path / "tokenizer.json"))
    server = start(SERVE, tmp_path, "--port", 0, "--name", "bert")
    texts = ["the cat sat .", "a mat", "the cat on the mat"]
    wanted = load_embedder(tmp_path).embed(texts)

    got = pytest.importorskip("openai") and server.client().embeddings.create(model="bert", input=texts)
    torch.testing.assert_close(torch.tensor([one.embedding for one in got.data]), wanted, rtol=1e-5, atol=1e-6)
    assert got.usage.prompt_tokens == 6 + 4 + 7

    status, body = server.post("/v1/embeddings", {"model": "bert", "input": "the " * 40})
    assert status == 400
    assert "42 tokens; accepted: 1 to 20" in body["error"]["message"]
    status, body = server.post("/v1/completions", {"model": "bert", "prompt": "the"})
    assert status == 400
    assert "embeddings alone" in body["error"]["message"]
    assert server.request("GET", "/health")[0] == 200
    assert server.request("GET", "/")[0] == 404
    assert b"llmcore_requests" in server.request("GET", "/metrics")[2]
    assert server.stop() == 0
