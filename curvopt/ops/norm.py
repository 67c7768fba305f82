"""Normalization layers: the parameters scale and shift the normalized input."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Size, Tensor

from curvopt.ops.arithmetic import scaled
from curvopt.ops.registry import Arguments, rule
from curvopt.ops.use import UseView
from curvopt.structures import Structure


def affine(use: UseView, normalized: Tensor, stands: Size | None = None) -> dict[str, Structure]:
    """Structures of weight and bias in ``normalized * weight + bias``.

    Args:
        use: cotangent and sample axis.
        normalized: the normalized input.
        stands: shape in which weight and bias are broadcast, if that is not their own.
    """
    return {
        name: scaled(use, normalized if name == "weight" else 1, parameter.shape, stands)
        for name, parameter in use.parameters.items()
    }


def per_channel(input: Tensor) -> Size:
    """The shape of a parameter that holds a number per channel (axis 1), as it is broadcast."""
    return Size([input.shape[1], *[1] * (input.ndim - 2)])


@rule(F.layer_norm, torch.layer_norm, parameters="weight bias")
def layer_norm(
    use: UseView, input: Tensor, normalized_shape: Any, weight: Tensor | None = None,
    bias: Tensor | None = None, eps: float = 1e-5, cudnn_enable: bool = True,
) -> dict[str, Structure]:  # fmt: skip
    """Zero mean and unit variance over the last axes."""
    return affine(use, F.layer_norm(input.to(use.dtype), normalized_shape, eps=eps))


@rule(F.rms_norm, torch.rms_norm, parameters="weight")
def rms_norm(
    use: UseView, input: Tensor, normalized_shape: Any, weight: Tensor | None = None,
    eps: float | None = None,
) -> dict[str, Structure]:  # fmt: skip
    """Unit mean square over the last axes."""
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    return affine(use, F.rms_norm(input.to(use.dtype), normalized_shape, eps=eps))


@rule(F.group_norm, torch.group_norm, parameters="weight bias")
def group_norm(
    use: UseView, input: Tensor, num_groups: int, weight: Tensor | None = None,
    bias: Tensor | None = None, eps: float = 1e-5, cudnn_enabled: bool = True,
) -> dict[str, Structure]:  # fmt: skip
    """Zero mean and unit variance over groups of channels."""
    return affine(use, F.group_norm(input.to(use.dtype), num_groups, eps=eps), per_channel(input))


def _of_the_input(flag: str) -> Any:
    """The running statistics are updated, not read, if the input's own are used."""

    def unread(arguments: Arguments) -> tuple[str, ...]:
        return ("running_mean", "running_var") if arguments[flag] else ()

    return unread


@rule(F.instance_norm, parameters="weight bias", unread=_of_the_input("use_input_stats"))
def instance_norm(
    use: UseView, input: Tensor, running_mean: Tensor | None = None,
    running_var: Tensor | None = None, weight: Tensor | None = None, bias: Tensor | None = None,
    use_input_stats: bool = True, momentum: float = 0.1, eps: float = 1e-5,
) -> dict[str, Structure]:  # fmt: skip
    """Zero mean and unit variance of every channel of every sample."""
    normalized = F.instance_norm(
        input.to(use.dtype), running_mean, running_var, None, None, use_input_stats, 0.0, eps
    )
    return affine(use, normalized, per_channel(input))


@rule(F.batch_norm, parameters="weight bias", unread=_of_the_input("training"))
def batch_norm(
    use: UseView, input: Tensor, running_mean: Tensor | None = None,
    running_var: Tensor | None = None, weight: Tensor | None = None, bias: Tensor | None = None,
    training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> dict[str, Structure]:  # fmt: skip
    """Constant mean and variance of every channel; those of the batch refuse all but its gradient.

    The engine sees to the refusal, for layers without parameters too.
    """
    normalized = F.batch_norm(
        input.to(use.dtype), running_mean, running_var, None, None, training, 0.0, eps
    )
    return affine(use, normalized, per_channel(input))
