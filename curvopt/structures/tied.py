"""Tied embeddings: one parameter that is looked up as a table and multiplied as a matrix."""

from __future__ import annotations

from torch import Tensor

from curvopt.structures.lookup import Lookup, scatter
from curvopt.structures.outer import Outer
from curvopt.structures.total import Total


class Tied(Total):
    """Lookups and products of one parameter: they meet in the table rows that were looked up.

    Only there do the squares have a cross term, ``(l + m)^2 = l^2 + m^2 + 2 l m``, so that no
    sample's gradient, as large as the vocabulary, is formed for it.

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
        return (squares + 2 * self.lookup.scatter(self.meeting().sum(0))).clamp(min=0)

    def batch_sum_of_squares(self) -> Tensor:
        squares = self.lookup.batch_sum_of_squares() + self.matrix.batch_sum_of_squares()
        meeting = self.meeting().sum(0).flatten(0, 1)
        keys = self.lookup.keys(0, self.samples)
        doubled = 2 * scatter(meeting, keys, self.samples * self.shape[0]).view_as(squares)
        return (squares + doubled).clamp(min=0)

    def squared_norms(self) -> Tensor:
        squares = self.lookup.squared_norms() + self.matrix.squared_norms()
        return (squares + 2 * self.meeting().sum((-2, -1))).clamp(min=0)
