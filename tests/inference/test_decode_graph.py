"""The static decode step, run without a graph on the CPU: the same logits as steps of fitting size. tests/gpu captures
it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from llmcore.inference import PagedKVCache, decode_graph
from llmcore.inference.decode_graph import DecodeGraph, can_capture
from tests.inference.test_generate import CONFIGS, PROMPTS, make


@torch.no_grad()
def decode(model, counts, use_graph):
    """Logits of greedy steps in which counts[i] sequences take part, after a prefill of all of them."""
    device = model.lm_head_weight.device
    cache = PagedKVCache(model.config, 16, device=device, dtype=model.lm_head_weight.dtype)
    cache.k_caches[0].fill_(float("nan"))  # an idle row must not write or read
    graph = DecodeGraph(model, cache, batch_size=4, max_blocks=5)
    step = cache.extend(range(4), [len(p) for p in PROMPTS])
    hidden = model(torch.tensor([t for p in PROMPTS for t in p], device=device), cache=step).hidden
    logits = [model.logits(hidden[step.cu_seqlens_q[1:].long() - 1])]
    for count in counts:
        tokens = logits[-1][:count].argmax(-1)
        if use_graph:
            logits.append(graph.logits(range(count), tokens.tolist()).clone())
        else:
            logits.append(model.logits(model(tokens, cache=cache.extend(range(count), [1] * count)).hidden))
    return logits


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_steps_of_fitting_size(name):
    model = make(CONFIGS[name]).eval()
    counts = [4, 4, 3, 3, 1, 1]
    for got, want in zip(decode(model, counts, True), decode(model, counts, False)):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_refuses_more_than_it_was_made_for():
    model = make(CONFIGS["mqa"])
    cache = PagedKVCache(model.config, 8)
    graph = DecodeGraph(model, cache, batch_size=1, max_blocks=1)
    with pytest.raises(ValueError, match="2 sequences of up to 1 tokens; this graph is for 1 of up to 16"):
        graph.logits([0, 1], [5, 6])
    assert not cache.blocks  # nothing has changed


def test_is_for_gpus():
    assert not can_capture(make(CONFIGS["mqa"]))


def test_needs_kernels_for_every_op_of_the_step(monkeypatch):
    """References look at their inputs on the host, which a capture does not allow."""

    def capturable(moe=None, head_dim=64, without=None, quantized=False, encoder_layers=0, position="rope"):
        monkeypatch.setattr(decode_graph, "has_kernel", lambda op, model: op != without)
        config = SimpleNamespace(moe=moe, head_dim=head_dim, encoder_layers=encoder_layers, position=position)
        device = torch.device("cuda")
        return can_capture(SimpleNamespace(device=device, is_quantized=quantized, config=config))

    assert capturable(head_dim=576)
    assert capturable(moe="some")
    assert capturable(without="moe_route")
    assert not capturable(head_dim=640)  # attention takes its reference
    assert not capturable(without="paged_attention")
    assert not capturable(encoder_layers=2)  # whose sequences the host counts
    assert not capturable(position="relative")  # attention with a bias takes its reference on a GPU
    assert not capturable(quantized=True)
    assert not capturable(moe="some", without="moe_route")
