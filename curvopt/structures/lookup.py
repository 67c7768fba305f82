"""Rows of a table that were looked up: embeddings, known by their indices."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Size, Tensor

from curvopt.looks import may_look
from curvopt.structures.base import Structure
from curvopt.structures.kronecker import Factors
from curvopt.structures.numerics import small_beside, widened


class Touched(NamedTuple):
    """What the samples do to the table rows that they touched: U pairs of sample and row.

    Attributes:
        values: ``[V, U, D]``.
        samples: ``[U]``.
        indices: ``[U]``.
        pairs: which pair each lookup belongs to, ``[N * M]``.
    """

    values: Tensor
    samples: Tensor
    indices: Tensor
    pairs: Tensor


class Lookup(Structure):
    """Rows ``sum_m e_index[n, m] (x) values[v, n, m]`` over the M lookups of a sample.

    Nothing of the table's size is made for a sample, except where the result has it.

    Args:
        values: cotangents of the looked up table rows, ``[V, N, M, D]``.
        indices: which table rows, ``[N, M]``; a lookup that does not count has value zero.
        shape: the table's shape, ``[R, *rest]`` with D elements in ``rest``.
    """

    def __init__(self, values: Tensor, indices: Tensor, shape: Size):
        self.values, self.indices, self.shape = values, indices, shape
        self.columns, self.samples = values.shape[:2]

    def keys(self, start: int, stop: int) -> Tensor:
        """Numbers of the pairs of sample and table row, ``[(stop - start) * M]``."""
        samples = torch.arange(stop - start, device=self.indices.device).unsqueeze(1)
        return (samples * self.shape[0] + self.indices[start:stop]).flatten()

    @cached_property
    def touched(self) -> Touched:
        """The lookups, those of one table row by one sample summed."""
        given = self.keys(0, self.samples)
        if may_look():
            keys, pairs = given.unique(return_inverse=True)
        else:  # as many pairs as there may be, so that no shape depends on values
            keys, pairs = _numbered(given)
        values = scatter(self.values.flatten(1, 2), pairs, len(keys), 1)
        samples = keys.div(self.shape[0], rounding_mode="floor")
        return Touched(values, samples, keys - samples * self.shape[0], pairs)

    def rows(self, start: int, stop: int) -> Tensor:
        values, keys = self.values[:, start:stop].flatten(1, 2), self.keys(start, stop)
        rows = scatter(values, keys, (stop - start) * self.shape[0], 1)
        return rows.reshape(self.columns, stop - start, *self.shape)

    def take(self, samples: Sequence[int]) -> Structure:
        at = list(samples)
        return Lookup(self.values[:, at], self.indices[at], self.shape)

    def sum(self, weights: Tensor | None = None) -> Tensor:
        values = self.values.sum(0) if self.columns > 1 else self.values[0]
        if weights is not None:
            values = values * weights.view(-1, 1, 1)
        return self.by_row(values)

    def by_row(self, values: Tensor) -> Tensor:
        """Add up values ``[N, M, D]`` of the lookups, by table row: ``[*shape]``."""
        return scatter(values.flatten(0, 1), self.indices.flatten(), self.shape[0]).view(self.shape)

    def sum_of_squares(self) -> Tensor:
        values, _, indices, _ = self.touched
        return scatter(values.square().sum(0), indices, self.shape[0]).view(self.shape)

    def moments(self, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        (values, _, indices, _), total = self.touched, self.sum()
        number = self.columns * self.samples
        mean = total.view(self.shape[0], -1) / max(1, number)
        around = scatter((values - mean[indices]).square().sum(0), indices, self.shape[0])
        touched = scatter(values.new_ones(len(indices), 1), indices, self.shape[0]) * self.columns
        around = (around + (number - touched) * mean.square()).view(self.shape)
        return (total, around) if scale == 1 else (total * scale, around * scale**2)

    def batch_sum_of_squares(self) -> Tensor:
        values, samples, indices, _ = self.touched
        keys = samples * self.shape[0] + indices
        squares = scatter(values.square().sum(0), keys, self.samples * self.shape[0])
        return squares.view(self.samples, *self.shape)

    def gauge(self) -> tuple[Tensor, Tensor | None]:
        values, samples, _, _ = self.touched
        squares = scatter(values.square().sum(-1), samples, self.samples, 1)
        if may_look() and values.shape[1] == self.indices.numel():  # none twice
            return squares, None
        return squares, small_beside(squares, self.reach())

    def reach(self) -> Tensor:
        touched, lengths = self.touched, torch.linalg.vector_norm(self.values.detach(), dim=-1)
        lengths = scatter(lengths.flatten(1), touched.pairs, len(touched.samples), 1)
        return scatter(lengths.square(), touched.samples, self.samples, 1).sqrt()

    def wide(self, samples: Sequence[int]) -> Tensor:
        at = list(samples)
        return Lookup(widened(self.values[:, at]), self.indices[at], self.shape).form()

    def rank_one(self, a: Tensor, b: Tensor) -> Tensor:
        return (self.values @ b * a[self.indices]).sum()

    def dots(self, direction: Tensor) -> Tensor:
        looked_up = direction.reshape(self.shape[0], -1)[self.indices]
        return (self.values * looked_up).sum((-2, -1))

    def weighted(self, weights: Tensor) -> Tensor:
        return self.by_row(torch.einsum("vn,vnmd->nmd", weights, self.values))

    def kronecker(
        self, *, reduce: bool = False, bias: bool = False, inputs: bool = True
    ) -> Factors:
        """As in `Outer.kronecker`, lookups for tokens: one-hot inputs make a diagonal factor.

        Always expanded: a mean of one-hot inputs would make a matrix of the table's size.
        """
        ones = self.values.new_ones(self.indices.numel())
        counts = scatter(ones, self.indices.flatten(), self.shape[0]) / max(1, self.samples)
        values = self.values.flatten(0, 2)
        outputs = values.mT @ values / max(1, self.indices.shape[1])
        return Factors((counts, outputs), outputs=1)


def _numbered(keys: Tensor) -> tuple[Tensor, Tensor]:
    """As ``keys.unique(return_inverse=True)``, with zeros for the keys that others are equal to."""
    ordered, order = keys.sort()
    news = (ordered[1:] != ordered[:-1]).long()
    number = torch.cat([torch.zeros_like(ordered[:1]), news]).cumsum(0)
    inverse = torch.zeros_like(number).scatter(0, order, number)
    return torch.zeros_like(ordered).scatter(0, number, ordered), inverse


def scatter(values: Tensor, indices: Tensor, size: int, axis: int = 0) -> Tensor:
    """Add up the values whose index along an axis is the same."""
    shape = (*values.shape[:axis], size, *values.shape[axis + 1 :])
    return values.new_zeros(shape).index_add(axis, indices, values)
