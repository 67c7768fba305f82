"""A recorded loss: its rows, their weights, and a root of its Hessian in the model's output."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from curvopt.axes.layout import Layout
from curvopt.errors import CurvoptError
from curvopt.looks import refuse


class Loss(ABC):
    """One call of a loss function on the model's output z.

    The output has *tokens* (a row of logits, an element of a regression), each with a loss of its
    own; the value is their sum times `token_weights`. The Hessian is block diagonal over tokens.

    Args:
        output: z, ``[R, ...]`` with the samples on its leading axis or axes.
        value: what the loss function returned.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Attributes:
        mark: the output's place in the trace of the pass.
        begin: number of ops before the call.
        end: the value's gradient edge, whatever happens to the value in place.
        value_at, value_ref: the value's place.
    """

    name = "loss"
    #: Columns of the Hessian's root per token.
    width = 1

    def __init__(self, output: Tensor, value: Tensor, reduction: str):
        self.output, self.value, self.reduction = output, value, reduction
        self.version = output._version
        with torch._C.DisableTorchFunction():
            self.end = get_gradient_edge(value)
        self.mark: Any = None
        self.begin: Any = None
        self.value_at: Any = None
        self.value_ref: Any = None

    @property
    def z(self) -> Tensor:
        """The output's values, refused if they were changed after the loss was computed."""
        if self.output._version != self.version:
            raise CurvoptError(
                f"the output that {self.name} was computed from was changed in place afterwards; "
                "use the out-of-place form of that operation"
            )
        return self.output

    def release(self) -> None:
        """Let go of the value and its node, for a while; `restore` undoes it."""
        del self.value, self.end

    def restore(self, end: GradientEdge) -> None:
        """Take the value's gradient edge back."""
        self.end = end

    @property
    def token_shape(self) -> torch.Size:
        """Shape of the tokens: of the output for losses of elements."""
        return self.output.shape

    def token_axes(self, ndim: int) -> set[int]:
        """Axes of the output along which samples may lie."""
        return set(range(ndim))

    def share(self, layout: Layout) -> float | Tensor:
        """Sample n's share w_n of the value, ``value = sum_n w_n (sample n's own loss)``."""
        if self.reduction in ("sum", "none"):
            return 1.0
        return layout.share(self.output)

    def reduced(self, upstream: Tensor) -> Tensor:
        """Derivative of the loss as a whole in each token's unreduced loss (broadcastable).

        Args:
            upstream: derivative of the loss as a whole in `value`.
        """
        if self.reduction == "mean":
            return upstream / math.prod(self.token_shape)
        return upstream

    @abstractmethod
    def curvature(self) -> Tensor:
        """Factor of each token's Hessian that does not depend on the reduction."""

    @abstractmethod
    def apply_root(self, coefficients: Tensor) -> Tensor:
        """Root of the tokens' Hessian (curvature factor 1) times ``[V, *tokens, width]``.

        Returns:
            ``[V, *output.shape]``.
        """

    def sample_labels(self, columns: int, generator: torch.Generator | None) -> Tensor:
        """Random vectors whose second moment is the Hessian, from labels drawn from the model."""
        raise CurvoptError(
            f"{self.name} has no label sampling; use estimator='rademacher', the default"
        )

    def spread(self, per_token: Tensor) -> Tensor:
        """Broadcast a factor per token to the output's shape."""
        return per_token

    def scale(self, upstream: Tensor, inverse_share: float | Tensor, layout: Layout) -> Tensor:
        """Square root of the factor of each token's Hessian.

        Args:
            upstream: derivative of the loss as a whole in `value`.
            inverse_share: 1, or 1 / w_n for the sample's own loss.
            layout: the sample axis of the output.
        """
        factor = self.reduced(upstream) * self.curvature()
        if isinstance(inverse_share, Tensor):
            factor = per_sample(factor.expand(self.token_shape), inverse_share, layout)
        else:
            factor = factor * inverse_share
        if factor.numel():
            refuse(factor.min() < 0, partial(_no_root, self.name))
        if factor.requires_grad:  # the derivative of a root at zero is no number
            root = torch.where(factor > 0, factor, 1).sqrt() * (factor > 0)
        else:
            root = factor.sqrt()
        return root.expand(self.token_shape)

    def columns_per_sample(self, layout: Layout) -> int:
        """Columns of the exact root per sample: tokens of a sample times `width`."""
        if layout.kind == "gather":
            return layout.k * math.prod(self.token_shape[layout.axes :]) * self.width
        return math.prod(self.token_shape) // max(layout.n, 1) * self.width

    def columns(self, start: int, stop: int, scale: Tensor, layout: Layout) -> Tensor:
        """Columns ``start`` to ``stop`` of the exact root, ``[stop - start, *output.shape]``."""
        count = self.columns_per_sample(layout)
        eye = torch.zeros(stop - start, count, dtype=scale.dtype, device=scale.device)
        eye[torch.arange(stop - start, device="cpu"), torch.arange(start, stop, device="cpu")] = 1
        inner = layout.split(scale).shape[1:]
        one_hot = eye.unflatten(1, (*inner, self.width)).unsqueeze(1)
        one_hot = one_hot.expand(-1, layout.n, *one_hot.shape[2:])
        merged = layout.merge(one_hot, 1, scale.shape[: layout.axes])
        return self.apply_root(merged * scale.unsqueeze(-1))

    def sketch(
        self, columns: int, scale: Tensor, estimator: str, generator: torch.Generator | None
    ) -> Tensor:
        """Random vectors with second moment H, ``[V, *output.shape]``, independent per sample."""
        if estimator == "labels":
            return self.sample_labels(columns, generator) * self.spread(scale)
        signs = random_signs(scale, (columns, *self.token_shape, self.width), generator)
        return self.apply_root(signs.mul_(scale.unsqueeze(-1)))


# Where random signs come from instead.
_SOURCES: list[Callable[..., Tensor]] = []


@contextmanager
def signs_from(source: Callable[..., Tensor]) -> Iterator[None]:
    """Have the random signs of losses from elsewhere: they are drawn outside of a traced graph.

    Args:
        source: called as `random_signs`.
    """
    _SOURCES.append(source)
    try:
        yield
    finally:
        _SOURCES.pop()


def _no_root(name: str) -> CurvoptError:
    return CurvoptError(
        f"{name} enters the loss with a negative weight, so its Gauss-Newton matrix "
        "is not positive semi-definite and has no root; use DiagHessian, or drop the term"
    )


def random_signs(like: Tensor, shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    """Independent random signs."""
    if _SOURCES:
        return _SOURCES[-1](like, shape, generator)
    return like.new_empty(shape).bernoulli_(0.5, generator=generator).mul_(2).sub_(1)


def per_sample(rows: Tensor, factor: float | Tensor, layout: Layout) -> Tensor:
    """Multiply the rows of each sample by its factor, a number or ``[N]``."""
    if not isinstance(factor, Tensor):
        return rows if factor == 1.0 else rows * factor
    split = layout.split(rows)
    scaled = split * factor.view(-1, *[1] * (split.ndim - 1))
    return layout.merge(scaled, 0, rows.shape[: layout.axes])


def reduction_of(arguments: dict[str, Any]) -> str:
    """The reduction of a loss call, the deprecated ``size_average`` and ``reduce`` included."""
    if arguments.get("size_average") is not None or arguments.get("reduce") is not None:
        raise CurvoptError("size_average and reduce are deprecated; use reduction=")
    return str(arguments.get("reduction", "mean"))
