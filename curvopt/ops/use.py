"""What a rule sees of a use: cotangent and data, samples first."""

from __future__ import annotations

from copy import copy
from typing import Any

from torch import Size, Tensor

from curvopt.axes.layout import Layout
from curvopt.dtypes import at_least_float32
from curvopt.errors import Uncovered


class UseView:
    """A use of parameters by an op, in the canonical layout.

    Args:
        op: the op's name.
        parameters: the values that the rule answers for, by argument name: parameters, or values
            made of them.
        cotangent: of the output, ``[V, *output.shape]``.
        layout: where the output holds the samples.

    Attributes:
        raw: the cotangent as it came, ``[V, *output.shape]``.
        cotangent: ``[V, N, K, *rest]``.
    """

    def __init__(self, op: str, parameters: dict[Any, Tensor], cotangent: Tensor, layout: Layout):
        dtype = next(iter(parameters.values())).dtype
        # Half precision would lose squares and norms: they are accumulated in float32.
        self.dtype = at_least_float32(dtype)
        self.op, self.layout, self.parameters = op, layout, parameters
        self.raw = cotangent if cotangent.dtype is self.dtype else cotangent.to(self.dtype)
        self.cotangent = layout.split(self.raw, 1)
        self.output_ndim = cotangent.ndim - 1

    def scaled(self, factor: float) -> UseView:
        """The same use with its cotangent multiplied by a number."""
        if factor == 1:
            return self
        view = copy(self)
        view.raw, view.cotangent = self.raw * factor, self.cotangent * factor
        return view

    def rows(self, tensor: Tensor) -> Tensor:
        """Data of the op in the canonical layout, ``[N, K, *rest]``."""
        split = self.layout.split(tensor)
        wrong = split.dtype is not self.dtype and split.is_floating_point()
        return split.to(self.dtype) if wrong else split

    def tokens(self, tensor: Tensor, lead: int = 0) -> Tensor:
        """Rows of a matrix product, ``[*lead axes, N, 1, tokens, features]``, in one view."""
        n, features = self.layout.n, tensor.shape[-1]
        if self.layout.kind != "batch" or not tensor.numel():
            return self.layout.split(tensor, lead).flatten(lead + 1, -2).unsqueeze(lead + 1)
        return tensor.reshape(*tensor.shape[:lead], n, 1, -1, features)

    @property
    def flat(self) -> Tensor:
        """The cotangent for a custom rule, samples first: ``[V, N (or N * K), ...]``."""
        if self.layout.kind == "gather":
            return self.cotangent.flatten(1, 2)
        return self.cotangent if self.layout.kind == "time" else self.raw

    def data(self, value: Any) -> Any:
        """Data for a custom rule: samples first where the tensor has them, else unchanged."""
        if not isinstance(value, Tensor):
            return value
        if self.layout.kind == "gather":
            same = value.shape[: self.layout.axes] == self.raw.shape[1 : 1 + self.layout.axes]
            return self.layout.split(value).flatten(0, 1) if same else value
        if self.layout.kind != "time" or value.ndim < 2:
            return value
        return value.transpose(0, 1) if value.shape[1] == self.layout.n else value

    def summed(self, rows: Tensor) -> Tensor:
        """Rows of a custom rule, ``[V, N * K, *p]`` as `flat` has them, summed: ``[V, N, *p]``."""
        layout = self.layout
        if layout.kind == "gather":
            layout = Layout("batch", layout.n, layout.k)
        return layout.split(rows, 1).sum(2)

    def aligned(self, shape: Size) -> tuple[int, ...]:
        """A broadcast shape as it stands in ``[K, *rest]``."""
        padded = [1] * (self.output_ndim - len(shape)) + list(shape)
        layout = self.layout
        if layout.kind == "time":
            samples = padded.pop(1)
            if samples != 1 and layout.n != 1:
                raise self.on_samples(shape)
            return tuple(padded)
        if any(size != 1 for size in padded[: layout.axes]) and (layout.n != 1 or layout.axes > 1):
            raise self.on_samples(shape)
        # With one sample the first axis is all its own.
        return (padded[0] if layout.axes == 1 else 1, *padded[layout.axes :])

    def on_samples(self, shape: Size) -> Uncovered:
        """The samples lie on an axis that the parameter has too."""
        return Uncovered(f"{self.op} has its samples on an axis of a parameter {list(shape)}")
