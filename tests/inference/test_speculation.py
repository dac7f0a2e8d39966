"""Speculative decoding changes no token: whoever guesses, and however badly."""

from __future__ import annotations

import itertools
import textwrap
from pathlib import Path

import pytest
import torch

from llmcore.inference.constraints import Choice, JSONSchema, Regex
from llmcore.inference.engine import Engine
from llmcore.inference.mtp import MTPSpeculator
from llmcore.inference.params import SamplingParams
from llmcore.inference.sequence import Finish
from llmcore.inference.speculation import DraftSpeculator, NGramSpeculator, Speculator
from llmcore.models import MLAConfig, ModelConfig, Transformer, llama, llama_moe
from llmcore.tokenizers import train_tokenizer

TEXT = Path(textwrap.__file__).read_text()
TOKENIZER = train_tokenizer([], kind="byte")
VOCAB = TOKENIZER.vocab_size
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer", "maximum": 999}, "b": {"enum": ["x", "y"]}},
          "required": ["a", "b"], "additionalProperties": False}  # fmt: skip


def make(config: ModelConfig, seed: int = 0, spread: float = 0.15) -> Transformer:
    torch.manual_seed(seed)
    model = Transformer(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * spread)
    return model.eval()


def nearly(model: Transformer, noise: float) -> Transformer:
    """A draft model that often says the same."""
    other = make(model.config)
    other.load_state_dict(model.state_dict())
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter) * noise)
    return other


@pytest.fixture(scope="module")
def model() -> Transformer:
    return make(llama("tiny", vocab_size=VOCAB, max_positions=256))


@pytest.fixture(scope="module")
def mtp_model() -> Transformer:
    mla = MLAConfig(kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16)
    config = llama_moe("tiny", vocab_size=VOCAB, max_positions=256, mtp_layers=1, mla=mla, num_kv_heads=None)
    return make(config, spread=0.1)


class Garbage(Speculator):
    """Guesses at random."""

    def draft(self, sequences, counts):
        return [torch.randint(VOCAB, (count,)).tolist() for count in counts]


class Oracle(Speculator):
    """Knows the answers: by prompt and index."""

    def __init__(self, answers, **limits):
        super().__init__(**limits)
        self.answers = answers

    def draft(self, sequences, counts):
        guesses = []
        for s, count in zip(sequences, counts):
            answer = self.answers[tuple(s.request.prompt), s.index]
            guesses.append(answer[s.num_output : s.num_output + count])
        return guesses


def requests() -> tuple[list, list[SamplingParams]]:
    """Of all kinds."""
    common = {"max_tokens": 30, "ignore_eos": True}
    params = [
        SamplingParams(**common, temperature=0),
        SamplingParams(**common, temperature=0, repetition_penalty=1.3, frequency_penalty=0.2, logprobs=3),
        SamplingParams(**common, temperature=1.0, seed=1, n=3),
        SamplingParams(**common, temperature=0.7, top_k=20, seed=2, logprobs=0, presence_penalty=0.5),
        SamplingParams(**common, temperature=1.2, top_p=0.9, seed=3, stop=("a", "e"), min_tokens=5),
        SamplingParams(max_tokens=40, temperature=1.0, seed=4, constraint=JSONSchema(SCHEMA), n=2),
        SamplingParams(max_tokens=40, temperature=1.0, seed=5, constraint=Regex("(ab|cd){2,9}x")),
        SamplingParams(max_tokens=40, temperature=0, constraint=Choice(["hello there", "hello you"])),
        SamplingParams(**common, temperature=1.0, seed=6, logit_bias={7: 3.0, 9: -torch.inf}, min_p=0.02),
        SamplingParams(max_tokens=1, temperature=1.0, seed=7),
        SamplingParams(**common, temperature=0, prompt_logprobs=1),
    ]
    prompts = [list(TEXT.encode()[40 * i : 40 * i + 3 + 7 * i]) for i in range(len(params))]
    return prompts, params


def run(model: Transformer, speculator: Speculator | None = None, prompts=None, params=None, **options):
    if prompts is None:
        prompts, params = requests()
    engine = Engine(model, TOKENIZER, speculator=speculator, cache_tokens=2048, **options)
    outputs = engine.generate(prompts, params)
    assert engine.cache.num_free_blocks == engine.cache.num_blocks
    for cache in [speculator.cache] if hasattr(speculator, "cache") else []:
        assert cache.num_free_blocks == cache.num_blocks  # nothing is kept of what has ended
    return outputs, engine.stats()


def check_same(outputs, expected) -> None:
    assert len(outputs) == len(expected)
    for output, wanted in zip(outputs, expected):
        for choice, other in zip(output.choices, wanted.choices):
            assert choice.tokens == other.tokens
            assert (choice.text, choice.finish) == (other.text, other.finish)
            for a, b in zip(choice.logprobs or [], other.logprobs or []):
                assert (a.token, a.rank, list(a.top)) == (b.token, b.rank, list(b.top))
                assert a.logprob == pytest.approx(b.logprob, abs=1e-4)


MANY = {"max_batch": 64, "max_rows": 512}  # drafts for all of a test's requests at once
SPECULATORS = {
    "ngram": lambda model: NGramSpeculator(3, min_match=1, **MANY),
    "draft": lambda model: DraftSpeculator(nearly(model, 0.02), 3, **MANY),
    "bad draft": lambda model: DraftSpeculator(make(model.config, seed=9), 3, **MANY),
    "garbage": lambda model: Garbage(5, **MANY),
    "few": lambda model: DraftSpeculator(nearly(model, 0.02), 4, max_batch=12, max_rows=36),
    "small cache": lambda model: DraftSpeculator(nearly(model, 0.02), 3, cache_tokens=300, block_size=4, **MANY),
}


@pytest.fixture(scope="module")
def expected(model):
    return run(model)[0]


@pytest.mark.parametrize("name", SPECULATORS)
def test_the_same_texts(model, expected, name):
    outputs, stats = run(model, SPECULATORS[name](model))
    check_same(outputs, expected)
    assert stats.draft_tokens > stats.draft_tokens_accepted >= 0
    if name in ("draft", "few", "small cache"):
        assert stats.draft_tokens_accepted > 0.3 * stats.draft_tokens


@pytest.mark.parametrize("options", [
    {"prefix_caching": False}, {"max_batch_tokens": 40, "max_sequences": 16}, {"batch_invariant": True},
    {"cache_dtype": torch.int8},
])  # fmt: skip
def test_the_same_texts_with_other_options(model, options):
    expected = run(model, **options)[0]
    for name in ("ngram", "draft", "garbage"):
        check_same(run(model, SPECULATORS[name](model), **options)[0], expected)


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
@pytest.mark.parametrize("name", ["draft", "ngram", "garbage"])
def test_the_same_texts_when_blocks_run_out(model, expected, name, preemption):
    prompts, params = requests()
    engine = Engine(
        model, TOKENIZER, speculator=SPECULATORS[name](model), cache_tokens=192, block_size=4, preemption=preemption
    )  # fmt: skip
    check_same(engine.generate(prompts, params), expected)
    assert engine.stats().preemptions > 0
    assert engine.cache.num_free_blocks == engine.cache.num_blocks


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_same_texts_by_multi_token_prediction(mtp_model, count):
    expected = run(mtp_model)[0]
    outputs, stats = run(mtp_model, MTPSpeculator(count, **MANY))
    check_same(outputs, expected)
    assert stats.draft_tokens > 0
    outputs, stats = run(mtp_model, MTPSpeculator(count, **MANY), max_batch_tokens=40, max_sequences=16)
    check_same(outputs, expected)
    small = {"cache_tokens": 120, "block_size": 4}
    check_same(run(mtp_model, MTPSpeculator(count, **MANY, **small))[0], expected)


class Recording(MTPSpeculator):
    def draft(self, sequences, counts):
        drafts = super().draft(sequences, counts)
        for s, count, made in zip(sequences, counts, drafts):
            assert bool(made) == (count > 0)
            if made:
                self.made[s.id, len(s.tokens)] = (list(s.tokens), made)
        return drafts


@torch.no_grad()
def test_multi_token_prediction_guesses_what_the_module_says(mtp_model):
    """The first draft of a step against `look_ahead` over the whole text."""
    speculator = Recording(2, **MANY)
    speculator.made, speculator.KEEP = {}, 4
    prompts = [list(TEXT.encode()[:n]) for n in (2, 9, 50)]
    params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
    run(mtp_model, speculator, prompts, params, max_batch_tokens=20, max_sequences=8, prefix_caching=False)
    assert len(speculator.made) >= 3 * 5
    for tokens, drafts in speculator.made.values():
        batch = torch.tensor([tokens])
        hidden = mtp_model(batch).hidden
        [ahead] = mtp_model.look_ahead(hidden, batch)
        assert drafts[0] == int(mtp_model.logits(ahead.hidden[0, len(tokens) - 2]).argmax())
        assert len(drafts) in (1, 2)


def test_multi_token_prediction_behind_a_known_prefix(mtp_model):
    """The module has not seen what the engine's cache held; the text is the same."""
    prompt = list(TEXT.encode()[:70])
    params = SamplingParams(max_tokens=20, temperature=0.8, seed=3, ignore_eos=True, n=2)
    [expected] = run(mtp_model, None, [prompt], params)[0]
    engine = Engine(mtp_model, TOKENIZER, speculator=MTPSpeculator(2, **MANY), cache_tokens=1024)
    for _ in range(2):
        [output] = engine.generate([prompt], params)
        check_same([output], [expected])
    assert output.cached_tokens == 64
    assert engine.stats().draft_tokens > 0


def test_an_oracle_is_always_right(model, expected):
    prompts, params = requests()
    answers = {(tuple(o.prompt_tokens), c.index): c.tokens for o in expected for c in o.choices}
    outputs, stats = run(model, Oracle(answers, num_tokens=4, **MANY))
    check_same(outputs, expected)
    assert stats.draft_tokens_accepted == stats.draft_tokens > 100
    # five tokens a step: a text of 30 takes a step for its first token and six more
    engine = Engine(model, TOKENIZER, speculator=Oracle(answers, num_tokens=4))
    engine.add(prompts[0], params[0])
    steps = [engine.step() for _ in range(7)]
    assert [len(d.tokens) for deltas in steps for d in deltas] == [1, 5, 5, 5, 5, 5, 4]
    assert not engine.has_work


def test_drafts_by_the_batch(model):
    """Fewer for more texts, none above max_batch."""
    counts: list[tuple[int, int]] = []

    class Counting(Garbage):
        def draft(self, sequences, limits):
            counts.append((len(sequences), max(limits)))
            return super().draft(sequences, limits)

    prompts = [[i + 1] for i in range(9)]
    params = [SamplingParams(max_tokens=4 + 16 * i, ignore_eos=True) for i in range(9)]
    run(model, Counting(6, max_batch=8, max_rows=32), prompts, params)
    most = {size: max(limit for n, limit in counts if n == size) for size, _ in counts}
    assert 9 not in most
    assert all(limit <= min(6, 32 // size - 1) for size, limit in most.items())
    assert most[min(most)] >= 3


def test_what_a_text_quotes(model):
    speculator = NGramSpeculator(4, min_match=2, max_match=3)
    find = speculator._find
    assert find([1, 2, 3, 4, 5, 1, 2, 3], 2) == [4, 5]
    assert find([1, 2, 3, 9, 1, 2, 3, 8, 2, 3], 4) == [8, 2, 3]  # the latest
    assert find([7, 2, 3, 9, 1, 2, 3, 8, 7, 2, 3], 4) == [9, 1, 2, 3]  # the longest
    assert find([1, 2, 3, 4, 3], 4) == []
    assert find([5, 5, 5], 4) == [5]
    assert find([1], 4) == []
    assert find([256, 1, 1, 256, 65536, 1, 1, 256], 1) == [65536]
    for tokens in ([0, 256, 7, 1, 0], [1 << 24, 5, 1 << 16, 1 << 8, 1, 0, 256]):  # bytes of two tokens are no token
        assert find(tokens, 4) == []


def test_a_draft_model_catches_up(model):
    """Its logits are those of a plain pass over the text, after rejections, preemption and pauses."""
    draft = make(model.config, seed=3)
    wrong = []

    class Checked(DraftSpeculator):
        calls = 0

        @torch.no_grad()
        def draft(self, sequences, counts):
            self.calls += 1
            if self.calls % 3 == 0:  # a pause
                return [[] for _ in sequences]
            drafts = super().draft(sequences, counts)
            for s, made in zip(sequences, drafts):
                for j, token in enumerate(made):
                    logits = draft.logits(draft(torch.tensor([s.tokens + made[:j]])).hidden[0, -1])
                    if int(logits.argmax()) != token and logits.max() - logits[token] > 1e-3:
                        wrong.append((s.tokens, made))
            return drafts

    prompts = [list(TEXT.encode()[:n]) for n in (3, 40, 41, 60)]
    params = SamplingParams(max_tokens=25, temperature=0, ignore_eos=True, n=2)
    speculator = Checked(draft, 3, cache_tokens=400, block_size=4, **MANY)
    speculator.CHUNK = 16
    engine = Engine(model, TOKENIZER, speculator=speculator, cache_tokens=256, block_size=4)
    engine.generate(prompts, params)
    assert engine.stats().preemptions > 0
    assert engine.stats().draft_tokens > 50
    assert not wrong


def counts_of(outputs) -> dict[tuple[int, ...], int]:
    found: dict[tuple[int, ...], int] = {}
    for output in outputs:
        for choice in output.choices:
            found[tuple(choice.tokens)] = found.get(tuple(choice.tokens), 0) + 1
    return found


@torch.no_grad()
def joint(model: Transformer, prompt: list[int], length: int, temperature: float) -> dict[tuple[int, ...], float]:
    """The probability of each continuation."""
    found = {(): 1.0}
    for _ in range(length):
        longer = {}
        for tokens, probability in found.items():
            logits = model.logits(model(torch.tensor([prompt + list(tokens)])).hidden[0, -1]).double()
            each = (logits / temperature).softmax(0).tolist()
            longer |= {(*tokens, token): probability * p for token, p in enumerate(each)}
        found = longer
    return found


def chi_square(counts: dict, probabilities: dict) -> tuple[float, int]:
    """The statistic and its degrees of freedom; rare outcomes are taken together."""
    total = sum(counts.values())
    cells, rest = [], [0.0, 0.0]
    for outcome, probability in probabilities.items():
        cell = (counts.get(outcome, 0), probability * total)
        if cell[1] >= 5:
            cells.append(cell)
        else:
            rest = [rest[0] + cell[0], rest[1] + cell[1]]
    cells += [tuple(rest)] if rest[1] >= 1 else []
    return sum((seen - wanted) ** 2 / wanted for seen, wanted in cells), len(cells) - 1


@pytest.mark.parametrize("name", ["draft", "garbage", "ngram"])
def test_the_distribution_is_the_models(name):
    """Three tokens of a vocabulary of six, over 3,840 seeds, against the exact probabilities."""
    model = make(llama("tiny", vocab_size=6, max_positions=64), seed=1, spread=0.1)
    draft = make(llama("tiny", vocab_size=6, max_positions=64), seed=2, spread=0.1)
    speculator = {
        "draft": DraftSpeculator(draft, 2, max_batch=128, max_rows=1024),
        "garbage": Garbage(2, max_batch=128, max_rows=1024),
        "ngram": NGramSpeculator(2, min_match=1, max_batch=128, max_rows=1024),
    }[name]
    if name == "garbage":
        speculator.draft = lambda sequences, counts: [[len(s.tokens) % 6] * c for s, c in zip(sequences, counts)]
    prompt, n = [1, 2, 3, 1, 2], 128
    params = [SamplingParams(max_tokens=3, n=n, seed=1000 * i, temperature=1.1) for i in range(30)]
    engine = Engine(model, speculator=speculator, max_sequences=n, cache_tokens=4096)
    counts = counts_of(engine.generate([prompt] * len(params), params))
    assert sum(counts.values()) == 30 * n
    stats = engine.stats()
    assert 0 < stats.draft_tokens_accepted < stats.draft_tokens
    probabilities = joint(model, prompt, 3, 1.1)
    statistic, freedom = chi_square(counts, probabilities)
    limit = freedom + 4 * (2 * freedom) ** 0.5  # beyond what happens by chance in one of ten thousand
    assert freedom > 20
    assert statistic < limit
    others = joint(draft, prompt, 3, 1.1)  # the test can fail: these are not the draft model's probabilities
    assert chi_square(counts, others)[0] > limit


def test_what_is_refused(model, mtp_model):
    with pytest.raises(ValueError, match="num_tokens is 0"):
        Garbage(0)
    with pytest.raises(ValueError, match="min_match is 3, max_match 2"):
        NGramSpeculator(min_match=3, max_match=2)
    with pytest.raises(ValueError, match="the draft model has 99 tokens"):
        Engine(model, speculator=DraftSpeculator(make(llama("tiny", vocab_size=99))))
    with pytest.raises(ValueError, match="mtp_layers is 0"):
        Engine(model, speculator=MTPSpeculator())
    speculator = Garbage(2)
    Engine(model, speculator=speculator)
    with pytest.raises(ValueError, match="another engine"):
        Engine(model, speculator=speculator)


def test_aborts_and_errors_leave_nothing(model):
    speculator = DraftSpeculator(nearly(model, 0.02), 3, **MANY)
    engine = Engine(model, TOKENIZER, speculator=speculator, cache_tokens=2048)
    ids = [engine.add(list(range(1, 30)), SamplingParams(max_tokens=50, n=2, ignore_eos=True)) for _ in range(3)]
    for _ in range(4):
        engine.step()
    assert speculator.cache.sequences
    for request in itertools.chain(ids):
        assert all(d.finish is Finish.ABORT for d in engine.abort(request))
    assert not speculator.cache.sequences
    assert not speculator._known
    assert engine.cache.num_free_blocks == engine.cache.num_blocks
