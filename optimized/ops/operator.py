"""One declaration makes an operator: schema, fake, gradient, batching rule, FLOPs, and its way past the dispatcher.

An operator is a class of plain functions. They take the arguments as one namespace, by the names of the schema:

    @operator(
        "(Tensor x, Tensor w, float scale) -> (Tensor y, Tensor norms)",
        wrt="x w",             # arguments that have gradients
        gradients_of="y",      # results that pass one on; the others are not differentiable
        saves="x w norms",     # arguments and results that the backward reads
    )
    class project:
        def forward(a): ...             # the results, in the order of the schema
        def fake(a): ...                # the same of empty tensors; sizes may be SymInt
        def backward(a, g, needs): ...  # {"x": dx, "w": dw}; a: what was saved; g: gradients of results, or None
        def flops(a, out): ...          # of matrix products; optional, as is backward_flops(a, out)

`needs.x` says whether anybody asks for the gradient of x: what nobody asks for is not computed. The result is called as
`project(x, w, scale)`, by position or name; `project.raw` is the body alone, for operators that contain it, and
`project.backward` the operator of the gradient. Both are in torch.ops.moa, the latter as project_backward.

Operators are not twice differentiable, nor in forward mode, and say so by an error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import itemgetter
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from optimized.ops import flops

_ORDINARY = (Tensor, torch.nn.Parameter)
_ERROR, _SAME = "error", "same"


OPERATORS: dict[str, Operator] = {}  # all of them by name, those of gradients too


class Arguments(SimpleNamespace):
    """Arguments and results of an operator by name."""


def is_plain(args: Sequence[Any]) -> bool:
    """Whether a call by the dispatcher would come to the same: no mode that looks on, and ordinary tensors with data.

    torch.autograd.grad(is_grads_batched=True) batches without a level of torch.func.
    """
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return False
    for a in args:
        if isinstance(a, Tensor) and (
            type(a) not in _ORDINARY or a.is_meta or torch._C._functorch.is_legacy_batchedtensor(a)
        ):
            return False
    return True


class Operator:
    """A registered operator; see the top of this file.

    folds: for the batching rule, the place of the batch dimension in tensors, by name, where every tensor has one: the
    new dimension is folded into it. Without, the rule is one call for each item. draws: the argument that is a
    probability of dropout. alike: arguments of `wrt` that are not saved, and what is saved of their shape and dtype.
    """

    def __init__(
        self,
        body: Any,
        name: str,
        schema: str,
        *,
        wrt: str = "",
        gradients_of: str = "",
        saves: str = "",
        folds: dict[str, int] | None = None,
        draws: str = "",
        alike: dict[str, str] | None = None,
    ) -> None:
        parsed = torch._C.parse_schema(f"moa::{name}{schema}")
        self.name, self.__doc__ = name, body.__doc__
        self.names = tuple(argument.name for argument in parsed.arguments)
        self.results = tuple(result.name for result in parsed.returns)
        self._defaults = {a.name: a.default_value for a in parsed.arguments if a.has_default_value()}
        self._body, self._folds, self._draws = body, folds, draws
        self.wrt, self.gradients_of, self.saves = wrt.split(), gradients_of.split(), saves.split()
        self.alike = {name: name for name in self.wrt} | (alike or {})
        arguments = schema.rpartition("->")[0].strip()
        # As written: a parsed schema tells SymInt from int no more.
        types = {n: part.split()[0] for n, part in zip(self.names, arguments[1:-1].split(","))}
        self.constants = [n for n in self.names if not types[n].startswith("Tensor")]
        there = (*self.names, *self.results)
        self._wrt_places = [there.index(name) for name in self.wrt]
        self._saved = _picker(there, self.saves)
        self._kept = _picker(there, self.constants)
        self._passing = _picker(self.results, self.gradients_of)
        self._stopping = _picker(self.results, [name for name in self.results if name not in self.gradients_of])
        self._asked = _picker(self.names, self.wrt)
        unnamed = ", ".join("Tensor" for _ in self.results)
        single = len(self.results) == 1 and not schema.rpartition("->")[2].strip().startswith("(")
        self.op = custom_op(
            f"moa::{name}",
            self.raw,
            mutates_args=(),
            schema=f"{arguments} -> {unnamed if single else f'({unnamed})'}",
            tags=(torch.Tag.nondeterministic_seeded,) if draws else (),
        )
        self.op.register_fake(lambda *args: body.fake(self._bind(args)))
        self.backward: Operator | None = None
        if self.wrt:
            self.backward = self._make_backward(types)
        self._register_gradient()
        self.op.register_vmap(self._rule(self.op))
        self._count_flops()
        OPERATORS[name] = self

    # --- calls -------------------------------------------------------------------------------------------------------

    def __call__(self, *args: Any, **named: Any) -> Any:
        args = self._positional(args, named)
        forward_mode = torch.autograd.forward_ad._current_level >= 0
        if torch.compiler.is_compiling():
            if forward_mode:
                self._refuse("forward-mode differentiation")
            return self.op(*args)
        transformed = torch._C._functorch.maybe_current_level() is not None
        if transformed and self._draws and args[self.names.index(self._draws)]:
            args = _as_randomness_says(self.name, args)
        if forward_mode or transformed:
            return self._function.apply(*args)
        if not is_plain(args):
            return self.op(*args)
        if torch.is_grad_enabled():
            for a in args:
                if isinstance(a, Tensor) and a.requires_grad:
                    return self._direct.apply(*args)
        return self._run(args)

    def raw(self, *args: Any, **named: Any) -> Any:
        """The computation alone, for operators that contain it; in the dtypes that it is given, under autocast too."""
        return self._run(self._positional(args, named))

    def _run(self, args: tuple) -> Any:
        bound = self._bind(args)
        if not torch._C._is_any_autocast_enabled():
            return self._body.forward(bound)
        with torch._C._DisableAutocast():
            return self._body.forward(bound)

    # Each call binds names once in either direction, on the host, which may be what a GPU waits for: no dict is built
    # to be thrown away, and places are looked up once for all calls.

    def _positional(self, args: tuple, named: dict[str, Any]) -> tuple:
        if len(args) == len(self.names):
            return args
        given = {**self._defaults, **named}
        return (*args, *(given[name] for name in self.names[len(args) :]))

    def _bind(self, args: Sequence[Any]) -> Arguments:
        bound = Arguments()
        bound.__dict__.update(zip(self.names, args))
        return bound

    # --- gradient ----------------------------------------------------------------------------------------------------

    def _make_backward(self, types: dict[str, str]) -> Operator:
        """Its arguments: gradients of results, saved tensors, constants, and one bit for each gradient wanted."""
        arguments = [f"Tensor? d_{name}" for name in self.gradients_of]
        arguments += [f"{types.get(name, 'Tensor')} {name}" for name in (*self.saves, *self.constants)]
        returns = ", ".join(f"Tensor d_{name}" for name in self.wrt)
        return Operator(
            _Backward(self, self._body), f"{self.name}_backward", f"({', '.join(arguments)}, int needs) -> ({returns})"
        )

    def _register_gradient(self) -> None:
        setup, backward = (self._setup, self._run_backward) if self.wrt else (_nothing, self._refuse_twice)
        self.op.register_autograd(backward, setup_context=setup)
        run = self._run

        def compute(ctx: Any, *args: Any) -> Any:
            # Not by setup_context, for which PyTorch inspects the signature at every call.
            output = run(args)
            setup(ctx, args, output)
            return output

        def refuse_tangent(ctx: Any, *tangents: Any) -> Any:
            self._refuse("forward-mode differentiation")

        methods: dict[str, Callable[..., Any]] = {"forward": compute, "backward": backward}
        self._direct = _function(self.name, methods)
        op = self.op
        self._function = _function(
            self.name,
            {
                "forward": lambda *args: op(*args),
                "setup_context": setup,
                "backward": backward,
                "jvp": refuse_tangent,
                "vmap": self._rule(self),
            },
        )

    def _setup(self, ctx: Any, inputs: tuple, output: Any) -> None:
        results = output if isinstance(output, tuple) else (output,)
        ctx.mark_non_differentiable(*self._stopping(results))
        there = (*inputs, *results)
        ctx.save_for_backward(*self._saved(there))
        ctx.constants = self._kept(there)
        ctx.set_materialize_grads(False)  # zeros as large as all that is saved

    def _run_backward(self, ctx: Any, *grads: Tensor | None) -> tuple:
        given, wanted = self._passing(grads), self._asked(ctx.needs_input_grad)
        needs = 0
        for i, want in enumerate(wanted):
            needs |= want << i
        if not needs or not [g for g in given if g is not None]:
            return (None,) * len(self.names)
        assert self.backward is not None
        found = self.backward(*given, *ctx.saved_tensors, *ctx.constants, needs)
        if isinstance(found, Tensor):  # the only one
            found = (found,)
        gradients: list[Tensor | None] = [None] * len(self.names)
        for place, d, want in zip(self._wrt_places, found, wanted):
            if want:
                gradients[place] = d
        return tuple(gradients)

    def _refuse(self, what: str) -> None:
        name = self.name.removesuffix("_backward")
        raise RuntimeError(f"moa::{name}: {what} is not supported; reference.MixtureOfAttention supports it")

    def _refuse_twice(self, ctx: Any, *grads: Any) -> Any:
        self._refuse("double backward" if self.name.endswith("_backward") else "a gradient")

    # --- batching ----------------------------------------------------------------------------------------------------

    def _rule(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def fold(info: Any, in_dims: tuple, *args: Any) -> tuple:
            assert self._folds is not None
            folded = []
            for name, arg, dim in zip(self.names, args, in_dims):
                if isinstance(arg, Tensor):
                    place, repeats = self._folds[name], info.batch_size if dim is None else -1
                    arg = arg.unsqueeze(0) if dim is None else arg.movedim(dim, 0)
                    arg = arg.expand(repeats, *arg.shape[1:]).movedim(0, place).flatten(place, place + 1)
                folded.append(arg)
            out = call(*folded)
            places = tuple(self._folds[name] for name in self.results)
            if isinstance(out, Tensor):
                return out.unflatten(places[0], (info.batch_size, -1)), places[0]
            return tuple(o.unflatten(p, (info.batch_size, -1)) for o, p in zip(out, places)), places

        def loop(info: Any, in_dims: tuple, *args: Any) -> tuple:
            drawing = self._draws and args[self.names.index(self._draws)]
            same = drawing and info.randomness == _SAME
            if drawing and info.randomness == _ERROR:
                _refuse_random(self.name)
            devices = sorted({a.device.index for a in args if isinstance(a, Tensor) and a.is_cuda}) if same else []
            results = []
            for i in range(info.batch_size):
                item = [a if dim is None else a.select(dim, i) for a, dim in zip(args, in_dims)]
                # The draws of all items but the last are undone, so that equal items get equal masks.
                with torch.random.fork_rng(devices, enabled=bool(same) and i + 1 < info.batch_size):
                    results.append(call(*item))
            if isinstance(results[0], Tensor):
                return torch.stack(results), 0
            return tuple(torch.stack(parts) for parts in zip(*results)), (0,) * len(results[0])

        return loop if self._folds is None else fold

    # --- counting ----------------------------------------------------------------------------------------------------

    def _count_flops(self) -> None:
        count = getattr(self._body, "flops", None)

        def formula(*args: Any, out_val: Any = None, **named: Any) -> int:
            if count is None:
                return 0
            return int(count(self._bind(self._positional(args, named)), out_val))

        flops.count(getattr(torch.ops.moa, self.name), formula)


class _Backward:
    """The body of a backward operator, from that of its forward."""

    def __init__(self, forward: Operator, body: Any) -> None:
        self._of, self._body = forward, body
        self._gradients = [(name, f"d_{name}") for name in forward.gradients_of]
        self._needs: dict[int, Arguments] = {}  # by the bits
        self.__doc__ = f"Gradients of moa::{forward.name}; empty where nobody asks for one."

    def _split(self, a: Arguments) -> tuple[Arguments, Arguments, Arguments]:
        g, there, needs = Arguments(), a.__dict__, self._needs.get(a.needs)
        for name, gradient in self._gradients:
            g.__dict__[name] = there[gradient]
        if needs is None:
            wanted = {name: bool(a.needs >> i & 1) for i, name in enumerate(self._of.wrt)}
            needs = self._needs[a.needs] = Arguments(**wanted)
        return a, g, needs

    def forward(self, a: Arguments) -> Tensor | tuple[Tensor, ...]:
        bound = self._split(a)
        found, needs = self._body.backward(*bound), bound[2].__dict__
        return _only([found[name] if needs[name] else self._nothing(a) for name in self._of.wrt])

    def fake(self, a: Arguments) -> Tensor | tuple[Tensor, ...]:
        needs = self._split(a)[2].__dict__
        return _only(
            [
                torch.empty_like(getattr(a, self._of.alike[name]), memory_format=torch.contiguous_format)
                if needs[name]
                else self._nothing(a)
                for name in self._of.wrt
            ]
        )

    def flops(self, a: Arguments, out: Any) -> int:
        count = getattr(self._body, "backward_flops", None)
        return 0 if count is None else int(count(*self._split(a)))

    def _nothing(self, a: Arguments) -> Tensor:
        """On the device of one that is always there: the first differentiable argument."""
        first = getattr(a, self._of.alike[self._of.wrt[0]])
        assert isinstance(first, Tensor)
        return first.new_empty(0)


def operator(schema: str, **declared: Any) -> Callable[[type], Operator]:
    """Make an `Operator` of a class of functions; see the top of this file."""

    def make(body: type) -> Operator:
        for name in ("forward", "fake", "backward", "flops", "backward_flops"):
            if name in vars(body):
                setattr(body, name, staticmethod(vars(body)[name]))
        return Operator(body, body.__name__, schema, **declared)

    return make


def _only(results: list[Tensor]) -> Tensor | tuple[Tensor, ...]:
    """As PyTorch has the results of an operator: a single one without a tuple."""
    return tuple(results) if len(results) > 1 else results[0]


def _picker(there: Sequence[str], names: Sequence[str]) -> Callable[[Sequence[Any]], tuple]:
    """Of values in the order of `there`, those of some names, as a tuple."""
    places = [there.index(name) for name in names]
    if len(places) > 1:
        return itemgetter(*places)
    return itemgetter(slice(places[0], places[0] + 1)) if places else itemgetter(slice(0, 0))


def _function(name: str, methods: dict[str, Callable[..., Any]]) -> Any:
    return type(name, (torch.autograd.Function,), {key: staticmethod(f) for key, f in methods.items()})


def _nothing(ctx: Any, inputs: tuple, output: Any) -> None:
    """Nothing to keep for a backward that only refuses."""


def _refuse_random(name: str) -> None:
    raise RuntimeError(
        f"moa::{name}: vmap: called random operation while in randomness error mode; expected randomness='different' or"
        " 'same', or the layer in eval mode"
    )


def _as_randomness_says(name: str, args: tuple) -> tuple:
    """Arguments of a draw under vmap: none may happen under "error", and under "different" each item has its own.

    Where no argument is batched, PyTorch would not ask a batching rule at all.
    """
    from torch._C import _functorch as functorch

    for interpreter in functorch.get_interpreter_stack() or []:
        if interpreter.key() != functorch.TransformType.Vmap:
            continue
        vmap = functorch.CVmapInterpreterPtr(interpreter)
        if vmap.randomness() == functorch.RandomnessType.Error:
            _refuse_random(name)
        level = interpreter.level()
        if vmap.randomness() == functorch.RandomnessType.Different and not any(
            _is_batched_at(a, level) for a in args if isinstance(a, Tensor)
        ):
            first = next(i for i, a in enumerate(args) if isinstance(a, Tensor))
            wide = args[first].expand(vmap.batchSize(), *args[first].shape)
            args = (*args[:first], functorch._add_batch_dim(wide, 0, level), *args[first + 1 :])
    return args


def _is_batched_at(t: Tensor, level: int) -> bool:
    from torch._C import _functorch as functorch

    while functorch.is_functorch_wrapped_tensor(t):
        if functorch.is_batchedtensor(t) and functorch.maybe_get_level(t) == level:
            return True
        t = functorch.get_unwrapped(t)
    return False
