"""Columns that were folded into the sample axis."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from curvopt.structures.base import Structure


class Folded(Structure):
    """V columns of N samples, from a structure with one column of N * V samples.

    For ops whose rows are not linear in a left factor that could carry the columns.

    Args:
        inner: the structure, a sample's columns one after the other.
        columns: V.
    """

    def __init__(self, inner: Structure, columns: int):
        self.inner, self.columns, self.shape = inner, columns, inner.shape
        self.samples = inner.samples // columns

    def _unfold(self, values: Tensor) -> Tensor:
        """``[N * V, ...]`` as ``[V, N, ...]``."""
        return values.unflatten(0, (-1, self.columns)).transpose(0, 1)

    def rows(self, start: int, stop: int) -> Tensor:
        return self._unfold(self.inner.rows(start * self.columns, stop * self.columns)[0])

    def sum(self, weights: Tensor | None = None) -> Tensor:
        return self.inner.sum(None if weights is None else weights.repeat_interleave(self.columns))

    def sum_of_squares(self) -> Tensor:
        return self.inner.sum_of_squares()

    def moments(self, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        return self.inner.moments(scale)

    def gauge(self) -> tuple[Tensor, Tensor | None]:
        squares, doubt = self.inner.gauge()
        return self._unfold(squares[0]), None if doubt is None else self._unfold(doubt[0])

    def reach(self) -> Tensor | None:
        reach = self.inner.reach()
        return None if reach is None else self._unfold(reach[0])

    def wide(self, samples: Sequence[int]) -> Tensor:
        inner = [n * self.columns + v for n in samples for v in range(self.columns)]
        return self._unfold(self.inner.wide(inner)[0])

    def rank_one(self, a: Tensor, b: Tensor) -> Tensor:
        return self.inner.rank_one(a, b)

    def dots(self, direction: Tensor) -> Tensor:
        return self._unfold(self.inner.dots(direction)[0])
