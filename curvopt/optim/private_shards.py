"""Private gradients of parameters that `fully_shard` divides: each process draws for its part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from curvopt.dtypes import at_least_float32
from curvopt.parallel.groups import Ranks
from curvopt.parallel.shards import cut, is_sharded, like, local
from curvopt.privacy.noise import GaussianNoise

# Number of the streams for parameters that every process has as a whole: the same noise on all.
WHOLE = -1


def privatized(
    params: Sequence[Tensor],
    sums: Mapping[Tensor, Tensor],
    penalties: Mapping[Tensor, Tensor],
    ranks: Ranks,
    noise: GaussianNoise,
    std: float,
    size: float,
) -> dict[Tensor, Tensor]:
    r"""``(sum + N(0, std^2)) / size`` over the processes, divided as the parameters are.

    Args:
        params: the parameters, in an order that is the same everywhere.
        sums: whole clipped sums of this process.
        penalties: whole gradients of terms that hold no sample, the same on all processes.
        ranks: the processes.
        noise: of the run.
        std: the noise's standard deviation.
        size: the divisor.
    """
    wide = [at_least_float32(p.dtype) for p in params]
    own = [
        sums[p] if p in sums else torch.zeros(p.shape, dtype=dtype, device=p.device)
        for p, dtype in zip(params, wide, strict=True)
    ]
    parts = [
        local(cut(total, p)).contiguous() for p, total in zip(params, ranks.sums(own), strict=True)
    ]
    if std:
        noise.share(ranks.value_of_first)
        numbers = [_number(p) for p in params]
        for number in sorted(set(numbers)):
            mine = [part for part, at in zip(parts, numbers, strict=True) if at == number]
            noise.part(number).add_to(mine, std, size)
    else:
        torch._foreach_div_(parts, size)
    for p, part in zip(params, parts, strict=True):
        if p in penalties:
            part.add_(local(cut(penalties[p], p)))
    return {p: like(part.to(p.dtype), p) for p, part in zip(params, parts, strict=True)}


def _number(p: Any) -> int:
    """The number of this process's part: replicas of a part have the same."""
    if not is_sharded(p):
        return WHOLE
    number = 0
    for dim, placement in enumerate(p.placements):
        if placement.is_shard():
            number = number * p.device_mesh.size(dim) + p.device_mesh.get_local_rank(dim)
    return number
