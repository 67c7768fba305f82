"""Curvature-aware optimizers for any PyTorch model, on one engine for per-sample quantities."""

from curvopt.api import compute, record
from curvopt.compiled import compile
from curvopt.engine.result import Result
from curvopt.errors import CurvoptError, SlowPathWarning
from curvopt.jacobians import (
    batch_hessian,
    batch_hessian_diag,
    batch_jacobian,
    empirical_ntk,
    param_jacobian,
)
from curvopt.ops.registry import register_rule
from curvopt.optim import DPSGD, DiagGGNOptimizer, DPAdam, PolarOptimizer, VarianceAdaptiveSGD
from curvopt.products import ggn_vector_product, hessian_vector_product
from curvopt.quantities import (
    KFAC,
    KFLR,
    BatchDiagGGNExact,
    BatchDiagGGNMC,
    BatchDiagHessian,
    BatchGrad,
    BatchL2Grad,
    BlockGGN,
    BlockHessian,
    ClippedGradSum,
    DiagGGNExact,
    DiagGGNMC,
    DiagHessian,
    DiagHessianMC,
    EmpiricalFisher,
    GGNGram,
    GGNQuadratic,
    GradGram,
    Gradient,
    Quantity,
    SqrtGGNExact,
    SqrtGGNMC,
    Structures,
    SumGradSquared,
    Variance,
)
from curvopt.verify import verify

__version__ = "0.1.0"

__all__ = [
    "DPSGD",
    "KFAC",
    "KFLR",
    "BatchDiagGGNExact",
    "BatchDiagGGNMC",
    "BatchDiagHessian",
    "BatchGrad",
    "BatchL2Grad",
    "BlockGGN",
    "BlockHessian",
    "ClippedGradSum",
    "CurvoptError",
    "DPAdam",
    "DiagGGNExact",
    "DiagGGNMC",
    "DiagGGNOptimizer",
    "DiagHessian",
    "DiagHessianMC",
    "EmpiricalFisher",
    "GGNGram",
    "GGNQuadratic",
    "GradGram",
    "Gradient",
    "PolarOptimizer",
    "Quantity",
    "Result",
    "SlowPathWarning",
    "SqrtGGNExact",
    "SqrtGGNMC",
    "Structures",
    "SumGradSquared",
    "Variance",
    "VarianceAdaptiveSGD",
    "batch_hessian",
    "batch_hessian_diag",
    "batch_jacobian",
    "compile",
    "compute",
    "empirical_ntk",
    "ggn_vector_product",
    "hessian_vector_product",
    "param_jacobian",
    "record",
    "register_rule",
    "verify",
]
