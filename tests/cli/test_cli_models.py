"""llmcore generate, chat and perplexity with models of every kind of source."""

from __future__ import annotations

import io
import json
import sys

import pytest
import torch

import llmcore
from llmcore import cli
from llmcore.inference import Engine, GenerationDefaults, LanguageModel, SamplingParams
from llmcore.inference.strategies import run_strategy
from llmcore.models import Transformer, llama
from llmcore.tokenizers import train_tokenizer

TEXT = "the quick fox and the lazy dog run over the hill\na cat sat on the mat and saw a rat\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    model = Transformer(llama("tiny", vocab_size=320, max_positions=96))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
    tokenizer = train_tokenizer([TEXT] * 10, vocab_size=320)
    lm = LanguageModel(model, tokenizer, defaults=GenerationDefaults(temperature=0.0))
    path = tmp_path_factory.mktemp("model") / "hf"
    lm.save_pretrained(path)
    return path


def run(capsys, *argv):
    assert cli.main([str(a) for a in argv]) == 0
    return capsys.readouterr()


def error_of(capsys, *argv):
    assert cli.main([str(a) for a in argv]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("llmcore: error: ")
    assert captured.err.count("\n") == 1
    return captured.err


def test_generate(folder, capsys, tmp_path):
    lm = llmcore.load(folder)
    out = run(capsys, "generate", "--model", folder, "--prompt", "the quick", "--max-tokens", 12).out
    assert out == "the quick" + lm.generate("the quick", max_tokens=12) + "\n"
    settings = ["--temperature", 1.2, "--seed", 3, "--top-k", 9, "--top-p", 0.9, "--min-p", 0.01, "--stop", "a"]
    penalties = ["--repetition-penalty", 1.3, "--presence-penalty", 0.1, "--frequency-penalty", 0.2]
    out = run(capsys, "generate", "--model", folder, "--prompt", "x", "--max-tokens", 12, *settings, *penalties).out
    assert out == "x" + lm.generate(
        "x", max_tokens=12, temperature=1.2, seed=3, top_k=9, top_p=0.9, min_p=0.01, stop=["a"],
        repetition_penalty=1.3, presence_penalty=0.1, frequency_penalty=0.2,
    ) + "\n"  # fmt: skip
    pytest.importorskip("gguf")
    lm.save_gguf(tmp_path / "a.gguf", "bf16")
    out = run(capsys, "generate", "--model", tmp_path / "a.gguf", "--prompt", "the", "--max-tokens", 9).out
    assert out.startswith("the")
    run(capsys, "generate", "--model", folder, "--dtype", "bfloat16", "--prompt", "the", "--max-tokens", 3)


def test_generate_refuses(folder, capsys):
    base = ["generate", "--model", folder, "--prompt", "x", "--max-tokens", 9]
    assert "min_p is 2.0" in error_of(capsys, *base, "--min-p", 2)
    assert "repetition_penalty is -1.0; accepted: above 0" in error_of(capsys, *base, "--repetition-penalty", -1)
    assert "the prompt has 1 tokens; accepted: 0" in error_of(capsys, *base, "--max-tokens", 96)
    assert "quantize is 'q9'; accepted: 'q8_0'" in error_of(capsys, *base, "--quantize", "q9")
    assert "no such file or folder; accepted:" in error_of(capsys, "generate", "--model", "nope", "--prompt", "x")


def test_solve(folder, capsys, tmp_path):
    lm = llmcore.load(folder)
    ask = ["solve", "2 + 2?", "--model", folder, "--max-tokens", 8, "--seed", 3, "--temperature", 1.2, "--min-p", 0.01]
    result = json.loads(run(capsys, *ask, "--n", 4, "--json").out)
    params = SamplingParams(max_tokens=8, seed=3, temperature=1.2, min_p=0.01)
    chat = [{"role": "user", "content": "2 + 2?"}]
    spec = {"name": "self-consistency", "n": 4}
    expected = run_strategy(Engine.from_language_model(lm, cache_tokens=512), chat, spec, params)
    assert result["text"] == expected.text
    assert [c["text"] for c in result["candidates"]] == [c.text for c in expected.candidates]
    assert result["usage"]["generated_tokens"] == expected.usage.generated_tokens
    captured = run(capsys, *ask, "--n", 4)
    assert captured.out == expected.text.strip() + "\n"
    assert f"; {expected.usage.generated_tokens} tokens generated in 1 requests" in captured.err

    sets = ["--set", "n=3", "--set", "weighted=true", "--set", "scorer=probability"]
    result = json.loads(run(capsys, *ask, "--strategy", "best-of-n", *sets, "--json").out)
    assert (result["strategy"], len(result["candidates"]), result["usage"]["requests"]) == ("best-of-n", 3, 1)
    option = {"spec": spec, "accuracy": [0.5], "tokens": [9], "questions": [1]}
    (tmp_path / "table.json").write_text(json.dumps({"edges": [], "options": [option]}))
    chooser = ["--strategy", "compute-optimal", "--table", tmp_path / "table.json", "--set", "budget=500"]
    assert json.loads(run(capsys, *ask, *chooser, "--json").out)["details"]["option"] == spec


def test_solve_refuses(folder, capsys, tmp_path):
    ask = ["solve", "x", "--model", folder, "--max-tokens", 8]
    assert "the strategy's name is 'magic'; accepted: 'beam-search'" in error_of(capsys, *ask, "--strategy", "magic")
    assert "n of self-consistency is 0; accepted: 1 to 128" in error_of(capsys, *ask, "--n", 0)
    assert "--set is 'n'; accepted: KEY=VALUE" in error_of(capsys, *ask, "--set", "n")
    (tmp_path / "a.json").write_text("{")
    assert "a.json is no JSON" in error_of(capsys, *ask, "--table", tmp_path / "a.json")


def chat(monkeypatch, capsys, folder, text, *flags):
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    return run(capsys, "chat", "--model", folder, "--max-tokens", 10, *flags)


def test_chat_takes_a_line_a_turn(folder, capsys, monkeypatch):
    lm = llmcore.load(folder)
    messages, wanted = [], []
    for line in ("the cat", "a rat"):
        messages.append({"role": "user", "content": line})
        wanted.append(lm.chat(messages, max_tokens=10))
        messages.append({"role": "assistant", "content": wanted[-1]})
    out = chat(monkeypatch, capsys, folder, "the cat\n\n  a rat  \n").out
    assert out == f"{wanted[0]}\n{wanted[1]}\n"


def test_chat_has_commands(folder, capsys, monkeypatch):
    lm = llmcore.load(folder)
    first = lm.chat([{"role": "user", "content": "a rat"}], max_tokens=10)
    captured = chat(monkeypatch, capsys, folder, "the cat\n/reset\na rat\n/help me\n/exit\nthe dog\n")
    assert captured.out.endswith(f"\n{first}\n")
    assert captured.err == "/help is no command; /reset begins anew, /exit ends\n"
    with_system = lm.chat(
        [{"role": "system", "content": "so"}, {"role": "user", "content": "a rat"}], max_tokens=10
    )  # fmt: skip
    captured = chat(monkeypatch, capsys, folder, "the cat\n/reset\na rat\n", "--system", "so")
    assert captured.out.endswith(f"\n{with_system}\n")
    assert with_system != first


def test_chat_slides_or_refuses(folder, capsys, monkeypatch):
    text = "".join(f"the cat and the dog {i}\n" for i in range(8))
    assert chat(monkeypatch, capsys, folder, text).out.count("\n") >= 8
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    message = error_of_last(capsys, "chat", "--model", folder, "--max-tokens", 10, "--context", "refuse")
    assert "accepted: 86, which is what max_tokens leaves of the context" in message


def error_of_last(capsys, *argv):
    assert cli.main([str(a) for a in argv]) == 2
    return capsys.readouterr().err


def test_chat_at_a_terminal(folder, capsys, monkeypatch):
    """Mistakes cost a turn, Ctrl-C cuts an answer, and the end of the input ends the chat."""

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stdin", Terminal("the cat\n" + "too long " * 60 + "\na rat\n"))
    captured = run(capsys, "chat", "--model", folder, "--max-tokens", 10)
    assert "/reset begins anew, /exit ends" in captured.err
    assert "llmcore: error: the prompt has" in captured.err
    assert len(captured.out.splitlines()) >= 2

    calls = []

    def interrupted(self, messages, **_):
        calls.append(len(messages))
        yield "half"
        if len(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(LanguageModel, "chat", interrupted)
    monkeypatch.setattr(sys, "stdin", Terminal("one\ntwo\n"))
    run(capsys, "chat", "--model", folder)
    assert calls == [1, 3]  # what came of the first answer is part of the chat


def test_chat_needs_a_template(capsys, tmp_path, folder):
    lm = llmcore.load(folder)
    LanguageModel(lm.model, train_tokenizer([], kind="byte", special_tokens=())).save_pretrained(tmp_path / "a")
    message = error_of(capsys, "chat", "--model", tmp_path / "a")
    assert "has no chat template; accepted: a chat model, or llmcore generate" in message


def test_perplexity(folder, capsys, tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    result = llmcore.load(folder).perplexity(TEXT, 32, 16)
    out = run(capsys, "perplexity", tmp_path / "a.txt", "--model", folder, "--window", 32, "--stride", 16).out
    assert out == f"perplexity {result.perplexity:.4f} over {result.num_tokens} tokens, {result.nll:.4f} nats each\n"
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe")
    assert "is no UTF-8 text" in error_of(capsys, "perplexity", tmp_path / "b.txt", "--model", folder)
    assert "No such file" in error_of(capsys, "perplexity", tmp_path / "c.txt", "--model", folder)
    assert "window is 1" in error_of(capsys, "perplexity", tmp_path / "a.txt", "--model", folder, "--window", 1)
