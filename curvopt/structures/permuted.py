"""A structure whose parameter has its axes in another order."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Size, Tensor

from curvopt.structures.base import Structure


class Permuted(Structure):
    """Rows of another structure with the parameter's axes permuted.

    Args:
        inner: the structure.
        order: axis i of the parameter is axis ``order[i]`` of the inner shape.
        shape: the parameter's shape, which may have further axes of size 1.
    """

    def __init__(self, inner: Structure, order: list[int], shape: Size):
        self.inner, self.order, self.shape = inner, order, shape
        self.columns, self.samples = inner.columns, inner.samples

    def _permute(self, tensor: Tensor, lead: int) -> Tensor:
        tensor = tensor.permute(*range(lead), *(lead + axis for axis in self.order))
        return tensor.reshape(*tensor.shape[:lead], *self.shape)

    def rows(self, start: int, stop: int) -> Tensor:
        return self._permute(self.inner.rows(start, stop), 2)

    def sum(self, weights: Tensor | None = None) -> Tensor:
        return self._permute(self.inner.sum(weights), 0)

    def sum_of_squares(self) -> Tensor:
        return self._permute(self.inner.sum_of_squares(), 0)

    def moments(self, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        total, scatter = self.inner.moments(scale)
        return self._permute(total, 0), self._permute(scatter, 0)

    def batch_sum_of_squares(self) -> Tensor:
        return self._permute(self.inner.batch_sum_of_squares(), 1)

    def gauge(self) -> tuple[Tensor, Tensor | None]:
        return self.inner.gauge()

    def reach(self) -> Tensor | None:
        return self.inner.reach()

    def wide(self, samples: Sequence[int]) -> Tensor:
        return self._permute(self.inner.wide(samples), 2)

    def weighted(self, weights: Tensor) -> Tensor:
        return self._permute(self.inner.weighted(weights), 0)

    def gram(self, other: Structure) -> Tensor:
        if isinstance(other, Permuted) and other.order == self.order:
            return self.inner.gram(other.inner)
        return super().gram(other)

    def settled(self) -> Structure:
        return Permuted(self.inner.settled(), self.order, self.shape)

    def rank_one(self, a: Tensor, b: Tensor) -> Tensor:
        if self.order != [1, 0] or len(self.shape) != 2:
            return super().rank_one(a, b)
        return self.inner.rank_one(b, a)  # a matrix, transposed

    def dots(self, direction: Tensor) -> Tensor:
        inverse = sorted(range(len(self.order)), key=self.order.__getitem__)
        permuted = direction.reshape([self.inner.shape[axis] for axis in self.order])
        return self.inner.dots(permuted.permute(inverse))
