"""Whether a module is as its class made it, so that its parameters may be used without calling it."""

from __future__ import annotations

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
    return _obstacle(module, cls, nn_module._has_any_global_hook(), bias)


def _obstacle(module: nn.Module | None, cls: type[nn.Module], hooked: bool, bias: bool = False) -> str | None:
    if module is None:
        return None
    if type(module) is not cls:
        return f"is of class {type(module).__name__}, not {cls.__name__}"
    if hooked:
        return "meets a hook of all modules"
    state = module.__dict__
    for name, what in _HOOKS.items():
        if state[name]:
            return f"has {what}"
    if "forward" in state:
        return "has a replaced forward"
    for name, parameter in module._parameters.items():
        if parameter is None:
            continue
        if name == "bias" and not bias:
            return "has a bias"
        if type(parameter) not in _ORDINARY:
            return f"has a {name} of class {type(parameter).__name__}"
    return None


def obstacle_to_fusion(**modules: tuple[nn.Module | None, type[nn.Module]]) -> str | None:
    """The first of the modules, by name and with the class it should be, that is not `plain`, and why; else None."""
    hooked = nn_module._has_any_global_hook()
    for name, (module, cls) in modules.items():
        found = _obstacle(module, cls, hooked)
        if found is not None:
            return f"{name} {found}"
    return None
