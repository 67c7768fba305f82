"""Several rows of the data that are views of one sample."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from curvopt.axes.lattice import MIXED
from curvopt.axes.samples import Samples
from curvopt.errors import CurvoptError

ViewOrder = Literal["sample", "view"]


def grouped(samples: Samples, views: int, order: ViewOrder) -> Samples:
    """Samples of several rows each, from rows that were found to be apart.

    Args:
        samples: the rows, each as a sample of its own.
        views: rows per sample, K.
        order: ``"sample"``: row nK + k is view k of sample n; ``"view"``: row kN + n is.

    Raises:
        CurvoptError: the rows are no multiple of K, or the views have an axis of their own.
    """
    if views == 1 or not samples.n:
        return samples
    n, rest = divmod(samples.n, views)
    if rest:
        raise CurvoptError(
            f"views={views}: the data flow keeps {samples.n} rows apart, which is no multiple of "
            "it. If views were made inside the closure, or have an axis of their own, their "
            "sample is known: leave views out"
        )
    for storage, owners in samples.seeds.items():
        shape = samples.trace.outside[storage].shape
        along = [d for d, size in enumerate(owners.shape) if size > 1]
        beside = [d + side for d in along for side in (-1, 1)]
        if any(0 <= d < len(shape) and shape[d] == views for d in beside):
            raise CurvoptError(
                f"views={views}: data of shape {list(shape)} may have the views on an axis of "
                "their own, beside that of the samples. Then leave views out: their sample is "
                "known. If not, give the data that axis (unflatten), and flatten it in the closure"
            )

    def group(owners: Tensor) -> Tensor:
        own = (owners >= 0) & (owners != MIXED)
        numbers = owners // views if order == "sample" else owners % n
        return torch.where(own, numbers, owners).to(owners.dtype)

    return replace(
        samples,
        n=n,
        seeds={key: group(owners) for key, owners in samples.seeds.items()},
        claims={key: group(owners) for key, owners in samples.claims.items()},
        owners=group(samples.owners),
        steady=False,
        _last=None,
    )
