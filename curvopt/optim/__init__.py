"""Optimizers that pull quantities from the engine inside ``step``."""

from curvopt.optim.diag_ggn import DiagGGNOptimizer

__all__ = ["DiagGGNOptimizer"]
