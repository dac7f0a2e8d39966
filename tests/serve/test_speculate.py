"""`llmcore serve --speculate`: the same texts, in fewer steps."""

from __future__ import annotations

import pytest

from llmcore import cli
from tests.serve.running import SERVE

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "the cat"}], "max_tokens": 40, "temperature": 0.0}


@pytest.mark.parametrize("how", ["ngram", "model"])
def test_the_same_texts(how, start, folder, tiny):
    how = folder if how == "model" else how  # the model itself: all its guesses are right
    server = start(SERVE, folder, "--port", 0, "--name", "tiny", "--speculate", how, "--draft-tokens", 3)
    _, wanted = tiny.post("/v1/chat/completions", CHAT)
    status, body = server.post("/v1/chat/completions", CHAT)
    assert status == 200, body
    assert body["choices"] == wanted["choices"]
    metrics = server.idle()
    drafts, right = (metrics[f"llmcore_draft_tokens{suffix}_total"] for suffix in ("", "_accepted"))
    assert drafts > 0
    assert how == "ngram" or right == drafts


def test_what_is_refused(folder, capsys):
    for options, message in (
        (["--speculate", "mtp"], "mtp_layers is 0; accepted: a model with multi-token prediction"),
        (["--speculate", "ngram", "--draft-tokens", "0"], "num_tokens is 0; accepted: 1 or more"),
        (["--speculate", "nope"], "nope: no such file or folder"),
        (["--draft-tokens", "2"], "--draft-tokens is 2; accepted: with --speculate"),
    ):
        assert cli.main(["serve", str(folder), *options]) == 2
        assert message in capsys.readouterr().err
