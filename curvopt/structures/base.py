"""What every structure can do, from one method; formed rows, and rows formed more exactly."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from copy import copy
from functools import partial
from typing import Any

import torch
from torch import Size, Tensor

from curvopt.errors import CurvoptError
from curvopt.looks import may_look, refuse
from curvopt.structures.kronecker import Factors
from curvopt.structures.numerics import accumulate, small_beside, squared_norm

# Elements of the largest parameter whose whole curvature block is formed: 64 MiB of float32.
DENSE_BLOCK = 1 << 12
# Elements of a block of formed rows: 2 MiB of float32, so that a block stays in a core's cache.
BLOCK = 1 << 19
# A variance is in doubt, likewise, where it is this share of the second moment.
SPREAD = 2e4

UNUSUAL = (
    "a sample's gradient is not finite, or too small beside its terms for its norm to be exact"
)


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
        return accumulate(
            rows.sum((0, 1))
            if weights is None
            else torch.tensordot(weights[start:stop], _over_columns(rows), 1)
            for start, stop, rows in self.blocks()
        )

    def sum_of_squares(self) -> Tensor:
        """Elementwise ``sum_vn row_vn^2``: ``[*shape]``."""
        return accumulate(rows.square().sum((0, 1)) for _, _, rows in self.blocks())

    def moments(self, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        """`sum` and scatter, ``sum_vn (row_vn - mean)^2`` elementwise, of the rows times ``scale``.

        However small the scatter is beside the mean: it is no difference of moments.
        """
        # Shifted by the mean of some rows, which is as near to the others' as they are to it.
        pilot, number = None, 0
        for _, _, rows in self.blocks():
            rows = rows.flatten(0, 1)
            if pilot is None:
                pilot = rows.detach().sum(0) / max(1, len(rows))
                total, squares = torch.zeros_like(pilot), torch.zeros_like(pilot)
            apart, number = rows - pilot, number + len(rows)
            total, squares = total + apart.sum(0), squares + (apart * apart).sum(0)
        assert pilot is not None  # there is always a block
        scatter = (squares - total * total / max(1, number)).clamp(min=0)
        total = total + number * pilot
        return (total, scatter) if scale == 1 else (total * scale, scatter * scale**2)

    def scatter(self, total: Tensor) -> Tensor:
        """The scatter of `moments`, where the sum over columns and samples is known."""
        return self.moments()[1]

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
        return accumulate(part.sum((0, 1)) for part in parts)

    def squared_norms(self) -> Tensor:
        """``|row_vn|^2``, ``[V, N]``, as exact as those of formed rows.

        The host looks whether any is in doubt, which on an accelerator waits for the device.
        """
        squares, doubt = self.gauge()
        if doubt is not None and not may_look():
            refuse(doubt, partial(CurvoptError, UNUSUAL))
        elif doubt is not None and doubt.any():
            return Mended(self, doubt).squared_norms()
        return squares

    def gauge(self) -> tuple[Tensor, Tensor | None]:
        """Squared norms by the cheapest way, ``[V, N]``, and which of them are in doubt.

        In doubt is a row that is so small beside its terms that rounding could matter, in its norm
        or in a weighted `sum`; None where no row can be. `Mended` makes both right.
        """
        squares = torch.cat([squared_norm(rows, 2) for _, _, rows in self.blocks()], 1)
        reach = self.reach()
        return squares, None if reach is None else small_beside(squares, reach)

    def reach(self) -> Tensor | None:
        """Sum of the lengths of the terms that `sum` adds up in a row, ``[V, N]``, or a bound.

        None where a row is held as one term.
        """
        return None

    def wide(self, samples: Sequence[int]) -> Tensor:
        """Form the rows of some samples in double precision: ``[V, n, *shape]``.

        Args:
            samples: their indices.
        """
        return self.take(samples).form()

    def settled(self) -> Structure:
        """The same structure, for `squared_norms` and then `sum`.

        Its rows are formed where that saves work and takes little more memory than their factors.
        """
        return self

    def rank_one(self, a: Tensor, b: Tensor) -> Tensor:
        """``a^T (sum_vn row_vn) b``, a number, the parameter seen as a matrix: scalars as 1 x 1.

        Args:
            a: one number per element of the first axis.
            b: one per element of the others, in order; one alone where there are none.
        """
        return a @ (self.sum().reshape(len(a), len(b)) @ b)

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
        return accumulate(
            torch.tensordot(weights[:, start:stop], rows, 2) for start, stop, rows in self.blocks()
        )

    def gram(self, other: Structure) -> Tensor:
        """Inner products ``<row_vn, other_um>``: ``[V, N, U, M]``.

        Args:
            other: a structure of the same parameter, for the same or other cotangents.
        """
        size = self.shape.numel()  # not -1, for an empty batch
        flat = other.form().reshape(other.columns, other.samples, size)
        return torch.cat(
            [
                torch.tensordot(rows.reshape(*rows.shape[:2], size), flat, dims=([2], [2]))
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
        return Factors([accumulate(rows.mT @ rows for rows in flat)])


def _over_columns(rows: Tensor) -> Tensor:
    return rows[0] if len(rows) == 1 else rows.sum(0)


class Dense(Structure):
    """Rows held as one tensor.

    Args:
        values: ``[V, N, *shape]``.
    """

    def __init__(self, values: Tensor):
        self.columns, self.samples = values.shape[:2]
        self.shape = values.shape[2:]
        self.values = values

    def rows(self, start: int, stop: int) -> Tensor:
        return self.values[:, start:stop]

    def form(self) -> Tensor:
        return self.values

    def sum(self, weights: Tensor | None = None) -> Tensor:
        values = _over_columns(self.values)
        return values.sum(0) if weights is None else torch.tensordot(weights, values, 1)


class Mended(Structure):
    """Another structure, some of whose samples are formed in double precision wherever they count.

    Their norms are then right, and what they add to a weighted sum is as long as the norms say: a
    sum over all samples would round each term of a row, and such a row is small beside its terms.

    Args:
        inner: the structure.
        doubt: ``[V, N]``, true where a norm is in doubt (`Structure.gauge`); read by the host.
    """

    def __init__(self, inner: Structure, doubt: Tensor):
        self.inner, self.shape = inner, inner.shape
        self.columns, self.samples = inner.columns, inner.samples
        self.at = doubt.any(0).nonzero().flatten()

    def _mended(self, at: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Samples and their rows, a block at a time."""
        for part in at.split(self.inner.block()) if len(at) else ():
            yield part, self.inner.wide(part.tolist())

    def rows(self, start: int, stop: int) -> Tensor:
        rows = self.inner.rows(start, stop)
        for at, mended in self._mended(self.at[(self.at >= start) & (self.at < stop)]):
            rows = rows.index_copy(1, at - start, mended.to(rows.dtype))
        return rows

    def sum(self, weights: Tensor | None = None) -> Tensor:
        if weights is None:
            return self.inner.sum()
        total = self.inner.sum(weights.index_fill(0, self.at, 0))
        for at, rows in self._mended(self.at):
            added = torch.tensordot(weights[at].to(rows), _over_columns(rows), 1)
            total = total + added.to(total.dtype)
        return total

    def rank_one(self, a: Tensor, b: Tensor) -> Tensor:
        return self.inner.rank_one(a, b)

    def gauge(self) -> tuple[Tensor, Tensor | None]:
        squares, _ = self.inner.gauge()
        for at, rows in self._mended(self.at):
            squares = squares.index_copy(1, at, squared_norm(rows, 2).to(squares.dtype))
        return squares, None
