"""Every op of the registry: kernel against reference, operator contracts, gradients, torch.compile."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import llmcore
from llmcore.ops import registry

from .checks import check_sample, comparable, copied, run, run_with_gradients, tensors

ISAS = [isa for isa in llmcore._C.cpu_isas() if isa != "cuda_emulated"]  # which has tests/simt


def _short(dtype):
    return str(dtype).removeprefix("torch.")


def cases():
    for name, spec in registry.items():
        for dtype in spec.dtypes["cpu"]:
            for sample in spec.samples(dtype, "cpu"):
                yield pytest.param(spec, sample, dtype, id=f"{name}-{_short(dtype)}-{sample.label}")


@pytest.fixture(params=ISAS)
def isa(request):
    before = llmcore._C.active_cpu_isa()
    assert llmcore._C.set_cpu_isa(request.param)
    yield request.param
    llmcore._C.set_cpu_isa(before)


@pytest.mark.parametrize(("spec", "sample", "dtype"), list(cases()))
def test_kernel_matches_reference(spec, sample, dtype, isa):
    with llmcore.backend("kernel"):
        check_sample(spec, sample)


def first_samples():
    for name, spec in registry.items():
        dtype = spec.dtypes["cpu"][0]
        for sample in spec.samples(dtype, "cpu"):
            yield pytest.param(spec, sample, dtype, id=f"{name}-{sample.label}")


@pytest.mark.parametrize(("spec", "sample", "dtype"), list(first_samples()))
def test_reference_gradients(spec, sample, dtype):
    """gradcheck of the reference in float64: the oracle's own gradients against finite differences."""
    size = sum(
        sample.args[i].numel() if isinstance(i, int) else sample.kwargs[i].numel() for i in sample.differentiable
    )
    if not 0 < size <= 600:
        pytest.skip("nothing to differentiate" if not size else "too large for finite differences")
    exact = copied(sample, torch.float64)
    args, kwargs = list(exact.args), dict(exact.kwargs)

    def function(*leaves):
        for where, leaf in zip(sample.differentiable, leaves):
            (args if isinstance(where, int) else kwargs)[where] = leaf
        output = spec.reference(*args, **kwargs)
        outputs = spec.compare(output) if spec.compare else output
        outputs = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
        # -inf (the lse of a row that sees no key) has no finite difference
        return tuple(torch.where(torch.isfinite(o), o, 0) for o in outputs if o.is_floating_point())

    leaves = [
        (args if isinstance(where, int) else kwargs)[where].clone().requires_grad_() for where in sample.differentiable
    ]
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("name", sorted(registry))
def test_tensors_on_two_devices_are_refused(name):
    """Any argument but the first on the meta device, where torch would call the fake kernel."""
    spec = registry[name]
    refused = name in ("moe_sort", "pack_quantized")  # which have one tensor only
    for sample in spec.samples(spec.dtypes["cpu"][0], "cpu"):
        values = dict(enumerate(sample.args)) | sample.kwargs
        moved = {w: value.to("meta") for w, value in values.items() if w != 0 and isinstance(value, torch.Tensor)}
        for where, value in values.items():  # of a list the last tensor, which is never the call's first
            if isinstance(value, list) and len(value) > (where == 0):
                moved[where] = [*value[:-1], value[-1].to("meta")]
        for where, value in moved.items():
            changed = values | {where: value}
            args = [changed.pop(i) for i in range(len(sample.args))]
            with pytest.raises(RuntimeError, match="tensors are on cpu, meta; all must be on one device"):
                spec.op(*args, **changed)
            refused += 1
    assert refused


def first_differentiable():
    for name, spec in registry.items():
        for sample in spec.samples(spec.dtypes["cpu"][0], "cpu"):
            if sample.differentiable:
                yield pytest.param(spec, sample, id=name)
                break


@pytest.mark.parametrize(("spec", "sample"), list(first_differentiable()))
def test_second_derivatives_are_right_or_refused(spec, sample):
    def second(function):
        args, kwargs = list(sample.args), dict(sample.kwargs)
        leaves = []
        for where in sample.differentiable:
            holder = args if isinstance(where, int) else kwargs
            holder[where] = holder[where].clone().requires_grad_()
            leaves.append(holder[where])
        outputs = [o for o in tensors(function(*args, **kwargs)) if o.requires_grad]
        grads = torch.autograd.grad(sum(o.square().sum() for o in outputs), leaves, create_graph=True)
        sum(g.square().sum() for g in grads).backward()
        return [leaf.grad for leaf in leaves]

    expected = second(spec.reference)
    if spec.name == "rope":  # its gradient is rope again
        torch.testing.assert_close(second(spec.op), expected)
        return
    with pytest.raises(RuntimeError, match=r"has no gradient|once_differentiable"):
        second(spec.op)


opchecked = set()


@pytest.mark.parametrize(("spec", "sample", "dtype"), list(first_samples()))
def test_opcheck(spec, sample, dtype):
    """torch.library.opcheck on every torch op the sample calls, with the very arguments of that call."""
    calls = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "llmcore":
                calls.append((func, args, kwargs or {}))
            return func(*args, **(kwargs or {}))

    with Record():
        if sample.differentiable:
            outputs = run(spec.op, sample, spec.compare)
            run_with_gradients(spec.op, sample, [torch.ones_like(o) for o in outputs], spec.compare)
        else:
            run(spec.op, sample, spec.compare)
    assert calls, "the sample reached no kernel"
    for func, args, kwargs in calls:
        assert func._schema.name.split("::")[1] in spec.torch_ops
        # opcheck takes a second: once for each way of calling the op (which arguments are given, and their ranks)
        way = (func, tuple(a.dim() if isinstance(a, torch.Tensor) else a is None for a in args))
        if way in opchecked:
            continue
        opchecked.add(way)
        args = torch.utils._pytree.tree_map_only(
            torch.Tensor, lambda t: t.detach().clone() if t.is_contiguous() else t.detach(), args
        )
        if func is calls[0][0] and sample.differentiable:  # the forward op: check its autograd registration too
            args = torch.utils._pytree.tree_map_only(
                torch.Tensor, lambda t: t.requires_grad_() if t.is_floating_point() else t, args
            )
        torch.library.opcheck(func, args, kwargs)


@pytest.mark.parametrize("name", sorted(registry))
def test_op_compiles(name):
    """torch.compile traces the op without a graph break (aot_eager: no code generation is needed to see that)."""
    spec = registry[name]
    sample = next(iter(spec.samples(spec.dtypes["cpu"][0], "cpu")))
    eager = run(spec.op, sample, spec.compare)
    compiled = run(torch.compile(spec.op, backend="aot_eager", fullgraph=True), sample, spec.compare)
    for a, b in zip(eager, compiled):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("spec", "sample", "dtype"), list(first_samples()))
def test_runs_are_equal(spec, sample, dtype):
    """Five runs give the same bits: no kernel depends on which thread took which task."""
    first = None
    for _ in range(5):
        outputs = run(spec.op, sample, spec.compare)
        if sample.differentiable:
            outputs, grads = run_with_gradients(spec.op, sample, [torch.ones_like(o) for o in outputs], spec.compare)
            outputs = outputs + [g for g in grads if g is not None]
        if first is None:
            first = outputs
        for a, b in zip(first, outputs):
            assert torch.equal(comparable(a), comparable(b))
