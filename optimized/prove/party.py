"""An implementation in a dtype: its stages one by one, with decisions handed to it."""

from __future__ import annotations

import contextlib
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

import reference
from optimized.prove.nudged import Nudged
from optimized.prove.setup import Setup
from optimized.prove.text import MIN_TOKENS
from reference.routing import routing_logits


class Decision(NamedTuple):
    """Of one router: the picked tokens (1, E, K), and which tokens saturate at each step of the solver (T, 1, E, N)."""

    indices: Tensor
    mask: Tensor
    saturated: Tensor


class Party:
    """An implementation in a dtype, on data rounded to the dtype under test.

    rounding: nudges what is given, as little as rounding in float32 does, and what is computed while it is entered.
    """

    def __init__(
        self,
        package: ModuleType,
        dtype: torch.dtype,
        under_test: torch.dtype,
        setup: Setup,
        rounding: Nudged | None = None,
    ) -> None:
        def cast(t: Tensor) -> Tensor:
            t = t.to(under_test).to(setup.device, dtype)
            return t if rounding is None else rounding.nudge(t, rounding.wide)

        self.cast = cast
        self.rounding = rounding
        self.package = package
        self.layer = package.MixtureOfAttention(**setup.arguments, device=setup.device, dtype=dtype)
        self.layer.load_state_dict({name: cast(t) for name, t in setup.state.items()})
        self.x = cast(setup.x).requires_grad_()
        self.cotangent = cast(setup.cotangent)
        self.routers = (self.layer.query_router, self.layer.key_value_router)
        self.slots = self.layer.config.num_routed_queries
        options = self.layer.query_router.options
        self.mass = min(self.slots * options.fetch_k_ratio, self.x.shape[1])
        self.solver = {name: getattr(options, name) for name in ("n_iters", "eps", "eps_init", "eps_decay")}

    def route(self) -> list[Any]:
        with self.widely():
            return [router(self.x, self.slots) for router in self.routers]

    def widely(self) -> contextlib.AbstractContextManager[None]:
        """Routers compute in at least float32."""
        return contextlib.nullcontext() if self.rounding is None else self.rounding.widely()

    def soft_scores(self, routes: list[Any]) -> list[Tensor]:
        return [self.package.coordinate_descent(r.logits, self.mass, **self.solver) for r in routes]

    def fixed(self, decision: Decision) -> Any:
        """Routes with these tokens, score 1 and no gradient."""
        wide = torch.promote_types(self.x.dtype, torch.float32)
        scores = decision.mask.to(wide)
        return self.package.Routes(
            decision.indices, decision.mask, scores, scores.new_zeros(decision.saturated[0].shape)
        )

    def replayed(self, router: Any, decision: Decision) -> Any:
        """The reference's routes with these decisions handed over; the scores carry the graph to the router."""
        with self.widely():
            logits = routing_logits(self.x, router.routing_token, router.options)
        soft = reference.coordinate_descent(logits, self.mass, saturated=decision.saturated, **self.solver)
        soft = soft.gather(-1, decision.indices)
        return reference.Routes(decision.indices, decision.mask, 1 + (soft - soft.detach()), logits)

    def routed_attention(self, decisions: list[Decision]) -> Tensor:
        attn, experts = self.layer.attn, self.layer.config.num_experts
        per_expert = {
            name: layer.weight.squeeze(-1).unflatten(0, (experts, -1))
            for name, layer in (("w_q", attn.to_q), ("w_kv", attn.to_kv), ("w_out", attn.to_out))
        }
        return self.package.routed_attention(
            self.x,
            self.x,
            *map(self.fixed, decisions),
            **per_expert,
            null_kv=attn.null_kv.squeeze(3),
            gamma=attn.norm.gamma.squeeze(-1),
            context_gamma=attn.context_norm.gamma.squeeze(-1),
        )

    def local_attention(self) -> Tensor:
        local = self.layer.local_attn
        return self.package.local_attention(
            self.x,
            local.window_size,
            w_qkv=local.to_qkv.weight,
            w_out=local.to_out.weight,
            heads=self.layer.config.heads,
            norm_weight=local.norm.weight,
            norm_bias=local.norm.bias,
        )

    def combine(self, y: Tensor, local: Tensor, decision: Decision) -> Tensor:
        return self.package.combine(self.cast(y), self.fixed(decision), self.x.shape[1], local=self.cast(local))

    def forward(self, decisions: list[Decision] | None = None) -> Tensor:
        """With its own routers, or with decisions handed over."""
        if decisions is None:
            return self.layer(self.x)
        return self.layer(self.x, routes=tuple(map(self.replayed, self.routers, decisions)))

    def warm_up(self) -> None:
        """A short run, so that nothing measured later has to load code."""
        slots = MIN_TOKENS // 4
        x = self.x[:, :MIN_TOKENS]
        self.layer(x, num_routed_queries=slots, num_routed_key_values=slots).sum().backward()
        self.layer.zero_grad()
        self.x.grad = None

    def backward(self, decisions: list[Decision] | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Output, and gradients of x and all parameters."""
        leaves = {"x": self.x, **dict(self.layer.named_parameters())}
        out = self.forward(decisions)
        return out.detach(), dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), self.cotangent)))
