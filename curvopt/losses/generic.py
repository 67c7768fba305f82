"""Losses whose Hessian in the model's output comes from autograd."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from curvopt.axes.layout import Layout
from curvopt.errors import CurvoptError
from curvopt.looks import refuse
from curvopt.losses.base import Loss, reduction_of
from curvopt.losses.cross_entropy import CrossEntropy, Likelihood
from curvopt.losses.elementwise import same_shape
from curvopt.losses.registry import LOSSES, LossRule, loss

Rows = Callable[[Tensor], Tensor]


class Elementwise(Loss):
    """A loss of single elements; its second derivative is autograd's.

    Args:
        output: z.
        value: what the loss function returned.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        rows: the loss function without its reduction.
        name: its name.
    """

    def __init__(self, output: Tensor, value: Tensor, reduction: str, rows: Rows, name: str):
        super().__init__(output, value, reduction)
        self.rows, self.name = rows, name

    def curvature(self) -> Tensor:
        z, slope = _slope(self.rows, self.z)
        second = _columns(slope, z, torch.ones_like(z)[None])[0]
        refuse(second < 0, partial(_negative, self.name))
        return second

    def apply_root(self, coefficients: Tensor) -> Tensor:
        return coefficients.squeeze(-1)


class RowWise(Loss):
    """A loss of rows ``[D]``; the root of its Hessian ``U diag(e) U^T`` is ``U diag(sqrt e)``.

    Args:
        output: z, ``[R, ...]`` with D elements per row.
        value: what the loss function returned.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        rows: the loss function without its reduction.
        name: its name.
    """

    def __init__(self, output: Tensor, value: Tensor, reduction: str, rows: Rows, name: str):
        super().__init__(output, value, reduction)
        self.rows, self.name = rows, name
        self.width = max(1, output[:1].numel())
        self._root: Tensor | None = None

    @property
    def token_shape(self) -> torch.Size:
        return self.output.shape[:1]

    def token_axes(self, ndim: int) -> set[int]:
        """A row is one token."""
        return {0}

    def spread(self, per_token: Tensor) -> Tensor:
        return per_token.view(-1, *[1] * (self.output.ndim - 1))

    def curvature(self) -> Tensor:
        return self.output.new_ones(())

    def slope(self) -> tuple[Tensor, Tensor]:
        """The output, and the gradient in it of the rows' sum, differentiable."""
        return _slope(self.rows, self.z)

    def root(self) -> Tensor:
        """``[R, D, D]``."""
        if self._root is None:
            z, slope = self.slope()
            unit = torch.eye(self.width, dtype=z.dtype, device=z.device)
            unit = unit.view(self.width, 1, *z.shape[1:]).expand(self.width, *z.shape)
            hessian = _columns(slope, z, unit).flatten(2).transpose(0, 1)
            if hessian.requires_grad:
                raise CurvoptError(
                    f"the root of the Hessian of {self.name} is not differentiable: leave out "
                    "create_graph, or use a loss of torch.nn.functional that acts on elements"
                )
            values, vectors = torch.linalg.eigh(hessian)
            rounding = 100 * torch.finfo(values.dtype).eps * values.abs().amax(-1, keepdim=True)
            refuse(values < -rounding, partial(_negative, self.name))
            self._root = vectors * values.clamp(min=0).sqrt().unsqueeze(-2)
        return self._root

    def apply_root(self, coefficients: Tensor) -> Tensor:
        rows = torch.einsum("rdk,vrk->vrd", self.root(), coefficients)
        return rows.view(len(coefficients), *self.output.shape)


class Closure(RowWise):
    """Any loss of an output that the closure returns beside it, ``(loss, output)``."""

    def __init__(self, output: Tensor, value: Tensor, ending: str):
        super().__init__(output, value, "none", _no_rows, "the loss")
        self.ending = ending

    def share(self, layout: Layout) -> float | Tensor:
        return 1.0 if self.ending == "sum" else layout.share(self.output)

    def slope(self) -> tuple[Tensor, Tensor]:
        z = self.z
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(self.value, z, create_graph=True)
            self._check_rows(z, slope)
        return z, slope

    def _check_rows(self, z: Tensor, slope: Tensor) -> None:
        """The slopes of a random half of the rows must not depend on the other half."""
        if not slope.requires_grad or len(z) < 2:
            return
        generator = torch.Generator().manual_seed(0)
        half = torch.randperm(len(z), generator=generator, device="cpu") < len(z) // 2
        noise = torch.rand(z.shape, generator=generator, device="cpu").add_(0.5)
        noise = noise * half.view(-1, *[1] * (z.ndim - 1))
        curved = _columns(slope, z, noise.to(z)[None])[0]
        other = (~half).to(z.device).view(-1, *[1] * (z.ndim - 1))
        refuse((curved != 0) & other, partial(_couples, list(z.shape)))


def _no_rows(z: Tensor) -> Tensor:
    raise NotImplementedError


def _slope(rows: Rows, z: Tensor) -> tuple[Tensor, Tensor]:
    """z, and the gradient of ``rows(z).sum()`` in it, differentiable."""
    z = z if torch.is_grad_enabled() else z.detach().requires_grad_()
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(rows(z).sum(), z, create_graph=True)
    return z, slope


def _columns(slope: Tensor, z: Tensor, unit: Tensor) -> Tensor:
    """Second derivatives along ``[V, *z.shape]``."""
    if not slope.requires_grad:
        return torch.zeros_like(unit)
    try:
        columns = [
            torch.autograd.grad(
                slope,
                z,
                one,
                retain_graph=True,
                create_graph=torch.is_grad_enabled(),
                materialize_grads=True,
            )[0]
            for one in unit
        ]
    except RuntimeError as error:
        if "not implemented" not in str(error):
            raise
        raise CurvoptError(f"the loss has no second derivative: {error}") from error
    return torch.stack(columns)


def _couples(shape: list[int]) -> CurvoptError:
    return CurvoptError(
        f"the loss couples the rows of the output {shape}, so its Hessian is not "
        "block diagonal over samples; use DiagHessian, or a loss that sums over rows"
    )


def _negative(name: str) -> CurvoptError:
    return CurvoptError(
        f"{name} curves downwards in the model's output here, so its Gauss-Newton matrix is not "
        "positive semi-definite and has no root; use DiagHessian, or a convex loss"
    )


def _register(kind: type[Elementwise] | type[RowWise], *functions: Callable[..., Tensor]) -> None:
    for function in functions:
        names = tuple(inspect.signature(function).parameters)
        LOSSES[function] = LossRule(partial(_make, kind, function), ("input", *names[1:]), False)


def _make(kind: Any, function: Any, output: Tensor, value: Tensor, **arguments: Any) -> Loss:
    name, reduction = function.__name__, reduction_of(arguments)
    others = {
        k: v for k, v in arguments.items() if k not in ("size_average", "reduce", "reduction")
    }
    if kind is Elementwise:
        same_shape(name, output, others["target"])
    rows = partial(function, **others, reduction="none")
    return kind(output, value, reduction, rows, name)


_register(
    Elementwise,
    F.l1_loss,
    F.smooth_l1_loss,
    F.huber_loss,
    F.binary_cross_entropy,
    F.poisson_nll_loss,
    F.gaussian_nll_loss,
    F.soft_margin_loss,
    F.hinge_embedding_loss,
)
_register(RowWise, F.multi_margin_loss, F.multilabel_margin_loss, F.multilabel_soft_margin_loss)


CLASSES = "kl_div has no root where its classes have weights of their own"


class Divergence(CrossEntropy):
    """``kl_div`` of a recorded ``log_softmax``: its curvature is that of the cross entropy."""

    name = "kl_div"

    def reduced(self, upstream: Tensor) -> Tensor:
        if self.reduction == "none" and upstream.ndim:
            refuse(upstream != upstream[:, :1], partial(CurvoptError, CLASSES))
            return upstream[:, 0]
        divisor = {"mean": self.output.numel(), "batchmean": len(self.output)}
        return upstream / divisor.get(self.reduction, 1)


class Linear(Divergence, Likelihood):
    """``kl_div`` of something that is no recorded ``log_softmax``: rows, but no curvature."""

    name = "kl_div"

    def curvature(self) -> Tensor:
        return Likelihood.curvature(self)


@loss(F.kl_div)
def kl_div(
    output: Tensor,
    value: Tensor,
    target: Tensor,
    size_average: Any = None,
    reduce: Any = None,
    reduction: str = "mean",
    log_target: bool = False,
    *,
    logits: Tensor | None = None,
) -> Loss:
    """Kullback-Leibler divergence of a recorded ``log_softmax(logits)``."""
    reduction = reduction_of(dict(size_average=size_average, reduce=reduce, reduction=reduction))
    same_shape("kl_div", output, target)
    target = target.exp() if log_target else target
    kind = Linear if logits is None else Divergence
    z = output if logits is None else logits
    return kind(z, value, reduction, target, None, -100, 0.0)
