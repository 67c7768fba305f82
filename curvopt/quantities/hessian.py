"""Quantities of the Hessian of the loss in the parameters."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Generator, Tensor

from curvopt.quantities.base import HESSIAN, Hessian, Quantity


class DiagHessian(Quantity):
    """Exact diagonal of the Hessian of the loss as written, ``[*p]``.

    For an op that is linear in its parameter, with outputs y per sample and ``H_n`` the Hessian of
    the loss in y_n, it is the diagonal of ``sum_n J_n^T H_n J_n``: one column per output of a
    sample, or per element of the parameter, whichever are fewer. From where the model is piecewise
    linear up to its output, ``H_n`` has the rank of the loss's own Hessian, and the diagonal is
    that of the GGN, at its cost. A parameter used several times (or by an op that is not linear in
    it, or at several time steps of a recurrent layer, as its hidden weight) takes one column per
    element. Columns go in chunks of bounded memory (``max_columns``).

    Works for any loss that can be differentiated twice, convex or not.

    Example:
        >>> closure = lambda: torch.nn.functional.cross_entropy(model(x), y)
        >>> curvopt.compute(closure, model.named_parameters(), curvopt.DiagHessian()).diag_h
        diag_h(0.weight: [5, 4], 0.bias: [5], 2.weight: [3, 5], 2.bias: [3])
    """

    field = "diag_h"
    cotangent = HESSIAN

    def from_hessian(self, hessian: Hessian) -> dict[Tensor, Tensor]:
        return hessian.diagonal(rows=self.own)


class BatchDiagHessian(DiagHessian):
    """Exact diagonals of the Hessian of each sample's own loss, ``[N, *p]``.

    As `DiagHessian`; a parameter used several times takes one column per element and sample.
    """

    field = "diag_h_batch"
    own = True


class DiagHessianMC(Quantity):
    """Hutchinson's unbiased estimate of the diagonal of the Hessian, ``[*p]``.

    ``v * H v`` with random signs v over all parameters, averaged: one product with the Hessian per
    sample, for any model. Off-diagonal elements make its variance, ``2 sum_j H_ij^2`` over j != i;
    where the GGN will do, `DiagGGNMC` is far less noisy.

    Args:
        samples: number of sign vectors to average.
        generator: source of randomness, on the parameters' device; torch's global one by default.

    References:
        Hutchinson, A stochastic estimator of the trace of the influence matrix (1989); Bekas et
        al., An estimator for the diagonal of a matrix (Applied Numerical Mathematics 2007).
    """

    field = "diag_h_mc"
    cotangent = HESSIAN

    def __init__(self, samples: int = 1, generator: Generator | None = None):
        if samples < 1:
            raise ValueError(f"Invalid samples: {samples}")
        self.samples, self.generator = samples, generator

    def from_hessian(self, hessian: Hessian) -> dict[Tensor, Tensor]:
        result: dict[Tensor, Tensor] = {}
        for start in range(0, self.samples, hessian.chunk):
            columns = min(hessian.chunk, self.samples - start)
            signs = {p: self._signs(columns, p) for p in hessian.params}
            for p, product in hessian.product(signs).items():
                part = (signs[p] * product).sum(0) / self.samples
                result[p] = result[p] + part if p in result else part
        return result

    def _signs(self, columns: int, p: Tensor) -> Tensor:
        shape = (columns, *p.shape)
        bits = torch.randint(0, 2, shape, generator=self.generator, device=p.device)
        return bits.to(p.dtype).mul_(2).sub_(1)


class BlockHessian(Quantity):
    """Products with the Hessian's block of each parameter: a function per parameter.

    ``result.block_hessian[p](M)`` multiplies ``[*p]`` or V vectors ``[V, *p]``. It holds the graph
    of the loss as long as it lives.
    """

    field = "block_hessian"
    cotangent = HESSIAN

    def from_hessian(self, hessian: Hessian) -> dict[Tensor, Callable[[Tensor], Tensor]]:
        def product(p: Tensor) -> Callable[[Tensor], Tensor]:
            return lambda m: hessian.product({p: m.view(-1, *p.shape)})[p].view(m.shape)

        return {p: product(p) for p in hessian.params}
