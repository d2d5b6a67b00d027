"""Every public stage function and the layer as a function of named tensors; shared by the tests of what any of them
must stand: subsets of gradients, memory layouts, poisoned memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import ModuleType

import torch
from strategies import LayerCase, draw, generator
from torch import Tensor
from torch.func import functional_call

B, N, M, DIM, EXPERTS, HEADS, DIM_HEAD, K_Q, K_KV = 2, 7, 6, 6, 2, 2, 4, 3, 2
SOFT = {"straight_through": False, "cosine_sim_routing": True, "eps": 0.3}  # every score below 1 has a gradient


@dataclass
class Stage:
    """call(package, tensors): the floating point result. unread: where nothing reads a tensor, True by element."""

    call: Callable[[ModuleType, dict[str, Tensor]], Tensor]
    tensors: dict[str, Tensor]
    leaves: tuple[str, ...] = ()
    unread: dict[str, Tensor] = field(default_factory=dict)
    hidden: Tensor | None = None  # of the result: where the cotangent is not read

    def run(
        self, package: ModuleType, tensors: dict[str, Tensor], wanted: tuple[str, ...], g: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor | None]]:
        """Result, and the gradients of the wanted leaves alone (cotangent g, else as `cotangent`)."""
        given = {name: t.detach().requires_grad_(name in wanted) for name, t in tensors.items()}
        out = self.call(package, given)
        assert out.requires_grad == bool(wanted)
        if not wanted:
            return out, {}
        g = cotangent_of(out) if g is None else g
        found = torch.autograd.grad(out, [given[name] for name in wanted], g, allow_unused=True)
        return out.detach(), dict(zip(wanted, found))


def cotangent_of(out: Tensor) -> Tensor:
    return draw(tuple(out.shape), "normal", 99).to(out.dtype).to(out.device)


def _masks() -> tuple[Tensor, Tensor]:
    """Of x (B, N) and of a context (B, M): more valid tokens than slots."""
    mask, other = torch.ones(B, N, dtype=torch.bool), torch.ones(B, M, dtype=torch.bool)
    mask[0, 2] = mask[1, -3:] = other[0, -2:] = other[1, 0] = False
    return mask, other


def _decisions() -> dict[str, Tensor]:
    g = generator(5)
    found = {}
    for side, k, size in (("q", K_Q, N), ("kv", K_KV, M)):
        found[f"{side}_indices"] = torch.rand(B, EXPERTS, size, generator=g).argsort(-1)[..., :k]
        slots = torch.rand(B, EXPERTS, k, generator=g) < 0.7
        slots[..., 0] = True
        found[f"{side}_slots"] = slots
    return found


def _floats(dtype: torch.dtype, **shapes: tuple[int, ...]) -> dict[str, Tensor]:
    return {name: draw(shape, "normal", i).to(dtype) for i, (name, shape) in enumerate(shapes.items())}


def _routes(package: ModuleType, t: dict[str, Tensor], side: str, size: int) -> tuple:
    logits = torch.zeros(*t[f"{side}_indices"].shape[:2], size, device=t[f"{side}_indices"].device)
    return package.Routes(t[f"{side}_indices"], t[f"{side}_slots"], t[f"{side}_scores"], logits)


def _route(dtype: torch.dtype) -> Stage:
    mask, _ = _masks()
    tensors = _floats(dtype, x=(B, N, DIM), tokens=(EXPERTS, DIM)) | {"mask": mask}
    return Stage(
        lambda p, t: p.route(t["x"], t["tokens"], K_Q, t["mask"], **SOFT).scores,
        tensors,
        ("x", "tokens"),
        {"x": ~mask[..., None].expand(-1, -1, DIM)},
    )


def _solver(name: str, **options: float) -> Callable[[torch.dtype], Stage]:
    def build(dtype: torch.dtype) -> Stage:
        mask, _ = _masks()
        hidden = ~mask[:, None].expand(-1, EXPERTS, -1)
        return Stage(
            lambda p, t: getattr(p, name)(t["logits"], 2.5, t["mask"], **options),
            _floats(dtype, logits=(B, EXPERTS, N)) | {"mask": mask},
            ("logits",),
            {"logits": hidden},
            hidden,
        )

    return build


def _routed_attention(dtype: torch.dtype) -> Stage:
    inner, wide, d = HEADS * DIM_HEAD, torch.promote_types(dtype, torch.float32), _decisions()
    tensors = _floats(
        dtype,
        x=(B, N, DIM),
        context=(B, M, DIM),
        w_q=(EXPERTS, inner, DIM),
        w_kv=(EXPERTS, 2 * inner, DIM),
        w_out=(EXPERTS, DIM, inner),
        null_kv=(2, EXPERTS, HEADS, DIM_HEAD),
        gamma=(EXPERTS, DIM),
        context_gamma=(EXPERTS, DIM),
    )
    scores = _floats(wide, q_scores=(B, EXPERTS, K_Q), kv_scores=(B, EXPERTS, K_KV))
    weights = ("w_q", "w_kv", "w_out", "null_kv", "gamma", "context_gamma")
    unread = {}
    for name, side in (("x", "q"), ("context", "kv")):
        held = torch.zeros(tensors[name].shape[:2], dtype=torch.bool)
        for b in range(B):
            held[b, d[f"{side}_indices"][b][d[f"{side}_slots"][b]]] = True
        unread[name] = ~held[..., None].expand(-1, -1, DIM)

    def call(p: ModuleType, t: dict[str, Tensor]) -> Tensor:
        q, kv = _routes(p, t, "q", N), _routes(p, t, "kv", M)
        return p.routed_attention(t["x"], t["context"], q, kv, **{name: t[name] for name in weights})

    hidden = ~d["q_slots"][..., None].expand(-1, -1, -1, DIM)
    return Stage(call, tensors | scores | d, (*tensors, *scores), unread, hidden)


def _local_attention(dtype: torch.dtype) -> Stage:
    inner, (mask, _) = HEADS * DIM_HEAD, _masks()
    tensors = _floats(
        dtype, x=(B, N, DIM), w_qkv=(3 * inner, DIM), w_out=(DIM, inner), norm_weight=(DIM,), norm_bias=(DIM,)
    )

    def call(p: ModuleType, t: dict[str, Tensor]) -> Tensor:
        weights = {name: t[name] for name in tensors if name != "x"}
        return p.local_attention(t["x"], 2, t["mask"], heads=HEADS, **weights)

    unread = ~mask[..., None].expand(-1, -1, DIM)
    return Stage(call, tensors | {"mask": mask}, tuple(tensors), {"x": unread}, unread)


def _combine(local: bool) -> Callable[[torch.dtype], Stage]:
    def build(dtype: torch.dtype) -> Stage:
        mask, _ = _masks()
        routing = {name: t for name, t in _decisions().items() if name.startswith("q_")}
        tensors = _floats(dtype, y=(B, EXPERTS, K_Q, DIM), local=(B, N, DIM), null=(DIM,))
        tensors.pop("null" if local else "local")
        scores = torch.ones(B, EXPERTS, K_Q)

        def call(p: ModuleType, t: dict[str, Tensor]) -> Tensor:
            routes = _routes(p, t | {"q_scores": scores.to(t["y"].device)}, "q", N)
            return p.combine(
                t["y"],
                routes,
                N,
                local=t.get("local"),
                null_routed_token=t.get("null"),
                average_routed=True,
                mask=t["mask"],
            )

        hidden = ~mask[..., None].expand(-1, -1, DIM)
        unread = {"y": ~routing["q_slots"][..., None].expand(-1, -1, -1, DIM)} | ({"local": hidden} if local else {})
        return Stage(call, tensors | routing | {"mask": mask}, tuple(tensors), unread, hidden)

    return build


BASE = LayerCase(
    n=N, dim=DIM, heads=HEADS, dim_head=DIM_HEAD, k_q=K_Q, k_kv=K_KV, experts=EXPERTS, options=SOFT, values="normal"
)
LAYERS: dict[str, dict[str, object]] = {
    "layer": {},
    "layer_rotary": {"rotary": True, "average": True, "options": {**SOFT, "solver": "exact"}},
    "layer_local": {"window": 2},
    "layer_cross": {"context": M},
}


def layer_stage(**changes: object) -> Callable[[torch.dtype], Stage]:
    case = replace(BASE, **changes)

    def build(dtype: torch.dtype) -> Stage:
        mask, other = _masks()
        inputs = {name: t if name == "rotary_emb" else t.to(dtype) for name, t in case.inputs().items()}
        hidden = ~mask[..., None].expand(-1, -1, DIM)
        unread = {"x": hidden}
        masks = {"mask": mask}
        if case.context is not None:
            masks["context_mask"] = other
            unread["context"] = ~other[..., None].expand(-1, -1, DIM)
        state = {name: t.to(dtype) for name, t in case.state().items()}

        def call(p: ModuleType, t: dict[str, Tensor]) -> Tensor:
            layer = p.MixtureOfAttention(**case.arguments(), device="meta", dtype=dtype).eval()
            given = {name: t[name] for name in (*inputs, *masks)}
            return functional_call(layer, {name: t[name] for name in state}, (), given)

        leaves = (*(name for name in inputs if name != "rotary_emb"), *state)
        return Stage(call, inputs | masks | state, leaves, unread, hidden)

    return build


STAGES: dict[str, Callable[[torch.dtype], Stage]] = {
    "route": _route,
    "coordinate_descent": _solver("coordinate_descent", n_iters=6, eps=0.3),
    "capped_simplex": _solver("capped_simplex", eps=0.3),
    "routed_attention": _routed_attention,
    "local_attention": _local_attention,
    "combine": _combine(local=False),
    "combine_local": _combine(local=True),
    **{name: layer_stage(**changes) for name, changes in LAYERS.items()},
}


def stage(name: str, dtype: torch.dtype, device: torch.device) -> Stage:
    made = STAGES[name](dtype)
    made.tensors = {key: t.to(device).contiguous() for key, t in made.tensors.items()}
    made.unread = {key: t.to(device) for key, t in made.unread.items()}
    made.hidden = None if made.hidden is None else made.hidden.to(device)
    return made
