"""Kronecker factors of a curvature block."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class Factors(tuple[Tensor, ...]):
    """Factors whose Kronecker product, in their order, approximates the block of ``p.flatten()``.

    A factor is a matrix ``[D, D]``, a diagonal ``[D]``, or ``[G, D, D]`` for G groups, whose
    products are the diagonal blocks. One factor alone is the exact block.

    Attributes:
        outputs: which factor belongs to the outputs; it carries the curvature of the loss.
    """

    outputs: int

    def __new__(cls, factors: Iterable[Tensor], outputs: int = 0) -> Factors:
        """Factors, and which of them belongs to the outputs."""
        self = super().__new__(cls, factors)
        self.outputs = outputs
        return self

    def scaled(self, factor: float) -> Factors:
        """The factors of the block times a number."""
        return self.replaced(self[self.outputs] * factor)

    def added(self, other: Factors) -> Factors:
        """The factors with further columns of the loss Hessian's root."""
        return self.replaced(self[self.outputs] + other[self.outputs])

    def replaced(self, output: Tensor) -> Factors:
        """The factors with another one for the outputs."""
        return Factors(
            (output if i == self.outputs else f for i, f in enumerate(self)), self.outputs
        )

    def dense(self) -> Tensor:
        """The block ``[P, P]`` that the factors stand for, P the number of elements."""
        matrices = [torch.diag(factor) if factor.ndim == 1 else factor for factor in self]
        groups = len(matrices[0]) if matrices[0].ndim == 3 else 0
        if groups:
            parts = (Factors(m[g] for m in matrices).dense() for g in range(groups))
            return torch.block_diag(*parts)
        product = matrices[0]
        for matrix in matrices[1:]:
            product = torch.kron(product, matrix)
        return product
