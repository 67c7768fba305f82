"""Inner products of rows: Gram matrices, kernels, quadratic forms, products with blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Generator, Tensor

from curvopt.errors import CurvoptError
from curvopt.quantities.base import ROOT, Context, Quantity
from curvopt.quantities.ggn import _Sketch
from curvopt.structures import Structure
from curvopt.structures.guarded import guarded
from curvopt.structures.numerics import sum_tensors

Held = dict[Tensor, list[tuple[Structure, float]]]


class _Held(Quantity):
    """A quantity that needs the structures of all columns at once."""

    def reduce_all(self, structures: dict[Tensor, Structure], context: Context) -> Held:
        return {p: [(structure, context.factor)] for p, structure in structures.items()}


class GradGram(_Held):
    """Gram matrix of the per-sample gradients, ``K_nm = <g_n, g_m>``: ``[N, N]`` per parameter.

    The sum over the parameters is that of the whole gradients. From the structures: rows are formed
    only where that is cheaper than the products of their factors.
    """

    field = "grad_gram"
    own = True

    def finish(self, result: Held) -> dict[Tensor, Tensor]:
        return {p: _gram(held)[0, :, 0] for p, held in result.items()}


class GGNGram(_Held):
    """Gram matrix of the exact root of the GGN, ``<V_kn, V_jm>``: ``[K, N, K, N]`` per parameter.

    As a matrix ``[KN, KN]`` it has the nonzero eigenvalues of the parameter's block of the GGN;
    summed over the parameters, those of the GGN.

    References:
        Dangel et al., ViViT: Curvature access through the generalized Gauss-Newton's low-rank
        structure (TMLR 2022).
    """

    field = "ggn_gram"
    cotangent = ROOT

    def finish(self, result: Held) -> dict[Tensor, Tensor]:
        return {p: _gram(held) for p, held in result.items()}


class BlockGGN(_Held):
    """Products with the GGN's block of each parameter: a function per parameter.

    ``result.block_ggn[p](M)`` multiplies ``[*p]`` or V vectors ``[V, *p]``, by the structures: the
    block is never formed, and no further backward pass is made. The functions hold the inputs of
    the layers by reference: after one was changed in place they raise `CurvoptError`.
    """

    field = "block_ggn"
    cotangent = ROOT

    def reduce_all(self, structures: dict[Tensor, Structure], context: Context) -> Held:
        outliving = {p: guarded(structure, context.name(p)) for p, structure in structures.items()}
        return super().reduce_all(outliving, context)

    def finish(self, result: Held) -> dict[Tensor, Callable[[Tensor], Tensor]]:
        return {p: _product(p, held) for p, held in result.items()}


class GGNQuadratic(Quantity):
    """Quadratic form of the GGN along a direction, ``d^T G d``: one number.

    ``sum_kn (sum_p <V_kn, d_p>)^2``, by one contraction per parameter and no further pass. The
    loss along a step ``t d`` is about ``L + t <g, d> + t^2/2 d^T G d``.

    Args:
        direction: ``[*p]`` by parameter; zero where it is missing.
        samples: columns of a random root instead of the exact one (an unbiased estimate from the
            cotangents of `DiagGGNMC`, in one pass with it); None for the exact value.
        estimator: as in `DiagGGNMC`.
        generator: source of randomness; torch's global one by default.

    Raises:
        CurvoptError: the direction does not fit a parameter.
    """

    field = "ggn_quadratic"
    cotangent = ROOT

    def __init__(
        self,
        direction: Mapping[Tensor, Tensor],
        samples: int | None = None,
        estimator: str = "rademacher",
        generator: Generator | None = None,
    ):
        self.direction, self.samples = direction, samples
        if samples is not None:
            self.cotangent = _Sketch(samples, estimator, generator).cotangent

    def reduce_all(self, structures: dict[Tensor, Structure], context: Context) -> Any:
        total: Tensor | float = 0.0
        for p, structure in structures.items():
            if p in self.direction:
                direction = self.direction[p]
                if direction.shape != p.shape:
                    raise CurvoptError(
                        f"the direction has shape {list(direction.shape)} for a parameter "
                        f"{list(p.shape)}"
                    )
                total = total + structure.dots(direction)
        return torch.as_tensor(total).square().sum() * context.factor**2

    def combine_all(self, before: Tensor, part: Tensor) -> Tensor:
        return before + part


class EmpiricalFisher(Quantity):
    """Diagonal of the empirical Fisher, ``sum_n w_n g_n^2``: ``[*p]``.

    ``g_n`` is the gradient of sample n's own loss, ``w_n`` its share of the loss as written: 1 / N
    under a mean. It is no curvature: unlike the GGN's, its diagonal takes the labels for what the
    model predicts.

    References:
        Kunstner et al., Limitations of the empirical Fisher approximation for natural gradient
        descent (NeurIPS 2019).
    """

    field = "empirical_fisher"
    own = True

    def reduce(self, structure: Structure, context: Context) -> Tensor:
        if context.share is None:
            raise CurvoptError(
                "the terms of the loss are reduced differently, so a sample's own loss has no one "
                "share in it; ask for the empirical Fisher of each term alone"
            )
        if isinstance(context.share, Tensor):
            return torch.tensordot(context.share, structure.batch_sum_of_squares(), 1)
        return structure.sum_of_squares() * (context.share * context.factor**2)


def _gram(held: list[tuple[Structure, float]]) -> Tensor:
    return torch.cat(
        [
            torch.cat([one.gram(other) * (a * b) for other, b in held], 2)
            for one, a in held
        ]
    )  # fmt: skip


def _product(p: Tensor, held: list[tuple[Structure, float]]) -> Callable[[Tensor], Tensor]:
    def product(m: Tensor) -> Tensor:
        columns = [
            sum_tensors([s.weighted(s.dots(column)) * factor**2 for s, factor in held])
            for column in m.reshape(-1, *p.shape)
        ]
        return torch.stack(columns).view(m.shape)

    return product
