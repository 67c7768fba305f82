"""Transposed convolutions: convolutions with input and cotangent exchanged."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from curvopt.ops.conv import batched, channel_bias, per_axis, whole_maps
from curvopt.ops.registry import rule
from curvopt.ops.use import UseView
from curvopt.structures import Conv, Folded, Structure


@rule(
    *(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d),
    parameters="weight bias",
    fits=batched,
)
def transposed_convolution(
    use: UseView, input: Tensor, weight: Tensor, bias: Tensor | None = None,
    stride: Any = 1, padding: Any = 0, output_padding: Any = 0, groups: int = 1,
    dilation: Any = 1,
) -> dict[str, Structure]:  # fmt: skip
    """The adjoint of a convolution with this weight, whose input is now the output."""
    whole_maps(use, weight)
    spatial = weight.ndim - 2
    stride, padding = per_axis(stride, spatial), per_axis(padding, spatial)
    # That convolution has further positions, which no input came from, behind the output padding.
    extra = zip(per_axis(output_padding, spatial), stride, strict=True)
    rows = F.pad(use.rows(input), [size for o, s in reversed(list(extra)) for size in (0, o // s)])
    v, n = use.cotangent.shape[:2]
    conv = Conv(
        rows.unsqueeze(1).expand(n, v, *rows.shape[1:]).flatten(0, 1).unsqueeze(0),
        use.cotangent.transpose(0, 1).flatten(0, 1),
        weight.shape,
        stride,
        padding,
        per_axis(dilation, spatial),
        groups,
    )
    found: dict[str, Structure] = {"weight": Folded(conv, v)}
    if bias is not None:
        found["bias"] = channel_bias(use, bias)
    return found
