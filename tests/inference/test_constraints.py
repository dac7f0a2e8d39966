"""Structured output: whatever the model would like to say, the text is of the form asked for."""

from __future__ import annotations

import json
import re
import textwrap
import time
from pathlib import Path

import jsonschema
import pytest
import torch

from llmcore.inference.constraints import MAX_SIZE, Choice, Grammar, JSONObject, JSONSchema, Regex, mask_logits_
from llmcore.inference.engine import Engine
from llmcore.inference.params import SamplingParams
from llmcore.inference.sequence import Finish
from llmcore.models import Transformer, llama
from llmcore.tokenizers import Tokenizer, train_tokenizer

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b", "ü\n"]}, "minItems": 1, "maxItems": 3},
        "address": {"type": "object", "properties": {"zip": {"type": "string", "pattern": "^[0-9]{5}$"}},
                    "required": ["zip"], "additionalProperties": False},
        "ok": {"anyOf": [{"type": "boolean"}, {"type": "null"}]},
    },
    "required": ["name", "age", "tags", "address", "ok"],
    "additionalProperties": False,
}  # fmt: skip
OPTIONS = ("yes", "yesterday", "no", 'naïve "x" (a|b)*\n', "😀")


def corpus():
    text = Path(textwrap.__file__).read_text() + Path(json.__file__).read_text()
    return [*text.splitlines(), json.dumps({"name": "Ann", "age": 41, "tags": ["a", "b"], "ok": True})] * 2


@pytest.fixture(scope="module", params=["byte", "bpe", "unigram"])
def tokenizer(request) -> Tokenizer:
    if request.param == "byte":
        return train_tokenizer([], kind="byte")
    return train_tokenizer(corpus(), kind=request.param, vocab_size=600)


def make_engine(tokenizer: Tokenizer, padding: int = 5, **options) -> Engine:
    torch.manual_seed(0)
    model = Transformer(llama("tiny", vocab_size=tokenizer.vocab_size + padding, max_positions=512))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return Engine(model, tokenizer, **options)


@pytest.fixture(scope="module")
def engine(tokenizer) -> Engine:
    return make_engine(tokenizer)


def texts(engine: Engine, constraint, n: int = 8, **params) -> list[str]:
    settings = {"max_tokens": 200, "temperature": 1.0, "seed": 3, "n": n} | params
    [output] = engine.generate(["Say: "], SamplingParams(constraint=constraint, **settings))
    assert [c.finish for c in output.choices] == [Finish.STOP] * n
    assert engine.cache.num_free_blocks == engine.cache.num_blocks
    return [c.text for c in output.choices]


def test_json_schema(engine):
    found = texts(engine, JSONSchema(PERSON))
    for text in found:
        value = json.loads(text)
        jsonschema.validate(value, PERSON)
        assert text == json.dumps(value, ensure_ascii=False) or "\\" in text  # Python's spaces, nothing around it
    assert len(set(found)) == len(found)  # each choice has noise of its own
    assert texts(engine, JSONSchema(json.dumps(PERSON)), n=8) == found


def test_json_object_may_have_white_space(engine):
    for whitespace in (False, True):
        matcher = JSONObject(whitespace).matcher(engine.tokenizer, engine.model.config.vocab_size)
        tokens = engine.tokenizer.encode('{"a": [1, {"b": null}], "c": "}"}')
        ends = [matcher.accept(token) for token in tokens]
        assert ends == [False] * (len(tokens) - 1) + [True]
        spaced = JSONObject(whitespace).matcher(engine.tokenizer, engine.model.config.vocab_size)
        tokens = engine.tokenizer.encode('{\n  "a" :1}')
        assert (spaced.valid(tokens) == len(tokens)) == whitespace


def test_regex(engine):
    pattern = r"([A-Z][a-z]{1,5}-\d{2}){1,3}"
    assert all(re.fullmatch(pattern, text) for text in texts(engine, Regex(pattern)))
    assert texts(engine, Regex(f"^{pattern}$")) == texts(engine, Regex(pattern))
    assert all(text.endswith("\\$") for text in texts(engine, Regex(r"x{1,2}\\\$")))


def test_choice(engine):
    found = texts(engine, Choice(OPTIONS), n=32)
    assert set(found) <= set(OPTIONS)
    assert len(set(found)) > 1
    assert texts(engine, Choice(["only"]), n=2) == ["only"] * 2


def test_grammar(engine):
    grammar = Grammar('start: "(" start ")" | "x"')
    matcher = grammar.matcher(engine.tokenizer, engine.model.config.vocab_size)
    accepted = [matcher.accept(token) for token in engine.tokenizer.encode("((x))")]
    assert accepted == [False] * (len(accepted) - 1) + [True]
    [output] = engine.generate(["a"], SamplingParams(constraint=grammar, seed=0, max_tokens=60))
    assert re.match(r"\(*x?\)*$", output.choices[0].text)


def test_the_end_of_the_text_is_allowed_exactly_where_it_is_complete(engine):
    """ "yes" may end, or go on to "yesterday"; which ones end it is told by the tokens that end texts."""
    tokenizer, vocab = engine.tokenizer, engine.model.config.vocab_size
    matcher = Choice(OPTIONS).matcher(tokenizer, vocab, engine.stop_ids)
    [stop] = engine.stop_ids
    assert not matcher.allowed()[stop]
    for token in tokenizer.encode("yes"):
        assert matcher.allowed()[token]
        assert not matcher.accept(token)
    assert matcher.allowed()[stop]
    assert matcher.allowed()[tokenizer.encode("t")].all()
    assert not matcher.allowed()[tokenizer.encode("s")].any()
    assert not matcher.allowed()[tokenizer.vocab_size :].any()  # rows of the model's table that are no tokens
    fork = matcher.fork()
    assert matcher.accept(stop)
    assert not any(fork.accept(token) for token in tokenizer.encode("terda"))
    assert fork.accept(tokenizer.encode("y")[0])


class Forced:
    """A matcher of another make: one sequence of tokens."""

    def __init__(self, tokens, at=0):
        self.tokens, self.at = tokens, at

    def matcher(self, tokenizer, vocab_size, stop_ids=()):
        self.vocab_size = vocab_size
        return self.fork()

    def allowed(self):
        return torch.arange(self.vocab_size) == self.tokens[self.at]

    def accept(self, token):
        assert token == self.tokens[self.at]
        self.at += 1
        return self.at == len(self.tokens)

    def fork(self):
        copy = Forced(self.tokens, self.at)
        copy.vocab_size = self.vocab_size
        return copy


def test_masks_of_a_step(engine):
    """All rows at once, after no draft and after some, beside rows without a constraint: as one at a time."""
    tokenizer, vocab = engine.tokenizer, engine.model.config.vocab_size
    drafts = {"a": tokenizer.encode("12ab"), "b": tokenizer.encode("x!")}
    matchers = {"a": Regex(r"\d+[a-c]*").matcher(tokenizer, vocab), "b": Regex("x?y{3}").matcher(tokenizer, vocab)}
    matchers["c"] = Forced([7, 8, 9]).matcher(tokenizer, vocab)
    drafts["c"] = [7, 8]
    rows = [(name, count) for name in "abc" for count in range(len(drafts[name]) + 1)] + [("a", 2)]
    logits = torch.randn(len(rows) + 3, vocab)
    free = {0, 4, len(logits) - 1}
    places = [i for i in range(len(logits)) if i not in free]
    masked = logits.clone()
    mask_logits_(masked, [(i, matchers[n], drafts[n][:count]) for i, (n, count) in zip(places, rows)])
    for i in free:
        assert torch.equal(masked[i], logits[i])
    for i, (name, count) in zip(places, rows):
        matcher = matchers[name].fork()
        reachable = True
        for token in drafts[name][:count]:
            reachable = reachable and bool(matcher.allowed()[token])
            if reachable:
                matcher.accept(token)
        if reachable:  # after a draft that is not allowed nothing is drawn
            assert torch.equal(masked[i], logits[i].masked_fill(~matcher.allowed(), -torch.inf))
    everything = logits[:1].clone()
    mask_logits_(everything, [(0, matchers["a"], [])])
    assert torch.isinf(everything).sum() == (~matchers["a"].allowed()).sum()


def test_beside_other_requests(engine):
    """A constrained request gets the same text alone and in a batch with others, which get theirs."""
    kinds = [JSONSchema(PERSON), None, Regex(r"[a-f]{4,30}"), Choice(OPTIONS), None, Forced([5, 6, 7])]
    params = [SamplingParams(max_tokens=120, seed=i, constraint=kind) for i, kind in enumerate(kinds)]
    together = engine.generate(["Say: "] * len(kinds), params)
    for wanted, output in zip(params, together):
        [alone] = engine.generate(["Say: "], wanted)
        assert alone.choices[0].tokens == output.choices[0].tokens
    assert together[-1].choices[0].tokens == [5, 6, 7]


def test_it_survives_preemption(tokenizer):
    constraint = JSONSchema(PERSON)
    params = [SamplingParams(max_tokens=160, seed=i, constraint=constraint) for i in range(4)]
    expected = make_engine(tokenizer).generate(["Say: "] * 4, params)
    small = make_engine(tokenizer, cache_tokens=224, block_size=4, max_sequences=4)
    assert [o.choices for o in small.generate(["Say: "] * 4, params)] == [o.choices for o in expected]
    assert small.scheduler.num_preemptions > 0


def test_beside_other_settings(engine):
    """Biases and penalties come first: they choose among what is allowed. min_tokens does not hold a text open."""
    tokenizer = engine.tokenizer
    no = tokenizer.encode("no")[0]
    assert texts(engine, Choice(["no", "yes"]), n=4, logit_bias={no: 1e4}, min_tokens=50) == ["no"] * 4
    assert texts(engine, Choice(["ab"]), n=2, stop=("b",)) == ["a"] * 2
    assert texts(engine, Choice(["yes", "no"]), n=4, ignore_eos=True, repetition_penalty=1.3)
    bias = {token: -torch.inf for token in range(engine.model.config.vocab_size)}
    [output] = engine.generate(["a"], SamplingParams(constraint=Choice(["a"]), logit_bias=bias, max_tokens=3))
    assert output.choices[0].finish is Finish.ERROR


@pytest.mark.parametrize(
    ("constraint", "message"),
    [
        (JSONSchema({"type": "foo"}), "JSONSchema.*foo"),
        (JSONSchema("{"), "JSONSchema"),
        (JSONSchema([1]), "list; accepted: an object"),
        (JSONSchema({"const": {1, 2}}), "JSONSchema.*set"),
        (JSONSchema({"enum": [float("nan")]}), "JSONSchema"),
        (JSONSchema({"type": "array", "uniqueItems": True}), "uniqueItems"),
        (JSONSchema({"$ref": "http://example.com/schema"}), "JSONSchema"),
        (JSONSchema({"$ref": "#"}), "JSONSchema"),
        (JSONSchema(False), "JSONSchema"),
        (Regex("((("), "Regex.*unclosed group"),
        (Regex("(?=a)b"), "look-ahead"),
        (Regex(3), "a string"),
        (Choice([]), "one or more strings"),
        (Choice("yes"), "one or more strings"),
        (Choice(["a", ""]), "none of them empty"),
        (Grammar("begin: x"), "Grammar"),
    ],
)
def test_wrong_constraints_are_refused_before_anything_is_queued(engine, constraint, message):
    with pytest.raises(ValueError, match=f"constraint.*{message}") as error:
        engine.add("a", SamplingParams(constraint=constraint))
    assert len(str(error.value)) < 700
    assert not engine.has_work


def nested(depth: int) -> dict:
    schema = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


BOMBS = {
    "long": JSONSchema({"type": "object", "properties": {f"key {i}": {"type": "string"} for i in range(10000)}}),
    "deep": JSONSchema(nested(200)),
    "deeper": JSONSchema(nested(5000)),
    "deep text": JSONSchema('{"not":' * 5000 + "{}" + "}" * 5000),
    "product": JSONSchema({"allOf": [{"anyOf": [nested(1) | {"title": f"{i}{j}"} for j in range(2)]}
                                     for i in range(20)]}),
    "rows": JSONSchema({"type": "object", "properties": {f"k{i}": {"type": "string"} for i in range(2500)}}),
    "groups": Regex("(" * 5000 + "a" + ")" * 5000),
    "choices": Choice([f"option {i}" for i in range(10000)]),
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused(engine, name):
    began = time.monotonic()
    with pytest.raises(ValueError, match="constraint"):
        engine.add("a", SamplingParams(constraint=BOMBS[name]))
    assert time.monotonic() - began < 60  # a hang, not a speed
    assert not engine.has_work


@pytest.mark.parametrize("pattern", ["(.*a.{20,40}){10}b", "((a{1000}){1000}){1000}", "(.*x){50}(.|\n)*y.{30}z"])
def test_a_limit_met_on_the_way_ends_that_text_alone(engine, pattern):
    """Expressions whose automaton grows with the text: it ends with an error, those beside it go on."""
    params = SamplingParams(constraint=Regex(pattern), max_tokens=300, seed=1)
    try:
        engine.prepare(params)
    except ValueError:  # the beginning was dear enough
        return
    other = SamplingParams(max_tokens=20, seed=2, ignore_eos=True)
    first, second = engine.generate(["a", "b"], [params, other])
    assert first.choices[0].finish in (Finish.ERROR, Finish.LENGTH)
    assert second.choices[0].finish is Finish.LENGTH
    assert engine.cache.num_free_blocks == engine.cache.num_blocks


def test_what_a_constraint_needs(engine):
    words = train_tokenizer(["some words to know"] * 3, kind="word", vocab_size=20)
    with pytest.raises(ValueError, match="must spell bytes"):
        Regex("a").matcher(words, words.vocab_size)
    with pytest.raises(ValueError, match="end a text"):
        Regex("a").matcher(train_tokenizer([], kind="byte", eos_token=None), 300)
    with pytest.raises(ValueError, match="a row of logits 10"):
        Regex("a").matcher(engine.tokenizer, 10, [3])
    with pytest.raises(ValueError, match="no tokenizer"):
        Engine(engine.model).add([1], SamplingParams(constraint=Regex("a")))


def test_without_the_package(engine, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    with pytest.raises(ImportError, match=r"llmcore\[structured\]"):
        engine.prepare(SamplingParams(constraint=Regex("a")))


def test_it_is_compiled_once(engine, monkeypatch):
    constraint, calls = Regex("[ab]{3}"), []
    monkeypatch.setattr(Regex, "_source", lambda self: calls.append(1) or self.pattern)
    for _ in range(3):
        assert constraint.matcher(engine.tokenizer, engine.model.config.vocab_size)
    assert len(calls) == 1
    assert MAX_SIZE >= 1 << 14
