"""Reward models: a classifier of transformers gives the same rewards, and chooses."""

from __future__ import annotations

import pytest
import torch

from llmcore.checkpoints import CheckpointError
from llmcore.inference.params import SamplingParams
from llmcore.inference.strategies import Candidate, Problem, RewardModel, best_of_n, drive
from llmcore.inference.strategies.reward import BATCH_TOKENS
from llmcore.tokenizers import train_tokenizer
from tests.inference.strategies.fakes import FakeEngine, answering, problem

transformers = pytest.importorskip("transformers")

TOKENIZER = train_tokenizer([], kind="byte", special_tokens=("<|endoftext|>", "<|im_start|>", "<|im_end|>"))


def classifier(labels: int = 1):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=TOKENIZER.vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_labels=labels, pad_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    return transformers.LlamaForSequenceClassification(config).eval()


@pytest.fixture(scope="module")
def theirs():
    return classifier()


@pytest.fixture(scope="module")
def folder(theirs, tmp_path_factory):
    path = tmp_path_factory.mktemp("reward")
    theirs.save_pretrained(path)
    TOKENIZER.save(path)
    return path


CHAT = [{"role": "user", "content": "2 + 2?"}]


@pytest.mark.parametrize("prompt", ["2 + 2 = ", CHAT], ids=["text", "chat"])
def test_rewards_are_those_of_transformers(folder, theirs, prompt):
    model = RewardModel.load(folder)
    texts = ["4", "five or so", "", "the answer is 4. " * 40]
    rewards = model(Problem.of(prompt, TOKENIZER), [Candidate(text, []) for text in texts])
    for text, reward in zip(texts, rewards):
        if prompt is CHAT:
            ids = TOKENIZER.encode_chat([*CHAT, {"role": "assistant", "content": text}])
        else:
            ids = TOKENIZER.encode(prompt + text, add_bos=TOKENIZER.adds_bos)
        with torch.no_grad():
            expected = theirs(torch.tensor([ids])).logits.item()
        assert reward == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert len(set(rewards)) == 4
    squashed = RewardModel.load(folder, sigmoid=True)(Problem.of(prompt, TOKENIZER), [Candidate("4", [])])
    assert squashed == [pytest.approx(torch.tensor(rewards[0]).sigmoid().item())]


def test_batches(folder):
    model = RewardModel.load(folder, dtype=torch.float32)
    texts = [list(range(5, 5 + n)) * 8 for n in (3, 200, 150, 1, 90, 100)]
    assert sum(map(len, texts)) > BATCH_TOKENS
    alone = [model.rewards([text])[0] for text in texts]
    assert model.rewards(texts) == pytest.approx(alone, rel=1e-4, abs=1e-5)
    assert model.rewards([]) == []


def test_it_chooses(folder):
    model = RewardModel.load(folder)
    result = drive(
        FakeEngine(answering({"1": 0.5, "22": 0.5})),
        best_of_n(problem(), SamplingParams(max_tokens=64), n=8, scorer=model),
    )
    assert {c.answer for c in result.candidates} == {"1", "22"}
    assert result.score == max(c.score for c in result.candidates)


def test_files_that_are_no_reward_model(tmp_path, folder):
    classifier(3).save_pretrained(tmp_path / "three")
    TOKENIZER.save(tmp_path / "three")
    with pytest.raises(CheckpointError, match=r"'score.weight' has shape \(3, 32\); accepted: \(1, dim\)"):
        RewardModel.load(tmp_path / "three")
    theirs = transformers.LlamaForCausalLM(classifier().config)
    theirs.save_pretrained(tmp_path / "lm")
    with pytest.raises(CheckpointError, match=r"has no tensor .score\.weight.; accepted: a sequence classifier"):
        RewardModel.load(tmp_path / "lm")
    with pytest.raises(ValueError, match=r"weight has shape \(2, 32\); accepted: \(1, 32\)"):
        RewardModel(RewardModel.load(folder).model, torch.zeros(2, 32), TOKENIZER)
