"""Data parallelism: the processes whose batches make up one logical batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from curvopt.errors import CurvoptError


class Ranks:
    """The processes of a group, or this one alone where ``torch.distributed`` is not initialized.

    Args:
        group: A process group; all processes by default.
    """

    def __init__(self, group: Any = None) -> None:
        self.group = group
        self._agreed = False

    @property
    def many(self) -> bool:
        """Whether there are others."""
        running = dist.is_available() and dist.is_initialized()
        return running and dist.get_world_size(self.group) > 1

    @property
    def first(self) -> bool:
        """Whether this process draws the noise."""
        return not self.many or dist.get_rank(self.group) == 0

    def sum_on_first(self, tensors: Sequence[Tensor]) -> None:
        """Add up tensors on the first process, in place; elsewhere they hold anything after it."""
        if self.many:
            for tensor in tensors:
                dist.reduce(tensor, group=self.group, group_dst=0)

    def copy_from_first(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite tensors with those of the first process."""
        if self.many:
            for tensor in tensors:
                dist.broadcast(tensor, group=self.group, group_src=0)

    def value_of_first(self, value: float) -> float:
        """A number of the first process."""
        if not self.many:
            return value
        box = [value]
        dist.broadcast_object_list(box, group=self.group, group_src=0)
        return box[0]

    def collect(self, values: Tensor) -> Tensor:
        """The values ``[n]`` of all processes, one after the other: ``[N]``."""
        if not self.many:
            return values
        parts: list[Any] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(parts, values.cpu(), group=self.group)
        return torch.cat(parts).to(values.device)

    def check_same(self, params: Sequence[Tensor]) -> None:
        """Refuse parameters that differ among the processes; looked at once.

        Raises:
            CurvoptError: they do, on any process.
        """
        if self._agreed or not self.many:
            return
        sums = [float(p.double().sum()) for p in params]
        found: list[Any] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(found, sums, group=self.group)
        if any(theirs != found[0] for theirs in found):
            raise CurvoptError(
                "the processes start from different parameters: build the model from one seed, or "
                "broadcast it with torch.distributed.broadcast(p, src=0)"
            )
        self._agreed = True

    def __getstate__(self) -> dict[str, Any]:
        """Process groups belong to their process."""
        return {"group": None, "_agreed": False}

    def __deepcopy__(self, memo: Any) -> Ranks:
        return Ranks(self.group)
