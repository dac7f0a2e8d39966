"""What the registry's checks do not say of global_norm and adamw_: odd addresses, many steps beside torch's own, equal
bits with any number of threads, bad input."""

from __future__ import annotations

import math

import pytest
import torch

import llmcore
from llmcore import reference
from llmcore.ops import adamw_, global_norm

NUMBERS = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
SIZES = (9001, 16, 5)  # more than a tile; one access; less than one


def call(dtype: torch.dtype, grad_dtype: torch.dtype, sizes=SIZES, seed: int = 0) -> dict[str, list[torch.Tensor]]:
    make = torch.Generator().manual_seed(seed)
    masters, grads, means, squares = ([torch.randn(n, generator=make) for n in sizes] for _ in range(4))
    return {
        "weights": [m.to(dtype) for m in masters],
        "masters": masters if dtype != torch.float32 else [],
        "grads": [g.to(grad_dtype) for g in grads],
        "exp_avgs": means,
        "exp_avg_sqs": [s.square() for s in squares],
        "steps": [torch.tensor(float(3 + i)) for i in range(len(sizes))],
    }


def copied(lists: dict[str, list[torch.Tensor]]) -> dict[str, list[torch.Tensor]]:
    return {name: [t.clone() for t in tensors] for name, tensors in lists.items()}


def shifted(t: torch.Tensor, by: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A copy `by` elements behind the start of its memory, and all of that memory: 77 around the copy."""
    memory = torch.full((t.numel() + by + 8,), 77.0, dtype=t.dtype)
    view = memory[by : by + t.numel()]
    view.copy_(t)
    return view, memory


def check_adamw_at_odd_addresses(name: str, dtype: torch.dtype, grad_dtype: torch.dtype) -> None:
    """One list's tensors start between multiples of 16 bytes: the same result, and nothing around them is touched."""
    lists = call(dtype, grad_dtype)
    expected, memories = copied(lists), []
    for key in [name] if name != "all" else list(lists):
        pairs = [shifted(t, 3) if t.dim() else (t, t) for t in lists[key]]
        lists[key] = [view for view, _ in pairs]
        memories += [memory for view, memory in pairs if view is not memory]
    norm = {"norm": torch.tensor(5.0), "max_norm": 2.0, "divisor": 3.0}
    with llmcore.backend("kernel"):
        adamw_(*lists.values(), **NUMBERS, **norm)
    reference.adamw_(*expected.values(), **NUMBERS, **norm)
    for key, tensors in expected.items():
        for got, want in zip(lists[key], tensors):
            torch.testing.assert_close(got, want, rtol=max(1e-5, torch.finfo(got.dtype).eps), atol=1e-6)
    for memory in memories:
        assert (memory[:3] == 77).all()
        assert (memory[-5:] == 77).all()


def check_norm_at_odd_addresses(dtype: torch.dtype) -> None:
    make = torch.Generator().manual_seed(0)
    tensors = [
        shifted(torch.randn(n, generator=make).to(dtype), by)[0] for n in (33_001, 32_700, 16, 5) for by in (0, 1, 5)
    ]
    with llmcore.backend("kernel"):
        norm = global_norm(tensors)
    assert norm.item() == pytest.approx(torch.cat(tensors).double().norm().item(), rel=2e-7)


@pytest.mark.parametrize("name", ["weights", "grads", "exp_avgs", "exp_avg_sqs", "all"])
@pytest.mark.parametrize("dtypes", [(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.float16, torch.float32)])
def test_adamw_at_odd_addresses(name, dtypes, isa):
    check_adamw_at_odd_addresses(name, *dtypes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_norm_at_odd_addresses(dtype, isa):
    check_norm_at_odd_addresses(dtype)


def test_many_steps_agree_with_torch():
    lists = call(torch.float32, torch.float32)
    weights = [torch.nn.Parameter(torch.randn(n)) for n in SIZES]
    theirs = torch.optim.AdamW(weights, lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, fused=True)
    lists["weights"] = [w.detach().clone() for w in weights]
    for key in ("exp_avgs", "exp_avg_sqs", "steps"):
        lists[key] = [torch.zeros_like(t) for t in lists[key]]
    for seed in range(30):
        lists["grads"] = call(torch.float32, torch.float32, seed=seed)["grads"]
        for weight, grad in zip(weights, lists["grads"]):
            weight.grad = grad / 2
        norm = torch.nn.utils.clip_grad_norm_(weights, 4.0)
        torch.testing.assert_close(global_norm(lists["grads"]) / 2, norm)
        theirs.step()
        adamw_(*lists.values(), **NUMBERS, divisor=2.0, norm=norm, max_norm=4.0)
    torch.testing.assert_close(lists["weights"], [w.detach() for w in weights], rtol=1e-5, atol=1e-6)
    assert [int(s) for s in lists["steps"]] == [30] * 3


def test_norm_of_many_elements_loses_nothing():
    """A sum in float32 alone would end at 2^24 times one square."""
    tensors = [torch.full((1 << 22,), 0.1) for _ in range(10)]
    want = math.sqrt(10 * (1 << 22)) * float(tensors[0][0])
    assert global_norm(tensors).item() == pytest.approx(want, rel=1e-7)


def test_norm_shows_a_nan():
    assert global_norm([torch.ones(40), torch.tensor([1.0, math.nan])]).isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_do_not_depend_on_the_number_of_threads(dtype):
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            lists = call(dtype, dtype, sizes=(100_000, 3, 0, 70_000))
            norm = global_norm(lists["grads"])
            adamw_(*lists.values(), **NUMBERS, norm=norm, max_norm=1.0)
            results.append([norm, *(t for tensors in lists.values() for t in tensors)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def test_autograd_learns_that_a_weight_changed():
    lists = call(torch.float32, torch.float32)
    x = torch.ones(SIZES[0], requires_grad=True)
    y = (x * lists["weights"][0]).sum()
    adamw_(*lists.values(), **NUMBERS)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_parameters_are_updated_in_grad_mode_and_stay_leaves():
    lists = call(torch.float32, torch.float32)
    lists["weights"] = [torch.nn.Parameter(w) for w in lists["weights"]]
    before = lists["weights"][0].detach().clone()
    adamw_(*lists.values(), **NUMBERS)
    assert lists["weights"][0].is_leaf
    assert not torch.equal(lists["weights"][0], before)


def test_a_norm_refuses_its_gradient():
    norm = global_norm([torch.ones(5, requires_grad=True), torch.ones(3)])
    with pytest.raises(NotImplementedError, match="global_norm has no gradient"):
        norm.backward()


def changed(key: str, i: int, value) -> dict[str, list[torch.Tensor]]:
    lists = call(torch.bfloat16, torch.float32)
    lists[key] = [*lists[key][:i], value(lists[key][i]), *lists[key][i + 1 :]]
    return lists


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        (lambda: call(torch.bfloat16, torch.float32) | {"grads": []}, "grads holds 0 tensors, but weights holds 3"),
        (lambda: call(torch.bfloat16, torch.float32) | {"masters": []}, "masters holds 0 tensors, but weights holds 3"),
        (
            lambda: (lists := call(torch.float32, torch.float32)) | {"masters": lists["weights"]},
            "masters holds 3 tensors, but float32 weights are their own masters",
        ),
        (lambda: changed("weights", 1, torch.Tensor.float), r"weights\[1\] has dtype float32; expected bfloat16"),
        (lambda: changed("masters", 1, torch.Tensor.half), r"masters\[1\] has dtype float16; expected float32"),
        (lambda: changed("grads", 0, torch.Tensor.half), r"grads\[0\] has dtype float16; accepted: float32 and the"),
        (lambda: changed("grads", 2, torch.Tensor.bfloat16), r"grads\[2\] has dtype bfloat16; expected float32"),
        (lambda: changed("exp_avgs", 2, lambda t: t[1:]), r"exp_avgs\[2\] has shape \(4,\), but weights\[2\] has \(5,"),
        (lambda: changed("exp_avg_sqs", 1, lambda t: t[:1].expand(16)), r"exp_avg_sqs\[1\] is not contiguous"),
        (lambda: changed("steps", 1, torch.Tensor.long), "step has dtype int64; expected float32"),
        (lambda: changed("steps", 1, lambda t: t.expand(2)), r"step has shape \(2,\); expected one element"),
    ],
)
def test_bad_lists(lists, message):
    lists = lists()
    before = copied(lists)
    with pytest.raises(RuntimeError, match=message):
        adamw_(*lists.values(), **NUMBERS)
    assert all(torch.equal(a, b) for key in lists for a, b in zip(lists[key], before[key]))


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"lr": math.nan}, "lr is nan"),
        ({"lr": -1.0}, "lr is -1"),
        ({"betas": (1.0, 0.9)}, "beta1 is 1; accepted: 0 to below 1"),
        ({"betas": (0.9, -0.1)}, "beta2 is -0.1"),
        ({"eps": -1e-8}, "eps is -1e-08"),
        ({"weight_decay": math.inf}, "weight_decay is inf"),
        ({"divisor": 0.0}, "divisor is 0; accepted: a number above 0"),
        ({"max_norm": 1.0}, "max_norm is 1; accepted: 0 without a norm"),
        ({"max_norm": -1.0, "norm": torch.tensor(1.0)}, "max_norm is -1"),
        ({"norm": torch.ones(2)}, r"norm has shape \(2,\); expected one element"),
        ({"lr": torch.tensor(1e-3, dtype=torch.float64)}, "lr has dtype float64; expected float32"),
    ],
)
def test_bad_numbers(numbers, message):
    lists = call(torch.float32, torch.float32)
    before = copied(lists)
    with pytest.raises(RuntimeError, match=message):
        adamw_(*lists.values(), **{**NUMBERS, **numbers})
    assert all(torch.equal(a, b) for key in lists for a, b in zip(lists[key], before[key]))


def test_bad_tensors_of_a_norm():
    with pytest.raises(RuntimeError, match="the list of tensors is empty"):
        global_norm([])
    with pytest.raises(RuntimeError, match=r"tensors\[1\] has dtype float16, but tensors\[0\] has float32"):
        global_norm([torch.ones(3), torch.ones(3).half()])


def test_an_empty_list_is_no_update():
    adamw_([], [], [], [], [], [], **NUMBERS)
