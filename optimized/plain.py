"""Whether a module is as its class made it, so that its parameters may be used without calling it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn.modules import module as nn_module

_ORDINARY = (Tensor, nn.Parameter, FakeTensor, FunctionalTensor)  # the last two stand for ordinary ones in tracing
_HOOKS = {
    "_forward_pre_hooks": "a forward pre-hook",
    "_forward_hooks": "a forward hook",
    "_backward_pre_hooks": "a backward pre-hook",
    "_backward_hooks": "a backward hook",
}


def plain(module: nn.Module | None, cls: type[nn.Module], bias: bool = False) -> str | None:
    """None where calling the module comes to what `cls` computes of its parameters, else in words why not.

    Asked of it: the exact class (a parametrization makes another), no hooks, its own or global, its own `forward`, no
    bias unless it may have one, and ordinary tensors as parameters. No module at all is plain.
    """
    found = _first({"": (module, cls)}, bias)
    return None if found is None else found[1]


def obstacle_to_fusion(**modules: tuple[nn.Module | None, type[nn.Module]]) -> str | None:
    """The first of the modules, by name and with the class it should be, that is not `plain`, and why; else None."""
    found = _first(modules, False)
    return None if found is None else " ".join(found)


def attached(module: nn.Module | None, cls: type[nn.Module]) -> str | None:
    """As `plain`, whatever the class of the parameters."""
    if module is None:
        return None
    if cls is not type(module):
        return f"is of class {type(module).__name__}"
    if nn_module._has_any_global_hook():
        return "meets a hook of all modules"
    state = module.__dict__
    if state["_parameters"].get("bias") is not None:
        return "has a bias"
    found = [what for name, what in _HOOKS.items() if state[name]] + ["a replaced forward"] * ("forward" in state)
    return f"has {found[0]}" if found else None


def _first(modules: dict[str, tuple[nn.Module | None, type[nn.Module]]], bias: bool) -> tuple[str, str] | None:
    """Name and obstacle. In one loop without a call, since every call of the layer asks."""
    hooked = nn_module._has_any_global_hook()
    for module_name, (module, cls) in modules.items():
        if module is None:
            continue
        if type(module) is not cls:
            return module_name, f"is of class {type(module).__name__}, not {cls.__name__}"
        if hooked:
            return module_name, "meets a hook of all modules"
        state = module.__dict__
        for name in _HOOKS:
            if state[name]:
                return module_name, f"has {_HOOKS[name]}"
        if "forward" in state:
            return module_name, "has a replaced forward"
        for name, parameter in state["_parameters"].items():
            if parameter is None:
                continue
            if name == "bias" and not bias:
                return module_name, "has a bias"
            if type(parameter) not in _ORDINARY:
                return module_name, f"has a {name} of class {type(parameter).__name__}"
    return None


# What nn.Module keeps, read where it lies: its own look-up is a function that Python calls when all else has failed.


def child(module: nn.Module, name: str) -> Any:
    """`module.name`, a module or None."""
    return module._modules.get(name)


def parameter(module: nn.Module, name: str) -> Any:
    """`module.name` of a module that is plain."""
    found = module._parameters.get(name)
    return getattr(module, name) if found is None else found
