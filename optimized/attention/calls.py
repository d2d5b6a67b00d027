"""Any adapter's forward and backward on any sizes: empty ones, padded head dimensions, unaligned rows, many rows."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from optimized.attention.interface import Adapter, Attended, Pair, Setting, Triple

MOST_ROWS = 65535  # of a call of a backend: most launch a grid that is as deep, which CUDA limits


def forward(adapter: Adapter, q: Tensor, k: Tensor, v: Tensor, setting: Setting) -> Triple:
    """out (R, L, H, d) and lse (R, H, L), contiguous, and the state of the draw. q, k, v: of any strides."""
    _check(adapter, setting)
    rows, length, heads, dim = q.shape
    if q.numel() == 0 or k.shape[1] == 0:
        lse = q.new_full((rows, heads, length), -math.inf, dtype=torch.promote_types(q.dtype, torch.float32))
        return q.new_zeros(q.shape), lse, state_of(adapter, q, k, setting.dropout).zero_()
    qkv = _pad((q, k, v), adapter)
    if _at_once(adapter, rows):
        out, lse, state = adapter.forward(*qkv, setting)  # type: ignore[call-arg, arg-type]
    else:
        parts = zip(*(t.split(MOST_ROWS) for t in qkv), _settings(setting, rows))
        outs, lses, states = zip(*(adapter.forward(*part) for part in parts))
        out, lse, state = torch.cat(outs), torch.cat(lses), torch.stack(states)
    return (out[..., :dim] if out.shape[-1] != dim else out).contiguous(), lse.contiguous(), state


def backward(adapter: Adapter, dout: Tensor, done: Attended, setting: Setting, into: Pair) -> Tensor:
    """dq, contiguous; dk and dv are written to `into`. done: of `forward`, or with more keys merged in."""
    dq, *found = backward_apart(adapter, dout, done, setting, into)
    copy(into, found)
    return dq


def backward_apart(adapter: Adapter, dout: Tensor, done: Attended, setting: Setting, into: Pair) -> Triple:
    """The same, but that dk and dv are elsewhere where the library can't write to `into`."""
    q, k, v, out, lse, state = done
    dim = q.shape[-1]
    if q.numel() == 0 or k.shape[1] == 0:
        for gradient in into:
            gradient.zero_()
        return q.new_zeros(q.shape), *into
    dout, *padded = _pad((dout, q, k, v, out), adapter)
    buffers = into
    if dout.shape[-1] != dim:
        buffers = padded[1].new_empty(padded[1].shape), padded[2].new_empty(padded[2].shape)
    rows = q.shape[0]
    if _at_once(adapter, rows):
        dq, *found = adapter.backward(dout, Attended(*padded, lse, state), setting, buffers)  # type: ignore[call-arg]
    else:
        dqs = []
        parts = zip(*(t.split(MOST_ROWS) for t in (*padded, lse, dout, *buffers)), state, _settings(setting, rows))
        for *given, slope, dk, dv, draw, part in parts:
            dq, *made = adapter.backward(slope, Attended(*given, draw), part, (dk, dv))  # type: ignore[call-arg]
            dqs.append(dq)
            copy((dk, dv), made)
        dq, found = torch.cat(dqs), list(buffers)
    dk, dv = (g[..., :dim] if g.shape[-1] != dim else g for g in found)
    return (dq[..., :dim] if dq.shape[-1] != dim else dq).contiguous(), dk, dv


def state_of(adapter: Adapter, q: Tensor, k: Tensor, dropout: float) -> Tensor:
    """An empty tensor as the state of a forward: one row for each `MOST_ROWS` rows where there are more."""
    state = adapter.state(q, k, dropout)
    if _at_once(adapter, q.shape[0]):
        return state
    return state.new_empty(-(-q.shape[0] // MOST_ROWS), *state.shape)


def _check(adapter: Adapter, setting: Setting) -> None:
    """No adapter is handed what it would ignore."""
    visible = setting.visible
    if visible.window >= 0 and not adapter.windows:
        raise ValueError(f"window: expected -1 (this backend has no window), got {visible.window}")
    if visible.mask is not None and not adapter.masks:
        raise ValueError(f"mask: expected None (this backend takes no mask), got shape {tuple(visible.mask.shape)}")


def _at_once(adapter: Adapter, rows: int) -> bool:
    return not adapter.splits or rows <= MOST_ROWS


def _settings(setting: Setting, rows: int) -> list[Setting]:
    """One for each part."""
    parts = -(-rows // MOST_ROWS)
    visible = setting.visible
    lengths, masks = ([None] * parts if t is None else t.split(MOST_ROWS) for t in (visible.lengths, visible.mask))
    return [
        replace(setting, visible=replace(visible, lengths=length, mask=mask)) for length, mask in zip(lengths, masks)
    ]


def copy(into: Pair, made: Iterable[Tensor]) -> None:
    """Where they are not there already."""
    for buffer, gradient in zip(into, made):
        if gradient is not buffer:
            buffer.copy_(gradient)


def _pad(tensors: tuple[Tensor, ...], adapter: Adapter) -> tuple[Tensor, ...]:
    """What the backend can address: zeros behind the head dimension, which change no product, and aligned rows."""
    surplus = -tensors[0].shape[-1] % adapter.alignment
    if surplus:
        return tuple(F.pad(t, (0, surplus)) for t in tensors)
    aligned = _side_by_side if adapter.alignment == 1 else _aligned
    return tuple([t if aligned(t) else t.clone(memory_format=torch.contiguous_format) for t in tensors])


def _side_by_side(t: Tensor) -> bool:
    return t.stride(-1) == 1 or t.shape[-1] == 1


def _aligned(t: Tensor) -> bool:
    """Whether every row starts at a multiple of 16 bytes, as the flash kernels load them."""
    *strides, last = t.stride()
    starts = t.data_ptr()
    for stride in strides:
        starts |= stride * t.element_size()
    return last == 1 and starts % 16 == 0
