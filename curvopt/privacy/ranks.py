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
        self.lost = False

    @property
    def many(self) -> bool:
        """Whether there are others."""
        if self.lost:
            raise CurvoptError(
                "a process group does not survive pickling: build the optimizer anew with "
                "process_group= and load its state_dict"
            )
        running = dist.is_available() and dist.is_initialized()
        return running and dist.get_world_size(self.group) > 1

    @property
    def place(self) -> tuple[int, int]:
        """This process's number, and how many there are."""
        if not self.many:
            return 0, 1
        return dist.get_rank(self.group), dist.get_world_size(self.group)

    @property
    def first(self) -> bool:
        """Whether this process draws the noise."""
        return self.place[0] == 0

    def meet(self, settings: dict[str, Any], values: Tensor) -> Tensor:
        """Wait for all processes, and see that they are about to take the same step.

        Args:
            settings: What must be the same everywhere.
            values: ``[n]``, what each process knows of its own samples.

        Returns:
            The values of all processes, one after the other: ``[N]``.

        Raises:
            CurvoptError: on every process, if settings differ or one called `fail` instead.
        """
        if not self.many:
            return values
        found = self._exchange((settings, values.cpu()))
        failed = [rank for rank, one in enumerate(found) if one is None]
        if failed:
            raise CurvoptError(f"the step failed on process {failed[0]}; its own error says why")
        for name, value in found[0][0].items():
            theirs = [one[0].get(name) for one in found]
            if any(other != value for other in theirs):
                raise CurvoptError(
                    f"the processes differ in {name}: {theirs}. Build model and optimizer alike "
                    "(from one seed), and load the same checkpoint everywhere"
                )
        return torch.cat([one[1] for one in found]).to(values.device)

    def fail(self) -> None:
        """Say in place of `meet` that this process cannot take the step."""
        if self.many:
            self._exchange(None)

    def _exchange(self, mine: Any) -> list[Any]:
        found: list[Any] = [None] * self.place[1]
        dist.all_gather_object(found, mine, group=self.group)
        return found

    def sums(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The sums over all processes, the same on each."""
        totals = [
            tensor.detach().clone(memory_format=torch.contiguous_format) for tensor in tensors
        ]
        if self.many:
            for total in totals:
                dist.all_reduce(total, group=self.group)
        return totals

    def sum_on_first(self, tensors: Sequence[Tensor]) -> None:
        """Add up contiguous tensors on the first process, in place; elsewhere they are used up."""
        if self.many:
            for tensor in tensors:
                dist.reduce(tensor, group=self.group, group_dst=0)

    def copy_from_first(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite contiguous tensors with those of the first process."""
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

    def __getstate__(self) -> dict[str, Any]:
        """A process group belongs to its process."""
        return {"group": None, "lost": self.lost or self.group is not None}

    def __deepcopy__(self, memo: Any) -> Ranks:
        return Ranks(self.group)
