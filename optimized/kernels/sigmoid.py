"""The gradient of scores that are sigmoids of their own logits: ds = g p (1 - p), p = sigmoid(s), at what was picked.

Rows (B, R, N) of logits as `selection` takes them, which makes the scores; g: of the picked scores, (B, E, K) for each
of one or two groups, by its inverse map (B, E, N). What was not picked has gradient 0, whatever its logit holds; a NaN
that was picked has NaN. A program per `BLOCK` tokens of a row.

Blind spots: none known.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from optimized.kernels.launch import cdiv, contiguous, launch
from optimized.kernels.rows import gradient_arguments, gradient_of_row, load_gradient

BLOCK = 1024


@triton.jit(do_not_specialize=["n", "experts", "group", "k_0", "k_1"])
def _sigmoid_backward_kernel(
    grad_0, grad_1, inverse_0, inverse_1, dlogits_ptr, s_ptr, out_ptr, n, experts, group, k_0, k_1,
    PICKED: tl.constexpr, HAS_DLOGITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    grad_ptr, inverse_ptr = gradient_of_row(
        grad_0, grad_1, inverse_0, inverse_1, row, experts, group, n, k_0, k_1, PICKED
    )
    mine = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = mine < n
    taken = tl.load(inverse_ptr + mine, mask=inside, other=-1) >= 0
    p = tl.sigmoid(tl.load(s_ptr + row * n + mine, mask=taken, other=0.0))
    ds = load_gradient(grad_ptr, inverse_ptr, mine, inside, PICKED) * (p * (1 - p))
    if HAS_DLOGITS:
        ds += tl.load(dlogits_ptr + row * n + mine, mask=inside, other=0.0)
    tl.store(out_ptr + row * n + mine, ds, mask=inside)


def sigmoid_picked_backward(
    grads: tuple[Tensor, ...], inverses: tuple[Tensor, ...], dlogits: Tensor | None, logits: Tensor
) -> Tensor:
    """The gradient of the logits (B, R, N); dlogits, of that shape, is added."""
    batch, experts, n = logits.shape
    s = logits.contiguous()
    out = torch.empty_like(s)
    if s.numel():
        pointers, widths, picked = gradient_arguments(grads, inverses)
        launch(
            _sigmoid_backward_kernel, (batch * experts, cdiv(n, BLOCK)),
            *pointers, contiguous(dlogits), s, out, n, experts, experts // len(grads), *widths,
            HAS_DLOGITS=dlogits is not None, BLOCK=BLOCK, num_warps=4, **picked,
        )  # fmt: skip
    return out
