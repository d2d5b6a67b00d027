"""The Mixture of Attention in NumPy float64: the definition, with loops where loops are clearest.

An independent witness: it shares no code with the rest of the package. Slow, so for small sizes; it does not
check its arguments and expects finite or NaN inputs. Reading order: `mixture_of_attention`, then its stages.
Letters: B batch, N tokens, M context tokens, D dim, Dc dim of the context, E experts, H heads, d dim_head,
K slots (Kq for queries, Kkv for keys and values).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Routes(NamedTuple):
    """Which tokens each expert reads. A masked slot holds a masked token; every later stage ignores it."""

    indices: np.ndarray  # (B, E, K) int64, distinct within a row
    mask: np.ndarray  # (B, E, K) bool, False for a masked slot
    scores: np.ndarray  # (B, E, K) float64
    logits: np.ndarray  # (B, E, N) float64, of a zero token where masked

    @property
    def load(self) -> np.ndarray:
        """Valid slots of each expert, (B, E) int64."""
        return self.mask.sum(axis=-1)


def mixture_of_attention(
    x, parameters: dict[str, np.ndarray], *, num_routed_queries, num_routed_key_values, heads, context=None,
    mask=None, context_mask=None, local_attn_window_size=None, average_routed=False, rotary_emb=None,
    query_routing_tokens=None, key_value_routing_tokens=None, router_options=None,
) -> np.ndarray:  # fmt: skip
    """The layer in evaluation mode: x (B, N, D), context (B, M, Dc) or None for x itself, to (B, N, D).

    `parameters` is the state dict; pre-normalisation and local attention happen if it has their parameters.
    Routing tokens (E, D) or (B, E, D) given as arguments take the place of those of the state dict.
    """
    if context is None:
        context, context_mask = x, mask
    x, context = _zero_masked(x, mask), _zero_masked(context, context_mask)
    p = {name: np.asarray(value, np.float64) for name, value in parameters.items()}
    if query_routing_tokens is None:
        query_routing_tokens = p["query_router.routing_token"]
    if key_value_routing_tokens is None:
        key_value_routing_tokens = p["key_value_router.routing_token"]
    options = router_options or {}
    q_routes = route(x, query_routing_tokens, num_routed_queries, mask, **options)
    kv_routes = route(context, key_value_routing_tokens, num_routed_key_values, context_mask, **options)

    e, d = p["attn.null_kv"].shape[1], p["attn.null_kv"].shape[-1]
    gamma, context_gamma = p.get("attn.norm.gamma"), p.get("attn.context_norm.gamma")
    y = routed_attention(
        x, context, q_routes, kv_routes, rotary_emb=rotary_emb, null_kv=p["attn.null_kv"][:, :, :, 0],
        w_q=p["attn.to_q.weight"].reshape(e, heads * d, x.shape[-1]),
        w_kv=p["attn.to_kv.weight"].reshape(e, 2 * heads * d, context.shape[-1]),
        w_out=p["attn.to_out.weight"].reshape(e, x.shape[-1], heads * d),
        gamma=None if gamma is None else gamma[:, :, 0],
        context_gamma=None if context_gamma is None else context_gamma[:, :, 0],
    )  # fmt: skip
    local = None
    if "local_attn.to_qkv.weight" in p:
        local = local_attention(
            x, local_attn_window_size, mask, heads=heads,
            w_qkv=p["local_attn.to_qkv.weight"], w_out=p["local_attn.to_out.weight"],
            norm_weight=p.get("local_attn.norm.weight"), norm_bias=p.get("local_attn.norm.bias"),
        )  # fmt: skip
    return combine(y, q_routes, x.shape[1], local=local, average_routed=average_routed,
                   null_routed_token=p.get("null_routed_token"), mask=mask)  # fmt: skip


def route(
    x, tokens, k, mask=None, *, straight_through=True, n_iters=20, fetch_k_ratio=9 / 8, eps=0.03,
    eps_init=4.0, eps_decay=0.7, solver="iterative", cosine_sim_routing=False, cosine_sim_scale=8.0,
    route_block_size=None,
) -> Routes:  # fmt: skip
    """Each expert chooses k of the N tokens of each item of x (B, N, D) by the logits <x[n], tokens[e]>.

    With N <= k there is nothing to choose: all tokens in order, with score 1. Otherwise each block of
    `route_block_size` tokens (by default one block of N) gives its best ceil(k / blocks), or all with score 1
    if it has no more; and a NaN logit of a valid token makes every score of its row (b, e) NaN. solver="sigmoid":
    the score of a token is the sigmoid of its logit, chosen among others or not, NaN or not.
    """
    x = _zero_masked(x, mask)
    batch, n = x.shape[:2]
    valid = _valid(mask, (batch, n))
    tokens = np.asarray(tokens, np.float64)
    tokens = np.broadcast_to(tokens, (batch, *tokens.shape[-2:]))
    experts = tokens.shape[1]
    if cosine_sim_routing:
        x, tokens = _unit_norm(x), _unit_norm(tokens) * cosine_sim_scale

    size = n if n <= k or route_block_size is None else route_block_size
    starts = range(0, n, size) if n > 0 else range(0)
    k_block = -(-k // max(len(starts), 1))  # ceil
    slots = sum(min(k_block, size, n - start) for start in starts)
    indices, logits = np.zeros((batch, experts, slots), np.int64), np.zeros((batch, experts, n))
    chosen_valid, scores = np.zeros((batch, experts, slots), bool), np.zeros((batch, experts, slots))
    for b, e in np.ndindex(batch, experts):
        logits[b, e] = x[b] @ tokens[b, e]
        soft = valid[b].astype(np.float64)  # (N,), stays 1 where there is nothing to choose
        chosen: list[int] = []
        for start in starts:
            s, m = logits[b, e, start : start + size], valid[b, start : start + size]
            if solver == "sigmoid":
                with np.errstate(invalid="ignore"):  # a NaN logit
                    soft[start : start + size] = np.exp(-np.logaddexp(0.0, -s))
            if len(s) <= k_block:
                chosen += range(start, start + len(s))
                continue
            mass = min(k_block * fetch_k_ratio, len(s))
            if solver == "exact":
                soft[start : start + size] = capped_simplex(s, mass, m, eps=eps)
            elif solver == "iterative":
                soft[start : start + size] = coordinate_descent(
                    s, mass, m, n_iters=n_iters, eps=eps, eps_init=eps_init, eps_decay=eps_decay
                )
            chosen += [start + int(i) for i in select(s, k_block, m)[0]]
        if n > k:
            chosen.sort(key=lambda i: (not valid[b, i], i))  # valid ascending, then masked ascending
        indices[b, e] = chosen
        chosen_valid[b, e] = valid[b, indices[b, e]]
        scores[b, e] = chosen_valid[b, e] if straight_through else soft[indices[b, e]] * chosen_valid[b, e]
        if solver == "sigmoid":
            scores[b, e, chosen_valid[b, e] & np.isnan(logits[b, e, indices[b, e]])] = np.nan
        elif n > k and np.isnan(logits[b, e, valid[b]]).any():
            scores[b, e] = np.nan
    return Routes(indices, chosen_valid, scores, logits)


def coordinate_descent(logits, k, mask=None, *, n_iters, eps, eps_init, eps_decay) -> np.ndarray:
    """Soft top-k of logits (N,) with target mass k: lambda (N,) in [0, 1], 0 for masked tokens.

    It maximises <s, lambda> + eps * entropy(lambda) with sum(lambda) = k (multiplier a) and lambda <= 1
    (multipliers b), improving a and b alternately (Wright 2015, "Coordinate descent algorithms") while eps falls
    (Schmitzer 2016, "Stabilized Sparse Scaling Algorithms for Entropy Regularized Transport Problems"), as in
    Ainslie et al. 2023, "CoLT5: Faster Long-Range Transformers with Conditional Computation", arXiv 2303.09752.
    It stops after n_iters steps, when the mass is in general not yet k.
    """
    logits = np.asarray(logits, np.float64)
    lam, valid = np.zeros(logits.shape), _valid(mask, logits.shape)
    if not valid.any():
        return lam
    s = logits[valid]
    b = -s
    for t in range(n_iters):
        eps_t = max(eps_init * eps_decay**t, eps)
        z = (s + b) / eps_t
        a = eps_t * (np.log(k) - z.max() - np.log(np.exp(z - z.max()).sum()))  # best a: the mass is k
        b = -np.maximum(s + a, 0.0)  # best b: no entry exceeds 1
    eps_last = max(eps_init * eps_decay**n_iters, eps)  # one decay beyond the last step, as published
    lam[valid] = np.exp((s + a + b) / eps_last)
    return lam


def capped_simplex(logits, k, mask=None, *, eps) -> np.ndarray:
    """The limit of `coordinate_descent`: lambda (N,) = min(1, exp((s + a) / eps)) of mass min(k, #valid)."""
    logits = np.asarray(logits, np.float64)
    lam, valid = np.zeros(logits.shape), _valid(mask, logits.shape)
    count = int(valid.sum())
    if count == 0:
        return lam
    s = logits[valid] - logits[valid].max()  # a shift changes nothing, and around 0 rounding is least
    low = eps * np.log(min(k, count) / count)  # each term is at most k / count, so the mass at most k
    high = -s.min()  # each term is 1
    for _ in range(200):  # more halvings than float64 can tell apart; `high` ends as the smallest such a
        a = (low + high) / 2
        if np.exp(np.minimum(s + a, 0.0) / eps).sum() < min(k, count):
            low = a
        else:
            high = a
    lam[valid] = np.exp(np.minimum(s + high, 0.0) / eps)
    return lam


def select(logits, k, mask=None) -> tuple[np.ndarray, np.ndarray]:
    """Indices (k,) int64 and mask (k,) of the k best of logits (N,): valid ascending, then masked ascending.

    The best comes first by: valid number, valid NaN, masked token; larger logit (-0.0 ties with 0.0); smaller
    index. Neither NaN nor masked tokens are compared by their content.
    """
    valid = _valid(mask, np.shape(logits))

    def rank(i: int) -> tuple[int, float, int]:
        if not valid[i]:
            return 2, 0.0, i
        return (1, 0.0, i) if np.isnan(logits[i]) else (0, -float(logits[i]), i)

    chosen = sorted(sorted(range(len(valid)), key=rank)[:k], key=lambda i: (not valid[i], i))
    return np.array(chosen, np.int64), np.array([valid[i] for i in chosen], bool)


def routed_attention(
    x, context, q_routes: Routes, kv_routes: Routes, *, w_q, w_kv, w_out, null_kv, gamma=None,
    context_gamma=None, rotary_emb=None, dropout=0.0, dropout_mask=None,
) -> np.ndarray:  # fmt: skip
    """Attention of each expert's routed queries to its routed keys and a learned null key: (B, E, Kq, D).

    w_q (E, H*d, D), rows (head, channel); w_kv (E, 2*H*d, Dc), rows (k-then-v, head, channel);
    w_out (E, D, H*d); null_kv (2, E, H, d); RMSNorm gamma (E, D) and context_gamma (E, Dc), None for no norm;
    rotary_emb (N, d) angles. dropout_mask (B, E, H, Kq, 1 + Kkv) is True where a probability is kept, slot 0
    being the null key; without it nothing is dropped.
    """
    x, context, null_kv = (np.asarray(array, np.float64) for array in (x, context, null_kv))
    heads, d = null_kv.shape[2:]
    out = np.zeros((*q_routes.indices.shape, x.shape[-1]))
    for b, e in np.ndindex(q_routes.indices.shape[:2]):
        slots, keys, values = [0], [null_kv[0, e]], [null_kv[1, e]]  # null: no position, no score
        for j in np.flatnonzero(kv_routes.mask[b, e]):
            token = kv_routes.indices[b, e, j]
            key, value = (w_kv[e] @ _rms_norm(context[b, token], context_gamma, e)).reshape(2, heads, d)
            slots.append(j + 1)
            keys.append(key if rotary_emb is None else _rotate(key, rotary_emb[token]))
            values.append(value * kv_routes.scores[b, e, j])
        for i in np.flatnonzero(q_routes.mask[b, e]):
            token = q_routes.indices[b, e, i]
            q = (w_q[e] @ _rms_norm(x[b, token], gamma, e)).reshape(heads, d)
            q = q if rotary_emb is None else _rotate(q, rotary_emb[token])
            attended = np.zeros((heads, d))
            for h in range(heads):
                probabilities = _softmax(np.array([q[h] @ key[h] / np.sqrt(d) for key in keys]))
                if dropout_mask is not None:
                    keep = dropout_mask[b, e, h, i, slots]
                    probabilities = np.where(keep, probabilities / (1.0 - dropout), 0.0)
                attended[h] = sum(p * value[h] for p, value in zip(probabilities, values, strict=True))
            out[b, e, i] = w_out[e] @ attended.reshape(heads * d) * q_routes.scores[b, e, i]
    return out


def local_attention(
    x, window_size, mask=None, causal=False, *, w_qkv, w_out, heads, norm_weight=None, norm_bias=None
) -> np.ndarray:
    """Token i of x (B, N, D) sees valid j with |i - j| <= window_size, if causal also j <= i: (B, N, D).

    w_qkv (3*H*d, D), rows (q-k-v, head, channel); w_out (D, H*d); LayerNorm (D,), none without norm_weight.
    """
    x = _zero_masked(x, mask)
    (batch, n), d = x.shape[:2], w_out.shape[1] // heads
    valid = _valid(mask, (batch, n))
    ahead = 0 if causal else window_size
    frequencies = 10000.0 ** (-2.0 * np.arange(d // 2) / d)
    out = np.zeros(x.shape)
    for b in range(batch):
        q, k, v = np.zeros((3, n, heads, d))
        for i in range(n):
            token = x[b, i]
            if norm_weight is not None:
                token = (token - token.mean()) / np.sqrt(token.var() + 1e-5) * norm_weight
                token = token if norm_bias is None else token + norm_bias
            q[i], k[i], v[i] = (w_qkv @ token).reshape(3, heads, d)
            angles = i * np.concatenate([frequencies, frequencies])
            q[i], k[i] = _rotate(q[i], angles), _rotate(k[i], angles)
        for i in map(int, np.flatnonzero(valid[b])):
            seen = [j for j in range(n) if valid[b, j] and -window_size <= j - i <= ahead]
            attended = [_softmax(k[seen, h] @ q[i, h] / np.sqrt(d)) @ v[seen, h] for h in range(heads)]
            out[b, i] = w_out @ np.concatenate(attended)
    return out


def combine(
    y, q_routes: Routes, n, *, local=None, average_routed=False, null_routed_token=None, mask=None
) -> np.ndarray:
    """Each token's sum or average of the experts' outputs y (B, E, Kq, D) and local (B, N, D): (B, N, D).

    Without local attention a token that no expert chose becomes null_routed_token (D values). Masked: 0.
    """
    batch, dim = y.shape[0], y.shape[-1]
    total = np.zeros((batch, n, dim)) if local is None else np.array(local, np.float64)
    count = np.full((batch, n), 0 if local is None else 1)  # terms in the sum, local among them
    for b, e, i in np.argwhere(q_routes.mask):
        total[b, q_routes.indices[b, e, i]] += y[b, e, i]
        count[b, q_routes.indices[b, e, i]] += 1
    if average_routed:
        total = total / np.maximum(count, 1)[:, :, None]
    if null_routed_token is not None:  # counts are at least 1 with local attention
        total[count == 0] = np.reshape(null_routed_token, dim)
    return _zero_masked(total, mask)


def _valid(mask, shape) -> np.ndarray:
    return np.ones(shape, bool) if mask is None else np.asarray(mask, bool)


def _zero_masked(x, mask) -> np.ndarray:
    """x (B, N, D) with masked tokens 0, so that nothing can depend on their content, NaN included."""
    x = np.asarray(x, np.float64)
    return np.where(_valid(mask, x.shape[:2])[:, :, None], x, 0.0)


def _unit_norm(x) -> np.ndarray:
    return x / np.maximum(np.sqrt((x * x).sum(axis=-1, keepdims=True)), 1e-12)


def _rms_norm(token, gamma, expert) -> np.ndarray:
    """token (D,) at root mean square 1, times the expert's weight; the token itself without gamma (E, D)."""
    return token if gamma is None else _unit_norm(token) * np.sqrt(len(token)) * gamma[expert]


def _rotate(t, angles) -> np.ndarray:
    """Rotary embedding of t (..., d) by angles (d,): channels c and c + d/2 are coordinates of one plane."""
    angles = np.asarray(angles, np.float64)  # the layer takes float32 angles; their cosines are float64 here
    first, second = np.split(t, 2, axis=-1)
    return t * np.cos(angles) + np.concatenate([-second, first], axis=-1) * np.sin(angles)


def _softmax(scores) -> np.ndarray:
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()
