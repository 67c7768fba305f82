"""Optimizers that pull quantities from the engine inside ``step``."""

from curvopt.optim.diag_ggn import DiagGGNOptimizer
from curvopt.optim.dp_adam import DPAdam
from curvopt.optim.dp_sgd import DPSGD
from curvopt.optim.noise import Noise
from curvopt.optim.polar import PolarOptimizer
from curvopt.optim.variance_adaptive import VarianceAdaptiveSGD

__all__ = ["DPSGD", "DPAdam", "DiagGGNOptimizer", "Noise", "PolarOptimizer", "VarianceAdaptiveSGD"]
