"""Products of whole curvature matrices with vectors, from plain autograd graphs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from curvopt.engine.backward import pull_back, twice_differentiable
from curvopt.errors import CurvoptError

Vector = Mapping[Tensor, Tensor] | Sequence[Tensor]


@twice_differentiable()
def hessian_vector_product(
    loss: Tensor, params: Iterable[Tensor], v: Vector, *, create_graph: bool = False
) -> Any:
    """Product of the Hessian of a loss with a vector over the parameters, ``H v``.

    Args:
        loss: a scalar, computed from the parameters as usual.
        params: the parameters.
        v: one tensor per parameter, ``[*p]``, or ``[V, *p]`` for V vectors at once; in the order of
            the parameters, or a mapping from them.
        create_graph: keep the product differentiable.

    Returns:
        The product in the form of v: a tuple of tensors, or a dict keyed by the parameters.

    Raises:
        CurvoptError: the loss is no scalar, or v does not fit the parameters.

    Example:
        >>> params = list(model.parameters())
        >>> loss, v = loss_fn(model(x), y), [torch.randn_like(p) for p in params]
        >>> Hv = curvopt.hessian_vector_product(loss, params, v)
        >>> [tuple(part.shape) for part in Hv]
        [(5, 4), (5,), (3, 5), (3,)]

    References:
        Pearlmutter, Fast exact multiplication by the Hessian (Neural Computation 1994).
    """
    params = list(params)
    vectors, batched = _vectors(params, v)
    _scalar(loss)
    slopes = torch.autograd.grad(loss, params, create_graph=True, materialize_grads=True)
    product = _pull(slopes, params, vectors, create_graph)
    return _in_the_form_of(v, params, product, batched)


@twice_differentiable()
def ggn_vector_product(
    loss: Tensor,
    outputs: Tensor | Sequence[Tensor],
    params: Iterable[Tensor],
    v: Vector,
    *,
    create_graph: bool = False,
) -> Any:
    """Product of the generalized Gauss-Newton matrix with a vector, ``J^T H J v``.

    J is the Jacobian of the outputs in the parameters, H the Hessian of the loss in the outputs.

    Args:
        loss: a scalar, computed from the outputs.
        outputs: the model's output, or a sequence of them.
        params: the parameters.
        v: as in `hessian_vector_product`.
        create_graph: keep the product differentiable.

    Returns:
        The product in the form of v: a tuple of tensors, or a dict keyed by the parameters.

    Raises:
        CurvoptError: the loss is no scalar, or v does not fit the parameters.

    Example:
        >>> params, outputs = list(model.parameters()), model(x)
        >>> v = [torch.randn_like(p) for p in params]
        >>> Gv = curvopt.ggn_vector_product(loss_fn(outputs, y), outputs, params, v)
        >>> [tuple(part.shape) for part in Gv]
        [(5, 4), (5,), (3, 5), (3,)]

    References:
        Schraudolph, Fast curvature matrix-vector products (Neural Computation 2002).
    """
    params = list(params)
    vectors, batched = _vectors(params, v)
    _scalar(loss)
    fs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    # J v is the derivative of J^T u in u, along v.
    dummies = [torch.zeros_like(f, requires_grad=True) for f in fs]
    slopes = torch.autograd.grad(fs, params, dummies, create_graph=True, materialize_grads=True)
    tangents = _pull(slopes, dummies, vectors, create_graph)
    slopes = torch.autograd.grad(loss, fs, create_graph=True, materialize_grads=True)
    product = _pull(fs, params, _pull(slopes, fs, tangents, create_graph), create_graph)
    return _in_the_form_of(v, params, product, batched)


def _scalar(loss: Tensor) -> None:
    if loss.numel() != 1 or not loss.requires_grad:
        raise CurvoptError(
            f"the loss must be a scalar that depends on the parameters, got {list(loss.shape)}"
            + ("" if loss.requires_grad else " without a graph")
        )


def _vectors(params: list[Tensor], v: Vector) -> tuple[list[Tensor], bool]:
    """One ``[V, *p]`` per parameter, and whether V was given."""
    vectors = [v[p] for p in params] if isinstance(v, Mapping) else list(v)
    shapes = [list(vector.shape) for vector in vectors]
    if shapes == [list(p.shape) for p in params]:
        return [vector.unsqueeze(0) for vector in vectors], False
    if [shape[1:] for shape in shapes] != [list(p.shape) for p in params] or len(
        {shape[0] for shape in shapes}
    ) != 1:
        raise CurvoptError(
            f"v has shapes {shapes}; the parameters have {[list(p.shape) for p in params]}, each "
            "with or without one leading axis [V] for several vectors"
        )
    return vectors, True


def _pull(
    outputs: Sequence[Tensor], inputs: list[Tensor], cotangents: list[Tensor], create_graph: bool
) -> list[Tensor]:
    """Cotangents at the outputs, carried to the inputs; zeros where no path leads."""
    columns = len(cotangents[0])
    pairs = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad]
    pulled: Sequence[Tensor | None] = [None] * len(inputs)
    if pairs:
        some, their = (list(part) for part in zip(*pairs, strict=True))
        pulled = pull_back(some, their, inputs, batched=True, create_graph=create_graph)
    return [
        target.new_zeros(columns, *target.shape) if value is None else value
        for target, value in zip(inputs, pulled, strict=True)
    ]


def _in_the_form_of(v: Vector, params: list[Tensor], product: list[Tensor], batched: bool) -> Any:
    values = product if batched else [value[0] for value in product]
    return dict(zip(params, values, strict=True)) if isinstance(v, Mapping) else tuple(values)
