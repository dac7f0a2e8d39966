from __future__ import annotations

import math

import pytest
import torch

from llmcore.checkpoints import CheckpointError
from llmcore.training import NonFiniteError, OptimConfig, Optimizer, parameter_groups
from llmcore.training.optim import muon_update, newton_schulz


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(11, 6)
        self.layers = torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.LayerNorm(9), torch.nn.Linear(9, 6))
        self.experts = torch.nn.Parameter(torch.randn(3, 6, 6) * 0.2)
        self.lm_head = torch.nn.Linear(6, 11, bias=False)

    def forward(self, ids):
        x = self.embed(ids)
        x = x + self.layers(x) + torch.einsum("bi,eij->bj", x, self.experts)
        return self.lm_head(x)


def loss_of(model, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(11, (20,), generator=generator)
    return torch.nn.functional.cross_entropy(model(ids).float(), (ids * 3 + 1) % 11, reduction="sum")


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def take_step(model, optimizer, seed: int, lr: float = 1e-2) -> float:
    loss = loss_of(model, seed)
    loss.backward()
    optimizer.accumulate()
    optimizer.step(lr, optimizer.gradient_norm(20))
    return float(loss.detach())


def test_groups():
    groups = parameter_groups(net().named_parameters(), "muon")
    assert groups["muon"] == ["experts", "layers.0.weight", "layers.2.weight"]
    assert groups["adamw_decay"] == ["embed.weight", "lm_head.weight"]
    assert groups["adamw_no_decay"] == ["layers.0.bias", "layers.1.weight", "layers.1.bias", "layers.2.bias"]
    assert parameter_groups(net().named_parameters(), "adamw")["muon"] == []


def test_adamw_is_the_paper_algorithm():
    """Against the update written out in float64 with decoupled decay and bias correction (arXiv 1711.05101)."""
    model, config = net(), OptimConfig(lr=1e-2, grad_clip=0.0, weight_decay=0.3)
    optimizer = Optimizer(model, config)
    weights = {n: p.detach().double() for n, p in model.named_parameters()}
    m = {n: torch.zeros_like(w) for n, w in weights.items()}
    v = {n: torch.zeros_like(w) for n, w in weights.items()}
    b1, b2 = config.betas
    for t in range(1, 6):
        loss_of(model, t).backward()
        gradients = {n: p.grad.double() / 20 for n, p in model.named_parameters()}
        optimizer.step(1e-2, optimizer.gradient_norm(20))
        for n, g in gradients.items():
            m[n] = b1 * m[n] + (1 - b1) * g
            v[n] = b2 * v[n] + (1 - b2) * g * g
            decay = 0.3 if weights[n].ndim >= 2 else 0.0
            update = (m[n] / (1 - b1**t)) / ((v[n] / (1 - b2**t)).sqrt() + config.eps)
            weights[n] = weights[n] * (1 - 1e-2 * decay) - 1e-2 * update
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.detach().double(), weights[n], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (8, 8)])
def test_muon_matches_torch(shape):
    """torch.optim.Muon orthogonalises in bf16, so the two agree to bf16's precision, direction and scale alike."""
    torch.manual_seed(1)
    ours = torch.randn(shape)
    theirs = torch.nn.Parameter(ours.clone())
    start = ours.clone()
    peer = torch.optim.Muon(
        [theirs], lr=0.02, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw", nesterov=True
    )
    buffer = torch.zeros(shape)
    for _ in range(3):
        gradient = torch.randn(shape)
        muon_update(ours, gradient, buffer, 0.02, 0.9, 0.1)
        theirs.grad = gradient.clone()
        peer.step()
    difference = (ours - theirs.detach()).norm() / (start - ours).norm()
    assert difference < 0.03


@pytest.mark.parametrize("shape", [(5, 40), (40, 5), (3, 7, 20)])
def test_newton_schulz_brings_singular_values_near_one(shape):
    torch.manual_seed(0)
    values = torch.linalg.svdvals(newton_schulz(torch.randn(shape)))
    assert values.shape[-1] == min(shape[-2:])
    assert values.min() > 0.5
    assert values.max() < 1.3
    stacked = torch.randn(3, 6, 6)  # each matrix of a stack on its own
    torch.testing.assert_close(newton_schulz(stacked)[1], newton_schulz(stacked[1]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_learns_and_round_trips(kind, dtype):
    model = net().to(dtype)
    optimizer = Optimizer(model, OptimConfig(kind=kind, weight_decay=0.0))
    losses = [take_step(model, optimizer, step % 4, lr=2e-2) for step in range(60)]
    assert losses[-1] < 0.3 * losses[0]
    saved = {n: t.clone() for n, t in optimizer.state_dict().items()}
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    want = [take_step(model, optimizer, seed) for seed in (7, 8, 9)]

    again = net().to(dtype)
    with torch.no_grad():
        for n, p in again.named_parameters():
            p.copy_(weights[n])
    other = Optimizer(again, OptimConfig(kind=kind, weight_decay=0.0))
    other.load_state_dict(saved)
    assert [take_step(again, other, seed) for seed in (7, 8, 9)] == want
    assert ("master.embed.weight" in saved) == (dtype == torch.bfloat16)


def test_fp32_masters_keep_updates_bf16_would_lose():
    model = torch.nn.Linear(1, 1, bias=False).bfloat16()
    torch.nn.init.ones_(model.weight)
    optimizer = Optimizer(model, OptimConfig(weight_decay=0.0, grad_clip=0.0))
    for _ in range(40):  # each step moves the weight by 1e-4, far below half a bf16 step at 1 (0.0039)
        model.weight.grad = torch.ones_like(model.weight)
        optimizer.accumulate()
        optimizer.step(1e-4, optimizer.gradient_norm(1))
    assert float(optimizer.masters["weight"].detach()) == pytest.approx(1 - 40e-4, abs=1e-5)
    assert float(model.weight.detach()) == pytest.approx(0.99609375)  # the nearest bf16 of 0.996


def test_gradients_of_bf16_weights_add_up_in_fp32():
    model = torch.nn.Linear(1, 1, bias=False).bfloat16()
    optimizer = Optimizer(model, OptimConfig())
    for value in (1.0, *[2.0**-10] * 8):
        model.weight.grad = torch.full_like(model.weight, value)
        optimizer.accumulate()
    assert float(optimizer.gradients["weight"]) == 1 + 8 * 2.0**-10


class Mixed(torch.nn.Module):
    """Every way in which a weight is kept: float32, narrow, without a kernel, and with gaps in its memory."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wide = torch.nn.Parameter(torch.randn(5, 3))
        self.narrow = torch.nn.Parameter(torch.randn(3, 7).bfloat16())
        self.sixteen = torch.nn.Parameter(torch.randn(9).half())
        self.exact = torch.nn.Parameter(torch.randn(4, 2).double())
        self.wide_columns = torch.nn.Parameter(torch.randn(8, 6)[:, 1:4])
        self.narrow_columns = torch.nn.Parameter(torch.randn(8, 6).bfloat16().t())
        self.unused = torch.nn.Parameter(torch.randn(2, 2).bfloat16())
        self.unused_wide = torch.nn.Parameter(torch.randn(2, 2))

    def loss(self, seed: int) -> torch.Tensor:
        make = torch.Generator().manual_seed(seed)
        used = [p for n, p in self.named_parameters() if "unused" not in n]
        return sum((p.float() * torch.randn(p.shape, generator=make)).sum() for p in used)


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_weights_of_every_kind_follow_their_gradients(micro_batches, kind):
    """Against the update written out on float64 copies, clipping included."""
    model, config = Mixed(), OptimConfig(kind=kind, grad_clip=0.5, weight_decay=0.3)
    optimizer = Optimizer(model, config)
    storage = {n: p.data_ptr() for n, p in model.named_parameters()}
    weights = {n: p.detach().double().clone() for n, p in model.named_parameters()}
    m, v, buffers = ({n: torch.zeros_like(w) for n, w in weights.items()} for _ in range(3))
    b1, b2 = config.betas
    for t in range(1, 5):
        gradients = {n: torch.zeros_like(w) for n, w in weights.items() if "unused" not in n}
        for i in range(micro_batches):
            used = [p for n, p in model.named_parameters() if n in gradients]
            for n, g in zip(gradients, torch.autograd.grad(model.loss(10 * t + i), used)):
                gradients[n] += g.double() / 20
            model.loss(10 * t + i).backward()
            optimizer.accumulate()
        norm = torch.cat([g.flatten() for g in gradients.values()]).norm()
        assert norm > 0.5
        got = optimizer.gradient_norm(20)
        assert float(got) == pytest.approx(float(norm), rel=1e-5)
        optimizer.step(1e-2, got)
        for n, g in gradients.items():
            g *= 0.5 / norm
            if n in optimizer.muon:
                muon_update(weights[n], g, buffers[n], 1e-2, config.momentum, 0.3)
                continue
            m[n] = b1 * m[n] + (1 - b1) * g
            v[n] = b2 * v[n] + (1 - b2) * g * g
            decay = 0.3 if weights[n].ndim >= 2 else 0.0
            update = (m[n] / (1 - b1**t)) / ((v[n] / (1 - b2**t)).sqrt() + config.eps)
            weights[n] = weights[n] * (1 - 1e-2 * decay) - 1e-2 * update
    assert (kind == "muon") == bool(optimizer.muon)
    for n, p in model.named_parameters():
        assert p.data_ptr() == storage[n]  # whoever shares a weight's memory sees the update
        torch.testing.assert_close(optimizer.masters[n].detach().double(), weights[n], rtol=1e-4, atol=1e-5)
        assert torch.equal(p, optimizer.masters[n].to(p.dtype))
        if n in optimizer.moments:
            assert optimizer.moments[n]["step"] == (0 if "unused" in n else 4)
    assert not optimizer.gradients


def test_a_step_without_a_gradient_is_not_counted():
    model = net()
    optimizer = Optimizer(model, OptimConfig())
    for seed in range(3):
        loss_of(model, seed).backward()
        if seed == 1:
            model.experts.grad = None
        before = model.experts.detach().clone()
        optimizer.step(1e-2, optimizer.gradient_norm(20))
        assert torch.equal(model.experts, before) == (seed == 1)
    assert optimizer.moments["experts"]["step"] == 2
    assert optimizer.moments["embed.weight"]["step"] == 3


def test_clipping_is_by_the_global_norm():
    model, free = net(), net()
    clipped, unclipped = Optimizer(model, OptimConfig(grad_clip=0.5)), Optimizer(free, OptimConfig(grad_clip=0.0))
    for m, o in ((model, clipped), (free, unclipped)):
        loss_of(m, 0).backward()
        norm = o.gradient_norm(1)
    want = math.sqrt(sum(float(p.grad.double().pow(2).sum()) for p in free.parameters()))
    assert norm == pytest.approx(want, rel=1e-5)
    assert norm > 0.5
    clipped.step(0.0, norm)
    rate = 1 - clipped.config.betas[0]  # the share of the first gradient in its running mean
    means = [m["exp_avg"] / rate for m in clipped.moments.values()]
    assert math.sqrt(sum(float(m.pow(2).sum()) for m in means)) == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_gradient_changes_nothing(bad):
    model = net()
    optimizer = Optimizer(model, OptimConfig(kind="muon"))
    take_step(model, optimizer, 0)
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    state = {n: t.clone() for n, t in optimizer.state_dict().items()}
    loss_of(model, 1).backward()
    model.lm_head.weight.grad[0, 0] = bad
    with pytest.raises(NonFiniteError):
        optimizer.step(1e-2, optimizer.gradient_norm(20))
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())
    assert all(torch.equal(t, state[n]) for n, t in optimizer.state_dict().items())


def test_a_weight_without_gradient_is_left_alone():
    model = net()
    optimizer = Optimizer(model, OptimConfig(kind="muon"))
    before = model.experts.detach().clone()
    loss_of(model, 0).backward()
    model.experts.grad = None
    optimizer.step(1e-2, optimizer.gradient_norm(20))
    assert torch.equal(model.experts, before)


def test_state_of_another_model_is_refused():
    optimizer = Optimizer(net(), OptimConfig())
    state = optimizer.state_dict()
    with pytest.raises(CheckpointError, match=r"muon\.experts"):
        Optimizer(net(), OptimConfig(kind="muon")).load_state_dict(state)
    state.pop("exp_avg.embed.weight")
    with pytest.raises(CheckpointError, match=r"'exp_avg\.embed\.weight' is missing"):
        optimizer.load_state_dict(state)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "sgd"}, "optim.kind is 'sgd'"),
        ({"lr": 0.0}, "optim.lr is 0.0"),
        ({"lr": math.nan}, "optim.lr is nan"),
        ({"lr": math.inf}, "optim.lr is inf"),
        ({"weight_decay": math.inf}, "optim.weight_decay is inf"),
        ({"grad_clip": math.nan}, "optim.grad_clip is nan"),
        ({"betas": (0.9, 1.0)}, "optim.betas"),
        ({"momentum": 1.0}, "optim.momentum"),
        ({"grad_clip": -1.0}, "optim.grad_clip is -1.0"),
    ],
)
def test_bad_values_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        OptimConfig(**values)
