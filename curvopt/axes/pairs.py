"""Rows of several tensors that are used together must be those of the same samples."""

from __future__ import annotations

from collections.abc import Set

import torch
from torch import Tensor

from curvopt.axes.lattice import NONE
from curvopt.axes.linking import Linked
from curvopt.axes.refusals import paired_otherwise


def check_pairs(linked: Linked, vectors: list[Tensor], picking: Set[int]) -> None:
    """Row i of one tensor must not be used with row j of another of the same samples.

    Args:
        linked: the readings.
        vectors: owners along their dims.
        picking: storages of indices by which data is picked, whose order is their own.
    """
    pairs = zip(linked.chosen, vectors, strict=True)
    judged = [(r, owners) for r, owners in pairs if r.entry.storage not in picking]
    for index, (reading, owners) in enumerate(judged):
        for other, theirs in judged[:index]:
            if owners.shape == theirs.shape and _crossed(owners, theirs):
                raise paired_otherwise(other, reading)


def _crossed(owners: Tensor, theirs: Tensor) -> bool:
    """Whether two vectors with at most one row a sample have a sample's rows at two places."""
    places = []
    for vector in (owners, theirs):
        known = vector >= 0
        table = torch.full((int(vector.max()) + 1,), NONE, dtype=torch.int64, device="cpu")
        table[vector[known].long()] = known.nonzero()[:, 0]
        if int((table >= 0).sum()) < int(known.sum()):  # several rows of a sample
            return False
        places.append(table)
    size = min(map(len, places))
    first, second = (table[:size] for table in places)
    return bool(((first != second) & (first >= 0) & (second >= 0)).any())
