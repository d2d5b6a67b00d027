"""How an operator of torch.library gets its gradient and its batching rule.

Operators are not twice differentiable, nor in forward mode, and say so by an error.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef

_ORDINARY = (Tensor, torch.nn.Parameter)


def refuse_to(name: str, what: str) -> Callable[..., Any]:
    def refuse(ctx: Any, *gradients: Any) -> Any:
        raise RuntimeError(f"{name}: {what} is not supported; reference.MixtureOfAttention supports it")

    return refuse


def fold_rule(call: Callable[..., Any], places: tuple[int, ...], out_places: tuple[int, ...]) -> Callable[..., Any]:
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


def loop_rule(call: Callable[..., Any]) -> Callable[..., Any]:
    """Batching rule of operators with arguments that have no batch dimension: one call for each item of the new one."""

    def rule(info: Any, in_dims: tuple, *args: Any) -> tuple:
        results = []
        for i in range(info.batch_size):
            item = [a if dim is None else a.select(dim, i) for a, dim in zip(args, in_dims)]
            results.append(call(*item))
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        return tuple(torch.stack(parts) for parts in zip(*results)), (0,) * len(results[0])

    return rule


def differentiable(
    op: CustomOpDef,
    setup: Callable[..., None],
    backward: Callable[..., Any],
    places: tuple[int, ...] | None = None,
    out_places: tuple[int, ...] = (),
) -> Callable[..., Any]:
    """Register the gradient of an operator, and let torch.func see it. places: see `fold_rule`; None: `loop_rule`.

    An operator of torch.library refuses torch.func.grad and drops forward-mode tangents without a word. So inside a
    transform, or a forward-mode level, the same formulas go through an autograd.Function, which refuses a tangent.
    Where nobody can see the operator (`is_plain`), its Python function is called, which takes a quarter of the time.
    """
    op.register_autograd(backward, setup_context=setup)
    name = op._opoverload.name()
    refuse_forward_mode = refuse_to(name, "forward-mode differentiation")
    raw = op._init_fn
    defaults = tuple(argument.default_value for argument in op._opoverload._schema.arguments)

    def call(*args: Any) -> Any:
        args += defaults[len(args) :]  # a gradient is due for each
        forward_mode = torch.autograd.forward_ad._current_level >= 0
        if torch.compiler.is_compiling():
            if forward_mode:
                refuse_forward_mode(None)
            return op(*args)
        if forward_mode or torch._C._functorch.maybe_current_level() is not None:
            return function.apply(*args)
        if not is_plain(args):
            return op(*args)
        recorded = torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args)
        return direct.apply(*args) if recorded else raw(*args)

    rule = loop_rule if places is None else functools.partial(fold_rule, places=places, out_places=out_places)
    op.register_vmap(rule(op))
    methods = {
        "forward": lambda *args: op(*args),
        "setup_context": setup,
        "backward": backward,
        "jvp": refuse_forward_mode,
        "vmap": rule(call),
    }
    function = type(name, (torch.autograd.Function,), {key: staticmethod(f) for key, f in methods.items()})

    def compute(ctx: Any, *args: Any) -> Any:
        # Not by setup_context, for which PyTorch inspects the signature at every call.
        output = raw(*args)
        setup(ctx, args, output)
        return output

    methods = {"forward": compute, "backward": backward}
    direct = type(name, (torch.autograd.Function,), {key: staticmethod(f) for key, f in methods.items()})
    call.__doc__ = op.__doc__
    return call


def is_plain(args: tuple) -> bool:
    """Whether a call by the dispatcher would come to the same: no mode that looks on, and ordinary tensors.

    torch.autograd.grad(is_grads_batched=True) batches without a level of torch.func.
    """
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return False
    for a in args:
        if isinstance(a, Tensor) and (type(a) not in _ORDINARY or torch._C._functorch.is_legacy_batchedtensor(a)):
            return False
    return True


def no_setup(ctx: Any, inputs: tuple, output: Any) -> None:
    """Nothing to keep for a backward that only refuses."""
