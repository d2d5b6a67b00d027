"""Router logits, and the norms of the tokens that come with them.

Letters: B batch, N tokens, D dimension, E experts. With cosine routing l = cx cr <x, r>, cx = 1 / max(||x||, 1e-12),
cr = scale / max(||r||, 1e-12); else cx = cr = 1. Gradients, with g = dL/dl:

    dx = sum_e g cx cr r - x cx^2 sum_e g l,   dr = sum_n g cx cr x - r / ||r||^2 sum_n g l

with second terms for cosine routing only, and where the norm exceeds 1e-12.
"""

from __future__ import annotations

import torch
from torch import Tensor

from optimized.ops.operator import operator

CACHED = 2**16  # numbers


@operator(
    "(Tensor x, Tensor tokens, Tensor? mask, float? scale, bool triton)"
    " -> (Tensor logits, Tensor norms, Tensor factors)",
    wrt="x tokens",
    gradients_of="logits",
    saves="x tokens mask logits norms factors",
)
class router_logits:
    """Logits (B, E, N) of x (B, N, D) against tokens (E, D) or (B, E, D), norms (B, N) of x, and factors cr (B, E).

    In the dtype of x and tokens, at least float32, under autocast too. scale: of cosine routing, None for the plain
    product, whose factors are empty (B, 0). Masked tokens have logit and norm 0 and are not read.
    """

    def forward(a):  # type: ignore[no-untyped-def]
        if a.triton:
            from optimized.kernels import router_logits as kernel

            return kernel.router_logits(a.x, a.tokens, a.mask, a.scale)
        return _logits(a.x, a.tokens, a.mask, a.scale)

    def fake(a):  # type: ignore[no-untyped-def]
        batch, n, _ = a.x.shape
        experts = a.tokens.shape[-2]
        shapes = (batch, experts, n), (batch, n), (batch, 0 if a.scale is None else experts)
        return tuple(a.x.new_empty(shape, dtype=logits_dtype(a.x, a.tokens)) for shape in shapes)

    def backward(a, g, needs):  # type: ignore[no-untyped-def]
        found = {}
        if needs.x and a.triton:
            from optimized.kernels.router_gradient import RouterGradient, router_gradient

            router = RouterGradient(g.logits, a.logits, a.tokens, a.factors)
            found["x"] = router_gradient(a.x, a.mask, a.norms, router)
        elif needs.x:
            found["x"] = input_gradient(g.logits, a.x, a.tokens, a.mask, a.logits, a.norms, a.factors).to(a.x.dtype)
        if needs.tokens:
            given = g.logits, a.x, a.tokens, a.mask, a.logits, a.norms, a.factors
            found["tokens"] = routing_token_gradient(*given, a.triton)
        return found

    def flops(a, out):  # type: ignore[no-untyped-def]
        return logits_flops(a.x, a.tokens)

    def backward_flops(a, g, needs):  # type: ignore[no-untyped-def]
        return logits_flops(a.x, a.tokens) * (needs.x + needs.tokens)


def logits_dtype(x: Tensor, tokens: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(x.dtype, tokens.dtype), torch.float32)


def logits_flops(x: Tensor, tokens: Tensor) -> int:
    return 2 * x.numel() * tokens.shape[-2]


def _logits(x: Tensor, tokens: Tensor, mask: Tensor | None, scale: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """Sums in one order for every token: equal ones get equal logits, however many tokens stand beside them.

    On a CPU: on a GPU, where our kernel keeps to one order, PyTorch's sums choose it by the shape. Products of matrices
    promise no such thing, and which of equal tokens is taken would be a matter of how a sequence is cut into calls.
    """
    dtype = logits_dtype(x, tokens)
    x, tokens = x.to(dtype).contiguous(), tokens.to(dtype)
    if mask is not None:
        x = x.masked_fill(~mask[..., None], 0)
    norms = torch.linalg.vector_norm(x, dim=-1)
    factors = norms.new_empty(x.shape[0], 0)
    if scale is not None:
        lengths = torch.linalg.vector_norm(tokens, dim=-1, keepdim=True).clamp_min_(1e-12)
        factors = (scale / lengths[..., 0]).expand(x.shape[0], -1).contiguous()
        x, tokens = x / norms.clamp_min(1e-12)[..., None] * scale, tokens / lengths
    logits = norms.new_empty(x.shape[0], tokens.shape[-2], x.shape[1])
    # On a CPU some tokens at a time, whose products stay in its cache.
    rows = max(CACHED // max(x[:, :1].numel(), 1), 1) if x.device.type == "cpu" else max(x.shape[1], 1)
    for some, made in zip(x.split(rows, 1), logits.split(rows, 2)):
        for e, token in enumerate(tokens.unbind(-2)):
            torch.sum(some * token.unsqueeze(-2), -1, out=made[:, e])
    return logits, norms.contiguous(), factors


def input_gradient(
    g: Tensor, x: Tensor, tokens: Tensor, mask: Tensor | None, logits: Tensor, norms: Tensor, factors: Tensor
) -> Tensor:
    """dx (B, N, D) in the dtype of the logits, by PyTorch. 0 at masked tokens, whatever they or the others hold."""
    dx = _weights(g, mask, norms, factors).transpose(1, 2) @ tokens.to(logits.dtype)
    if factors.numel():
        inverse_norms = 1 / norms.clamp_min(1e-12)
        slope = (g * logits).sum(1) * inverse_norms * inverse_norms
        dx -= x.to(logits.dtype) * torch.where(norms > 1e-12, slope, 0)[..., None]
    dx = dx.contiguous()
    return dx if mask is None else dx.masked_fill_(~mask[..., None], 0)


def routing_token_gradient(
    g: Tensor,
    x: Tensor,
    tokens: Tensor,
    mask: Tensor | None,
    logits: Tensor,
    norms: Tensor,
    factors: Tensor,
    triton: bool,
) -> Tensor:
    """dr in the shape and dtype of the routing tokens."""
    if triton:
        from optimized.kernels import router_logits as kernel

        return kernel.routing_token_gradient(g, x, tokens, mask, norms, factors)
    x, r = x.to(logits.dtype), tokens.to(logits.dtype)
    if mask is not None:
        x, g = x.masked_fill(~mask[..., None], 0), g.masked_fill(~mask[:, None], 0)
    weights = _weights(g, mask, norms, factors)
    shared = tokens.ndim == 2
    dr = weights.transpose(0, 1).flatten(1) @ x.flatten(0, 1) if shared else torch.bmm(weights, x)
    if factors.numel():
        squares = r.square().sum(-1, keepdim=True)
        moment = (g * logits).sum(-1, keepdim=True)
        moment = moment.sum(0) if shared else moment
        dr -= torch.where(squares > 1e-24, moment * r / squares.clamp_min(1e-24), 0)
    return dr.to(tokens.dtype).contiguous()


def _weights(g: Tensor, mask: Tensor | None, norms: Tensor, factors: Tensor) -> Tensor:
    """g cx cr (B, E, N), 0 at masked tokens."""
    if mask is not None:
        g = g.masked_fill(~mask[:, None], 0)
    return g / norms.clamp_min(1e-12)[:, None] * factors[..., None] if factors.numel() else g
