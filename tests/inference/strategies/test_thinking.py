"""Budget forcing, self-refinement, chains of thought: what is asked, in which order, and what is counted."""

from __future__ import annotations

import pytest

from llmcore.inference.params import SamplingParams
from llmcore.inference.sequence import Finish
from llmcore.inference.strategies import (
    Problem,
    budget_forcing,
    chain_of_thought,
    drive,
    self_consistency,
    self_refine,
)
from llmcore.tokenizers import train_tokenizer
from tests.inference.strategies.fakes import EOS, TOKENIZER, FakeEngine, problem

PARAMS = SamplingParams(max_tokens=40)


def thinker(rng, before, params):
    """Says "so." for each "Wait" that it has been told, and ends its thinking; then answers with their number."""
    thinking = "</think>" not in before
    return ("so.</think>", False) if thinking else (f"the answer is {before.count('Wait')}", True)


@pytest.mark.parametrize("waits", [0, 1, 3])
def test_wait_is_put_in_place_of_the_end(waits):
    engine = FakeEngine(thinker)
    result = drive(engine, budget_forcing(problem("Q"), PARAMS, waits=waits))
    assert result.answer == str(waits)
    assert result.chosen.reasoning == "so." + "Waitso." * waits
    assert result.details == {"thinking_tokens": 3 + 7 * waits, "times_continued": waits}
    prompts = [prompt for call in engine.calls for prompt, _ in call]
    assert prompts[0] == "Q<think>\n"
    assert prompts[-1] == "Q<think>\nso." + "Waitso." * waits + "</think>\n\n"
    assert len(prompts) == waits + 2
    assert result.usage.generated_tokens == engine.generated == result.curve[-1].tokens


def test_thinking_is_made_to_end():
    ramble = lambda rng, before, p: ("the answer is 7", True) if "</think>" in before else ("la " * 50, False)  # noqa: E731
    engine = FakeEngine(ramble)
    result = drive(engine, budget_forcing(problem("Q"), PARAMS, max_thinking=10, waits=5))
    assert (result.chosen.reasoning, result.answer) == ("la la la l", "7")
    assert engine.calls[0][0][1].max_tokens == 10
    assert engine.calls[1][0] == ("Q<think>\nla la la l</think>\n\n", PARAMS)
    assert len(engine.calls) == 2


def test_the_cap_counts_waits():
    engine = FakeEngine(lambda rng, before, p: ("9", True) if before.endswith("#\n\n") else ("so#", False))
    result = drive(engine, budget_forcing(problem("Q"), PARAMS, max_thinking=14, waits=64, begin="", end="#"))
    assert result.chosen.reasoning == "soWaitsoWaitso"
    assert result.details["thinking_tokens"] == 14
    assert [p.max_tokens for call in engine.calls[:-1] for _, p in call] == [14, 8, 2]


def test_min_thinking():
    result = drive(FakeEngine(thinker), budget_forcing(problem("Q"), PARAMS, min_thinking=15))
    assert result.details == {"thinking_tokens": 17, "times_continued": 2}


def test_a_model_without_marks():
    """As in s1: thinking ends with the text or with "Final Answer:", which is put there otherwise."""
    texts = iter([("I add. ", True), ("It is 12. Final Answer: no", False), (" 12", True)])
    engine = FakeEngine(lambda *_: next(texts))
    settings = {"begin": "", "end": "Final Answer:", "answer": "", "waits": 1}
    result = drive(engine, budget_forcing(problem("Q\n"), PARAMS, **settings))
    assert result.chosen.reasoning == "I add. WaitIt is 12. "
    assert engine.calls[2][0][0] == "Q\nI add. WaitIt is 12. Final Answer:"
    assert (result.text, result.answer) == (" 12", "12")
    silent = iter([("It is 12. ", True), ("", True)])
    result = drive(
        FakeEngine(lambda *_: next(silent)), budget_forcing(problem("Q\n"), PARAMS, **settings | {"waits": 0})
    )
    assert (result.text, result.answer) == ("", "12")  # from the thinking


def test_an_end_mark_of_one_token():
    tokenizer = train_tokenizer([], kind="byte", special_tokens=("<|endoftext|>", "</think>"))
    end = tokenizer.token_to_id("</think>")
    asked = []

    class Engine(FakeEngine):
        def _choice(self, index, prompt, params):
            asked.append((list(prompt), params))
            choice = super()._choice(index, prompt, params)
            if len(asked) < 3:
                assert end in params.stop_token_ids
                assert not params.stop
                choice.tokens.append(end)
                choice.finish = Finish.STOP
            return choice

    engine = Engine(lambda rng, before, params: ("hm", False))
    task = Problem.of("Q", tokenizer, stop_ids=frozenset([tokenizer.eos_id]))
    result = drive(engine, budget_forcing(task, PARAMS, waits=1))
    assert result.chosen.reasoning == "hmWaithm"
    assert asked[2][0] == [*tokenizer.encode("Q<think>\nhmWaithm"), end, *tokenizer.encode("\n\n")]


def test_a_mark_within_a_token():
    """Tokens are those of a text in which the end mark begins within one: what stands before it is kept."""
    tokenizer = train_tokenizer(["ab.Final"] * 50, vocab_size=280)
    from llmcore.inference.sequence import Completion
    from llmcore.inference.strategies.budget_forcing import _Thinker

    tokens = tokenizer.encode("ab.Final")
    assert len(tokens) < len("ab.Final")
    made = _Thinker(Problem.of("Q", tokenizer), PARAMS, "Final")
    own, ended = made.before_end(Completion(0, "ab.", tokens, None, Finish.STOP))
    assert ended
    assert tokenizer.decode(own) == "ab."


def test_thinking_needs_room():
    task = problem("Q", max_length=60)
    with pytest.raises(ValueError, match="the prompt has 1 tokens, the thinking up to 58 and max_tokens is 40"):
        drive(FakeEngine(thinker), budget_forcing(task, PARAMS, max_thinking=40))


# ---- self-refinement


def test_refinement_asks_for_rounds():
    texts = iter(["a 1", "bad", "b 2", "worse", "c 3"])
    engine = FakeEngine(lambda *_: (next(texts), True))
    result = drive(engine, self_refine(problem("Q "), PARAMS, rounds=2, criticise="why?", revise="again!"))
    assert [prompt for ((prompt, _),) in engine.calls] == [
        "Q ",
        "Q a 1\n\nwhy?\n",
        "Q a 1\n\nwhy?\nbad\n\nagain!\n",
        "Q b 2\n\nwhy?\n",
        "Q b 2\n\nwhy?\nworse\n\nagain!\n",
    ]
    assert result.answer == "3"
    assert result.details == {"critiques": ["bad", "worse"]}
    assert [point.answer for point in result.curve] == ["1", "2", "3"]
    assert [point.tokens for point in result.curve] == [4, 12, 22]
    texts = iter(["a 1", "No Mistakes."])
    result = drive(engine, self_refine(problem("Q "), PARAMS, rounds=9))
    assert (result.answer, result.usage.requests) == ("1", 2)


def test_refinement_with_a_scorer_keeps_the_best():
    texts = iter(["5", "bad", "9", "bad", "2"])
    by_answer = lambda problem, candidates: [float(c.answer) for c in candidates]  # noqa: E731
    result = drive(FakeEngine(lambda *_: (next(texts), True)), self_refine(problem("Q "), PARAMS, scorer=by_answer))
    assert (result.answer, result.score) == ("9", 9.0)
    assert [(p.answer, p.score) for p in result.curve] == [("5", 5.0), ("9", 9.0), ("9", 9.0)]


# ---- prompts


CHAT = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"})


def test_chain_of_thought_puts_its_instruction_after_the_question():
    engine = FakeEngine(lambda *_: ("so the answer is 4", True))
    result = drive(engine, chain_of_thought(problem("2 + 2?"), PARAMS))
    assert engine.calls[0][0][0] == "2 + 2?\n\nThink step by step, then end with: The answer is\n"
    assert (result.strategy, result.answer, result.score) == ("chain-of-thought", "4", None)
    tokenizer = train_tokenizer([], kind="byte", special_tokens=("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    task = Problem.of(CHAT, tokenizer)
    assert task.question == "2 + 2?"
    drive(engine, chain_of_thought(task, PARAMS, instruction="Think."))
    asked = tokenizer.encode_chat([CHAT[0], {"role": "user", "content": "2 + 2?\n\nThink."}], True)
    assert Problem.of(CHAT, tokenizer).instructed("Think.").tokens == asked
    followed = task.followed("4", "Sure?")
    turns = [*CHAT, {"role": "assistant", "content": "4"}, {"role": "user", "content": "Sure?"}]
    assert followed.tokens == tokenizer.encode_chat(turns, True)


def test_every_strategy_takes_an_instruction():
    engine = FakeEngine(lambda *_: ("4", True))
    drive(engine, self_consistency(problem("2 + 2?"), PARAMS, n=2, instruction="Be exact."))
    assert engine.calls[0][0][0] == "2 + 2?\n\nBe exact.\n"
    ids = Problem.of(TOKENIZER.encode("2 + 2?"), TOKENIZER, stop_ids=frozenset([EOS]))
    drive(engine, self_consistency(ids, PARAMS, n=2, instruction="Be exact."))
    assert engine.calls[1][0][0] == "2 + 2?\n\nBe exact.\n"


def test_prompts_that_are_none():
    with pytest.raises(ValueError, match="the prompt is empty"):
        Problem.of("", TOKENIZER)
    with pytest.raises(ValueError, match="there is no tokenizer; accepted: token ids"):
        Problem.of("text")
    parts = [{"role": "user", "content": [{"type": "image"}]}]
    with pytest.raises(ValueError, match="accepted with a strategy: text"):
        Problem.of(CHAT, TOKENIZER).with_prompt(CHAT) and Problem(tuple(parts), [1], TOKENIZER).instructed("x")
