"""Collectives that autograd knows the transposes of: gradients are those of the sum of all ranks' losses.

By the functional operators of PyTorch, which torch.compile traces. All ranks call them in one order, in either
direction, with or without tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_ops = torch.ops._c10d_functional


class Ranks:
    """The ranks of a one-dimensional mesh, and which of them this process is."""

    def __init__(self, mesh: Any) -> None:
        self.mesh, self.size, self.rank = mesh, mesh.size(), mesh.get_local_rank()
        self.name: str = mesh.get_group().group_name

    def __deepcopy__(self, memo: Any) -> Ranks:
        return self  # a process group is not copied

    def gather(self, t: Tensor) -> Tensor:
        """(R, ...): what each rank has. Each gets back the sum of the gradients that all have of its part."""
        return _Gather.apply(t, self.name, self.size)

    def scatter(self, t: Tensor) -> Tensor:
        """(...) of (R, ...): the sum over the ranks of what they have for this one."""
        return _Scatter.apply(t, self.name, self.size)

    def exchange(self, t: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        """Rows of t, `send[r]` of them to rank r, in order; `receive[r]` rows from it."""
        return _Exchange.apply(t, list(send), list(receive), self.name)

    def swap(self, t: Tensor) -> Tensor:
        """(R, ...), a part for each rank: the part that each rank has for this one."""
        return _Swap.apply(t, self.name, self.size)

    def gather_decisions(self, scores: Tensor, ints: Tensor) -> tuple[Tensor, Tensor]:
        """`gather` of scores, and of int32 that have no gradient, at once."""
        return _GatherDecisions.apply(scores[None], ints[None], self.name, self.size)

    def swap_decisions(self, scores: Tensor, ints: Tensor) -> tuple[Tensor, Tensor]:
        """`swap` of scores, and of int32 that have no gradient, at once."""
        return _ExchangeDecisions.apply(scores, ints, self.name, self.size)

    def total(self, t: Tensor) -> Tensor:
        """The sum over the ranks, of which all go on alike: their gradients are equal, and each one's own."""
        return _Total.apply(t, self.name)

    def alike(self, *ts: Tensor) -> tuple[Tensor, ...]:
        """Tensors that are equal on all ranks, which go on each in its own way: their gradients are summed."""
        return _Alike.apply(self.name, *ts)

    def whole(self, t: Tensor) -> Tensor:
        """(R, ...): what each rank has, of which all go on alike."""
        return _Whole.apply(t, self.name, self.size, self.rank)

    def masks(self, mask: Tensor) -> Tensor:
        """(R, ...) of bool: what each rank has."""
        return _gathered(mask.to(torch.uint8), self.name, self.size).bool()

    def largest(self, t: Tensor) -> Tensor:
        """Without gradient: the maximum over the ranks."""
        return _ops.wait_tensor(_ops.all_reduce(t, "max", self.name))


def _gathered(t: Tensor, name: str, size: int) -> Tensor:
    out = _ops.wait_tensor(_ops.all_gather_into_tensor(t.contiguous().view(-1), size, name))
    return out.view(size, *t.shape)


def _scattered(t: Tensor, name: str, size: int) -> Tensor:
    out = _ops.wait_tensor(_ops.reduce_scatter_tensor(t.contiguous().view(-1), "sum", size, name))
    return out.view(t.shape[1:])


def _summed(t: Tensor, name: str) -> Tensor:
    return _ops.wait_tensor(_ops.all_reduce(t.contiguous(), "sum", name))


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor, name: str, size: int) -> Tensor:
        ctx.name, ctx.size = name, size
        return _gathered(t, name, size)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return _scattered(g, ctx.name, ctx.size), None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor, name: str, size: int) -> Tensor:
        ctx.name, ctx.size = name, size
        return _scattered(t, name, size)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return _gathered(g, ctx.name, ctx.size), None, None


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor, send: list[int], receive: list[int], name: str) -> Tensor:
        ctx.send, ctx.receive, ctx.name = send, receive, name
        return _ops.wait_tensor(_ops.all_to_all_single(t.contiguous(), receive, send, name))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        out = _ops.wait_tensor(_ops.all_to_all_single(g.contiguous(), ctx.send, ctx.receive, ctx.name))
        return out, None, None, None


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor, name: str) -> Tensor:
        return _summed(t, name)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return g, None


class _Alike(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, name: str, *ts: Tensor) -> tuple[Tensor, ...]:
        ctx.name = name
        return tuple(t.view_as(t) for t in ts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """One collective for all of a dtype."""
        found: list[Any] = [None] * len(grads)
        for dtype in dict.fromkeys(g.dtype for g in grads):
            places = [i for i, g in enumerate(grads) if g.dtype == dtype]
            parts = [grads[i].reshape(-1) for i in places]
            flat = parts[0] if len(parts) == 1 else torch.cat(parts)
            for i, part in zip(places, _summed(flat, ctx.name).split([grads[i].numel() for i in places])):
                found[i] = part.view(grads[i].shape)
        return None, *found


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor, name: str, size: int, rank: int) -> Tensor:
        ctx.rank = rank
        return _gathered(t, name, size)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return g[ctx.rank].contiguous(), None, None, None


def _packed(scores: Tensor, ints: Tensor) -> Tensor:
    """(R, B) bytes as int32: scores (R, ...) beside ints (R, ...)."""
    return torch.cat((scores.contiguous().view(torch.int32).flatten(1), ints.flatten(1)), 1)


def _unpacked(t: Tensor, scores: Tensor, ints: Tensor, size: int) -> tuple[Tensor, Tensor]:
    width = scores[0].numel() * scores.dtype.itemsize // 4
    first, second = t[:, :width].contiguous(), t[:, width:]
    return first.view(scores.dtype).view(size, *scores.shape[1:]), second.reshape(size, *ints.shape[1:])


class _GatherDecisions(torch.autograd.Function):
    """Scores (1, ...) with a gradient and int32 (1, ...) without: (R, ...) of all ranks, by one collective."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, ints: Tensor, name: str, size: int) -> tuple[Tensor, Tensor]:
        ctx.name, ctx.size = name, size
        made = _unpacked(_gathered(_packed(scores, ints)[0], name, size), scores, ints, size)
        ctx.mark_non_differentiable(made[1])
        return made

    @staticmethod
    def backward(ctx: Any, g: Tensor, _: Any) -> Any:
        return _scattered(g, ctx.name, ctx.size)[None], None, None, None


class _ExchangeDecisions(torch.autograd.Function):
    """Scores (R, ...) with a gradient and int32 (R, ...) without, one of each for every rank: from every rank."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, ints: Tensor, name: str, size: int) -> tuple[Tensor, Tensor]:
        ctx.name, ctx.size = name, size
        made = _unpacked(_swapped(_packed(scores, ints), name, size), scores, ints, size)
        ctx.mark_non_differentiable(made[1])
        return made

    @staticmethod
    def backward(ctx: Any, g: Tensor, _: Any) -> Any:
        return _swapped(g, ctx.name, ctx.size), None, None, None


class _Swap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor, name: str, size: int) -> Tensor:
        ctx.name, ctx.size = name, size
        return _swapped(t, name, size)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return _swapped(g, ctx.name, ctx.size), None, None


def _swapped(t: Tensor, name: str, size: int) -> Tensor:
    """(R, ...), one part for every rank: one from every rank."""
    each = [t[0].numel()] * size
    return _ops.wait_tensor(_ops.all_to_all_single(t.contiguous().view(-1), each, each, name)).view(t.shape)
