"""Quantities of the generalized Gauss-Newton matrix (GGN) ``G = sum_n J_n^T H_n J_n``.

J_n is the Jacobian of the model's output for sample n in the parameters, H_n the Hessian of the
loss in that output. With a root ``H_n = sum_k s_nk s_nk^T`` the rows are ``J_n^T s_nk``.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from curvopt.quantities.base import ROOT, Context, Cotangent, Quantity
from curvopt.structures import Structure


def sketch(samples: int, estimator: str, generator: Generator | None) -> Cotangent:
    """The cotangent of a Monte-Carlo quantity, validated."""
    if not isinstance(samples, int) or samples < 1:
        raise ValueError(f"Invalid samples: {samples}")
    if estimator not in ("rademacher", "labels"):
        raise ValueError(f"Invalid estimator: {estimator!r} (use 'rademacher' or 'labels')")
    return Cotangent("sketch", samples, estimator, generator)


class DiagGGNExact(Quantity):
    """Exact diagonal of the GGN of the loss as written, ``[*p]``.

    One backward column per column of the loss Hessian's root: C - 1 for a softmax over C classes.
    """

    field = "diag_ggn_exact"
    cotangent = ROOT

    def reduce(self, structure: Structure, context: Context) -> Tensor:
        squares = structure.sum_of_squares()
        return squares if context.factor == 1 else squares * context.factor**2


class DiagGGNMC(DiagGGNExact):
    """Unbiased estimate of the GGN's diagonal from one backward column per sample: ``[*p]``.

    The columns of the exact root are combined with random signs, independent per sample; the
    square's expectation is the exact diagonal. Sampling labels from the model is unbiased too and
    costs the same, but its relative standard deviation is several times as large.

    Args:
        samples: number of independent estimates to average.
        estimator: ``"rademacher"`` (default), or ``"labels"`` as in the Monte-Carlo Fisher.
        generator: source of randomness, on the output's device; torch's global one by default.
    """

    field = "diag_ggn_mc"

    def __init__(
        self,
        samples: int = 1,
        estimator: str = "rademacher",
        generator: Generator | None = None,
    ):
        self.samples, self.estimator, self.generator = samples, estimator, generator
        self.cotangent = sketch(samples, estimator, generator)


class BatchDiagGGNExact(Quantity):
    """Exact diagonals of the GGN of each sample's own loss, ``[N, *p]``."""

    field = "diag_ggn_exact_batch"
    cotangent = ROOT
    own = True

    def reduce(self, structure: Structure, context: Context) -> Tensor:
        squares = structure.batch_sum_of_squares()
        return squares if context.factor == 1 else squares * context.factor**2


class BatchDiagGGNMC(BatchDiagGGNExact):
    """Unbiased estimates of the GGN's diagonal of each sample's own loss, ``[N, *p]``.

    Args:
        samples: number of independent estimates to average.
        estimator: ``"rademacher"`` (default), or ``"labels"``.
        generator: source of randomness, on the output's device; torch's global one by default.
    """

    field = "diag_ggn_mc_batch"

    def __init__(
        self,
        samples: int = 1,
        estimator: str = "rademacher",
        generator: Generator | None = None,
    ):
        self.samples, self.estimator, self.generator = samples, estimator, generator
        self.cotangent = sketch(samples, estimator, generator)


class SqrtGGNExact(Quantity):
    """Exact root of the GGN, ``[K, N, *p]`` with ``sum_kn V_kn V_kn^T = G``."""

    field = "sqrt_ggn_exact"
    cotangent = ROOT

    def reduce(self, structure: Structure, context: Context) -> Tensor:
        rows = structure.form()
        return rows if context.factor == 1 else rows * context.factor

    def combine(self, before: Tensor, part: Tensor) -> Tensor:
        return torch.cat([before, part])


class SqrtGGNMC(SqrtGGNExact):
    """Random root of the GGN, ``[samples, N, *p]``, whose square is the GGN in expectation.

    Args:
        samples: number of columns per sample.
        estimator: ``"rademacher"`` (default), or ``"labels"``.
        generator: source of randomness, on the output's device; torch's global one by default.
    """

    field = "sqrt_ggn_mc"

    def __init__(
        self,
        samples: int = 1,
        estimator: str = "rademacher",
        generator: Generator | None = None,
    ):
        self.samples, self.estimator, self.generator = samples, estimator, generator
        self.cotangent = sketch(samples, estimator, generator)
