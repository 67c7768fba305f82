"""Bilinear layers."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from curvopt.ops.linear import shift
from curvopt.ops.registry import rule
from curvopt.ops.use import UseView
from curvopt.structures import Outer, Structure


@rule(F.bilinear, parameters="weight bias")
def bilinear(
    use: UseView, input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None
) -> dict[str, Structure]:
    """``y_o = x1^T W_o x2 + b_o``: linear in the products of the two inputs' features."""
    products = use.rows(input1).unsqueeze(-1) * use.rows(input2).unsqueeze(-2)
    right = products.flatten(-2).flatten(1, -2).unsqueeze(1)
    left = use.cotangent.flatten(2, -2).unsqueeze(2)
    found: dict[str, Structure] = {"weight": Outer(left, right, weight.shape)}
    if bias is not None:
        found["bias"] = shift(use, bias)
    return found
