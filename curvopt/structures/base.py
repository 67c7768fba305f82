"""What every structure can do, from one method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from copy import copy
from typing import Any

import torch
from torch import Size, Tensor

from curvopt.errors import CurvoptError
from curvopt.structures.kronecker import Factors

# Elements of the largest parameter whose whole curvature block is formed: 64 MiB of float32.
DENSE_BLOCK = 1 << 12
# Elements of a block of formed rows: 2 MiB of float32, so that a block stays in a core's cache.
BLOCK = 1 << 19


class Structure(ABC):
    """Per-sample gradients of one parameter, known without being formed.

    Row ``(v, n)`` is the gradient of one parameter for cotangent column v (of V) and sample n (of
    N). A subclass gives `rows`; every reduction below follows from it. A faster override must
    return the same numbers.

    Attributes:
        shape: the parameter's shape.
        columns: V.
        samples: N.
        use: the one use of the parameter that this is about, if it is the only one.
    """

    shape: Size
    columns: int
    samples: int
    use: object = None

    @abstractmethod
    def rows(self, start: int, stop: int) -> Tensor:
        """Form the rows of samples ``start`` to ``stop``: ``[V, stop - start, *shape]``."""

    def form(self) -> Tensor:
        """All rows, ``[V, N, *shape]``."""
        return self.rows(0, self.samples)

    def take(self, samples: Sequence[int]) -> Structure:
        """The structure of some samples alone.

        Args:
            samples: their indices.
        """
        from curvopt.structures.dense import Dense

        return Dense(torch.cat([self.rows(n, n + 1) for n in samples], 1))

    def _taken(self, samples: Sequence[int], **fields: Any) -> Structure:
        taken = copy(self)
        vars(taken).update(fields, samples=len(samples))
        return taken

    def block(self) -> int:
        """Samples whose rows are formed at a time: as many as fit the cache, at least one."""
        return max(1, BLOCK // max(1, self.columns * self.shape.numel()))

    def blocks(self) -> Iterator[tuple[int, int, Tensor]]:
        """Form the rows a block of samples at a time: ``(start, stop, rows)``."""
        size = self.block()
        for start in range(0, max(1, self.samples), size):  # an empty batch is one empty block
            stop = min(start + size, self.samples)
            yield start, stop, self.rows(start, stop)

    def sum(self, weights: Tensor | None = None) -> Tensor:
        """Weighted sum over columns and samples, ``sum_vn w_n row_vn``: ``[*shape]``.

        Args:
            weights: ``[N]``; ones by default.
        """
        return _accumulate(
            rows.sum((0, 1))
            if weights is None
            else torch.tensordot(weights[start:stop], rows.sum(0), 1)
            for start, stop, rows in self.blocks()
        )

    def sum_of_squares(self) -> Tensor:
        """Elementwise ``sum_vn row_vn^2``: ``[*shape]``."""
        return _accumulate(rows.square().sum((0, 1)) for _, _, rows in self.blocks())

    def moments(self, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        """`sum` and `sum_of_squares` of the rows times ``scale``."""
        total, squares = self.sum(), self.sum_of_squares()
        return (total, squares) if scale == 1 else (total * scale, squares * scale**2)

    def batch_sum_of_squares(self) -> Tensor:
        """Elementwise ``sum_v row_vn^2`` of every sample: ``[N, *shape]``."""
        return self._collected((rows * rows).sum(0) for _, _, rows in self.blocks())

    def _collected(self, parts: Iterator[Tensor], axis: int = 0) -> Tensor:
        """Blocks of samples put together, each freed as the next one comes."""
        result, start = None, 0
        for part in parts:
            if part.requires_grad:
                return torch.cat([part, *parts], axis)
            if result is None:
                shape = list(part.shape)
                shape[axis] = self.samples
                result = part.new_empty(shape)
            result.narrow(axis, start, part.shape[axis]).copy_(part)
            start += part.shape[axis]
        assert result is not None  # there is always a block
        return result

    def cross(self, other: Structure, batch: bool = False) -> Tensor:
        """Elementwise ``sum_v row_vn * other_vn``, ``[N, *shape]`` if batch, else summed over n.

        Args:
            other: cotangents of another kind at the same use.
            batch: keep the samples apart.
        """
        parts = (rows * other.rows(start, stop) for start, stop, rows in self.blocks())
        if batch:
            return torch.cat([part.sum(0) for part in parts])
        return _accumulate(part.sum((0, 1)) for part in parts)

    def squared_norms(self) -> Tensor:
        """``|row_vn|^2``: ``[V, N]``."""
        return torch.cat([squared_norm(rows, 2) for _, _, rows in self.blocks()], 1)

    def settled(self) -> Structure:
        """The same structure, for `squared_norms` and then `sum`.

        Its rows are formed where that saves work and takes little more memory than their factors.
        """
        return self

    def dots(self, direction: Tensor) -> Tensor:
        """Inner products ``<row_vn, direction>``: ``[V, N]``.

        Args:
            direction: a tensor of the parameter's shape.
        """
        flat = direction.flatten()
        return torch.cat(
            [rows.reshape(*rows.shape[:2], -1) @ flat for _, _, rows in self.blocks()], 1
        )

    def weighted(self, weights: Tensor) -> Tensor:
        """``sum_vn w_vn row_vn``, the transpose of `dots`: ``[*shape]``.

        Args:
            weights: ``[V, N]``.
        """
        return _accumulate(
            torch.tensordot(weights[:, start:stop], rows, 2) for start, stop, rows in self.blocks()
        )

    def gram(self, other: Structure) -> Tensor:
        """Inner products ``<row_vn, other_um>``: ``[V, N, U, M]``.

        Args:
            other: a structure of the same parameter, for the same or other cotangents.
        """
        flat = other.form().reshape(other.columns, other.samples, -1)
        return torch.cat(
            [
                torch.tensordot(rows.reshape(*rows.shape[:2], -1), flat, dims=([2], [2]))
                for _, _, rows in self.blocks()
            ],
            1,
        )

    def kronecker(
        self, *, reduce: bool = False, bias: bool = False, inputs: bool = True
    ) -> Factors:
        """Kronecker factors of ``sum_vn row_vn row_vn^T``: the exact block, if nothing is cheaper.

        Args:
            reduce: sum over a sample's tokens first, instead of taking them for samples.
            bias: with a constant input, whose column is that of a bias (matrices only).
            inputs: with the factor of the inputs, which is the same for all columns; else empty.

        Raises:
            CurvoptError: the block has no Kronecker factors and is too large to form.
        """
        if self.shape.numel() > DENSE_BLOCK:
            raise CurvoptError(
                "the parameter is used in a way that has no Kronecker factors, and its block of "
                f"{self.shape.numel()}^2 elements is too large to form: leave it out of params, or "
                "ask for DiagGGNExact"
            )
        flat = (rows.reshape(-1, self.shape.numel()) for _, _, rows in self.blocks())
        return Factors([_accumulate(rows.mT @ rows for rows in flat)])


def squared_norm(tensor: Tensor, keep: int) -> Tensor:
    """Sum of squares over all but the first ``keep`` axes, differentiable at zero."""
    flat = tensor.flatten(keep) if tensor.ndim > keep else tensor.unsqueeze(-1)
    if tensor.requires_grad:
        return flat.square().sum(-1)
    return torch.linalg.vector_norm(flat, dim=-1).square()  # three times as fast


def _accumulate(parts: Iterator[Tensor]) -> Tensor:
    total = next(parts)
    for part in parts:
        total = total + part
    return total


def scale_smaller(left: Tensor, right: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of a product, the smaller one times the samples' weights ``[N]``."""
    if left.numel() <= right.numel():
        return left * weights.view(-1, *[1] * (left.ndim - 1)), right
    return left, right * weights.view(-1, *[1] * (right.ndim - 1))


def sum_tensors(tensors: list[Tensor]) -> Tensor:
    """Sum of tensors of one shape."""
    result = tensors[0]
    for tensor in tensors[1:]:
        result = result + tensor
    return result
