"""Hold the engine against plain autograd loops, on the user's own model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from curvopt.api import compute
from curvopt.errors import CurvoptError
from curvopt.quantities import (
    BatchDiagGGNExact,
    BatchDiagHessian,
    BatchGrad,
    BatchL2Grad,
    ClippedGradSum,
    DiagGGNExact,
    DiagHessian,
    DiagHessianMC,
    GradGram,
    Gradient,
    Quantity,
    SqrtGGNExact,
    SumGradSquared,
    Variance,
)

ByParameter = dict[Tensor, Tensor]


@dataclass(frozen=True)
class Comparison:
    """One quantity of one parameter.

    Attributes:
        quantity: the quantity's class.
        parameter: the parameter's name.
        shape: the parameter's shape.
        error: largest difference, relative to the largest magnitude that the loops give.
        ok: whether the difference is within the tolerances.
    """

    quantity: str
    parameter: str
    shape: tuple[int, ...]
    error: float
    ok: bool


@dataclass(frozen=True)
class Verification:
    """What `verify` found; printed, a table with a line per quantity and parameter.

    Attributes:
        comparisons: one per quantity and parameter.
    """

    comparisons: list[Comparison]

    @property
    def ok(self) -> bool:
        """Whether every quantity of every parameter agrees with the loops."""
        return all(comparison.ok for comparison in self.comparisons)

    def __str__(self) -> str:
        head = ("quantity", "parameter", "shape", "relative error", "")
        lines = [
            (c.quantity, c.parameter, str(list(c.shape)), f"{c.error:.1e}", _verdict(c.ok))
            for c in self.comparisons
        ]
        widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in (head, *lines)
        )


def _verdict(ok: bool) -> str:
    return "ok" if ok else "FAILED"


def verify(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    x: Any,
    y: Any,
    *quantities: Quantity,
    rtol: float | None = None,
    atol: float | None = None,
    double: bool = True,
    raises: bool = False,
    batch_size: int | None = None,
) -> Verification:
    """Compare quantities of a model with plain autograd loops over batches of one.

    For a model with ops of your own (`register_rule`), or when in doubt. The loops know nothing of
    the engine: per-sample gradients are those of batches of one; the Gauss-Newton matrix comes from
    the Jacobian of the model's output and the Hessian of the loss in it, one output at a time. They
    are slow, so give a small batch. A root of the Gauss-Newton matrix is compared by its product
    with a random vector, a Monte-Carlo quantity through the exact one that it estimates.

    Args:
        model: called as ``model(x)``, or ``model(**x)`` if x is a dict. Dropout must be off.
        loss_fn: the loss, ``loss_fn(model(x), y)``.
        x: the inputs: tensors with the samples on their first axis, also in tuples and dicts.
        y: the targets, likewise.
        *quantities: what to compare; by default ``BatchGrad()`` and ``DiagGGNExact()``: a rule that
            is right for these two is right for all.
        rtol: allowed difference relative to the largest magnitude of the tensor; 1e-7 by default
            in float64, else 1e-3.
        atol: allowed difference beside it; 1e-12 by default in float64, else 1e-6.
        double: compare a copy of the model in float64, where rounding cannot be mistaken for an
            error; else the model and the data as they are.
        raises: raise if something does not agree.
        batch_size: number of samples, where the data flow leaves two readings; checked against it.

    Returns:
        A report: ``report.ok``, ``print(report)``, ``report.comparisons``.

    Raises:
        CurvoptError: the model is random, or, with ``raises``, something does not agree.
        TypeError: there is no loop to compare a quantity with.

    Example:
        >>> print(curvopt.verify(model, torch.nn.functional.cross_entropy, x[:4], y[:4]))
        quantity      parameter  shape   relative error
        BatchGrad     0.weight   [5, 4]  ...             ok
        BatchGrad     0.bias     [5]     ...             ok
        BatchGrad     2.weight   [3, 5]  ...             ok
        BatchGrad     2.bias     [3]     ...             ok
        DiagGGNExact  0.weight   [5, 4]  ...             ok
        DiagGGNExact  0.bias     [5]     ...             ok
        DiagGGNExact  2.weight   [3, 5]  ...             ok
        DiagGGNExact  2.bias     [3]     ...             ok
    """
    if double:
        loss_fn = copy.deepcopy(loss_fn).double() if isinstance(loss_fn, nn.Module) else loss_fn
        model, x, y = copy.deepcopy(model).double(), _double(x), _double(y)
    asked = [_exact(quantity) for quantity in quantities or (BatchGrad(), DiagGGNExact())]
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters() if p.requires_grad}
    loops = Loops(model, loss_fn, x, y, list(names))
    with torch.no_grad():
        if not torch.equal(loops.loss(x, y), loops.loss(x, y)):
            raise CurvoptError(
                "the model is random (two forward passes gave two losses), so loops cannot tell "
                "anything: call model.eval(), or set its dropout to 0"
            )
    if batch_size is None and not isinstance(x, Tensor):  # data of one sample in several tensors
        batch_size = loops.size
    result = compute(
        lambda: loops.loss(x, y), model.named_parameters(), *asked, batch_size=batch_size
    )
    comparisons = []
    for quantity in asked:
        actual = dict(getattr(result, quantity.field))
        if isinstance(quantity, SqrtGGNExact):
            actual = loops.root_product(actual)
        for p, expected in LOOPS[type(quantity)](loops, quantity).items():
            exact = expected.dtype == torch.float64
            bounds = rtol or (1e-7 if exact else 1e-3), atol or (1e-12 if exact else 1e-6)
            comparisons.append(_compare(quantity, names[p], p, actual[p], expected, *bounds))
    report = Verification(comparisons)
    if raises and not report.ok:
        raise CurvoptError(f"the engine does not agree with the loops:\n{report}")
    return report


def _compare(
    quantity: Quantity, name: str, p: Tensor, actual: Tensor, expected: Tensor,
    rtol: float, atol: float,
) -> Comparison:  # fmt: skip
    if actual.shape != expected.shape:
        error = scale = float("inf")
    else:
        scale = expected.abs().max().item() if expected.numel() else 0.0
        error = (actual - expected).abs().max().item() if expected.numel() else 0.0
    ok = error <= atol + rtol * scale < float("inf")
    relative = error / scale if scale else error
    return Comparison(type(quantity).__name__, name, tuple(p.shape), relative, ok)


def _double(tree: Any) -> Any:
    return tree_map(
        lambda t: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t, tree
    )


def _exact(quantity: Quantity) -> Quantity:
    """The quantity, or the exact one that it estimates."""
    if isinstance(quantity, DiagHessianMC):
        return DiagHessian()
    known = next((kind for kind in type(quantity).__mro__ if kind in LOOPS), None)
    if known is None or quantity.cotangent.subsample is not None:
        raise TypeError(
            f"there is no loop to compare {quantity!r} with; a model whose BatchGrad and "
            "DiagGGNExact are right has right structures, from which all quantities follow"
        )
    return known() if quantity.cotangent.kind == "sketch" else quantity


class Loops:
    """A problem, and what plain autograd says about it.

    Args:
        model: the model.
        loss_fn: the loss of the model's output and the target.
        x: the inputs.
        y: the targets.
        params: the parameters.
    """

    def __init__(self, model: Any, loss_fn: Any, x: Any, y: Any, params: list[Tensor]):
        self.model, self.loss_fn, self.x, self.y, self.params = model, loss_fn, x, y, params

    def outputs(self, x: Any) -> Any:
        """What the model returns."""
        return self.model(**x) if isinstance(x, Mapping) else self.model(x)

    def loss(self, x: Any, y: Any) -> Tensor:
        """The loss of a batch."""
        return self.loss_fn(self.outputs(x), y)

    def derivative(self, output: Tensor, cotangent: Tensor | None = None) -> ByParameter:
        """The cotangent times the derivative of an output in the parameters."""
        grads = torch.autograd.grad(
            output, self.params, cotangent, retain_graph=True, materialize_grads=True
        )
        return dict(zip(self.params, grads, strict=True))

    @property
    def size(self) -> int:
        """Number of samples."""
        return next(len(t) for t in tree_leaves(self.x) if isinstance(t, Tensor) and t.ndim)

    def per_sample(self, function: Callable[[Any, Any], ByParameter]) -> ByParameter:
        """A function of the batch, of every batch of one: ``[N, *p]``."""
        size = self.size

        def one(t: Any, n: int) -> Any:
            return t[n : n + 1] if isinstance(t, Tensor) and t.ndim and len(t) == size else t

        rows = [
            function(*(tree_map(partial(one, n=n), tree) for tree in (self.x, self.y)))
            for n in range(size)
        ]
        return {p: torch.stack([row[p] for row in rows]) for p in self.params}

    @cached_property
    def rows(self) -> ByParameter:
        """The gradients of the batches of one."""
        return self.per_sample(lambda x, y: self.derivative(self.loss(x, y)))

    def clipped(self, max_norm: float) -> ByParameter:
        """The sum of the rows, each scaled to the norm where it is longer."""
        norms = torch.cat([row.flatten(1) for row in self.rows.values()], 1).norm(dim=1)
        factors = (max_norm / norms).clamp(max=1)
        return {p: torch.tensordot(factors, row, 1) for p, row in self.rows.items()}

    def linearized(self, x: Any, y: Any) -> tuple[Tensor, Tensor]:
        """All elements of the model's outputs, and the dense Hessian of the loss in them."""
        leaves, tree = tree_flatten(self.outputs(x))
        kept = [i for i, t in enumerate(leaves) if isinstance(t, Tensor) and t.requires_grad]
        elements = torch.cat([leaves[i].flatten() for i in kept])

        def loss(z: Tensor) -> Tensor:
            replaced, pieces = list(leaves), z.split([leaves[i].numel() for i in kept])
            for i, piece in zip(kept, pieces, strict=True):
                replaced[i] = piece.view_as(leaves[i])
            return self.loss_fn(tree_unflatten(replaced, tree), y)

        return elements, torch.autograd.functional.hessian(loss, elements.detach())

    def ggn_diagonal(self, x: Any, y: Any) -> ByParameter:
        """``diag J^T H J = sum_b J_b * (J^T H)_b``, over the output's elements b."""
        elements, hessian = self.linearized(x, y)
        total = {p: torch.zeros_like(p) for p in self.params}
        for unit, column in zip(
            torch.eye(len(hessian), device="cpu").to(hessian), hessian, strict=True
        ):
            left, right = self.derivative(elements, unit), self.derivative(elements, column)
            total = {p: value + left[p] * right[p] for p, value in total.items()}
        return total

    def hessian_diagonal(self, x: Any, y: Any) -> ByParameter:
        """Second derivatives, one element of the gradient after the other."""
        slopes = torch.autograd.grad(
            self.loss(x, y), self.params, create_graph=True, materialize_grads=True
        )
        result = {}
        for p, slope in zip(self.params, slopes, strict=True):
            elements = enumerate(slope.flatten() if slope.requires_grad else ())
            second = [self.derivative(element)[p].flatten()[i] for i, element in elements]
            result[p] = torch.stack(second).view_as(p) if second else torch.zeros_like(p)
        return result

    @cached_property
    def direction(self) -> ByParameter:
        """A random vector over all parameters."""
        generator = torch.Generator().manual_seed(0)
        return {
            p: torch.randn(p.shape, generator=generator, device="cpu").to(p) for p in self.params
        }

    def ggn_product(self) -> ByParameter:
        """The Gauss-Newton matrix times the random vector."""
        elements, hessian = self.linearized(self.x, self.y)
        rows = (
            self.derivative(elements, unit)
            for unit in torch.eye(len(hessian), device="cpu").to(hessian)
        )
        product = torch.stack([_inner(row, self.direction) for row in rows])
        return self.derivative(elements, hessian @ product)

    def root_product(self, root: ByParameter) -> ByParameter:
        """``V V^T`` times the random vector, for a root ``[K, N, *p]``."""
        product = sum(torch.tensordot(V, u, u.ndim) for V, u in _pairs(root, self.direction))
        return {p: torch.tensordot(product, V, 2) for p, V in root.items()}


def _pairs(left: ByParameter, right: ByParameter) -> Iterator[tuple[Tensor, Tensor]]:
    return ((value, right[p]) for p, value in left.items())


def _inner(left: ByParameter, right: ByParameter) -> Tensor:
    return torch.stack([(a * b).sum() for a, b in _pairs(left, right)]).sum()


def _mapped(function: Callable[[Tensor], Tensor], rows: ByParameter) -> ByParameter:
    return {p: function(row) for p, row in rows.items()}


#: What each quantity is, as a loop.
LOOPS: dict[type[Quantity], Callable[[Loops, Any], ByParameter]] = {
    Gradient: lambda loops, _: loops.derivative(loops.loss(loops.x, loops.y)),
    BatchGrad: lambda loops, _: loops.rows,
    BatchL2Grad: lambda loops, _: _mapped(lambda r: r.flatten(1).square().sum(1), loops.rows),
    SumGradSquared: lambda loops, _: _mapped(lambda r: r.square().sum(0), loops.rows),
    Variance: lambda loops, quantity: _mapped(
        lambda r: r.var(0, correction=int(quantity.unbiased)), loops.rows
    ),
    ClippedGradSum: lambda loops, quantity: loops.clipped(quantity.max_norm),
    GradGram: lambda loops, _: _mapped(lambda r: r.flatten(1) @ r.flatten(1).T, loops.rows),
    DiagHessian: lambda loops, _: loops.hessian_diagonal(loops.x, loops.y),
    BatchDiagHessian: lambda loops, _: loops.per_sample(loops.hessian_diagonal),
    DiagGGNExact: lambda loops, _: loops.ggn_diagonal(loops.x, loops.y),
    BatchDiagGGNExact: lambda loops, _: loops.per_sample(loops.ggn_diagonal),
    SqrtGGNExact: lambda loops, _: loops.ggn_product(),
}
