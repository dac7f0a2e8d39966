from __future__ import annotations

import itertools

import pytest
import torch

from llmcore.inference.engine import Engine
from llmcore.inference.params import SamplingParams
from llmcore.inference.sequence import Finish
from llmcore.inference.strategies import beam_search, drive, problem_for
from llmcore.models import Transformer, llama, save_pretrained

STOP = 6


def spread(vocab_size: int) -> Transformer:
    """A model whose logits lie far apart."""
    torch.manual_seed(vocab_size)
    model = Transformer(llama("tiny", vocab_size=vocab_size, max_positions=64))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(2)
    return model.eval()


@pytest.fixture(scope="module")
def engine():
    return Engine(spread(24), cache_tokens=4096, block_size=4, stop_ids=[STOP])


@pytest.fixture(scope="module")
def theirs(engine, tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("model")
    save_pretrained(engine.model, folder)
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


PROMPTS = [[5, 6, 7], list(range(4, 20)), [9], [11, 3, 12, 13, 14], [17, 4], [8, 8, 9], [22]]


@pytest.mark.parametrize("settings", [
    {"num_beams": 1}, {"num_beams": 4}, {"num_beams": 4, "early_stopping": True},
    {"num_beams": 5, "length_penalty": 0.0}, {"num_beams": 3, "length_penalty": 2.5},
])  # fmt: skip
def test_beams_are_those_of_transformers(engine, theirs, settings):
    ended = []
    for prompt in PROMPTS:
        params = SamplingParams(max_tokens=12)
        result = drive(engine, beam_search(problem_for(engine, prompt), params, **settings))
        num_beams = settings["num_beams"]
        out = theirs.generate(
            torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=STOP, pad_token_id=0,
            num_return_sequences=num_beams, return_dict_in_generate=True, output_scores=True, **settings,
        )  # fmt: skip
        expected = [row[len(prompt) :].tolist() for row in out.sequences]
        expected = [row[: row.index(STOP) + 1] if STOP in row else row for row in expected]
        if num_beams == 1:
            assert result.chosen.tokens == expected[0]
        else:
            assert [c.tokens for c in result.candidates] == expected
            scores = torch.tensor([c.score for c in result.candidates])
            torch.testing.assert_close(scores, out.sequences_scores, rtol=1e-4, atol=1e-4)
        ended += [c.finish for c in result.candidates]
        assert result.curve[-1].tokens == result.usage.generated_tokens
    assert set(ended) == {Finish.STOP, Finish.LENGTH} or num_beams == 1


def test_enough_beams_find_the_likeliest_text():
    """Of all texts of two tokens out of 6, by trying each."""
    model = spread(6)
    engine = Engine(model, cache_tokens=1024, block_size=4, stop_ids=[])
    for prompt in ([1], [2, 3, 4], [5, 5]):
        total = {}
        for first, second in itertools.product(range(6), repeat=2):
            with torch.no_grad():
                logprobs = model.logits(model(torch.tensor([[*prompt, first]])).hidden).log_softmax(-1)[0]
            total[first, second] = (logprobs[len(prompt) - 1, first] + logprobs[len(prompt), second]).item()
        result = drive(engine, beam_search(problem_for(engine, prompt), SamplingParams(max_tokens=2), num_beams=6))
        best = max(total, key=total.__getitem__)
        assert tuple(result.chosen.tokens) == best
        assert result.chosen.logprob == pytest.approx(total[best], abs=1e-4)
        assert result.score == pytest.approx(total[best] / 2, abs=1e-4)


def test_min_tokens_and_cache(engine):
    for least in (0, 8):
        params = SamplingParams(max_tokens=12, min_tokens=least)
        result = drive(engine, beam_search(problem_for(engine, PROMPTS[0]), params))
        assert all(STOP not in c.tokens[:least] for c in result.candidates)
    assert result.usage.cached_tokens > 0.5 * result.usage.prompt_tokens
    assert engine.cache.num_free_blocks == engine.cache.num_blocks


def test_refusals(engine):
    task = problem_for(engine, [5])
    for settings, message in (
        ({"stop": ("x",)}, r"stop is \('x',\); accepted with beam search: stop_token_ids"),
        ({"logit_bias": {1: 1.0}}, "logit_bias is {1: 1.0}; accepted with beam search: none"),
        ({"presence_penalty": 1.0}, "penalties is 'set'; accepted with beam search: none"),
        ({"constraint": object()}, "constraint is .*; accepted with beam search: None"),
        ({"stop_token_ids": range(20)}, "there are 24 beams and stop tokens together; accepted: up to 20"),
        ({"max_tokens": 64}, "the prompt has 1 tokens and max_tokens is 64; accepted: together at most 64"),
    ):
        with pytest.raises(ValueError, match=message):
            drive(engine, beam_search(task, SamplingParams(**{"max_tokens": 4, **settings})))
    with pytest.raises(ValueError, match="num_beams of beam-search is 20; accepted: 1 to 19"):
        beam_search(task, SamplingParams(max_tokens=4), num_beams=20)
