"""linear_cross_entropy on CUDA devices: torch's matrix products around llmcore's kernel, a chunk of tokens at a time.

    logits   = hidden[chunk] @ weight.T          float32, into one buffer
    dlogits  = cross_entropy_chunk_(logits)      loss and lse; the gradient replaces the logits
    dhidden  = dlogits @ weight
    dweight += dlogits.T @ hidden[chunk]         summed in float32

Nothing here waits for the device, so calls can be captured in a CUDA graph. See docs/cuda-cross-entropy.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK_BYTES = 512 << 20  # of logits held at once, unless MIN_CHUNK asks for more
MIN_CHUNK = 128  # tokens; fewer would read and write dweight's sum too often
FLOAT16_PEAK = 2.0**14  # bound of dloss times the factor on exp(logit - lse), where dlogits are float16


def _float_product(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> None:
    """out = a @ b, or out += a @ b: float32 whatever a and b are, as autocast leaves products into a tensor alone."""
    if a.dtype == torch.float32:
        out.addmm_(a, b) if add else torch.mm(a, b, out=out)
    elif a.is_cuda:
        out_dtype = torch.float32
        torch.addmm(out, a, b, out_dtype, out=out) if add else torch.mm(a, b, out_dtype, out=out)
    else:  # where tests run this; torch's CPU products have no out_dtype
        product = a.float() @ b.float()
        out.add_(product) if add else out.copy_(product)


def _chunk_size(tokens: int, columns: int) -> int:
    rows = CHUNK_BYTES // (4 * columns)
    return min(tokens, max(rows - rows % MIN_CHUNK, MIN_CHUNK))


def _run(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    arguments: tuple[int, float, float, float],
    loss: Tensor | None,
    lse: Tensor,
    dloss: Tensor | None = None,
    need_dhidden: bool = False,
    need_dweight: bool = False,
    factor: Tensor | float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Fills loss and lse, or with loss None reads lse, and gives (dhidden, dweight), both times `factor`; empty where
    not needed. dloss: (tokens,), or (1,) for all."""
    dim, vocab = hidden.shape[-1], weight.shape[0]
    rows, ids = hidden.reshape(-1, dim), targets.reshape(-1)
    tokens = rows.shape[0]
    if 1 not in weight.stride():
        weight = weight.contiguous()  # once, not in each product
    columns = -(-vocab // 8) * 8  # every row of the logits is aligned, whatever the vocabulary
    size = _chunk_size(tokens, columns)
    buffer = rows.new_empty(size, columns, dtype=torch.float32)
    dhidden = rows.new_empty(hidden.shape if need_dhidden else 0)
    row_sums = rows.new_empty(size if need_dhidden else 0, dim, dtype=torch.float32)
    weight_sums = torch.empty(vocab if need_dweight else 0, dim, dtype=torch.float32, device=rows.device)
    ignore_index, *settings = arguments
    gradient = str(rows.dtype).removeprefix("torch.")
    for begin in range(0, tokens, max(size, 1)):
        chunk = slice(begin, min(begin + size, tokens))
        part, part_ids, logits = rows[chunk], ids[chunk], buffer[: chunk.stop - begin]
        _float_product(part, weight.t(), logits[:, :vocab])
        torch.ops.llmcore.cross_entropy_chunk_(
            logits[:, :vocab],
            part_ids,
            None if loss is None else loss[chunk],
            lse[chunk],
            dloss[chunk] if dloss is not None and dloss.numel() == tokens else dloss,
            begin,
            ignore_index,
            *settings,
            gradient,
        )
        dlogits = logits.view(rows.dtype)[:, :vocab]
        if need_dhidden:
            sums = row_sums[: chunk.stop - begin]
            _float_product(dlogits, weight, sums)
            dhidden.view(-1, dim)[chunk] = sums * factor if rows.dtype == torch.float16 else sums
        if need_dweight:
            unread = (part_ids == ignore_index) | (part_ids < 0) | (part_ids >= vocab)
            # their dlogits are 0, but 0 times what stands in hidden might be NaN
            part = part.masked_fill(unread.unsqueeze(1), 0)
            _float_product(dlogits.t(), part, weight_sums, add=begin > 0)
    if tokens == 0:
        weight_sums.zero_()
    if rows.dtype == torch.float16:
        weight_sums *= factor
    return dhidden, weight_sums.to(rows.dtype) if need_dweight else weight.new_empty(0)


def _check(op: str, hidden, weight, targets, dloss, lse, arguments) -> None:
    torch.ops.llmcore.linear_cross_entropy_check(op, hidden, weight, targets, dloss, lse, *arguments[1:])


def _losses(hidden: Tensor, weight: Tensor, targets: Tensor, arguments) -> tuple[Tensor, Tensor]:
    loss = hidden.new_empty(targets.numel(), dtype=torch.float32)
    lse = torch.empty_like(loss)
    _run(hidden, weight, targets, arguments, loss, lse)
    return loss, lse


def _gradients(dloss, hidden, weight, targets, lse, arguments, need_dhidden, need_dweight) -> tuple[Tensor, Tensor]:
    dloss, factor = dloss.contiguous(), 1.0
    if hidden.dtype == torch.float16:  # scaled so that dlogits use its range; the float32 sums are scaled back
        ignore_index, _, z_loss, _ = arguments
        bound = dloss * (1 + 2 * z_loss * lse).abs().clamp(
            min=1
        )  # of the factors on exp(logit - lse) and at the target
        bound = bound.masked_fill(targets.reshape(-1) == ignore_index, 0).abs()
        factor = bound.amax(0, keepdim=True).clamp(min=1e-30) if bound.numel() else bound.new_zeros(1)
        dloss, factor = dloss / factor * FLOAT16_PEAK, factor / FLOAT16_PEAK
    return _run(hidden, weight, targets, arguments, None, lse, dloss, need_dhidden, need_dweight, factor)


def linear_cross_entropy(hidden, weight, targets, *arguments):
    _check("linear_cross_entropy", hidden, weight, targets, None, None, arguments)
    return _losses(hidden, weight, targets, arguments)


def linear_cross_entropy_backward(dloss, hidden, weight, targets, lse, *rest):
    *arguments, need_dhidden, need_dweight = rest
    _check("linear_cross_entropy_backward", hidden, weight, targets, dloss, lse, arguments)
    return _gradients(dloss, hidden, weight, targets, lse.contiguous(), arguments, need_dhidden, need_dweight)


def linear_cross_entropy_with_grad(hidden, weight, targets, *rest):
    *arguments, mean, need_dhidden, need_dweight = rest
    _check("linear_cross_entropy_with_grad", hidden, weight, targets, None, None, arguments)
    loss = hidden.new_empty(targets.numel(), dtype=torch.float32)
    lse, share = torch.empty_like(loss), loss.new_ones(1)
    if mean:  # counted on the device
        share = (targets != arguments[0]).sum().clamp(min=1).float().reciprocal().view(1)
    if hidden.dtype == torch.float16:  # whose scale depends on lse
        _run(hidden, weight, targets, arguments, loss, lse)
        dloss = share.expand_as(loss)
        gradients = _gradients(dloss, hidden, weight, targets, lse, arguments, need_dhidden, need_dweight)
    else:
        gradients = _run(hidden, weight, targets, arguments, loss, lse, share, need_dhidden, need_dweight)
    return loss.sum() * share.squeeze(0), *gradients


IMPLEMENTATIONS = {
    function.__name__: function
    for function in (linear_cross_entropy, linear_cross_entropy_backward, linear_cross_entropy_with_grad)
}
for _name, _function in IMPLEMENTATIONS.items():
    torch.library.impl(f"llmcore::{_name}", "CUDA", _function)
