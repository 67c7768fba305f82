"""Arithmetic that structures share, and where it is too inexact."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Norms are in doubt where rounding, of a few units of the terms' sum, could be 1e-5 of them: where
# inner products add up to this share of their absolute values (the norm's square), and where a
# row has this share of the length of its terms. In units of the precision, float32's at most.
INNER_PRODUCTS, TERMS = 4e5, 3e4


def squared_norm(tensor: Tensor, keep: int) -> Tensor:
    """Sum of squares over all but the first ``keep`` axes, differentiable at zero."""
    flat = tensor.flatten(keep) if tensor.ndim > keep else tensor.unsqueeze(-1)
    if tensor.requires_grad:
        return flat.square().sum(-1)
    return torch.linalg.vector_norm(flat, dim=-1).square()  # three times as fast


def small_beside(squares: Tensor, reach: Tensor) -> Tensor:
    """Which rows are small beside their terms, by their squared norms and `Structure.reach`."""
    return _below(squares, reach.detach().square(), units(squares, TERMS) ** 2)


def cancels(squares: Tensor, absolute: Tensor) -> Tensor:
    """Which sums are small beside that of their absolute terms; also those that overflow."""
    return _below(squares, absolute, units(squares, INNER_PRODUCTS))


def units(like: Tensor, number: float) -> float:
    """A number of units of a tensor's precision, float32's at most."""
    return number * min(torch.finfo(like.dtype).eps, torch.finfo(torch.float32).eps)


def _below(values: Tensor, bound: Tensor, share: float) -> Tensor:
    return ~((values > share * bound) | (bound == 0))  # true also where one is no number


def widened(tensor: Tensor) -> Tensor:
    """In double precision, where the device has it."""
    return tensor if tensor.device.type == "mps" else tensor.double()


def accumulate(parts: Iterator[Tensor]) -> Tensor:
    """Sum of tensors as they come."""
    total = next(parts)
    for part in parts:
        total = total + part
    return total


def scale_smaller(left: Tensor, right: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of a product, the smaller one times the samples' weights ``[N]``."""
    if left.numel() <= right.numel():
        return left * weights.view(-1, *[1] * (left.ndim - 1)), right
    return left, right * weights.view(-1, *[1] * (right.ndim - 1))


def sum_tensors(tensors: list[Tensor]) -> Tensor:
    """Sum of tensors of one shape."""
    result = tensors[0]
    for tensor in tensors[1:]:
        result = result + tensor
    return result
