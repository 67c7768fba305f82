"""Owners of elements, and the few operations on them that everything else is made of.

The owners of a tensor are an int32 tensor that broadcasts to its shape: of size 1 along every dim
where the owner does not change. An element's owner is `NONE` (it depends on no sample), the number
of the one sample that it depends on, or `MIXED`. A tensor that depends on no sample has no state:
None.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

NONE, MIXED = -1, 2**30
DTYPE = torch.int32


class State(NamedTuple):
    """What is known of a tensor.

    Attributes:
        owners: int32, broadcasts to the tensor's shape.
        ragged: (dim counted from the right, name) of an axis whose length or order comes from owned
            values, as that of `x[mask]`. Axes of the same name have the same order.
        lines: of positions made by `nonzero`: owners of the positions that each column (a tuple) or
            this column may point to.
    """

    owners: Tensor
    ragged: tuple[int, Hashable] | None = None
    lines: tuple[Tensor, ...] | Tensor | None = None


def constant(ndim: int, owner: int = NONE) -> Tensor:
    """The same owner for all elements."""
    return torch.full((1,) * ndim, owner, dtype=DTYPE, device="cpu")


def bags_of(starts: Tensor, size: int) -> Tensor:
    """The bag of each of `size` rows, given where the bags start."""
    return (
        torch.searchsorted(starts, torch.arange(size, dtype=starts.dtype, device="cpu"), right=True)
        - 1
    )


def mixed(ndim: int) -> State:
    """Every element depends on several samples, as far as is known."""
    return State(constant(ndim, MIXED))


def along(shape: Sequence[int], dim: int, owners: Tensor | None = None) -> Tensor:
    """Owners that change along one dim: 0, 1, 2, ... unless given."""
    if owners is None:
        owners = torch.arange(shape[dim], dtype=DTYPE, device="cpu")
    return owners.to(DTYPE).reshape([-1 if d == dim else 1 for d in range(len(shape))])


def join(a: Tensor, b: Tensor) -> Tensor:
    """Owners of elements that depend on both."""
    if a is b:
        return a
    larger = torch.maximum(a, b)
    return larger.masked_fill_((a != b) & (torch.minimum(a, b) != NONE), MIXED)


def join_all(*owners: Tensor | None) -> Tensor | None:
    """`join` of all that are there."""
    result = None
    for each in owners:
        if each is not None:
            result = each if result is None else join(result, each)
    return result


def merge(owners: Tensor, dims: Iterable[int]) -> Tensor:
    """Owners of what depends on all elements along `dims`, which are kept with size 1."""
    over = [d for d in dims if owners.shape[d] != 1]
    if not over:
        return owners
    if owners.numel() == 0:
        return owners.new_full([1 if d in over else n for d, n in enumerate(owners.shape)], NONE)
    largest = owners.amax(over, keepdim=True)
    smallest = owners.masked_fill(owners == NONE, MIXED).amin(over, keepdim=True)
    return largest.masked_fill((smallest != largest) & (largest != NONE), MIXED)


def merge_all(owners: Tensor, ndim: int = 0) -> Tensor:
    """Owner of what depends on every element, with `ndim` dims of size 1."""
    return merge(owners, range(owners.ndim)).reshape((1,) * ndim)


def drop(owners: Tensor, dims: Iterable[int]) -> Tensor:
    """Without `dims`, which have size 1."""
    gone = set(dims)
    return owners.reshape([n for d, n in enumerate(owners.shape) if d not in gone])


def align(owners: Tensor, ndim: int) -> Tensor:
    """With dims of size 1 in front."""
    return owners.reshape((1,) * (ndim - owners.ndim) + tuple(owners.shape))


def only(owners: Tensor, shape: Sequence[int], dims: Iterable[int]) -> Tensor:
    """Expanded to the tensor's size along `dims` alone."""
    chosen = set(dims)
    return owners.expand([n if d in chosen else owners.shape[d] for d, n in enumerate(shape)])


def squash(owners: Tensor) -> Tensor:
    """Size 1 along every dim where the owner does not change."""
    for d, n in enumerate(owners.shape):
        if n > 1:
            first = owners.narrow(d, 0, 1)
            if owners.stride(d) == 0 or bool((owners == first).all()):
                owners = first
    return owners


def strip(owners: Tensor) -> Tensor:
    """`squash` without a look at the values: only dims that were expanded."""
    for d, n in enumerate(owners.shape):
        if n > 1 and owners.stride(d) == 0:
            owners = owners.narrow(d, 0, 1)
    return owners


def regroup(owners: Tensor, old: Sequence[int], new: Sequence[int]) -> Tensor:
    """Owners after `view` from shape `old` to shape `new`.

    Dims are grouped by equal products; groups in which the owner changes are expanded, no others.
    """
    if owners.numel() == 1:
        return owners.reshape([1] * len(new))
    if math.prod(old) == 0:
        return owners.new_full(tuple(new), NONE)
    i = j = 0
    middle: list[int] = []
    result: list[int] = []
    while i < len(old) or j < len(new):
        start, begin, left, right = i, j, 1, 1
        if i < len(old):
            left, i = old[i], i + 1
        if j < len(new):
            right, j = new[j], j + 1
        while left != right:
            if left < right:
                left, i = left * old[i], i + 1
            else:
                right, j = right * new[j], j + 1
        if all(owners.shape[d] == 1 for d in range(start, i)):
            middle += [1] * (i - start)
            result += [1] * (j - begin)
        else:
            middle += old[start:i]
            result += new[begin:j]
    return squash(owners.expand(middle).reshape(result))


def filled(owners: Tensor) -> Tensor:
    """Elements without owner get the owner of their slice on the samples' axis, if there is one.

    A class token, padding or a start token belongs to the sample beside which it stands. This only
    adds dependence: whether it holds is decided by the rows, as everything is.
    """
    if owners.numel() == 1 or not bool((owners == NONE).any()):
        return owners
    for d in range(owners.ndim):
        slices = merge(owners, [e for e in range(owners.ndim) if e != d])
        if owners.shape[d] > 1 and not bool(((slices == MIXED) | (slices == NONE)).any()):
            return torch.where(owners == NONE, slices, owners)
    return owners
