"""Quantities: cotangent x reduction, one class each."""

from curvopt.quantities.base import Quantity
from curvopt.quantities.first_order import (
    BatchGrad,
    BatchL2Grad,
    ClippedGradSum,
    Gradient,
    SumGradSquared,
    Variance,
)
from curvopt.quantities.ggn import (
    BatchDiagGGNExact,
    BatchDiagGGNMC,
    DiagGGNExact,
    DiagGGNMC,
    SqrtGGNExact,
    SqrtGGNMC,
)
from curvopt.quantities.hessian import BatchDiagHessian, BlockHessian, DiagHessian, DiagHessianMC
from curvopt.quantities.kronecker import KFAC, KFLR
from curvopt.quantities.products import BlockGGN, EmpiricalFisher, GGNGram, GGNQuadratic, GradGram
from curvopt.quantities.raw import Structures

__all__ = [
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
    "DiagGGNExact",
    "DiagGGNMC",
    "DiagHessian",
    "DiagHessianMC",
    "EmpiricalFisher",
    "GGNGram",
    "GGNQuadratic",
    "GradGram",
    "Gradient",
    "Quantity",
    "SqrtGGNExact",
    "SqrtGGNMC",
    "Structures",
    "SumGradSquared",
    "Variance",
]
