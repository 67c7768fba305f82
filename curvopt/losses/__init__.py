"""Losses that the engine knows: one file a family, registered by torch function."""

from curvopt.losses import (  # noqa: F401 (they register themselves)
    cross_entropy,
    elementwise,
    generic,
    handwritten,
)
from curvopt.losses.base import Loss
from curvopt.losses.registry import LOSSES, loss

__all__ = ["LOSSES", "Loss", "loss"]
