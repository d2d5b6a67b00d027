"""Operators registered with PyTorch under torch.ops.moa: solver, selection, and the two transposed token moves.

Each has a fake kernel (torch.compile sees no break), a gradient written by hand, and a batching rule (torch.vmap). The
solvers are not twice differentiable and say so by an error. All run on any device that PyTorch runs on.
Letters: B batch, N tokens, E experts, K slots per expert, D channels, T iterations.

Who reads what in the backward: the solver's needs T scalars and T counts per row and no intermediate row;
`dispatch` and `collect` are each other's transpose through the inverse map, so neither needs atomic additions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef, custom_op


def temperature(t: int, eps: float, eps_init: float, eps_decay: float) -> float:
    return max(eps_init * eps_decay**t, eps)


def _fill(logits: Tensor, mask: Tensor | None) -> Tensor:
    """A masked token at -inf has weight exp(-inf) = 0 in every sum below, so no step needs the mask again.

    Contiguous, and so is all that is computed from it, as the fake kernels promise.
    """
    logits = logits.contiguous()
    return logits if mask is None else logits.masked_fill(~mask[:, None], -math.inf)


@custom_op(
    "moa::coordinate_descent",
    mutates_args=(),
    schema="(Tensor logits, Tensor? mask, float k, int n_iters, float eps, float eps_init, float eps_decay)"
    " -> (Tensor, Tensor, Tensor)",
)
def coordinate_descent(
    logits: Tensor, mask: Tensor | None, k: float, n_iters: int, eps: float, eps_init: float, eps_decay: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Soft scores (B, E, N) of mass about k, the iterates a (T, B, E), and the counts (T, B, E).

    One scalar per row and step: a_t = eps_t (log k - logsumexp(u_t / eps_t)), u_0 = 0 and u_t = min(s, -a_{t-1}).
    counts[t] = #{s >= -a_{t-1}}.
    """
    s = _fill(logits, mask)
    a = logits.new_empty(n_iters, *logits.shape[:2])
    counts = torch.zeros_like(a)
    u = _fill(torch.zeros_like(s), mask)
    for t in range(n_iters):
        if t > 0:
            bound = -a[t - 1, ..., None]
            counts[t] = (s >= bound).sum(-1)
            u = torch.minimum(s, bound)
        eps_t = temperature(t, eps, eps_init, eps_decay)
        lse = (u / eps_t).logsumexp(-1)
        # A row without valid tokens: any finite a will do, its weights are exp(-inf).
        a[t] = torch.where(lse == -math.inf, 0.0, eps_t * (math.log(k) - lse))
        if t == 0:
            a[0].masked_fill_(s.isnan().any(-1), math.nan)  # the first step does not look at s
    scores = (s + a[-1, ..., None]).clamp_max(0).div_(temperature(n_iters, eps, eps_init, eps_decay)).exp_()
    if mask is not None:
        scores.masked_fill_(~mask[:, None], 0)  # exp(-inf) = 0 already, but for rows poisoned by a NaN
    return scores, a, counts


@coordinate_descent.register_fake
def _(logits, mask, k, n_iters, eps, eps_init, eps_decay):  # type: ignore[no-untyped-def]
    a = logits.new_empty(n_iters, *logits.shape[:2])
    return torch.empty_like(logits, memory_format=torch.contiguous_format), a, torch.empty_like(a)


@custom_op(
    "moa::coordinate_descent_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor logits, Tensor? mask, Tensor scores, Tensor a, Tensor counts, float k, float eps,"
    " float eps_init, float eps_decay) -> Tensor",
)
def coordinate_descent_backward(
    grad: Tensor,
    logits: Tensor,
    mask: Tensor | None,
    scores: Tensor,
    a: Tensor,
    counts: Tensor,
    k: float,
    eps: float,
    eps_init: float,
    eps_decay: float,
) -> Tensor:
    """Gradient of the logits. With P_t = exp((u_t + a_t) / eps_t) / k and dA = dL/da:

    ds = g scores / eps_T [s < -a_{T-1}],  dA = sum ds;  for t = T-1 .. 1:  ds -= dA P_t [s < -a_{t-1}],
    dA <- dA counts_t exp((a_t - a_{t-1}) / eps_t) / k. The second line needs no row, so dA costs no reduction.
    """
    s = _fill(logits, mask)
    n_iters = a.shape[0]
    bound = -a[..., None]
    grad = grad.contiguous()
    if mask is not None:
        grad = grad.masked_fill(~mask[:, None], 0)  # it may be NaN there, and 0 * NaN is NaN
    ds = (grad * scores).div_(temperature(n_iters, eps, eps_init, eps_decay))
    ds.masked_fill_(s >= bound[-1], 0)
    da = ds.sum(-1)
    for t in range(n_iters - 1, 0, -1):
        eps_t = temperature(t, eps, eps_init, eps_decay)
        p = (s - bound[t]).div_(eps_t).exp_().mul_(da[..., None] / k)
        ds -= p.masked_fill_(s >= bound[t - 1], 0)
        da = da * counts[t] * ((a[t] - a[t - 1]) / eps_t).exp() / k
    return ds if mask is None else ds.masked_fill_(~mask[:, None], 0)


@coordinate_descent_backward.register_fake
def _(grad, logits, mask, scores, a, counts, k, eps, eps_init, eps_decay):  # type: ignore[no-untyped-def]
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _descent_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    logits, mask, k, _, *epsilons = inputs
    ctx.save_for_backward(logits, mask, *output)
    ctx.mark_non_differentiable(*output[1:])
    ctx.constants = (k, *epsilons)


def _descent_backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple:
    logits, mask, scores, a, counts = ctx.saved_tensors
    ds = descend_backward(grad, logits, mask, scores, a, counts, *ctx.constants)
    return ds, None, None, None, None, None, None


@custom_op(
    "moa::capped_simplex",
    mutates_args=(),
    schema="(Tensor logits, Tensor? mask, float k, float eps) -> (Tensor, Tensor)",
)
def capped_simplex(logits: Tensor, mask: Tensor | None, k: float, eps: float) -> tuple[Tensor, Tensor]:
    """min(1, exp((s + a) / eps)) of mass min(k, valid tokens) for the smallest a, and a threshold (B, E).

    Sorted in descending order, j saturated tokens leave a_j = eps (log(k - j) - logsumexp of the rest); the answer is
    the first j whose next token stays below 1. Tokens at or below the threshold are unsaturated.
    """
    if logits.numel() == 0:
        return torch.empty_like(logits), logits.new_full(logits.shape[:2], -math.inf)
    poisoned = logits.isnan()
    if mask is not None:
        poisoned &= mask[:, None]
    s = _fill(logits.nan_to_num(nan=0.0, posinf=math.inf, neginf=-math.inf), mask)
    n = s.shape[-1]
    ordered = s.sort(dim=-1, descending=True).values
    rest = (ordered.flip(-1) / eps).logcumsumexp(-1).flip(-1)
    left = (k - torch.arange(n, device=s.device, dtype=s.dtype)).clamp_min(0)
    # A later duplicate of the threshold would be cut off from its equals: compare values, not positions.
    stays_below = (ordered + eps * (left.log() - rest) < 0) & (left > 0)
    fits = (s > -math.inf).sum(-1, keepdim=True) <= k
    first = torch.where(stays_below.any(-1, keepdim=True), stays_below.int().argmax(-1, keepdim=True), math.ceil(k))
    threshold = torch.where(fits, -math.inf, ordered.gather(-1, first.clamp_max(n - 1)))
    free = s <= threshold
    remaining = (k - (s > threshold).sum(-1, keepdim=True).to(s.dtype)).clamp_min(0)  # not int - float: float32
    rest = torch.where(free, s / eps, -math.inf).logsumexp(-1, keepdim=True)
    a = torch.where(rest == -math.inf, 0.0, eps * (remaining.log() - rest))
    scores = torch.where(free, ((s + a) / eps).clamp_max(0).exp(), 1.0)
    scores.masked_fill_(poisoned.any(-1, keepdim=True), math.nan)
    if mask is not None:
        scores.masked_fill_(~mask[:, None], 0)
    return scores, threshold.squeeze(-1)


@capped_simplex.register_fake
def _(logits, mask, k, eps):  # type: ignore[no-untyped-def]
    return torch.empty_like(logits, memory_format=torch.contiguous_format), logits.new_empty(logits.shape[:2])


@custom_op(
    "moa::capped_simplex_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor logits, Tensor? mask, Tensor scores, Tensor threshold, float eps) -> Tensor",
)
def capped_simplex_backward(
    grad: Tensor, logits: Tensor, mask: Tensor | None, scores: Tensor, threshold: Tensor, eps: float
) -> Tensor:
    """Implicit gradient: ds = w (g - <g>_w) / eps over the unsaturated tokens, w their scores; 0 elsewhere.

    Their total mass is fixed, so da = -sum(w ds) / sum(w). The row sum of ds is 0; if nothing is unsaturated so is ds.
    """
    free = _fill(logits, mask) <= threshold[..., None]
    w = torch.where(free, scores, 0)
    if mask is not None:
        grad = grad.masked_fill(~mask[:, None], 0)  # it may be NaN there, and 0 * NaN is NaN
    mean = (w * grad).sum(-1, keepdim=True) / w.sum(-1, keepdim=True).clamp_min(torch.finfo(w.dtype).tiny)
    return w * (grad.contiguous() - mean) / eps


@capped_simplex_backward.register_fake
def _(grad, logits, mask, scores, threshold, eps):  # type: ignore[no-untyped-def]
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _capped_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    logits, mask, _, ctx.eps = inputs
    ctx.save_for_backward(logits, mask, *output)
    ctx.mark_non_differentiable(output[1])


def _capped_backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple:
    return cap_backward(grad, *ctx.saved_tensors, ctx.eps), None, None, None


@custom_op("moa::select", mutates_args=(), schema="(Tensor logits, Tensor? mask, SymInt k) -> (Tensor, Tensor)")
def select(logits: Tensor, mask: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    """Indices (B, E, K) int64 and slot mask of the k best: valid before masked, larger logit, smaller index.

    The k-th largest key decides: all keys above it are in, and of its equals the first ones. A running count then gives
    each chosen token its slot, in index order, so no second sort. Keys are integers in the order of the floats.
    """
    key = _order_preserving(logits)
    valid = torch.ones_like(logits, dtype=torch.bool)
    if mask is not None:
        valid = mask[:, None].expand_as(logits)
        key = key.masked_fill(~valid, torch.iinfo(torch.int64).min)
    least = key.topk(k, dim=-1).values[..., -1:]
    above, equal = key > least, key == least
    room = k - above.sum(-1, keepdim=True)
    chosen = above | (equal & (equal.cumsum(-1) <= room))
    chosen_valid = chosen & valid
    slot_valid = chosen_valid.cumsum(-1)
    slot = torch.where(valid, slot_valid, slot_valid[..., -1:] + (chosen & ~valid).cumsum(-1)) - 1
    # Tokens that were not chosen write to one slot past the end.
    slot = torch.where(chosen, slot, k)
    position = torch.arange(logits.shape[-1], device=logits.device).expand_as(slot)
    indices = slot.new_empty(*slot.shape[:2], k + 1).scatter_(-1, slot, position)[..., :k].contiguous()
    return indices, valid.gather(-1, indices)


def _order_preserving(logits: Tensor) -> Tensor:
    """int64 keys with the order of the floats: -0.0 and 0.0 equal, NaN below -inf (and above the masked key)."""
    floats = logits + 0.0
    wide = torch.int32 if logits.dtype == torch.float32 else torch.int64
    bits = floats.view(wide)
    # Flipping all but the sign bit of a negative float turns sign-magnitude order into integer order.
    key = torch.where(bits < 0, bits ^ torch.iinfo(wide).max, bits).long()
    return key.masked_fill(logits.isnan(), torch.iinfo(torch.int64).min + 1)


@select.register_fake
def _(logits, mask, k):  # type: ignore[no-untyped-def]
    shape = (*logits.shape[:2], k)
    return logits.new_empty(shape, dtype=torch.int64), logits.new_empty(shape, dtype=torch.bool)


def inverse_map(indices: Tensor, mask: Tensor, n: int) -> Tensor:
    """(B, E, N) int64: the slot that holds a token, or -1. Masked slots hold nothing; indices are distinct in a row."""
    slots = torch.where(mask, torch.arange(indices.shape[-1], device=indices.device), -1)
    return indices.new_full((*indices.shape[:2], n), -1).scatter(-1, indices, slots)


@custom_op("moa::dispatch", mutates_args=(), schema="(Tensor x, Tensor indices, Tensor mask, Tensor inverse) -> Tensor")
def dispatch(x: Tensor, indices: Tensor, mask: Tensor, inverse: Tensor) -> Tensor:
    """Routed tokens (E, B, K, D) of x (B, N, D), experts first for batched GEMMs; masked slots are 0."""
    batch = torch.arange(x.shape[0], device=x.device)[None, :, None]
    # Indexing copies the layout of its index, and the fake kernel promises a contiguous result.
    rows = x[batch, indices.transpose(0, 1).contiguous()]
    return rows.masked_fill_(~mask.transpose(0, 1)[..., None], 0)


@custom_op("moa::collect", mutates_args=(), schema="(Tensor y, Tensor indices, Tensor mask, Tensor inverse) -> Tensor")
def collect(y: Tensor, indices: Tensor, mask: Tensor, inverse: Tensor) -> Tensor:
    """Transpose of `dispatch`: (B, N, D), the sum over experts of y (E, B, K, D) at each token, 0 where none.

    Every token reads its rows, at most E, through the inverse map in the order of the experts: deterministic.
    Summed in at least float32, returned in y's dtype.
    """
    experts, batch, slots, dim = y.shape
    wide = torch.promote_types(y.dtype, torch.float32)
    out = y.new_zeros(batch, inverse.shape[-1], dim, dtype=wide)
    rows = torch.arange(batch, device=y.device)[:, None]
    for e in range(experts if slots else 0):
        slot = inverse[:, e]
        out += y[e][rows, slot.clamp_min(0)].masked_fill_((slot < 0)[..., None], 0)
    return out.to(y.dtype)


@dispatch.register_fake
def _(x, indices, mask, inverse):  # type: ignore[no-untyped-def]
    batch, experts, slots = indices.shape
    return x.new_empty(experts, batch, slots, x.shape[-1])


@collect.register_fake
def _(y, indices, mask, inverse):  # type: ignore[no-untyped-def]
    return y.new_empty(y.shape[1], inverse.shape[-1], y.shape[-1])


def _save_routing(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _refuse(name: str, what: str) -> Callable[..., Any]:
    def refuse(ctx: Any, *gradients: Any) -> Any:
        raise RuntimeError(f"{name}: {what} is not supported; reference.MixtureOfAttention supports it")

    return refuse


def _fold_rule(call: Callable[..., Any], places: tuple[int, ...], out_places: tuple[int, ...]) -> Callable[..., Any]:
    """Batching rule: fold the new dimension into the batch dimension, which every one of these operators has.

    places, out_places: where B stands in each argument (tensors only count) and in each output.
    """

    def rule(info: Any, in_dims: tuple, *args: Any) -> tuple:
        folded = []
        for arg, dim, place in zip(args, in_dims, places):
            if isinstance(arg, Tensor):
                repeats = info.batch_size if dim is None else -1
                arg = arg.unsqueeze(0) if dim is None else arg.movedim(dim, 0)
                arg = arg.expand(repeats, *arg.shape[1:]).movedim(0, place).flatten(place, place + 1)
            folded.append(arg)
        out = call(*folded)
        if isinstance(out, Tensor):
            return out.unflatten(out_places[0], (info.batch_size, -1)), out_places[0]
        return tuple(o.unflatten(p, (info.batch_size, -1)) for o, p in zip(out, out_places)), out_places

    return rule


select.register_vmap(_fold_rule(select, (0, 0, 0), (0, 0)))


def _differentiable(
    op: CustomOpDef,
    setup: Callable[..., None],
    backward: Callable[..., Any],
    places: tuple[int, ...],
    out_places: tuple[int, ...],
) -> Callable[..., Any]:
    """Register the gradient of an operator, and let torch.func see it.

    An operator of torch.library refuses torch.func.grad and drops forward-mode tangents without a word. So inside a
    transform, or a forward-mode level, the same formulas go through an autograd.Function, which refuses a tangent.
    """
    op.register_autograd(backward, setup_context=setup)
    name = op._opoverload.name()
    refuse_forward_mode = _refuse(name, "forward-mode differentiation")

    def call(*args: Any) -> Any:
        forward_mode = torch.autograd.forward_ad._current_level >= 0
        if torch.compiler.is_compiling():
            if forward_mode:
                refuse_forward_mode(None)
            return op(*args)
        transformed = forward_mode or torch._C._functorch.maybe_current_level() is not None
        return function.apply(*args) if transformed else op(*args)

    op.register_vmap(_fold_rule(op, places, out_places))
    methods = {
        "forward": lambda *args: op(*args),
        "setup_context": setup,
        "backward": backward,
        "jvp": refuse_forward_mode,
        "vmap": _fold_rule(call, places, out_places),
    }
    function = type(name, (torch.autograd.Function,), {key: staticmethod(f) for key, f in methods.items()})
    call.__doc__ = op.__doc__
    return call


def _no_setup(ctx: Any, inputs: tuple, output: Any) -> None:
    """Nothing to keep for a backward that only refuses."""


descend_backward = _differentiable(
    coordinate_descent_backward,
    _no_setup,
    _refuse("moa::coordinate_descent", "double backward"),
    (0, 0, 0, 0, 1, 1, 0, 0, 0, 0),
    (0,),
)
cap_backward = _differentiable(
    capped_simplex_backward,
    _no_setup,
    _refuse("moa::capped_simplex", "double backward"),
    (0, 0, 0, 0, 0, 0),
    (0,),
)
descend = _differentiable(coordinate_descent, _descent_setup, _descent_backward, (0, 0, 0, 0, 0, 0, 0), (0, 1, 1))
cap = _differentiable(capped_simplex, _capped_setup, _capped_backward, (0, 0, 0, 0), (0, 0))
gather_tokens = _differentiable(
    dispatch,
    _save_routing,
    lambda ctx, g: (scatter_tokens(g, *ctx.saved_tensors), None, None, None),
    (0, 0, 0, 0),
    (1,),
)
scatter_tokens = _differentiable(
    collect, _save_routing, lambda ctx, g: (gather_tokens(g, *ctx.saved_tensors), None, None, None), (1, 0, 0, 0), (0,)
)
