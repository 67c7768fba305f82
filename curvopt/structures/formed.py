"""Rows that are held as they were formed, a block of samples at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from curvopt.structures.base import Structure


class Formed(Structure):
    """Rows of another structure, formed once and kept, without a copy of them all in one tensor.

    Args:
        inner: the structure; nothing of it is kept.
    """

    def __init__(self, inner: Structure):
        self.shape, self.columns, self.samples = inner.shape, inner.columns, inner.samples
        self.parts = [*inner.blocks()]

    def blocks(self) -> Iterator[tuple[int, int, Tensor]]:
        return iter(self.parts)

    def rows(self, start: int, stop: int) -> Tensor:
        parts = [
            rows[:, max(0, start - first) : stop - first]
            for first, last, rows in self.parts
            if first < stop and start < last
        ]
        if not parts:
            return self.parts[0][2][:, :0]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)
