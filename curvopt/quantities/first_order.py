"""Quantities of the loss gradient: per-sample rows and what follows from them."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from curvopt.errors import CurvoptError
from curvopt.looks import may_look, refuse
from curvopt.quantities.base import Context, Quantity
from curvopt.structures import Mended, Structure
from curvopt.structures.base import UNUSUAL


class Gradient(Quantity):
    """The gradient of the loss as written, ``[*p]``: what ``backward()`` computes.

    `compute` offers it as ``result.grad`` anyway, on demand; asked for by name it is computed in
    the same pass and the graph is not needed any more.
    """

    field = "grad"

    def reduce(self, structure: Structure, context: Context) -> Tensor:
        if isinstance(context.share, Tensor):
            return structure.sum(context.share)
        total = structure.sum()
        scale = context.factor * (1.0 if context.share is None else context.share)
        return total if scale == 1 else total * scale


class BatchGrad(Quantity):
    """Per-sample gradients, ``[N, *p]``: row n is the gradient of sample n's own loss.

    ``g_n = d loss(model(x_n), y_n) / dp``, as a loop over batches of one gives it, whatever the
    loss's reduction, class weights and ignored targets.

    Example:
        >>> closure = lambda: torch.nn.functional.cross_entropy(model(x), y)
        >>> result = curvopt.compute(closure, model.parameters(), curvopt.BatchGrad())
        >>> result.batch_grad[p].shape == (len(x), *p.shape)
        True
    """

    field = "batch_grad"
    own = True

    def reduce(self, structure: Structure, context: Context) -> Tensor:
        rows = structure.form()[0]
        return rows if context.factor == 1 else rows * context.factor


class BatchL2Grad(Quantity):
    """Squared norms of the per-sample gradients, ``|g_n|^2`` per parameter: ``[N]``.

    The rows are formed only where that is cheaper than the Gram matrix of their factors.
    """

    field = "batch_l2"
    own = True

    def reduce(self, structure: Structure, context: Context) -> Tensor:
        norms = structure.squared_norms()[0]
        return norms if context.factor == 1 else norms * context.factor**2


class SumGradSquared(Quantity):
    """Elementwise ``sum_n g_n^2``, ``[*p]``: N times the second moment of the rows."""

    field = "sum_grad_squared"
    own = True

    def reduce(self, structure: Structure, context: Context) -> Tensor:
        squares = structure.sum_of_squares()
        return squares if context.factor == 1 else squares * context.factor**2


class Variance(Quantity):
    """Elementwise variance of the per-sample gradients, ``[*p]``.

    ``(1/N) sum_n (g_n - (1/N) sum_m g_m)^2``, times ``N / (N - 1)`` if unbiased. Computed
    in this form where the rows hardly differ: the difference of moments would be all rounding.

    Args:
        unbiased: divide by N - 1 instead of N. Off by default: the variance of this batch.

    Raises:
        CurvoptError: the unbiased variance of a single sample.
    """

    field = "variance"
    own = True

    def __init__(self, unbiased: bool = False):
        self.unbiased = unbiased

    def reduce(self, structure: Structure, context: Context) -> Tensor:
        n = context.samples
        if self.unbiased and n < 2:
            raise CurvoptError(
                f"the unbiased variance needs two samples, got {n}; use unbiased=False"
            )
        _, variance = structure.moments(max(1, n) ** -0.5)
        scale = context.factor**2 * (n / (n - 1) if self.unbiased else 1)
        return variance if scale == 1 else variance * scale


class ClippedGradSum(Quantity):
    """Sum of clipped per-sample gradients, ``sum_n c_n g_n``: ``[*p]``.

    ``c_n = min(1, max_norm / |g_n|)`` with the norm over all parameters together, so that each
    sample contributes at most ``max_norm``. Norms and sum come from the same structures; the rows
    are formed only where that is cheaper. A sample whose norm is not finite contributes nothing.

    Args:
        max_norm: the largest norm of a sample's contribution, above zero.
    """

    field = "clipped_grad_sum"
    own = True

    def __init__(self, max_norm: float):
        if not max_norm > 0:
            raise ValueError(f"Invalid max_norm: {max_norm}")
        self.max_norm = max_norm

    def weights(self, squares: Tensor) -> Tensor:
        """Factors ``[P, N]`` of P parameters' rows, from their squared norms ``[P, N]``."""
        total = squares.sum(0)
        long = total.sqrt() > self.max_norm
        # Roots of the long norms alone: at zero, a root's derivative is no number.
        factors = torch.where(long, self.max_norm / total.where(long, 1).sqrt(), 1)
        return torch.where(total.isfinite(), factors, 0).expand_as(squares)

    def reduce_all(
        self, structures: dict[Tensor, Structure], context: Context
    ) -> dict[Tensor, Tensor]:
        for p, structure in structures.items():  # in place, for its factors are not needed now
            structures[p] = structure.settled()
        gauges = [structure.gauge() for structure in structures.values()]
        parts = [squares[0] for squares, _ in gauges]
        squares = torch.stack(parts)
        doubts = [doubt[0] for _, doubt in gauges if doubt is not None]
        some = self._some(torch.stack([~squares.sum(0).isfinite(), *doubts]).any())
        if some:
            for index, (p, (_, doubt)) in enumerate(zip([*structures], gauges, strict=True)):
                if doubt is not None and doubt.any():
                    structures[p] = Mended(structures[p], doubt)
                    parts[index] = structures[p].squared_norms()[0]
            squares = torch.stack(parts)
        factor = context.factor
        weights = self.weights(squares if factor == 1 else squares * factor**2) * factor
        left_out = weights[0] == 0
        some = some and bool(left_out.any())
        return {
            p: _sum_without(left_out, s, w.to(part)) if some else s.sum(w.to(part))
            for (p, s), w, part in zip(structures.items(), weights, parts, strict=True)
        }

    def _some(self, special: Tensor) -> bool:
        """Whether a sample is not finite or in doubt; where nobody may look, none must be."""
        if may_look():
            return bool(special)
        refuse(special, partial(CurvoptError, UNUSUAL))
        return False


def _sum_without(left_out: Tensor, structure: Structure, weights: Tensor) -> Tensor:
    """Weighted sum of rows, without those of some samples, whatever they hold."""
    total = weights.new_zeros(structure.shape)
    for start, stop, rows in structure.blocks():
        out = left_out[start:stop].view(-1, *[1] * len(structure.shape))
        total += torch.tensordot(weights[start:stop], rows[0].masked_fill(out, 0), 1)
    return total
