"""Quantities of the generalized Gauss-Newton matrix (GGN) ``G = sum_n J_n^T H_n J_n``.

J_n is the Jacobian of the model's output for sample n in the parameters, H_n the Hessian of the
loss in that output. With a root ``H_n = sum_k s_nk s_nk^T`` the rows are ``J_n^T s_nk``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from curvopt.quantities.base import Context, Cotangent, Quantity
from curvopt.structures import Structure


class _Exact(Quantity):
    """A quantity of the exact root.

    Args:
        subsample: indices of the samples to take, as if the loss were that of these alone; all by
            default.
    """

    def __init__(self, *, subsample: Sequence[int] | Tensor | None = None):
        self.cotangent = Cotangent("root", subsample=indices(subsample))


class _Sketch(Quantity):
    """A quantity of a random root.

    Args:
        samples: number of random columns per sample.
        estimator: ``"rademacher"`` (default), or ``"labels"``.
        generator: source of randomness, on the output's device; torch's global one by default.
        subsample: indices of the samples to take, as if the loss were that of these alone; all by
            default.
    """

    def __init__(
        self,
        samples: int = 1,
        estimator: str = "rademacher",
        generator: Generator | None = None,
        *,
        subsample: Sequence[int] | Tensor | None = None,
    ):
        if not isinstance(samples, int) or samples < 1:
            raise ValueError(f"Invalid samples: {samples}")
        if estimator not in ("rademacher", "labels"):
            raise ValueError(f"Invalid estimator: {estimator!r} (use 'rademacher' or 'labels')")
        self.samples, self.estimator, self.generator = samples, estimator, generator
        self.cotangent = Cotangent("sketch", samples, estimator, generator, indices(subsample))


def indices(subsample: Sequence[int] | Tensor | None) -> tuple[int, ...] | None:
    """Indices of samples, checked."""
    if subsample is None:
        return None
    chosen = tuple(int(index) for index in subsample)
    if not chosen or len(set(chosen)) < len(chosen) or min(chosen) < 0:
        raise ValueError(f"Invalid subsample: {chosen} (distinct indices of samples, from 0)")
    return chosen


class DiagGGNExact(_Exact):
    """Exact diagonal of the GGN of the loss as written, ``[*p]``.

    One backward column per column of the loss Hessian's root: C - 1 for a softmax over C classes.

    Args:
        subsample: indices of the samples to take, as if the loss were computed from these alone
            (a mean over them, a sum over them); all by default.
    """

    field = "diag_ggn_exact"

    def reduce(self, structure: Structure, context: Context) -> Tensor:
        squares = structure.sum_of_squares()
        return squares if context.factor == 1 else squares * context.factor**2


class DiagGGNMC(_Sketch, DiagGGNExact):
    """Unbiased estimate of the GGN's diagonal from one backward column per sample: ``[*p]``.

    The columns of the exact root are combined with random signs, independent per sample; the
    square's expectation is the exact diagonal. Sampling labels from the model is unbiased too and
    costs the same, but its relative standard deviation is several times as large.

    Args:
        samples: number of independent estimates to average.
        estimator: ``"rademacher"`` (default), or ``"labels"`` as in the Monte-Carlo Fisher.
        generator: source of randomness, on the output's device; torch's global one by default.
        subsample: as in `DiagGGNExact`.
    """

    field = "diag_ggn_mc"


class BatchDiagGGNExact(_Exact):
    """Exact diagonals of the GGN of each sample's own loss, ``[N, *p]``.

    Args:
        subsample: indices of the samples to take; all by default.
    """

    field = "diag_ggn_exact_batch"
    own = True

    def reduce(self, structure: Structure, context: Context) -> Tensor:
        squares = structure.batch_sum_of_squares()
        return squares if context.factor == 1 else squares * context.factor**2


class BatchDiagGGNMC(_Sketch, BatchDiagGGNExact):
    """Unbiased estimates of the GGN's diagonal of each sample's own loss, ``[N, *p]``.

    Args:
        samples: number of independent estimates to average.
        estimator: ``"rademacher"`` (default), or ``"labels"``.
        generator: source of randomness, on the output's device; torch's global one by default.
        subsample: as in `DiagGGNExact`.
    """

    field = "diag_ggn_mc_batch"


class SqrtGGNExact(_Exact):
    """Exact root of the GGN, ``[K, N, *p]`` with ``sum_kn V_kn V_kn^T = G``.

    Args:
        subsample: as in `DiagGGNExact`.
    """

    field = "sqrt_ggn_exact"

    def reduce(self, structure: Structure, context: Context) -> Tensor:
        rows = structure.form()
        return rows if context.factor == 1 else rows * context.factor

    def combine(self, before: Tensor, part: Tensor) -> Tensor:
        return torch.cat([before, part])


class SqrtGGNMC(_Sketch, SqrtGGNExact):
    """Random root of the GGN, ``[samples, N, *p]``, whose square is the GGN in expectation.

    Args:
        samples: number of columns per sample.
        estimator: ``"rademacher"`` (default), or ``"labels"``.
        generator: source of randomness, on the output's device; torch's global one by default.
        subsample: as in `DiagGGNExact`.
    """

    field = "sqrt_ggn_mc"
