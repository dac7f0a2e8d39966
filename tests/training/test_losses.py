from __future__ import annotations

from itertools import islice

import pytest
import torch
import torch.nn.functional as F

from llmcore.data import PackedDataset, Texts, prepare
from llmcore.models import Transformer, llama, llama_moe
from llmcore.tokenizers import train_tokenizer
from llmcore.training import next_token_loss
from llmcore.training.losses import add_metrics, mean_metrics


@pytest.fixture(scope="module")
def batches(tmp_path_factory):
    tokenizer = train_tokenizer([], kind="byte")
    texts = Texts([f"document {i}: " + "word " * (i % 11) for i in range(40)])
    loader = PackedDataset(prepare(texts, tokenizer, tmp_path_factory.mktemp("data")), row_len=48, batch_size=2)
    return list(islice(loader, 3))


def model(preset, **overrides) -> Transformer:
    torch.manual_seed(0)
    return Transformer(preset("tiny", **{"vocab_size": 300, "init_std": 0.1, **overrides}))


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_it_is_the_summed_cross_entropy_of_the_logits(batches, softcap):
    net = model(llama, logit_softcap=softcap)
    for batch in batches:
        loss = next_token_loss(net, batch)
        spans = {"positions": batch.positions, "cu_seqlens": batch.cu_seqlens, "max_seqlen": batch.max_seqlen}
        want = F.cross_entropy(net.logits(net(batch.tokens, **spans).hidden), batch.targets, reduction="sum")
        torch.testing.assert_close(loss.total, want, rtol=1e-5, atol=1e-4)
        assert loss.num_targets == int((batch.targets != -100).sum())
        assert set(loss.metrics) == {"nll"}
        got, expected = (torch.autograd.grad(x, list(net.parameters())) for x in (loss.total, want))
        for a, b in zip(got, expected):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_the_auxiliary_loss_is_weighted_by_the_targets(batches):
    net, batch = model(llama_moe), batches[0]
    loss = next_token_loss(net, batch)
    spans = {"positions": batch.positions, "cu_seqlens": batch.cu_seqlens, "max_seqlen": batch.max_seqlen}
    aux = float(net(batch.tokens, **spans).aux_loss.detach())
    assert aux > 0
    means = mean_metrics(loss.metrics, loss.num_targets)
    assert means["aux_loss"] == pytest.approx(aux, rel=1e-5)
    assert float(loss.total.detach()) / loss.num_targets == pytest.approx(means["nll"] + aux, rel=1e-5)
    assert int(loss.metrics["expert_load"][0].sum()) == len(batch.tokens) * net.config.moe.top_k


def test_metrics_add_up_over_micro_batches(batches):
    net, total, targets = model(llama_moe), {}, 0
    for batch in batches:
        loss = next_token_loss(net, batch)
        add_metrics(total, loss.metrics)
        targets += loss.num_targets
    each = [next_token_loss(net, batch) for batch in batches]
    want = sum(float(x.metrics["nll"]) for x in each) / sum(x.num_targets for x in each)
    assert mean_metrics(total, targets)["nll"] == pytest.approx(want, rel=1e-6)
    assert "expert_load" not in mean_metrics(total, targets)
    assert torch.equal(total["expert_load"], sum(x.metrics["expert_load"] for x in each))
