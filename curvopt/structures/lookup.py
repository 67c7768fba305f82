"""Rows of a table that were looked up: embeddings, known by their indices."""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

from torch import Size, Tensor

from curvopt.structures.base import Structure


class Touched(NamedTuple):
    """What each sample does to each table row that it touched.

    Attributes:
        values: ``[V, U, D]``, one per pair of a sample and a table row.
        samples: ``[U]``.
        indices: ``[U]``.
    """

    values: Tensor
    samples: Tensor
    indices: Tensor


class Lookup(Structure):
    """Rows ``sum_m e_index[m] (x) values[v, m]`` over the lookups m of a sample.

    Nothing of the table's size is made, but by `form` and where the result has it.

    Args:
        values: cotangents of the looked up rows, ``[V, M, D]``.
        samples: the sample of each lookup, ``[M]``.
        indices: the table row of each lookup, ``[M]``.
        count: number of samples N.
        shape: the table's shape, ``[R, *rest]`` with D elements in ``rest``.
    """

    def __init__(self, values: Tensor, samples: Tensor, indices: Tensor, count: int, shape: Size):
        self.values, self.lookup_samples, self.indices = values, samples, indices
        self.columns, self.samples, self.shape = len(values), count, shape

    @cached_property
    def touched(self) -> Touched:
        """The lookups, those of one table row by one sample summed."""
        size = self.shape[0]
        keys, inverse = (self.lookup_samples * size + self.indices).unique(return_inverse=True)
        values = scatter(self.values, inverse, len(keys), 1)
        samples = keys.div(size, rounding_mode="floor")
        return Touched(values, samples, keys - samples * size)

    def rows(self, start: int, stop: int) -> Tensor:
        chosen = (self.lookup_samples >= start) & (self.lookup_samples < stop)
        keys = (self.lookup_samples[chosen] - start) * self.shape[0] + self.indices[chosen]
        rows = scatter(self.values[:, chosen], keys, (stop - start) * self.shape[0], 1)
        return rows.reshape(self.columns, stop - start, *self.shape)

    def sum(self, weights: Tensor | None = None) -> Tensor:
        values = self.values.sum(0) if self.columns > 1 else self.values[0]
        if weights is not None:
            values = values * weights[self.lookup_samples].unsqueeze(-1)
        return scatter(values, self.indices, self.shape[0]).reshape(self.shape)

    def sum_of_squares(self) -> Tensor:
        values, _, indices = self.touched
        return scatter(values.square().sum(0), indices, self.shape[0]).reshape(self.shape)

    def batch_sum_of_squares(self) -> Tensor:
        values, samples, indices = self.touched
        keys = samples * self.shape[0] + indices
        squares = scatter(values.square().sum(0), keys, self.samples * self.shape[0])
        return squares.reshape(self.samples, *self.shape)

    def squared_norms(self) -> Tensor:
        return scatter(self.touched.values.square().sum(-1), self.touched.samples, self.samples, 1)

    def dots(self, direction: Tensor) -> Tensor:
        looked_up = direction.flatten(1)[self.indices]
        return scatter((self.values * looked_up).sum(-1), self.lookup_samples, self.samples, 1)


def scatter(values: Tensor, indices: Tensor, size: int, axis: int = 0) -> Tensor:
    """Add up the values whose index along an axis is the same."""
    shape = (*values.shape[:axis], size, *values.shape[axis + 1 :])
    return values.new_zeros(shape).index_add(axis, indices, values)
