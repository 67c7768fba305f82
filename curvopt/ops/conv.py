"""Convolutions of one, two and three dimensions."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from curvopt.ops.registry import Arguments, rule
from curvopt.ops.use import UseView
from curvopt.structures import Conv, Shift, Structure


def batched(arguments: Arguments) -> bool:
    """The input has a batch axis."""
    return bool(arguments["input"].ndim == arguments["weight"].ndim)


def whole_maps(use: UseView, weight: Tensor) -> None:
    """Refuse samples on an axis of the maps."""
    if use.cotangent.ndim != weight.ndim + 2:
        raise use.on_samples(weight.shape)


@rule(F.conv1d, F.conv2d, F.conv3d, parameters="weight bias", fits=batched)
def convolution(
    use: UseView, input: Tensor, weight: Tensor, bias: Tensor | None = None,
    stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1,
) -> dict[str, Structure]:  # fmt: skip
    """Cross-correlation; padding modes other than zeros pad the input beforehand."""
    whole_maps(use, weight)
    spatial = weight.ndim - 2
    stride, dilation = per_axis(stride, spatial), per_axis(dilation, spatial)
    rows = use.rows(input)
    if padding == "same":
        totals = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
        if any(total % 2 for total in totals):  # torch pads the odd one on the right
            pads = [size for total in reversed(totals) for size in (total // 2, total - total // 2)]
            rows, padding = F.pad(rows, pads), 0
        else:
            padding = [total // 2 for total in totals]
    elif padding == "valid":
        padding = 0
    structure = Conv(
        use.cotangent, rows, weight.shape, stride, per_axis(padding, spatial), dilation, groups
    )
    found: dict[str, Structure] = {"weight": structure}
    if bias is not None:
        found["bias"] = channel_bias(use, bias)
    return found


def channel_bias(use: UseView, bias: Tensor) -> Shift:
    """The structure of a bias on axis 1 of the output."""
    spatial = use.cotangent.ndim - 4
    return Shift(use.cotangent, bias.shape, (1, bias.numel(), *[1] * spatial))


def per_axis(value: Any, axes: int) -> list[int]:
    """A number for every spatial axis."""
    if isinstance(value, int):
        return [value] * axes
    values = list(value)
    return values * axes if len(values) == 1 else values
