"""What a request may ask of the engine besides tokens: log-probabilities, penalties, biases, stops, texts."""

from __future__ import annotations

import pytest
import torch

from llmcore import ops
from llmcore.inference import Engine, Finish, LanguageModel, SamplingParams
from llmcore.tokenizers import train_tokenizer
from tests.inference.engines import CONFIGS, TEXT, all_free, logprobs_by_full_pass, make

TINY = {"cache_tokens": 96, "block_size": 2, "max_batch_tokens": 40, "max_sequences": 12}
PROMPTS = [TEXT[:33], TEXT[:50], TEXT[100:101], TEXT[30:64], TEXT[200:209]]


@pytest.fixture(scope="module")
def model():
    return make(CONFIGS["llama"]).eval()


def close(told, token, logprobs):
    assert told.token == token
    assert told.logprob == pytest.approx(float(logprobs[token]), abs=2e-4)
    assert told.rank == int((logprobs > logprobs[token]).sum()) + 1
    best = logprobs.topk(len(told.top))
    assert list(told.top) == best.indices.tolist()
    assert list(told.top.values()) == pytest.approx(best.values.tolist(), abs=2e-4)


@pytest.mark.parametrize("penalties", [{}, {"presence_penalty": 1.0, "logit_bias": {5: 2.0}}], ids=str)
@pytest.mark.parametrize("options", [{}, TINY, TINY | {"preemption": "swap"}], ids=["roomy", "recompute", "swap"])
def test_logprobs_are_those_of_a_plain_forward_pass(model, options, penalties):
    """Of prompt and output, under preemption and with prefixes in the cache, before penalties and temperature."""
    engine = Engine(model, **options)
    params = SamplingParams(max_tokens=14, seed=3, logprobs=3, prompt_logprobs=2, n=2, **penalties)
    engine.generate(PROMPTS, SamplingParams(max_tokens=1))  # leaves prefixes
    outputs = engine.generate(PROMPTS, [params] * 4 + [SamplingParams(max_tokens=14, seed=3, logprobs=0)])
    assert (engine.stats().preemptions > 0) == bool(options)
    for prompt, output in zip(PROMPTS, outputs[:4]):
        for choice in output.choices:
            plain = logprobs_by_full_pass(model, prompt + choice.tokens)
            assert output.prompt_logprobs[0] is None
            for place in range(1, len(prompt)):
                close(output.prompt_logprobs[place], prompt[place], plain[place - 1])
                assert len(output.prompt_logprobs[place].top) == 2
            assert len(output.prompt_logprobs) == len(prompt)
            for place, told in enumerate(choice.logprobs, len(prompt)):
                close(told, choice.tokens[place - len(prompt)], plain[place - 1])
                assert len(told.top) == 3
    assert outputs[4].prompt_logprobs is None
    assert [told.top for told in outputs[4].choices[0].logprobs] == [{}] * 14


def test_prompt_logprobs_come_with_the_first_delta(model):
    engine = Engine(model, max_batch_tokens=13, max_sequences=12)
    engine.add(PROMPTS[0], SamplingParams(max_tokens=3, prompt_logprobs=1, n=2, seed=0))
    deltas = []
    while engine.has_work:
        deltas += engine.step()
    assert [d.prompt_logprobs is not None for d in deltas] == [True] + [False] * 5
    assert len(deltas[0].prompt_logprobs) == 33


def test_penalties_equal_the_reference(model):
    """Beside requests without any."""
    settings = {"repetition_penalty": 1.7, "presence_penalty": 0.4, "frequency_penalty": 0.3}
    punished = SamplingParams(max_tokens=14, temperature=0, logit_bias={7: 1.5, 40: float("-inf")}, **settings)
    plain = SamplingParams(max_tokens=14, temperature=0)
    outputs = Engine(model).generate(PROMPTS, [punished, plain, punished, plain, punished])
    for prompt, output, params in zip(PROMPTS, outputs, [punished, plain, punished, plain, punished]):
        tokens = list(prompt)
        for _ in range(14):
            with torch.no_grad():
                logits = model.logits(model(torch.tensor([tokens])).hidden)[0, -1:].clone()
            if params is punished:
                ops.apply_penalties_(
                    logits, torch.tensor([tokens]), torch.tensor([len(prompt)]), repetition=1.7, presence=0.4,
                    frequency=0.3,
                )  # fmt: skip
                logits[0, 7] += 1.5
                logits[0, 40] = float("-inf")
            tokens.append(int(logits.argmax()))
        assert output.choices[0].tokens == tokens[len(prompt) :]
    assert outputs[0].choices[0].tokens != Engine(model).generate(PROMPTS[:1], plain)[0].choices[0].tokens


def test_settings_of_one_step_may_all_differ(model):
    each = [
        SamplingParams(max_tokens=10, temperature=0),
        SamplingParams(max_tokens=10, temperature=1.3, top_k=5, seed=1),
        SamplingParams(max_tokens=10, temperature=0.7, top_p=0.8, seed=2, logprobs=1),
        SamplingParams(max_tokens=10, min_p=0.1, seed=-3, presence_penalty=2.0),
        SamplingParams(max_tokens=10, seed=4, n=3, min_tokens=4),
    ]
    together = Engine(model, **TINY).generate(PROMPTS, each)
    for prompt, params, output in zip(PROMPTS, each, together):
        (alone,) = Engine(model).generate([prompt], params)
        assert [c.tokens for c in alone.choices] == [c.tokens for c in output.choices]


# ---- how texts end


def test_stop_tokens(model):
    (free,) = Engine(model).generate([PROMPTS[0]], SamplingParams(max_tokens=12, temperature=0))
    tokens = free.choices[0].tokens
    stop = tokens[4]
    first = tokens.index(stop)
    engine = Engine(model, stop_ids=[stop])

    def run(**params):
        (output,) = engine.generate([PROMPTS[0]], SamplingParams(max_tokens=12, temperature=0, **params))
        return output.choices[0].tokens, output.choices[0].finish

    assert run() == (tokens[: first + 1], Finish.STOP)
    assert run(ignore_eos=True) == (tokens, Finish.LENGTH)
    assert run(ignore_eos=True, stop_token_ids=[tokens[0]]) == (tokens[:1], Finish.STOP)
    later, _ = run(min_tokens=first + 1)
    assert stop not in later[: first + 1]  # forbidden until then
    assert later[:first] == tokens[:first]
    everything = engine.generate([PROMPTS[0]], SamplingParams(temperature=0, ignore_eos=True))[0].choices[0]
    assert (len(everything.tokens), everything.finish) == (96 - 33, Finish.LENGTH)


@pytest.fixture(scope="module")
def lm(model):
    return LanguageModel(model, train_tokenizer([], kind="byte"))


def test_stop_strings_of_choices(lm):
    """Each choice ends by itself, at the same place as in a run of its own, and shows nothing of the stop string."""
    params = SamplingParams(max_tokens=40, temperature=1.0, seed=5, n=4)
    engine = Engine.from_language_model(lm, stop_ids=[])
    (free,) = engine.generate(["the quick"], params)
    stop = [choice.text[k : k + 2] for choice, k in zip(free.choices, (3, 9, 12))]
    (cut,) = engine.generate(["the quick"], SamplingParams(max_tokens=40, seed=5, n=4, stop=stop))
    for whole, choice in zip(free.choices, cut.choices):
        places = [whole.text.find(s) for s in stop if s in whole.text]
        wanted = whole.text[: min(places)] if places else whole.text
        assert choice.text == wanted
        assert choice.finish is (Finish.STOP if places else Finish.LENGTH)
        assert choice.tokens == whole.tokens[: len(choice.tokens)]
    assert sum(c.finish is Finish.STOP for c in cut.choices) >= 3
    (late,) = engine.generate(["the quick"], SamplingParams(max_tokens=40, seed=5, n=4, stop=stop, min_tokens=20))
    assert all(len(c.tokens) > 20 for c in late.choices)
    assert late.choices[0].text.startswith(free.choices[0].text[:5])
    assert all_free(engine)


def test_deltas_add_up_to_the_text(lm):
    engine = Engine.from_language_model(lm, stop_ids=[], **TINY)
    for stop in ((), ("e", "zz")):
        parts, tokens = {}, {}
        params = SamplingParams(max_tokens=20, seed=1, n=3, stop=stop)

        def take(delta, parts=parts, tokens=tokens):
            parts[delta.request_id, delta.index] = parts.get((delta.request_id, delta.index), "") + delta.text
            tokens.setdefault((delta.request_id, delta.index), []).extend(delta.tokens)

        outputs = engine.generate(["the quick", "a cat"], params, on_delta=take)
        for output in outputs:
            for choice in output.choices:
                assert parts[output.request_id, choice.index] == choice.text
                assert tokens[output.request_id, choice.index] == choice.tokens
                if not stop:
                    known = [t for t in choice.tokens if lm.tokenizer.id_to_token(t) is not None]
                    assert choice.text == lm.tokenizer.decode(known, skip_special_tokens=True)


def test_a_chat_finds_its_earlier_turns(lm, monkeypatch):
    """The second call runs only what is new, on the same engine; other weights are another engine."""
    made = []
    monkeypatch.setattr(Engine, "__init__", _spied(Engine.__init__, made))
    prompt = lm.encode("the quick brown fox jumps over it")
    lm.generate(prompt, max_tokens=8)
    answer = lm.complete([prompt], max_tokens=8, temperature=0)[0].tokens
    lm.generate(prompt + answer + prompt[:9], max_tokens=8)
    assert len(made) == 1
    stats = made[0].stats()
    assert stats.prefix_tokens_hit >= 16 * (len(prompt) // 16) + 16 * ((len(prompt) + 8) // 16) > 0
    with torch.no_grad():
        lm.model.norm.gain.mul_(1.5)
    changed = lm.complete([prompt], max_tokens=8, temperature=0)[0]
    assert len(made) == 2
    fresh = LanguageModel(lm.model, lm.tokenizer).complete([prompt], max_tokens=8, temperature=0)[0]
    assert changed == fresh
    with torch.no_grad():
        lm.model.norm.gain.div_(1.5)


def _spied(init, made):
    def spy(self, *args, **kwargs):
        made.append(self)
        init(self, *args, **kwargs)

    return spy


def test_calls_at_the_same_time_have_engines_of_their_own(lm):
    """A stream that is half read does not stop other calls, nor they it."""
    whole = lm.generate("the quick", max_tokens=12, temperature=0)
    pieces = lm.generate("the quick", max_tokens=12, temperature=0, stream=True)
    begin = next(pieces)
    assert lm.generate("the quick", max_tokens=12, temperature=0) == whole
    assert begin + "".join(pieces) == whole
