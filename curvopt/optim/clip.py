"""How the gradients of a batch are clipped."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from curvopt.privacy.checks import require
from curvopt.quantities import ClippedGradSum

Clipping = Literal["flat", "per_layer", "automatic"]


class Clip(ClippedGradSum):
    """The clipped sum of a batch; it keeps the norms of the samples, `norms`.

    Attributes:
        kept: ``[N]``, the samples that count; None where all do.

    Args:
        max_norm: C.
        mode: ``"flat"``, ``"per_layer"`` or ``"automatic"``.
    """

    kept: Tensor | None = None

    def __init__(self, max_norm: float, mode: Clipping):
        super().__init__(max_norm)
        self.mode = mode

    def weights(self, squares: Tensor) -> Tensor:
        """As in the base class, by mode."""
        self.norms = norms = squares.sum(0).sqrt()
        if self.mode == "automatic":
            factors = self.max_norm / (norms + 0.01)
        elif self.mode == "flat":
            factors = (self.max_norm / (norms + 1e-6)).clamp(max=1)
        else:
            share = self.max_norm / len(squares) ** 0.5
            factors = (share / (squares.sqrt() + 1e-6)).clamp(max=1)
        counts = norms.isfinite() if self.kept is None else norms.isfinite() & self.kept
        return torch.where(counts, factors, 0).expand_as(squares)


def check_norm(norm: float, clipping: str) -> float:
    """The clipping norm, or an error."""
    require(norm > 0, "max_grad_norm", norm, "must be positive")
    finite = clipping != "automatic" or norm < math.inf
    require(finite, "max_grad_norm", norm, "automatic clipping needs a finite one")
    return norm
