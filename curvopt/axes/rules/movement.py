"""Ops that only move elements: they run themselves on the owners."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from curvopt.axes.lattice import DTYPE, NONE, State, along, constant, only, regroup, squash, strip
from curvopt.axes.ops import Ref
from curvopt.axes.rules.base import INT64_MAX, Call, Refuse, Result, rule

# Cut or reorder an axis: never a ragged one, whatever the values of this pass.
_CUTS = frozenset(
    "slice split split_with_sizes unsafe_split unsafe_split_with_sizes unfold unbind "
    "constant_pad_nd select diagonal".split()
)
_REORDERS = frozenset("flip roll repeat rot90".split())


def _list(value: Any) -> list[Tensor]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _ragged_dims(call: Call, dim: int, name: Hashable) -> list[tuple[int, Hashable]]:
    """Where the ragged axis is after the op; Refuse unless it is whole and in its order.

    An axis of 0 or 1 elements is tried with 3: what it is must not follow from its length today.
    """
    size, args = call.x.shape[dim], list(call.op.args[1:])
    length = size if size > 1 else 3
    shape = [length if d == dim else n for d, n in enumerate(call.x.shape)]
    if call.op.name in ("expand", "expand_copy") and size <= 1:
        sizes = list(args[0])
        at = dim - call.x.ndim
        if sizes[at] not in (-1, size):
            raise Refuse
        sizes[at] = -1
        args[0] = sizes
    found = []
    moved = _list(call.op.func(along(shape, dim).expand(shape), *args, **dict(call.op.kwargs)))
    for each, ref in zip(moved, call.outputs, strict=True):
        dims = [d for d in range(each.ndim) if each.stride(d) != 0 and each.shape[d] != 1]
        if each.ndim != ref.ndim or len(dims) != 1 or each.shape[dims[0]] != length:
            raise Refuse
        if each.stride(dims[0]) != 1 or each.storage_offset() != 0 or ref.shape[dims[0]] != size:
            raise Refuse
        found.append((dims[0] - each.ndim, name))
    return found


def _keeps(call: Call, dim: int) -> bool:
    """Whether a cut leaves this axis alone; a slice of all of it is none."""
    if call.op.name == "constant_pad_nd":
        return False
    if call.op.name == "diagonal":
        return dim not in (call.arg("dim1") % call.x.ndim, call.arg("dim2") % call.x.ndim)
    at = call.arg("dimension" if call.has("dimension") else "dim") % call.x.ndim
    if at != dim:
        return True
    end = call.arg("end") if call.op.name == "slice" else 0
    return call.op.name == "slice" and (
        call.arg("start") in (None, 0) and end in (None, INT64_MAX) and call.arg("step") == 1
    )


@rule(
    "permute transpose t unsqueeze squeeze expand slice select split split_with_sizes unsafe_split "
    "unsafe_split_with_sizes unbind diagonal unfold flip roll repeat rot90 "
    "constant_pad_nd squeeze_copy permute_copy transpose_copy t_copy unsqueeze_copy expand_copy "
    "slice_copy select_copy",
    ragged=True,
)
def move(call: Call) -> Result:
    """Views, and copies that pad by numbers or repeat."""
    x, op = call.x, call.op
    state = call.state(x)
    if state is None or (x.numel == 0 and any(ref.numel for ref in call.outputs)):
        raise Refuse
    args = list(op.args[1:])
    if op.name == "constant_pad_nd":
        args = [args[0], NONE]
    moved = op.func(state.owners.expand(x.shape), *args, **dict(op.kwargs))
    ragged: list[Any] = []
    if state.ragged is not None:
        dim = x.ndim + state.ragged[0]
        if op.name in _REORDERS or (op.name in _CUTS and not _keeps(call, dim)):
            raise Refuse
        ragged = _ragged_dims(call, dim, state.ragged[1])
    copies = op.name in _REORDERS or op.name == "constant_pad_nd"
    return [
        State(
            squash(each) if copies else strip(each),
            ragged[n] if ragged else None,
            _lines(call, state, n),
        )
        for n, each in enumerate(_list(moved))
    ]


def _lines(call: Call, state: State, output: int) -> Any:
    """Of positions made by `nonzero`: a column of them keeps the owners of its line."""
    if state.lines is None:
        return None
    if call.op.name == "select" and call.arg("dim") in (-1, call.x.ndim - 1):
        return state.lines[call.arg("index")]
    if call.op.name == "unbind":
        return (state.lines[output],) if isinstance(state.lines, tuple) else None
    return state.lines if call.op.name in ("squeeze", "unsqueeze", "expand") else None


@rule(
    "im2col upsample_nearest1d upsample_nearest2d upsample_nearest3d reflection_pad1d "
    "reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d replication_pad3d "
    "pixel_shuffle pixel_unshuffle channel_shuffle"
)
def move_floats(call: Call) -> Result:
    """Movements that torch has for floating point only; what is padded with 0 belongs to nobody."""
    owners = call.full(call.x, call.x.ndim).expand(call.x.shape).double() + 1
    moved = call.op.func(owners, *call.op.args[1:], **dict(call.op.kwargs))
    return State(squash(moved.round().to(DTYPE) - 1))


@rule("diag_embed")
def on_a_diagonal(call: Call) -> Result:
    """The zeros around it belong to nobody."""
    owners = call.full(call.x, call.x.ndim).expand(call.x.shape) - NONE
    return State(squash(call.op.func(owners, *call.op.args[1:], **dict(call.op.kwargs)) + NONE))


@rule("slice_scatter select_scatter diagonal_scatter")
def put_in(call: Call) -> Result:
    """A copy of the first, with the second in the place of a view."""
    whole, part = (call.full(ref, ref.ndim).expand(ref.shape) for ref in call.inputs)
    return State(squash(call.op.func(whole, part, *call.op.args[2:], **dict(call.op.kwargs))))


@rule("view _unsafe_view _reshape_alias _reshape_copy view_copy", ragged=True)
def view(call: Call) -> Result:
    """The same elements in another shape."""
    old, new = call.x.shape, call.outputs[0].shape
    if call.x.dtype.itemsize != call.outputs[0].dtype.itemsize or call.op.func is _VIEW_DTYPE:
        raise Refuse
    state = call.state(call.x)
    owners = regroup(call.full(call.x, 0), old, new)
    if state is None or state.ragged is None:
        return State(owners)
    # A ragged axis stays itself where only dims of size 1 come or go.
    dim, long = len(old) + state.ragged[0], [n for n in old if n != 1]
    if old[dim] < 2 or long != [n for n in new if n != 1]:
        raise Refuse
    rank = sum(n != 1 for n in old[:dim])
    at = [d for d, n in enumerate(new) if n != 1][rank]
    return State(owners, (at - len(new), state.ragged[1]))


_VIEW_DTYPE = torch.ops.aten.view.dtype


@rule("as_strided")
def as_strided(call: Call) -> Result:
    """Any window on the storage."""
    call.replay.flatten(call.x)
    return call.replay.get(call.outputs[0])


@rule("cat stack")
def cat(call: Call) -> Result:
    """Side by side; a 1-D tensor without elements is no part, as torch has it."""
    stacks = call.op.name == "stack"
    rank = call.outputs[0].ndim - stacks
    parts: list[Ref] = [ref for ref in call.op.args[0] if stacks or rank == 1 or ref.shape != (0,)]
    dim = call.arg("dim") % call.outputs[0].ndim
    pieces = []
    for ref in parts:
        owners = call.owners(ref)
        if owners is None:
            owners = constant(rank)
        pieces.append(owners.unsqueeze(dim) if stacks else only(owners, ref.shape, [dim]))
    shape = [max(piece.shape[d] for piece in pieces) for d in range(call.outputs[0].ndim)]
    return State(
        squash(
            torch.cat(
                [
                    piece.expand([piece.shape[d] if d == dim else n for d, n in enumerate(shape)])
                    for piece in pieces
                ],
                dim,
            )
        )
    )
