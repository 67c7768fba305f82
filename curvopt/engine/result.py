"""What `compute` returns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

from curvopt.errors import CurvoptError


class Values(Mapping[Any, Any]):
    """One quantity's values, by parameter, or by name where names were given.

    Example:
        >>> model = torch.nn.Linear(4, 3)
        >>> x, y = torch.randn(8, 4), torch.randint(3, (8,))
        >>> result = curvopt.compute(
        ...     lambda: torch.nn.functional.cross_entropy(model(x), y),
        ...     model.named_parameters(),
        ...     curvopt.BatchGrad(),
        ... )
        >>> result.batch_grad["weight"] is result.batch_grad[model.weight]
        True
        >>> result.batch_grad
        batch_grad(weight: [8, 3, 4], bias: [8, 3])
        >>> list(result.batch_grad.named())
        ['weight', 'bias']
    """

    def __init__(self, field: str, values: dict[Tensor, Any], names: dict[Tensor, str]):
        self._field, self._values = field, values
        self._names = {p: names[p] for p in values}

    def __getitem__(self, parameter: Tensor | str) -> Any:
        values: Mapping[Any, Any] = self.named() if isinstance(parameter, str) else self._values
        try:
            return values[parameter]
        except KeyError:
            raise KeyError(self._lacks(parameter)) from None

    def _lacks(self, parameter: Tensor | str) -> str:
        if isinstance(parameter, str):
            return (
                f"{self._field} has no value named {parameter!r}, but {', '.join(self.named())}: "
                "give (name, parameter) pairs, as of model.named_parameters(), for names"
            )
        return (
            f"{self._field} has no value for this tensor: it was not among the parameters "
            "given, or it does not require a gradient"
        )

    def named(self) -> dict[str, Any]:
        """The values by name; ``parameter 0`` and so on where no names were given."""
        return {self._names[p]: value for p, value in self._values.items()}

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_values": {p: _apart(value) for p, value in self._values.items()}}

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name}: {_form(value)}" for name, value in self.named().items())
        return f"{self._field}({shapes})"


class Result:
    """What `compute` returns: the loss, and one mapping from parameters per quantity.

    ``result.batch_grad[p]`` is the value for parameter p, and ``result.batch_grad["0.weight"]``
    that for the parameter of this name, where `compute` was given names. A result can be pickled,
    and saved by `torch.save`; loaded elsewhere it answers to names.

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

    def __init__(
        self,
        loss: Tensor,
        gradient: Callable[[], dict[Tensor, Tensor]],
        names: dict[Tensor, str],
    ):
        self.loss, self._gradient, self._names = loss, gradient, names

    def __getattr__(self, name: str) -> Any:
        if name == "grad":
            self.grad = Values("grad", self._gradient(), self._names)
            return self.grad
        raise AttributeError(f"no quantity {name!r} was asked for")

    def _fields(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if not key.startswith("_")}

    def __repr__(self) -> str:
        fields = self._fields()
        lines = [f"loss={float(fields.pop('loss')):.6g}"]
        for field, value in fields.items():
            lines.append(repr(value) if isinstance(value, Values) else f"{field}: {_form(value)}")
        return f"Result({', '.join(lines)})" if len(lines) == 1 else _indented(lines)

    def __getstate__(self) -> dict[str, Any]:
        """All numbers, the gradient too, without the graph behind them."""
        for field, value in self._fields().items():
            parts = value.values() if isinstance(value, Values) else (value,)
            if any(callable(part) and not isinstance(part, Tensor) for part in parts):
                raise CurvoptError(
                    f"{field} holds functions, which multiply by means of the graph and cannot be "
                    "copied or pickled: take what you need of it, and compute the rest apart"
                )
        self.grad  # noqa: B018 (it is computed now)
        fields = {key: _apart(value) for key, value in self._fields().items()}
        return fields | {"_names": self._names}


def _indented(lines: list[str]) -> str:
    return "Result(\n" + "".join(f"    {line},\n" for line in lines) + ")"


def _apart(value: Any) -> Any:
    """A value without the graph behind it."""
    if isinstance(value, (tuple, list)):
        return type(value)(map(_apart, value))
    return value.detach() if isinstance(value, Tensor) else value


def _form(value: Any) -> str:
    """The shape of a value, or of its parts."""
    if isinstance(value, Tensor):
        return str(list(value.shape)) if value.ndim else f"{value.item():.6g}"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(_form, value))})"
    return getattr(value, "__name__", type(value).__name__)
