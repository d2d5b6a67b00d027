"""The strictly causal Mixture of Attention in NumPy float64: the definition, token by token.

Causal by construction: a token's output is computed by a function that is given the sequence up to this token and
nothing after it, and computes everything anew. Slow, so for tiny sizes; it does not check its arguments and expects
finite or NaN inputs. Reading order: from top to bottom.

Only valid tokens count: p = 0, 1, ... numbers them, and blocks, windows and rotary angles go by p. Block j is
p = jW ... jW + W - 1. Its queries see a memory chosen from all blocks before it, and are themselves chosen by a
threshold set by the block just before it. Nobody is routed in block 0.
Letters: B batch, N tokens, D dim, E experts, H heads, d dim_head, W routed window, w local window, Kq queries to
route per block, K tokens in memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from reference.oracle import _rms_norm, _rotate, _softmax, _unit_norm


class Decision(NamedTuple):
    """What an expert decided for one token."""

    candidate: bool  # its query logit reaches the threshold
    routed: bool  # it is a candidate and found a slot
    query_score: float  # 0 if not routed
    memory: list[int]  # positions p of the keys that tokens of its block see, ascending
    memory_scores: list[float]
    query_logit: float
    key_value_logit: float


class Options(NamedTuple):
    """Options of both routers."""

    solver: str = "sigmoid"  # or "iterative", "exact"
    straight_through: bool = False
    cosine_sim_routing: bool = True
    cosine_sim_scale: float = 8.0
    n_iters: int = 20
    fetch_k_ratio: float = 9 / 8
    eps: float = 0.03
    eps_init: float = 4.0
    eps_decay: float = 0.7


def mixture_of_autoregressive_attention(
    x: np.ndarray, parameters: Mapping[str, np.ndarray], *, num_routed_queries: int, num_routed_key_values: int,
    heads: int, local_attn_window_size: int, routed_window_size: int | None = None,
    local_attn_heads: int | None = None, mask: np.ndarray | None = None, rotary_emb: np.ndarray | None = None,
    capacity_factor: float = 2.0, average_routed: bool = False, router_options: Mapping[str, Any] | None = None,
) -> tuple[np.ndarray, list[list[list[Decision]]]]:  # fmt: skip
    """The layer in evaluation mode: x (B, N, D) to (B, N, D), and decisions[item][p][expert].

    `parameters` is the state dict; pre-normalisation happens if it has its parameters. mask (B, N) is False for
    tokens that are left out, whose output is 0; row p of rotary_emb (P, d) has the angles of valid token p.
    """
    x = np.asarray(x, np.float64)
    valid = np.ones(x.shape[:2], bool) if mask is None else np.asarray(mask, bool)
    p = {name: np.asarray(value, np.float64) for name, value in parameters.items()}
    window = local_attn_window_size if routed_window_size is None else routed_window_size
    options = Options(**(router_options or {}))
    out = np.zeros(x.shape)
    decisions: list[list[list[Decision]]] = []
    for b in range(len(x)):
        places = np.flatnonzero(valid[b])
        decisions.append([])
        for t, place in enumerate(places):
            out[b, place], experts = newest_token(
                x[b, places[: t + 1]], p, kq=num_routed_queries, k=num_routed_key_values, heads=heads, window=window,
                local_heads=heads if local_attn_heads is None else local_attn_heads,
                local_window=local_attn_window_size, rotary_emb=rotary_emb, capacity_factor=capacity_factor,
                average_routed=average_routed, options=options,
            )  # fmt: skip
            decisions[b].append(experts)
    return out, decisions


def newest_token(
    x, p, *, kq, k, heads, window, local_heads, local_window, rotary_emb, capacity_factor, average_routed, options
) -> tuple[np.ndarray, list[Decision]]:  # fmt: skip
    """Output (D,) of the last token of x (t + 1, D), and each expert's decision about it."""
    decisions = []
    total = local_attention(x, p, heads=local_heads, window=local_window)
    for e, null_token in enumerate(p["null_tokens"]):
        query_logits = logits(x, p["query_router.routing_token"][e], options)
        key_value_logits = logits(x, p["key_value_router.routing_token"][e], options)
        decision = decide(query_logits, key_value_logits, window=window, kq=kq, k=k,
                          capacity_factor=capacity_factor, options=options)  # fmt: skip
        decisions.append(decision)
        if decision.routed:
            total += decision.query_score * routed_attention(x, p, e, decision, heads=heads, rotary_emb=rotary_emb)
        elif len(x) > window:  # not in block 0, where the experts have no say
            total += null_token
    if average_routed and len(x) > window:
        total = total / (len(decisions) + 1)
    return total, decisions


def logits(x, routing_token, options) -> np.ndarray:
    """<x[p], routing_token>, (t + 1,): summed row by row, so that equal tokens tie whatever their number."""
    if options.cosine_sim_routing:
        x, routing_token = _unit_norm(x), _unit_norm(routing_token) * options.cosine_sim_scale
    return np.array([(token * routing_token).sum() for token in x])


def decide(query_logits, key_value_logits, *, window, kq, k, capacity_factor, options) -> Decision:
    """One expert's decision about the last token, from the logits (t + 1,) of all tokens so far."""
    own_logits = float(query_logits[-1]), float(key_value_logits[-1])
    start = (len(query_logits) - 1) // window * window  # of the last token's block
    if start == 0:
        return Decision(False, False, 0.0, [], [], *own_logits)

    previous, block = query_logits[start - window : start], query_logits[start:]  # block ends with the last token
    if kq >= window:
        slots, candidates = window, np.ones(len(block), bool)  # NaN too
    else:
        numbers = np.sort(previous[~np.isnan(previous)])
        threshold = numbers[-kq] if len(numbers) >= kq else np.nan  # no logit reaches NaN
        slots, candidates = min(window, math.ceil(capacity_factor * kq)), block >= threshold
    candidate = bool(candidates[-1])
    routed = candidate and int(candidates.sum()) <= slots  # first come, first served
    query_score = float(scores(query_logits[-1:], previous, kq, options)[0]) if routed else 0.0

    memory = remember(key_value_logits[:start], k)
    memory_scores = scores(key_value_logits[memory], key_value_logits[:start], k, options).tolist()
    return Decision(candidate, routed, query_score, memory, memory_scores, *own_logits)


def remember(past, k) -> list[int]:
    """The k best positions by logits `past`, ascending: numbers before NaN, larger logit, later position."""

    def rank(i: int) -> tuple[bool, float, int]:
        nan = bool(np.isnan(past[i]))
        return nan, 0.0 if nan else -float(past[i]), -i  # -0.0 ties with 0.0

    return sorted(sorted(range(len(past)), key=rank)[:k])


def scores(chosen, row, k, options) -> np.ndarray:
    """Scores of logits `chosen`: of themselves (sigmoid), or by the dual of a soft top-k of the logits `row`.

    The row of memory scores is all that the memory was chosen from; that of query scores is the previous block. If
    it has no more than k logits there was no choice. With a NaN in it the dual is NaN.
    """
    if options.solver == "sigmoid":
        soft = np.exp(np.minimum(chosen, 0.0)) / (1.0 + np.exp(-np.abs(chosen)))  # no overflow
    elif len(row) <= k:
        soft = np.ones(len(chosen))
    elif np.isnan(row).any():
        soft = np.full(len(chosen), np.nan)
    else:
        mass = min(k * options.fetch_k_ratio, len(row))
        a, eps = exact_dual(row, mass, options) if options.solver == "exact" else iterative_dual(row, mass, options)
        soft = np.exp(np.minimum(chosen + a, 0.0) / eps)
    return np.where(np.isnan(soft), np.nan, 1.0) if options.straight_through else soft


def iterative_dual(s, mass, options) -> tuple[float, float]:
    """The last dual a, and eps one decay beyond its step, of coordinate descent for a soft top-k of s (n,).

    The dual of the constraints lambda <= 1 is eliminated: its best value makes s + b = min(s, -a).
    """
    a = 0.0
    for t in range(options.n_iters):
        u = np.minimum(s, -a) if t > 0 else np.zeros(len(s))
        eps = max(options.eps_init * options.eps_decay**t, options.eps)
        a = float(eps * (np.log(mass) - np.logaddexp.reduce(u / eps)))
    return a, max(options.eps_init * options.eps_decay**options.n_iters, options.eps)


def exact_dual(s, mass, options) -> tuple[float, float]:
    """The a with sum(min(1, exp((s + a) / eps))) = mass, infinite if the mass is all of len(s); and eps.

    The `full` largest logits have lambda = 1, and the rest share what mass is left in proportion to their weights.
    It is the first such division in which the largest of the rest does not exceed 1.
    """
    s = np.sort(s)[::-1]
    if mass < len(s):
        for full in range(len(s)):
            weight = np.exp((s[full:] - s[full]) / options.eps).sum()  # at least 1: of the largest of the rest
            if mass - full <= weight:
                return float(options.eps * np.log((mass - full) / weight) - s[full]), options.eps
    return np.inf, options.eps


def routed_attention(x, p, e, decision, *, heads, rotary_emb) -> np.ndarray:
    """Attention of the last token to the memory and a learned null key, by expert e, before its score: (D,)."""
    null_kv, t = p["attn.null_kv"][:, e, :, 0], len(x) - 1
    dim, d = x.shape[1], null_kv.shape[-1]
    w_q = p["attn.to_q.weight"].reshape(-1, heads * d, dim)[e]  # rows (head, channel)
    w_kv = p["attn.to_kv.weight"].reshape(-1, 2 * heads * d, dim)[e]  # rows (k-then-v, head, channel)
    w_out = p["attn.to_out.weight"].reshape(-1, dim, heads * d)[e]
    gamma, context_gamma = (p[n][:, :, 0] if n in p else None for n in ("attn.norm.gamma", "attn.context_norm.gamma"))
    q = (w_q @ _rms_norm(x[t], gamma, e)).reshape(heads, d)
    q = q if rotary_emb is None else _rotate(q, rotary_emb[t])
    keys, values = [null_kv[0]], [null_kv[1]]  # null: no position, no score
    for i, score in zip(decision.memory, decision.memory_scores, strict=True):
        key, value = (w_kv @ _rms_norm(x[i], context_gamma, e)).reshape(2, heads, d)
        keys.append(key if rotary_emb is None else _rotate(key, rotary_emb[i]))
        values.append(value * score)
    return w_out @ attend(q, np.array(keys), np.array(values))


def local_attention(x, p, *, heads, window) -> np.ndarray:
    """Attention of the last token to itself and the `window` tokens before it: (D,)."""
    w_qkv, w_out = p["local_attn.to_qkv.weight"], p["local_attn.to_out.weight"]  # rows (q-k-v, head, channel)
    d, t = w_out.shape[1] // heads, len(x) - 1
    frequencies = 10000.0 ** (-2.0 * np.arange(d // 2) / d)
    keys, values = [], []
    for i in range(max(t - window, 0), t + 1):
        token = x[i]
        if "local_attn.norm.weight" in p:
            token = (token - token.mean()) / np.sqrt(token.var() + 1e-5)
            token = token * p["local_attn.norm.weight"] + p["local_attn.norm.bias"]
        q, k, v = (w_qkv @ token).reshape(3, heads, d)
        angles = i * np.concatenate([frequencies, frequencies])
        q = _rotate(q, angles)  # the last one is the last token's
        keys.append(_rotate(k, angles))
        values.append(v)
    return w_out @ attend(q, np.array(keys), np.array(values))


def attend(q, keys, values) -> np.ndarray:
    """Softmax attention of one query (H, d) to keys and values (n, H, d), heads side by side: (H * d,)."""
    d = q.shape[-1]
    return np.concatenate([_softmax(keys[:, h] @ q[h] / np.sqrt(d)) @ values[:, h] for h in range(len(q))])
