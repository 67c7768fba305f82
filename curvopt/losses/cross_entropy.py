"""Softmax cross entropy and the negative log-likelihood of a log-softmax."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from curvopt.axes.layout import Layout
from curvopt.errors import CurvoptError
from curvopt.looks import may_look
from curvopt.losses.base import Loss, random_signs, reduction_of
from curvopt.losses.registry import loss


class CrossEntropy(Loss):
    """``-sum_c t_c w_c log p_c`` per token, p the softmax over axis 1.

    Its Hessian in the logits is ``s (diag p - p p^T)`` with ``s = sum_c t_c w_c``. With
    ``q = sqrt p`` (elementwise) this is ``s diag(q) (I - q q^T) diag(q)``; the projector has rank
    C - 1, and the first C - 1 columns of the Householder reflection that maps q to a unit vector
    are an orthonormal basis of its range, so that the root has C - 1 columns, exactly.
    """

    name = "cross_entropy"

    def __init__(
        self,
        output: Tensor,
        value: Tensor,
        reduction: str,
        target: Tensor,
        weight: Tensor | None,
        ignore_index: int,
        smoothing: float,
    ):
        super().__init__(output, value, reduction)
        self.target, self.weight = target, weight
        self.ignore_index, self.smoothing = ignore_index, smoothing
        self.classes = output.shape[1]
        self.width = max(1, self.classes - 1)

    @property
    def token_shape(self) -> torch.Size:
        shape = self.output.shape
        return shape[:1] + shape[2:]

    @property
    def probabilities_given(self) -> bool:
        return self.target.is_floating_point()

    def token_axes(self, ndim: int) -> set[int]:
        """Axis 1 holds the classes."""
        return set(range(ndim)) - {1}

    def spread(self, per_token: Tensor) -> Tensor:
        return per_token.unsqueeze(1)

    @cached_property
    def alike(self) -> bool:
        """Every token counts alike, as far as may be seen: no class weights, nothing ignored."""
        if self.weight is not None or self.probabilities_given or not may_look():
            return False
        return not bool((self.target == self.ignore_index).any())

    @cached_property
    def label_weights(self) -> Tensor:
        """Weight of each token's label, 0 where it is ignored: what a weighted mean divides by."""
        kept = self.target != self.ignore_index
        if self.weight is None:
            return kept.to(self.output.dtype)
        return torch.where(kept, self.weight[self.target.where(kept, 0)], 0)

    def share(self, layout: Layout) -> float | Tensor:
        if self.reduction != "mean" or self.probabilities_given:
            return super().share(layout)
        if self.alike:
            return super().share(layout)
        own = layout.split(self.label_weights).flatten(1).sum(1)
        return own / own.sum()

    def reduced(self, upstream: Tensor) -> Tensor:
        if self.reduction == "mean":
            if self.probabilities_given or self.alike:
                return upstream / self.token_shape.numel()
            return upstream / self.label_weights.sum()
        return upstream

    def curvature(self) -> Tensor:
        smoothing, weight = self.smoothing, self.weight
        if self.alike:
            return self.output.new_ones(())
        if self.probabilities_given:
            target = self.target * (1 - smoothing) + smoothing / self.classes
            if weight is not None:
                target = target * weight.view(-1, *[1] * (target.ndim - 2))
            return target.sum(1)
        own = self.label_weights
        if not smoothing:
            return own
        mean_weight = 1.0 if weight is None else weight.mean()
        kept = (self.target != self.ignore_index).to(own.dtype)
        return (1 - smoothing) * own + smoothing * mean_weight * kept

    def apply_root(self, coefficients: Tensor) -> Tensor:
        coefficients = coefficients.movedim(-1, 2)  # [V, R, C - 1, ...]
        if self.classes == 1:
            return torch.zeros_like(coefficients)
        q = self.z.softmax(1).sqrt()
        head, last = q[:, :-1], q[:, -1:]
        # Column c of the reflection I - 2 u u^T / |u|^2, u = q + e_C, |u|^2 = 2 (1 + q_C).
        along = (coefficients * head).sum(2, keepdim=True) / (1 + last)
        return q * torch.cat([coefficients - along * head, -along * (1 + last)], 2)

    def sketch(
        self, columns: int, scale: Tensor, estimator: str, generator: torch.Generator | None
    ) -> Tensor:
        if estimator == "labels":
            return super().sketch(columns, scale, estimator, generator)
        # diag(q) (I - q q^T) is a root too; its C columns are combined in fewer operations.
        signs = random_signs(self.output, (columns, *self.output.shape), generator)
        q = self.z.softmax(1).sqrt()
        along = (signs * q).sum(2, keepdim=True)
        return q * torch.addcmul(signs, along, q, value=-1) * self.spread(scale)

    def sample_labels(self, columns: int, generator: torch.Generator | None) -> Tensor:
        p = self.z.softmax(1)
        flat = p.movedim(1, -1).reshape(-1, self.classes)
        labels = torch.multinomial(flat, columns, replacement=True, generator=generator).T
        labels = labels.reshape(columns, *self.token_shape)
        return p - F.one_hot(labels, self.classes).movedim(-1, 2)


@loss(F.cross_entropy, of_rows=True)
def cross_entropy(
    output: Tensor, value: Tensor, target: Tensor, weight: Tensor | None = None,
    size_average: Any = None, ignore_index: int = -100, reduce: Any = None,
    reduction: str = "mean", label_smoothing: float = 0.0,
) -> CrossEntropy:  # fmt: skip
    """Cross entropy of logits: labels or class probabilities."""
    reduction = reduction_of(dict(size_average=size_average, reduce=reduce, reduction=reduction))
    return CrossEntropy(output, value, reduction, target, weight, ignore_index, label_smoothing)


@loss(F.nll_loss, of_rows=True)
def nll_loss(
    output: Tensor, value: Tensor, target: Tensor, weight: Tensor | None = None,
    size_average: Any = None, ignore_index: int = -100, reduce: Any = None,
    reduction: str = "mean", *, logits: Tensor | None = None,
) -> CrossEntropy:  # fmt: skip
    """Negative log-likelihood of a recorded ``log_softmax(logits)``."""
    reduction = reduction_of(dict(size_average=size_average, reduce=reduce, reduction=reduction))
    if logits is None:
        return Likelihood(output, value, reduction, target, weight, ignore_index, 0.0)
    return CrossEntropy(logits, value, reduction, target, weight, ignore_index, 0.0)


class Likelihood(CrossEntropy):
    """``nll_loss`` of something that is no recorded ``log_softmax``: rows, but no curvature."""

    name = "nll_loss"

    def curvature(self) -> Tensor:
        raise CurvoptError(
            f"{self.name} is linear in its input, so it has curvature only through log_softmax; "
            "apply torch.nn.functional.log_softmax(logits, dim=1) to the model's output while "
            "recording"
        )
