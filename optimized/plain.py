"""Whether a module is as its class made it, so that its parameters may be used without calling it."""

from __future__ import annotations

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn.modules import module as nn_module

# Those of tracing stand for ordinary ones.
_ORDINARY = (Tensor, nn.Parameter, FakeTensor, FunctionalTensor)
_HOOKS = {
    "_forward_pre_hooks": "a forward pre-hook",
    "_forward_hooks": "a forward hook",
    "_backward_pre_hooks": "a backward pre-hook",
    "_backward_hooks": "a backward hook",
}


def plain(module: nn.Module | None, cls: type[nn.Module]) -> str | None:
    """None where calling the module comes to what `cls` says of its parameters, else in words why not.

    So it is with no module at all. Otherwise: the exact class (a parametrization is another), no hooks, its own or
    global, its own `forward`, and parameters that are those of a fresh module, in ordinary tensors.
    """
    if module is None:
        return None
    if type(module) is not cls:
        return f"is {_article(type(module).__name__)}, not {_article(cls.__name__)}"
    if nn_module._has_any_global_hook():
        return "a hook is registered for all modules"
    own = vars(module)
    for name, what in _HOOKS.items():
        if own[name]:
            return f"has {what}"
    if "forward" in own:
        return "has a replaced forward"
    parameters = own["_parameters"]
    if parameters.get("bias") is not None and "bias" not in _WITH_BIAS.get(cls, ()):
        return "has a bias"
    for name, parameter in parameters.items():
        if parameter is not None and type(parameter) not in _ORDINARY:
            return f"its {name} is {_article(type(parameter).__name__)}"
    return None


def obstacle_to_fusion(**modules: tuple[nn.Module | None, type[nn.Module]]) -> str | None:
    """Of modules by name, each with the class it should be: the first obstacle in words, or None."""
    for name, (module, cls) in modules.items():
        found = plain(module, cls)
        if found is not None:
            return f"{name} {found}"
    return None


def _article(name: str) -> str:
    return f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"
