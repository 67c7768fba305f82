"""Elementwise arithmetic and copies: biases, scales, masks, class tokens, position tables."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Size, Tensor

from curvopt.errors import Uncovered
from curvopt.ops.registry import Arguments, composition, rule
from curvopt.ops.use import UseView
from curvopt.structures import Scale, Shift, Structure


def no_larger(arguments: Arguments, is_shared: Callable[[Tensor], bool]) -> bool:
    """Parameters and data that may be a mask for them: the output is no larger than they are."""
    tensors = [value for value in arguments.values() if isinstance(value, Tensor)]
    data = [tensor for tensor in tensors if not is_shared(tensor)]
    if any(tensor.requires_grad for tensor in data):
        return False
    own = [tensor.shape for tensor in tensors if is_shared(tensor)]
    return torch.broadcast_shapes(*(t.shape for t in tensors)) == torch.broadcast_shapes(*own)


def elementwise(use: UseView, **derivatives: Callable[[], Tensor | float]) -> dict[str, Structure]:
    """Structures of the parameters of an op that acts element by element, with broadcasting.

    Args:
        use: cotangent and sample axis.
        **derivatives: by argument, how to get the derivative of the output in it (see `scaled`).
    """
    return {
        name: scaled(use, derivatives[name](), parameter.shape)
        for name, parameter in use.parameters.items()
    }


def scaled(
    use: UseView, derivative: Tensor | float, shape: Size, stands: Size | None = None
) -> Structure:
    """Structure of a parameter, given the derivative of the output in it, element by element.

    Args:
        use: cotangent and sample axis.
        derivative: a number, or a tensor that broadcasts to the output.
        shape: the parameter's shape.
        stands: the shape in which it was broadcast to the output, if that is another one.
    """
    aligned = use.aligned(shape if stands is None else stands)
    if not isinstance(derivative, Tensor):
        return Shift(use.scaled(derivative).cotangent, shape, aligned)
    factor = use.rows(derivative.expand(use.raw.shape[1:]))
    return Scale(use.cotangent, factor, shape, aligned)


def always(*names: str) -> Callable[[Arguments], tuple[str, ...]]:
    """Say which arguments' values a rule does not read."""
    return lambda arguments: names


@rule(
    *(torch.add, Tensor.add),
    parameters="input other",
    opens=no_larger,
    unread=always("input", "other"),
)
def add(use: UseView, input: Tensor, other: Tensor, *, alpha: float = 1) -> dict[str, Structure]:
    """``input + alpha * other``."""
    return elementwise(use, input=lambda: 1, other=lambda: alpha)


@rule(
    *(torch.sub, Tensor.sub, torch.subtract, Tensor.subtract),
    parameters="input other",
    opens=no_larger,
    unread=always("input", "other"),
)
def sub(use: UseView, input: Tensor, other: Tensor, *, alpha: float = 1) -> dict[str, Structure]:
    """``input - alpha * other``."""
    return elementwise(use, input=lambda: 1, other=lambda: -alpha)


@rule(
    *(torch.mul, Tensor.mul, torch.multiply, Tensor.multiply),
    parameters="input other",
    opens=no_larger,
)
def mul(use: UseView, input: Tensor, other: Tensor) -> dict[str, Structure]:
    """``input * other``."""
    return elementwise(use, input=lambda: other, other=lambda: input)


def _is_exact(arguments: Arguments) -> bool:
    return arguments["rounding_mode"] is None


@rule(
    *(torch.div, Tensor.div, torch.divide, Tensor.divide, torch.true_divide, Tensor.true_divide),
    parameters="input other",
    fits=_is_exact,
    opens=no_larger,
)
def div(
    use: UseView, input: Tensor, other: Tensor, *, rounding_mode: str | None = None
) -> dict[str, Structure]:
    """``input / other``."""
    return elementwise(use, input=lambda: other.reciprocal(), other=lambda: -input / other.square())


@rule(
    *(torch.addcmul, Tensor.addcmul),
    parameters="input tensor1 tensor2",
    opens=no_larger,
)
def addcmul(
    use: UseView, input: Tensor, tensor1: Tensor, tensor2: Tensor, *, value: float = 1
) -> dict[str, Structure]:
    """``input + value * tensor1 * tensor2``."""
    return elementwise(
        use, input=lambda: 1, tensor1=lambda: value * tensor2, tensor2=lambda: value * tensor1
    )


@rule(
    *(torch.lerp, Tensor.lerp),
    parameters="input end weight",
    opens=no_larger,
)
def lerp(use: UseView, input: Tensor, end: Tensor, weight: Tensor | float) -> dict[str, Structure]:
    """``input + weight * (end - input)``."""
    return elementwise(
        use, input=lambda: 1 - weight, end=lambda: weight, weight=lambda: end - input
    )


@rule(torch.where, parameters="input other", opens=no_larger, unread=always("input", "other"))
def where(use: UseView, condition: Tensor, input: Any, other: Any) -> dict[str, Structure]:
    """``input`` where the condition holds, else ``other``."""
    return elementwise(use, input=lambda: condition, other=lambda: ~condition)


@composition(Tensor.where)
def _where(self: Any, condition: Tensor, other: Any) -> Tensor:
    return torch.where(condition, self, other)


@rule(torch.prelu, Tensor.prelu, parameters="weight")
def prelu(use: UseView, input: Tensor, weight: Tensor) -> dict[str, Structure]:
    """``max(input, 0) + weight * min(input, 0)``, a weight per channel (axis 1) or one for all."""
    stands = Size([weight.numel(), *[1] * max(input.ndim - 2, 0)])
    return {"weight": scaled(use, input.clamp(max=0), weight.shape, stands)}


def _inplace(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The in-place form of an elementwise op: its output, copied to where the input was."""

    def form(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return input.copy_(function(input.clone(), *args, **kwargs))

    return form


for _name in "add sub subtract mul multiply div divide true_divide addcmul lerp".split():
    composition(getattr(Tensor, f"{_name}_"))(_inplace(getattr(Tensor, _name)))


# Copies along the sample axis. The rules need no sizes: the output has them.


def copies(use: UseView, input: Tensor) -> dict[str, Structure]:
    """Structure of a parameter that was broadcast to the output's shape."""
    aligned = use.aligned(input.shape)
    sizes = use.cotangent.shape[2:]
    if any(own not in (1, size) for own, size in zip(aligned, sizes, strict=True)):
        raise Uncovered(f"{use.op} repeats an axis of a parameter {list(input.shape)}")
    return {"input": Shift(use.cotangent, input.shape, aligned)}


@rule(
    *(Tensor.expand, Tensor.broadcast_to, torch.broadcast_to),
    parameters="input",
)
def expand(use: UseView, input: Tensor, *sizes: Any, **options: Any) -> dict[str, Structure]:
    """``input.expand(*sizes)``."""
    return copies(use, input)


@rule(
    Tensor.expand_as,
    parameters="input",
    opens=lambda arguments, is_shared: True,
    unread=always("other"),
)
def expand_as(use: UseView, input: Tensor, other: Tensor) -> dict[str, Structure]:
    """``input.expand(other.shape)``."""
    return copies(use, input)


@rule(
    *(Tensor.repeat, Tensor.tile, torch.tile),
    parameters="input",
)
def repeat(use: UseView, input: Tensor, *sizes: Any, **options: Any) -> dict[str, Structure]:
    """``input.repeat(*sizes)``, where only axes of size 1 are repeated."""
    return copies(use, input)
