"""Squared norms of a step, without large temporaries and without denormal numbers."""

from __future__ import annotations

import torch
from torch import Tensor

# Elements of a block: 256 KiB of float32.
BLOCK = 1 << 16


def nothing(like: Tensor) -> float:
    """The smallest number whose inverse is one."""
    info = torch.finfo(like.dtype)
    return info.tiny / info.eps


def square(x: Tensor) -> Tensor:
    """Squared norm; a norm would form squares too small to be normal numbers, which are slow."""
    flat = x.reshape(-1)
    return torch.dot(flat, flat)


def squares(m: Tensor, grad: Tensor, inverse: Tensor, weight: float) -> Tensor:
    """Squares of the step, of the momentum to come and of the gradient: ``[3]``.

    On a CPU in blocks, which cost less than a whole: large fresh memory is slow, the system clears
    it page by page.
    """
    whole = (m, grad, inverse)
    large = m.numel() > BLOCK and m.device.type == "cpu"
    if not large or not all(x.is_contiguous() for x in whole):
        mean = torch.lerp(m, grad, weight)
        known = square(mean), square(grad)
        return torch.stack([square(mean.mul_(inverse)), *known])
    scratch, found = m.new_empty(BLOCK), []
    for m, grad, inverse in zip(*(x.view(-1).split(BLOCK) for x in whole), strict=True):
        mean = torch.lerp(m, grad, weight, out=scratch[: len(m)])
        known = square(mean), square(grad)
        found += [square(mean.mul_(inverse)), *known]
    return torch.stack(found).view(-1, 3).sum(0)
