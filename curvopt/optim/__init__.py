"""Optimizers that pull quantities from the engine inside ``step``."""

from curvopt.optim.diag_ggn import DiagGGNOptimizer
from curvopt.optim.dp_sgd import DPSGD, DPAdam
from curvopt.optim.variance_adaptive import Noise, VarianceAdaptiveSGD

__all__ = ["DPSGD", "DPAdam", "DiagGGNOptimizer", "Noise", "VarianceAdaptiveSGD"]
