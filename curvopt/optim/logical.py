"""One logical batch of a private step: what its passes left, and what is made of them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from curvopt.dtypes import at_least_float32


@dataclass
class LogicalBatch:
    """What the recorded passes of one private step left.

    Attributes:
        sums: clipped sums per parameter; they become the private gradient in place.
        norms: ``[n]`` per pass, before clipping.
        penalties: gradients of the terms that hold no sample.
        grads: the private gradients, once the noise is drawn.
        lengths: ``[N]``, the norms of all passes and processes.
        sizes: what `check_sizes` keeps for the next batch.
        following: the clipping norm of the next step, where it adapts.
        accounted: the step is in the ledger.
    """

    sums: dict[Tensor, Tensor] = field(default_factory=dict)
    norms: list[Tensor] = field(default_factory=list)
    penalties: dict[Tensor, Tensor] = field(default_factory=dict)
    grads: dict[Tensor, Tensor] | None = None
    lengths: Tensor = field(default_factory=lambda: torch.zeros(0, device="cpu"))
    sizes: tuple[int, int] = (-1, 0)
    following: float | None = None
    accounted: bool = False

    @property
    def passes(self) -> int:
        """How many passes there were, empty ones too."""
        return len(self.norms)

    def add(
        self, sums: dict[Tensor, Tensor], norms: Tensor, penalties: dict[Tensor, Tensor]
    ) -> None:
        """Add a pass."""
        for mine, more in ((self.sums, sums), (self.penalties, penalties)):
            for p, part in more.items():
                mine[p] = mine[p].add_(part) if p in mine else part
        self.norms.append(norms)

    def joined_norms(self) -> Tensor:
        """The norms of all passes."""
        return torch.cat([part.to(self.norms[0].device) for part in self.norms])


def zeros_for(p: Tensor) -> Tensor:
    """The sum for a parameter that took no part."""
    dtype = at_least_float32(p.dtype)
    return torch.zeros_like(p, dtype=dtype, memory_format=torch.contiguous_format)
