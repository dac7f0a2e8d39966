"""What reaches the attention kernels as `deterministic`: the argument, or torch's global setting."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import llmcore


class Recorded(TorchDispatchMode):
    """Notes the last argument of every attention kernel that is called."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "llmcore":
            self.seen.append((func._opname, args[-1]))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def torch_asks():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def seen(function, **kwargs):
    q, k, v = (torch.randn(1, 5, 2, 8, requires_grad=True) for _ in range(3))
    with Recorded() as recorded:
        function(q, k, v, **kwargs).sum().backward()
    return recorded.seen


@pytest.mark.parametrize("deterministic", [False, True])
def test_the_argument(deterministic):
    with llmcore.backend("kernel"):
        assert seen(llmcore.ops.attention, deterministic=deterministic) == [
            ("attention", deterministic),
            ("attention_backward", deterministic),
        ]


def test_the_setting_of_torch(torch_asks):
    with llmcore.backend("kernel"):
        assert seen(llmcore.ops.attention) == [("attention", True), ("attention_backward", True)]


def test_compiled_under_the_setting_of_torch(torch_asks):
    """The setting is looked at in the graph without a break, and its value is the traced one."""
    torch.compiler.reset()
    values = []

    def backend(graph, inputs):
        values.extend(n.args[-1] for n in graph.graph.nodes if "llmcore" in str(n.target))
        return graph

    q, k, v = (torch.randn(1, 5, 2, 8) for _ in range(3))
    with llmcore.backend("kernel"):
        compiled = torch.compile(lambda *t: llmcore.ops.attention(*t), backend=backend, fullgraph=True)
        compiled(q, k, v)
        torch.use_deterministic_algorithms(False)
        compiled(q, k, v)
    assert values == [True, False]
