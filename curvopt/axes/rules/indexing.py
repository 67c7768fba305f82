"""Ops that read by an index: the index values of this pass say which owners are read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from curvopt.axes.lattice import (
    DTYPE,
    MIXED,
    NONE,
    State,
    align,
    constant,
    join,
    join_all,
    merge,
    only,
    squash,
)
from curvopt.axes.ops import Ref
from curvopt.axes.rules.base import Call, Refuse, Result, rule


def hide(call: Call, picked: Tensor, read: Tensor, dims: list[int], by: list[Ref]) -> Tensor:
    """Mixed where an index picks among samples, in a replay that does not look at index values.

    A mask leaves samples out; an index may draw several times from one.
    """
    mask = any(_is_mask(call, ref) for ref in by)
    call.replay.masked |= mask
    if not mask:
        call.replay.picks += [(call.index, ref) for ref in by]
    if not mask and call.replay.opaque and bool((merge(read, dims) == MIXED).any()):
        return torch.full_like(picked, MIXED)
    return picked


def _is_mask(call: Call, ref: Ref) -> bool:
    """A mask, or the positions at which one is true."""
    state = call.state(ref)
    return ref.dtype == torch.bool or (state is not None and state.ragged is not None)


def varies(owners: Tensor, dims: list[int]) -> bool:
    """Whether owners change along one of the dims."""
    return any(owners.shape[d] != 1 for d in dims)


@rule("index _unsafe_index", ragged=True)
def index(call: Call) -> Result:
    """`x[i, :, j]`, `x[mask]`."""
    x, indices = call.op.args[:2]
    state = call.state(x)
    if state is not None and state.ragged is not None:
        raise Refuse
    given: list[Ref] = [i for i in indices if i is not None]
    dims: list[int] = []
    at = 0
    for i in indices:
        width = i.ndim if i is not None and i.dtype == torch.bool else 1
        if i is not None:
            dims += range(at, at + width)
        at += width
    start = dims[0] if dims == list(range(dims[0], dims[-1] + 1)) else 0
    ndim = call.outputs[0].ndim
    width = ndim - (x.ndim - len(dims))  # dims of the index, in the output from `start` on
    owners = None
    if state is not None:
        if varies(state.owners, dims):
            flat = _positions(call, indices)
            read = only(state.owners, x.shape, dims)
            if read.numel() or 0 in call.outputs[0].shape:
                owners = hide(call, torch.ops.aten.index(read, flat), read, dims, given)
        else:
            kept = [n for d, n in enumerate(state.owners.shape) if d not in dims]
            owners = state.owners.reshape(kept[:start] + [1] * width + kept[start:])
    drawn, ragged = _drawn(call, given, start - ndim)
    if drawn is not None:
        drawn = align(drawn, width)
        drawn = drawn.reshape([1] * start + list(drawn.shape) + [1] * (ndim - start - width))
        owners = join_all(owners, drawn)
    if owners is None:
        return None
    if owners.numel() == 0 or 0 in call.outputs[0].shape:
        owners = constant(ndim)
    return State(squash(owners), ragged)


def _positions(call: Call, indices: tuple[Any, ...]) -> list[Tensor | None]:
    """The index values, with masks turned into the positions that they pick."""
    flat: list[Tensor | None] = []
    for i in indices:
        value = None if i is None else call.values(i)
        if value is not None and value.dtype == torch.bool:
            flat += value.nonzero().unbind(1)
        else:
            flat.append(value)
    return flat


def _drawn(call: Call, given: list[Ref], dim: int) -> tuple[Tensor | None, Any]:
    """Owners of the positions that an index points from, and the ragged axis that it makes."""
    owners, ragged = None, None
    for i in given:
        state = call.state(i)
        if state is None:
            continue
        if i.dtype == torch.bool:
            if len(given) != 1:
                raise Refuse
            mine = state.owners.expand(i.shape)[call.values(i)]
            ragged = dim, call.name_of(i)
        else:
            mine = state.owners
            if state.ragged is not None:
                if i.ndim != 1:
                    raise Refuse
                ragged = dim, state.ragged[1]
        size = max(mine.ndim, owners.ndim if owners is not None else 0)
        owners = (
            align(mine, size) if owners is None else join(align(owners, size), align(mine, size))
        )
    if ragged is not None:
        for i in given:
            state = call.state(i)
            axis = None if state is None or state.ragged is None else state.ragged[1]
            if i.dtype != torch.bool and i.ndim and axis != ragged[1]:
                raise Refuse
    return owners, ragged


@rule("index_select", ragged=True)
def index_select(call: Call) -> Result:
    """Slices of one dim, by a vector."""
    x, dim, i = call.op.args[:3]
    state, index_state = call.state(x), call.state(i)
    if x.ndim == 0 or (state is not None and state.ragged is not None):
        raise Refuse
    dim %= x.ndim
    owners = None
    if state is not None:
        owners = state.owners
        if varies(owners, [dim]):
            read = only(owners, x.shape, [dim])
            owners = hide(call, read.index_select(dim, call.values(i)), read, [dim], [i])
    ragged = None
    if index_state is not None:
        shape = [-1 if d == dim else 1 for d in range(x.ndim)]
        owners = join_all(owners, index_state.owners.reshape(shape))
        if index_state.ragged is not None:
            ragged = dim - x.ndim, index_state.ragged[1]
    if owners is None:
        return None
    return State(squash(owners) if owners.numel() else constant(x.ndim), ragged)


@rule("embedding", ragged=True)
def embedding(call: Call) -> Result:
    """Rows of a table."""
    table, i = call.op.args[:2]
    state, index_state = call.state(table), call.state(i)
    if state is not None and state.ragged is not None:
        raise Refuse
    owners = None
    if state is not None:
        if varies(state.owners, [0]):
            read = only(state.owners, table.shape, [0])
            owners = hide(call, read[call.values(i)], read, [0], [i])
        else:
            owners = align(state.owners[0], i.ndim + 1)
    ragged = None
    if index_state is not None:
        owners = join_all(owners, index_state.owners.unsqueeze(-1))
        if index_state.ragged is not None:
            ragged = index_state.ragged[0] - 1, index_state.ragged[1]
    return None if owners is None else State(squash(owners), ragged)


@rule("gather", ragged=True)
def gather(call: Call) -> Result:
    """One element per position of the index, along one dim."""
    x, dim, i = call.op.args[:3]
    state, index_state = call.state(x), call.state(i)
    if x.ndim == 0 or i.ndim != x.ndim or (state is not None and state.ragged is not None):
        raise Refuse
    dim %= x.ndim
    ragged = None if index_state is None else index_state.ragged
    if ragged is not None and ragged[0] != dim - x.ndim:
        raise Refuse
    owners = None if state is None else state.owners
    if owners is not None:
        if varies(owners, [dim]):
            read = owners.expand(x.shape)
            owners = hide(call, read.gather(dim, call.values(i)), owners, [dim], [i])
        else:
            for d in range(x.ndim):
                if owners.shape[d] != 1:
                    owners = owners.narrow(d, 0, i.shape[d])
    owners = join_all(owners, None if index_state is None else index_state.owners)
    if owners is None:
        return None
    return State(squash(owners) if owners.numel() else constant(x.ndim), ragged)


@rule("take")
def take(call: Call) -> Result:
    """Elements of the flattened tensor."""
    x, i = call.op.args[:2]
    owners = call.owners(x)
    if owners is not None:
        read = owners.expand(x.shape).reshape(-1)
        owners = hide(call, read[call.values(i)], read, [0], [i])
    owners = join_all(owners, call.owners(i))
    return None if owners is None else State(squash(owners))


@rule("masked_select")
def masked_select(call: Call) -> Result:
    """The elements where the mask is true, in the mask's order."""
    x, mask = call.op.args[:2]
    shape = torch.broadcast_shapes(x.shape, mask.shape)
    both = [align(o, len(shape)) for o in (call.owners(x), call.owners(mask)) if o is not None]
    owners = join_all(*both)
    if owners is None:
        return None
    picked = owners.expand(shape)[call.values(mask).expand(shape)]
    name = call.name_of(mask) if call.state(mask) is not None and mask.shape == shape else None
    if call.state(mask) is not None and name is None:
        raise Refuse
    return State(
        squash(picked) if picked.numel() else constant(1), None if name is None else (-1, name)
    )


@rule("nonzero")
def nonzero(call: Call) -> Result:
    """Positions of what is not 0: a ragged axis."""
    x = call.x
    owners = call.full(x, x.ndim)
    picked = owners.expand(x.shape)[call.values(x).bool()].reshape(-1, 1)
    lines = []
    for d in range(x.ndim):
        line = merge(owners, [e for e in range(x.ndim) if e != d]).reshape(-1)
        lines.append(line.expand(x.shape[d]))
    if not picked.numel():
        picked = torch.full((1, 1), NONE, dtype=DTYPE, device="cpu")
    return State(picked, (-2, call.name_of(x)), tuple(lines))
