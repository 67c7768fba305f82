"""What `compute` returns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor


class Values(Mapping[Tensor, Any]):
    """One quantity's values, keyed by the parameter."""

    def __init__(self, field: str, values: dict[Tensor, Any]):
        self._field, self._values = field, values

    def __getitem__(self, parameter: Tensor) -> Any:
        try:
            return self._values[parameter]
        except KeyError:
            raise KeyError(
                f"{self._field} has no value for this tensor: it was not among the parameters "
                "given, or it does not require a gradient"
            ) from None

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        shapes = ", ".join(str(list(getattr(v, "shape", "?"))) for v in self._values.values())
        return f"{self._field}({shapes})"


class Result:
    """What `compute` returns: the loss, and one mapping from parameters per quantity.

    Attributes:
        loss: the loss, detached.
        grad: the gradient of the loss as written; computed when first read unless it was asked for
            or followed from what was.
    """

    loss: Tensor
    batch_grad: Values
    batch_l2: Values
    sum_grad_squared: Values
    variance: Values
    diag_ggn_exact: Values
    diag_ggn_mc: Values
    diag_ggn_exact_batch: Values
    diag_ggn_mc_batch: Values
    sqrt_ggn_exact: Values
    sqrt_ggn_mc: Values
    clipped_grad_sum: Values
    kfac: Values
    kflr: Values
    diag_h: Values
    diag_h_batch: Values
    diag_h_mc: Values
    empirical_fisher: Values
    grad_gram: Values
    ggn_gram: Values
    block_ggn: Values
    block_hessian: Values
    ggn_quadratic: Tensor
    structures: Values

    def __init__(self, loss: Tensor, gradient: Callable[[], dict[Tensor, Tensor]]):
        self.loss, self._gradient = loss, gradient

    def __getattr__(self, name: str) -> Any:
        if name == "grad":
            self.grad = Values("grad", self._gradient())
            return self.grad
        raise AttributeError(f"no quantity {name!r} was asked for")
