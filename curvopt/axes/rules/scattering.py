"""Ops that write by an index: what is hit twice is joined; an owned index may write anywhere."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from curvopt.axes.lattice import (
    MIXED,
    NONE,
    State,
    align,
    bags_of,
    constant,
    join,
    join_all,
    merge,
    merge_all,
    mixed,
    squash,
)
from curvopt.axes.ops import Ref
from curvopt.axes.rules.base import Call, Refuse, Result, rule, spreads
from curvopt.axes.rules.indexing import varies


def scattered(target: Tensor, dim: int, index: Tensor, source: Tensor) -> Tensor:
    """Owners of `target` where `source` was written or added, by `index` along `dim`."""
    largest = target.scatter_reduce(dim, index, source, "amax")
    low_target, low_source = (t.masked_fill(t == NONE, MIXED) for t in (target, source))
    smallest = low_target.scatter_reduce(dim, index, low_source, "amin")
    return largest.masked_fill((smallest != largest) & (largest != NONE), MIXED)


def _vector(owners: Tensor, dim: int, ndim: int) -> Tensor:
    return owners.reshape([-1 if d == dim else 1 for d in range(ndim)])


def _bound(x: Tensor, source: Tensor, dim: int) -> Tensor | None:
    """What holds whatever the index: the join, if it mixes nothing that was not mixed."""
    if varies(x, [dim]) or varies(source, [dim]):
        return None
    if any(a != b and 1 not in (a, b) for a, b in zip(x.shape, source.shape, strict=True)):
        return None
    both = join(x, source)
    return None if bool((both == MIXED).any()) else both


@rule("scatter scatter_add scatter_reduce")
def scatter(call: Call) -> Result:
    """One element per position of the index, along one dim."""
    x, dim, i = call.op.args[:3]
    if x.ndim == 0 or i.ndim != x.ndim:
        raise Refuse
    dim %= x.ndim
    given: Any = call.arg("src") if call.has("src") else None
    old = call.full(x, x.ndim)
    source = call.full(given, x.ndim)
    owners = _bound(old, source, dim) if i.shape == x.shape or source.numel() == 1 else None
    if owners is None:
        source = source.expand(given.shape if isinstance(given, Ref) else i.shape)
        source = source[tuple(slice(0, n) for n in i.shape)].clone()
        owners = scattered(old.expand(x.shape).clone(), dim, call.values(i), source)
    index = call.owners(i)
    if index is not None:  # what is not hit depends on the index too
        line = merge(index.expand(i.shape), [dim])
        fits = all(n in (1, x.shape[d]) for d, n in enumerate(line.shape))
        owners = join(owners, line if fits else merge_all(index, x.ndim))
    return State(squash(owners))


@rule("index_add index_copy", ragged=True)
def index_add(call: Call) -> Result:
    """Slices of one dim, by a vector."""
    x, dim, i, source = call.op.args[:4]
    dim %= max(x.ndim, 1)
    state, index = call.state(source), call.state(i)
    ragged = None if index is None else index.ragged
    target = call.state(x)
    if x.ndim == 0 or (target is not None and target.ragged is not None):
        raise Refuse
    if state is not None and state.ragged is not None:
        if ragged is None or state.ragged != (dim - x.ndim, ragged[1]):
            raise Refuse
    elif ragged is not None:
        raise Refuse  # a table with an entry for each position
    old, new = call.full(x, x.ndim), call.full(source, x.ndim)
    owners = None
    if index is None:
        owners = _bound(old, new, dim)
    if owners is None:
        shape = [max(a, b) for a, b in zip(old.shape, new.shape, strict=True)]
        shape[dim] = source.shape[dim]
        new = new.expand(shape)
        if index is not None:
            new = join(new, _vector(index.owners, dim, x.ndim).expand(shape))
        position = _vector(call.values(i), dim, x.ndim).expand(shape)
        shape[dim] = x.shape[dim]
        owners = scattered(old.expand(shape).clone(), dim, position, new.clone())
    if index is not None:
        # What is not hit depends on the index too: on a line of a mask that `nonzero` read, only
        # on the owners of that line.
        lines = (
            index.lines[0]
            if isinstance(index.lines, tuple) and len(index.lines) == 1
            else (index.lines)
        )
        if isinstance(lines, Tensor) and lines.shape[0] == x.shape[dim]:
            owners = join(owners, _vector(lines, dim, x.ndim))
        else:
            owners = join(owners, merge_all(index.owners, x.ndim))
    return State(squash(owners))


@rule("index_fill")
def index_fill(call: Call) -> Result:
    """Slices that become one value."""
    x, i = call.op.args[0], call.op.args[2]
    value, index = call.owners(call.arg("value")), call.owners(i)
    return State(
        squash(
            join_all(
                call.full(x, x.ndim),
                None if value is None else value.reshape((1,) * x.ndim),
                None if index is None else merge_all(index, x.ndim),
            )  # type: ignore[arg-type]  # some have owners
        )
    )


@rule("index_put _index_put_impl _unsafe_index_put", ragged=True)
def index_put(call: Call) -> Result:
    """`x[i, j] = value`, `x[mask] = value`."""
    x, indices, value = call.op.args[:3]
    given: list[Ref] = [i for i in indices if i is not None]
    target, source = call.state(x), call.state(value)
    if target is not None and target.ragged is not None:
        raise Refuse
    old = call.full(x, x.ndim)
    mask = given[0]
    state = call.state(mask)
    if len(given) == 1 and mask.dtype == torch.bool and indices[0] is mask:
        marked = None if state is None else state.owners
        if state is not None and state.ragged is not None:
            raise Refuse
        if marked is None and source is not None and source.ragged is not None:
            raise Refuse  # by another mask, of as many elements today
        if marked is not None:
            marked = marked.reshape([*marked.shape, *[1] * (x.ndim - mask.ndim)])
        if value.numel == 1 and (marked is None or value.ndim <= x.ndim - mask.ndim):
            one = None if source is None else source.owners.reshape((1,) * x.ndim)
            return State(squash(join_all(old, marked, one)))  # type: ignore[arg-type]  # as above
        if marked is not None and not call.arg("accumulate"):
            return _by_owned_mask(call, old, marked)
    if any(call.state(i) is not None for i in given):
        raise Refuse
    if source is not None and source.ragged is not None:
        raise Refuse
    picks: list[Tensor | None] = [None if i is None else call.values(i) for i in indices]
    positions = torch.arange(x.numel, device="cpu").reshape(x.shape)
    hit = torch.ops.aten.index(positions, picks)
    new = constant(value.ndim) if source is None else source.owners
    new = new.expand(value.shape).expand(hit.shape).reshape(-1).clone()
    flat = old.expand(x.shape).reshape(-1)
    return State(squash(scattered(flat, 0, hit.reshape(-1), new).reshape(x.shape)))


def _by_owned_mask(call: Call, old: Tensor, marked: Tensor) -> State:
    """Values in the order of an owned mask: they must have been read by this mask."""
    x, (mask, *_), value = call.op.args[:3]
    source = call.state(value)
    behind = x.ndim - mask.ndim
    ragged = (-behind - 1, call.name_of(mask))
    if source is not None and source.ragged not in (None, ragged):
        raise Refuse
    chosen = call.values(mask)
    plain = source is None or source.ragged is None
    if plain and not spreads(call, value, ragged, int(chosen.sum())):
        raise Refuse
    owners = old.expand(x.shape).clone()
    if source is None:
        owners[chosen] = NONE
    else:
        size = int(chosen.sum())
        new = align(source.owners, behind + 1)
        owners[chosen] = new.expand(size, *x.shape[mask.ndim :])
    return State(squash(join(owners, marked)))


@rule("_embedding_bag _embedding_bag_forward_only")
def embedding_bag(call: Call) -> Result:
    """Rows of a table, added up bag by bag."""
    table, i, offsets = call.op.args[:3]
    weights = call.arg("per_sample_weights")
    if call.state(table) is not None:
        raise Refuse
    bags, size = offsets.shape[0] - bool(call.arg("include_last_offset")), i.shape[0]
    bag = bags_of(call.values(offsets), size)
    index = join(call.full(i, 1), call.full(weights, 1)).expand(size).clone()
    # A bag is the sample's whose offset it begins at; where the next one begins is no data of it.
    begun = call.full(offsets, 1).expand(offsets.shape)[:bags].clone()
    owners = scattered(begun, 0, bag.clamp(max=bags - 1), index)
    return [State(squash(owners.reshape(-1, 1))), *(mixed(r.ndim) for r in call.outputs[1:])]
