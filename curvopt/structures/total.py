"""Several uses of one parameter, and parameters behind a derived value."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from curvopt.dtypes import at_least_float32
from curvopt.structures.base import Structure
from curvopt.structures.kronecker import Factors
from curvopt.structures.lookup import Lookup
from curvopt.structures.numerics import cancels, sum_tensors
from curvopt.structures.outer import Outer


class Total(Structure):
    """Sum of the structures of all uses of one parameter, cross terms included.

    Args:
        parts: structures of one shape, for the same columns and samples.
    """

    def __init__(self, parts: list[Structure]):
        self.parts = parts
        self.shape, self.columns, self.samples = parts[0].shape, parts[0].columns, parts[0].samples

    def rows(self, start: int, stop: int) -> Tensor:
        return sum_tensors([part.rows(start, stop) for part in self.parts])

    def sum(self, weights: Tensor | None = None) -> Tensor:
        return sum_tensors([part.sum(weights) for part in self.parts])

    def reach(self) -> Tensor:
        reaches = [(part, part.reach()) for part in self.parts]
        return sum_tensors(
            [part.gauge()[0].detach().sqrt() if r is None else r for part, r in reaches]
        )

    def wide(self, samples: Sequence[int]) -> Tensor:
        return sum_tensors([part.wide(samples) for part in self.parts])

    def rank_one(self, a: Tensor, b: Tensor) -> Tensor:
        return sum_tensors([part.rank_one(a, b) for part in self.parts])

    def dots(self, direction: Tensor) -> Tensor:
        return sum_tensors([part.dots(direction) for part in self.parts])

    def weighted(self, weights: Tensor) -> Tensor:
        return sum_tensors([part.weighted(weights) for part in self.parts])


class Disjoint(Total):
    """Uses of separate parts of one parameter: no element has two uses, so no cross terms."""

    def sum_of_squares(self) -> Tensor:
        return sum_tensors([part.sum_of_squares() for part in self.parts])

    def moments(self, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        totals, scatters = zip(*(part.moments(scale) for part in self.parts), strict=True)
        return sum_tensors([*totals]), sum_tensors([*scatters])

    def batch_sum_of_squares(self) -> Tensor:
        return sum_tensors([part.batch_sum_of_squares() for part in self.parts])

    def gauge(self) -> tuple[Tensor, Tensor | None]:
        gauges = [part.gauge() for part in self.parts]
        doubts = [doubt for _, doubt in gauges if doubt is not None]
        squares = sum_tensors([squares for squares, _ in gauges])
        return squares, torch.stack(doubts).any(0) if doubts else None


class Tied(Total):
    """A parameter that is looked up as a table and multiplied as a matrix (tied embeddings).

    Lookups and products meet in the table rows that were looked up, and only there their squares
    have a cross term, ``(l + m)^2 = l^2 + m^2 + 2 l m``. For it no sample's gradient is formed,
    which would be as large as the vocabulary.

    Args:
        lookup: the parameter as a table.
        matrix: the parameter as a matrix, without groups.
    """

    def __init__(self, lookup: Lookup, matrix: Outer):
        super().__init__([lookup, matrix])
        self.lookup, self.matrix = lookup, matrix

    def meeting(self) -> Tensor:
        """Each lookup's value times the matrix's gradient in that table row, ``[V, N, M, D]``."""
        left, right = self.matrix.left[:, :, 0], self.matrix.right[:, 0]
        table, other = (right, left) if self.matrix.transposed else (left, right)
        indices = self.lookup.indices.unsqueeze(-2).expand(*table.shape[:-1], -1)
        return self.lookup.values * (table.gather(-1, indices).mT @ other)

    def sum_of_squares(self) -> Tensor:
        squares = self.lookup.sum_of_squares() + self.matrix.sum_of_squares()
        return (squares + 2 * self.lookup.by_row(self.meeting().sum(0))).clamp(min=0)

    def batch_sum_of_squares(self) -> Tensor:
        squares = self.lookup.batch_sum_of_squares() + self.matrix.batch_sum_of_squares()
        twice = Lookup(2 * self.meeting().sum(0, keepdim=True), self.lookup.indices, self.shape)
        return (squares + twice.form()[0]).clamp(min=0)

    def gauge(self) -> tuple[Tensor, Tensor | None]:
        gauges = [part.gauge() for part in self.parts]
        (lookups, _), (products, _) = gauges
        squares = lookups + products + 2 * self.meeting().sum((-2, -1))
        absolute = (lookups.detach().sqrt() + products.detach().sqrt()).square()
        doubts = [doubt for _, doubt in gauges if doubt is not None]
        return squares, torch.stack([cancels(squares, absolute), *doubts]).any(0)


class Pulled(Structure):
    """Rows of a derived value, pulled back to a parameter through the graph that made it.

    Args:
        inner: the structure of the derived value.
        value: the derived value, attached to the parameter.
        parameter: the parameter.
        isometry: the derived value only selects and rearranges elements of the parameter, each at
            most once, so that squares and norms are pulled back like the rows.
        create_graph: keep the pull-back differentiable.
    """

    def __init__(
        self,
        inner: Structure,
        value: Tensor,
        parameter: Tensor,
        *,
        isometry: bool = False,
        create_graph: bool = False,
    ):
        self.inner, self.value, self.parameter = inner, value, parameter
        self.isometry, self.create_graph = isometry, create_graph
        self.shape, self.columns, self.samples = parameter.shape, inner.columns, inner.samples

    @property
    def span(self) -> tuple[int, int]:
        """Elements of the parameter's storage among which the derived value lies."""
        last = sum((n - 1) * s for n, s in zip(self.value.shape, self.value.stride(), strict=True))
        start = int(self.value.storage_offset())
        return start, start + int(last) + 1

    def pull(self, rows: Tensor, lead: int) -> Tensor:
        """Pull back ``[*lead axes, *value.shape]`` to ``[*lead axes, *shape]``."""
        if not lead:
            return self._vjp(rows, batched=False)
        flat = rows.reshape(-1, *self.value.shape)
        return self._vjp(flat, batched=True).unflatten(0, rows.shape[:lead])

    def _weights(self, weights: Tensor) -> Tensor:
        """Weights in the type of the inner rows; the value may have another one than p."""
        return weights.to(at_least_float32(self.value.dtype))

    def _vjp(self, rows: Tensor, *, batched: bool) -> Tensor:
        (pulled,) = torch.autograd.grad(
            self.value,
            self.parameter,
            rows.to(self.value.dtype),
            retain_graph=True,
            create_graph=self.create_graph,
            is_grads_batched=batched,
        )
        return pulled

    def block(self) -> int:
        return min(super().block(), self.inner.block())

    def rows(self, start: int, stop: int) -> Tensor:
        return self.pull(self.inner.rows(start, stop), 2)

    def sum(self, weights: Tensor | None = None) -> Tensor:
        weights = None if weights is None else self._weights(weights)
        return self.pull(self.inner.sum(weights), 0)

    def sum_of_squares(self) -> Tensor:
        if self.isometry:
            return self.pull(self.inner.sum_of_squares(), 0)
        return super().sum_of_squares()

    def moments(self, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        if not self.isometry:
            return super().moments(scale)
        total, scatter = self.inner.moments(scale)
        return self.pull(total, 0), self.pull(scatter, 0)

    def batch_sum_of_squares(self) -> Tensor:
        if self.isometry:
            return self.pull(self.inner.batch_sum_of_squares(), 1)
        return super().batch_sum_of_squares()

    def cross(self, other: Structure, batch: bool = False) -> Tensor:
        if self.isometry and isinstance(other, Pulled):
            return self.pull(self.inner.cross(other.inner, batch), int(batch))
        return super().cross(other, batch)

    def gauge(self) -> tuple[Tensor, Tensor | None]:
        return self.inner.gauge() if self.isometry else super().gauge()

    def reach(self) -> Tensor | None:
        return self.inner.reach() if self.isometry else None

    def wide(self, samples: Sequence[int]) -> Tensor:
        return self.pull(self.inner.wide(samples), 2)

    def weighted(self, weights: Tensor) -> Tensor:
        return self.pull(self.inner.weighted(self._weights(weights)), 0)

    def gram(self, other: Structure) -> Tensor:
        if self.isometry and isinstance(other, Pulled):
            return self.inner.gram(other.inner)
        return super().gram(other)

    def kronecker(
        self, *, reduce: bool = False, bias: bool = False, inputs: bool = True
    ) -> Factors:
        value, parameter = self.value, self.parameter
        transposed = value.ndim == parameter.ndim == 2 and value.shape == parameter.mT.shape
        if self.isometry and transposed and value.stride() == parameter.mT.stride():
            factors = self.inner.kronecker(reduce=reduce, bias=bias, inputs=inputs)
            return Factors(reversed(factors), len(factors) - 1 - factors.outputs)
        return super().kronecker(reduce=reduce, bias=bias, inputs=inputs)


def total(parts: list[Structure]) -> Structure:
    """One structure for all uses of a parameter."""
    alike: dict[Hashable, list[Any]] = defaultdict(list)
    for part in parts:
        alike[_kind(part)].append(part)
    parts = [same[0] if len(same) == 1 else concatenate(same) for same in alike.values()]
    if len(parts) == 1:
        return parts[0]
    pulled = [part for part in parts if isinstance(part, Pulled)]
    if len(pulled) == len(parts) and _separate(pulled):
        return Disjoint(parts)
    lookups = [part for part in parts if isinstance(part, Lookup)]
    matrices = [part for part in parts if isinstance(part, Outer) and part.groups == 1]
    if len(parts) == 2 and lookups and matrices:
        return Tied(lookups[0], matrices[0])
    return Total(parts)


def _kind(part: Structure) -> Hashable:
    """What structures must have in common for their tokens to go one after the other."""
    if isinstance(part, Outer):
        return part.transposed, part.groups, part.outputs, part.inputs
    return Lookup if isinstance(part, Lookup) else id(part)


def concatenate(parts: list[Any]) -> Structure:
    """One structure for several of a kind: their tokens, one after the other."""
    first = parts[0]
    if isinstance(first, Lookup):
        values = torch.cat([part.values for part in parts], 2)
        return Lookup(values, torch.cat([part.indices for part in parts], 1), first.shape)
    left = torch.cat([part.left for part in parts], 3)
    right = torch.cat([part.right for part in parts], 2)
    return Outer(left, right, first.shape, transposed=first.transposed)


def _separate(parts: list[Pulled]) -> bool:
    """Whether the derived values are views of one parameter that share no element."""
    if not all(part.isometry and part.value._is_view() for part in parts):
        return False
    spans = sorted(part.span for part in parts)
    return all(before[1] <= after[0] for before, after in pairwise(spans))
