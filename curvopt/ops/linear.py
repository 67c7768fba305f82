"""Matrix products with a parameter: linear, addmm, matmul, einsum."""

from __future__ import annotations

import string
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from curvopt.errors import Uncovered
from curvopt.ops.contraction import contraction
from curvopt.ops.registry import Arguments, rule
from curvopt.ops.use import UseView
from curvopt.structures import Outer, Shift, Structure


def _batched_linear(arguments: Arguments) -> bool:
    return arguments["input"].ndim > 1 and arguments["weight"].ndim == 2


@rule(F.linear, parameters="weight bias", fits=_batched_linear)
def linear(
    use: UseView, input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> dict[str, Structure]:
    """``y = x W^T + b``, all axes but the last are samples and tokens."""
    if use.cotangent.ndim < 4:
        raise Uncovered("linear has its samples on the axis of its features")
    left, right = use.tokens(use.raw, 1), use.tokens(input.to(use.dtype))
    found: dict[str, Structure] = {"weight": Outer(left, right, weight.shape)}
    if bias is not None:
        found["bias"] = shift(use, bias)
    return found


def shift(use: UseView, parameter: Tensor, factor: float = 1.0) -> Shift:
    """The structure of a parameter that was added to the output."""
    cotangent = use.cotangent if factor == 1 else use.cotangent * factor
    return Shift(cotangent, parameter.shape, use.aligned(parameter.shape))


def _two_operands(arguments: Arguments) -> bool:
    """An einsum of two tensors, given by an equation."""
    given = isinstance(arguments["left"], Tensor) and isinstance(arguments["right"], Tensor)
    return given and isinstance(arguments["equation"], str) and not arguments["others"]


def product(
    use: UseView, left: Tensor, right: Tensor, names: tuple[str, str]
) -> dict[str, Structure]:
    """Structure of the parameter in ``left @ right``, by letters of its einsum."""
    out = "abcdefgh"[: len(torch.broadcast_shapes(left.shape[:-2], right.shape[:-2]))]
    subs = []
    for tensor, own in ((left, "xy"), (right, "yz")):
        own = own if tensor.ndim > 1 else "y"
        lead = max(tensor.ndim - 2, 0)
        subs.append(out[len(out) - lead :] + own)
    out += ("x" if left.ndim > 1 else "") + ("z" if right.ndim > 1 else "")
    side = 0 if names[0] in use.parameters else 1
    operands = (left, right)
    return {
        names[side]: contraction(
            use, out, operands[1 - side], subs[1 - side], operands[side].shape, subs[side]
        )
    }


@rule(
    torch.matmul,
    Tensor.matmul,
    Tensor.__matmul__,
    parameters="input other",
    one_of="input other",
)
def matmul(use: UseView, input: Tensor, other: Tensor) -> dict[str, Structure]:
    """``input @ other`` with a parameter on either side."""
    return product(use, input, other, ("input", "other"))


@rule(
    torch.mm,
    Tensor.mm,
    torch.bmm,
    Tensor.bmm,
    parameters="input mat2",
    one_of="input mat2",
)
def mm(use: UseView, input: Tensor, mat2: Tensor) -> dict[str, Structure]:
    """``input @ mat2`` with a parameter on either side."""
    return product(use, input, mat2, ("input", "mat2"))


@rule(Tensor.__rmatmul__, parameters="other input", one_of="other input")
def rmatmul(use: UseView, other: Tensor, input: Tensor) -> dict[str, Structure]:
    """``input @ other``, called on ``other``."""
    return product(use, input, other, ("input", "other"))


@rule(
    torch.addmm,
    Tensor.addmm,
    parameters="input mat1 mat2",
    one_of="mat1 mat2",
)
def addmm(
    use: UseView, input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1
) -> dict[str, Structure]:
    """``beta * input + alpha * mat1 @ mat2``."""
    found: dict[str, Structure] = {}
    if "input" in use.parameters:
        found["input"] = shift(use, input, beta)
    if "mat1" in use.parameters or "mat2" in use.parameters:
        found |= product(use.scaled(alpha), mat1, mat2, ("mat1", "mat2"))
    return found


@rule(
    torch.functional.einsum,
    parameters="left right",
    fits=_two_operands,
    one_of="left right",
)
def einsum(
    use: UseView, equation: str, left: Any = None, right: Any = None, *others: Any
) -> dict[str, Structure]:
    """A product of a parameter and data, in any of whose axes are summed or not."""
    letters, out = _letters(equation, left.ndim, right.ndim, use.output_ndim)
    side = 0 if "left" in use.parameters else 1
    operands, names = (left, right), ("left", "right")
    own, other = letters[side], letters[1 - side]
    if any(len(set(part)) < len(part) for part in letters) or not set(own) <= set(out + other):
        raise Uncovered(f"einsum {equation!r} takes a diagonal or sums a parameter by itself")
    structure = contraction(use, out, operands[1 - side], other, operands[side].shape, own)
    return {names[side]: structure}


def _letters(equation: str, *ndims: int) -> tuple[list[str], str]:
    """Letters of the operands and of the output, for ellipses too."""
    inputs, arrow, out = equation.replace(" ", "").partition("->")
    parts = inputs.split(",")
    if not arrow:
        single = (c for c in inputs if c.isalpha() and inputs.count(c) == 1)
        out = ("..." if "..." in inputs else "") + "".join(sorted(single))
    free = [c for c in string.ascii_letters if c not in equation]

    def spelled(part: str, ndim: int) -> str:
        hidden = ndim - len(part.replace("...", ""))
        return part.replace("...", "".join(free[:hidden][::-1]))

    *letters, out = (spelled(part, n) for part, n in zip((*parts, out), ndims, strict=True))
    return letters, out
