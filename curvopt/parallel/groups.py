"""The processes whose batches make up one logical batch: they meet before a step, or fail."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from curvopt.errors import CurvoptError
from curvopt.parallel.reduce import add_up, totals

#: Numbers that one process tells the others in `Ranks.meet`, beside its settings.
NUMBERS = 2


class Ranks:
    """The processes of a group, or this one alone where ``torch.distributed`` is not initialized.

    Args:
        group: A process group; all processes by default.

    Attributes:
        given: It was given, not found.
    """

    def __init__(self, group: Any = None) -> None:
        self.group, self.given = group, group is not None
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

    # -- meeting ----------------------------------------------------------------------------------

    def meet(self, settings: dict[str, Any], *numbers: int) -> list[list[int]]:
        """Wait for all processes, and see that they are about to take the same step.

        One small message, unless they differ.

        Args:
            settings: What must be the same everywhere, by its name in messages.
            *numbers: At most `NUMBERS`, which may differ.

        Returns:
            The numbers of each process.

        Raises:
            CurvoptError: on every process, if settings differ or one called `fail` instead.
        """
        mine = [1, token_of(settings), *numbers, *[0] * (NUMBERS - len(numbers))]
        found = self._gather(mine)
        failed = [rank for rank, one in enumerate(found) if not one[0]]
        if failed:
            raise CurvoptError(f"the step failed on process {failed[0]}; its own error says why")
        if any(one[1] != mine[1] for one in found):
            told: list[Any] = [None] * len(found)
            dist.all_gather_object(told, settings, group=self.group)
            raise self._differ(told)
        return [one[2 : 2 + len(numbers)] for one in found]

    def some(self, flag: bool) -> bool:
        """Whether a process says so, or called `fail` instead."""
        mine = [1, 0, int(flag), *[0] * (NUMBERS - 1)]
        return any(one[2] or not one[0] for one in self._gather(mine))

    def fail(self) -> None:
        """Say in place of `meet` that this process cannot take the step."""
        if self.many:
            self._gather([0] * (2 + NUMBERS))

    def _gather(self, mine: list[int]) -> list[list[int]]:
        if not self.many:
            return [mine]
        device = self._device()
        message = torch.tensor(mine, dtype=torch.int64, device=device)
        found = [torch.empty_like(message) for _ in range(self.place[1])]
        dist.all_gather(found, message, group=self.group)
        return torch.stack(found).tolist()

    def _device(self) -> torch.device:
        """Where the group can send numbers from: the CPU if it may be."""
        if "cpu" in dist.get_backend_config(self.group):
            return torch.device("cpu")
        accelerator = torch.accelerator.current_accelerator()
        return torch.device("cpu") if accelerator is None else accelerator

    def _differ(self, told: list[dict[str, Any]]) -> CurvoptError:
        for name in told[0]:
            theirs = [one.get(name) for one in told]
            if any(other != theirs[0] for other in theirs):
                return CurvoptError(
                    f"the processes differ in {name}: {theirs}. Build model and optimizer alike "
                    "(from one seed), and load the same checkpoint everywhere"
                )
        return CurvoptError(f"the processes are about to take different steps: {told}")

    # -- joining ----------------------------------------------------------------------------------

    def union(self, indices: Sequence[int], length: int) -> list[int]:
        """Those of the numbers below ``length`` that some process has."""
        if not self.many:
            return sorted(indices)
        has = torch.zeros(length, dtype=torch.int32, device=self._device())
        has[list(indices)] = 1
        dist.all_reduce(has, dist.ReduceOp.MAX, group=self.group)
        return has.nonzero().flatten().tolist()

    def concatenated(self, values: Tensor, counts: Sequence[int]) -> Tensor:
        """``[n]`` of every process, one after the other: ``[N]``.

        Args:
            values: This process's.
            counts: n of each process.

        Returns:
            The same on all, in float64.
        """
        device, longest = self._device(), max(counts)
        if not longest:
            return values.double()
        mine = torch.zeros(longest, dtype=torch.float64, device=device)
        mine[: len(values)] = values
        found = [torch.empty_like(mine) for _ in counts]
        dist.all_gather(found, mine, group=self.group)
        parts = [part[:count] for part, count in zip(found, counts, strict=True)]
        return torch.cat(parts).to(values.device)

    def sums(self, tensors: Sequence[Tensor], *, spare: bool = False) -> list[Tensor]:
        """The sums over all processes, the same on each; contiguous, and to be overwritten.

        Args:
            tensors: of this process.
            spare: they may be overwritten.
        """
        given = [tensor.detach() for tensor in tensors]
        if not self.many:
            return [t.clone(memory_format=torch.contiguous_format) for t in given]
        return totals(given, lambda flat: dist.all_reduce(flat, group=self.group), spare=spare)

    def sum_on_first(self, tensors: Sequence[Tensor]) -> None:
        """Add up contiguous tensors on the first process, in place; elsewhere they are used up."""
        if self.many:
            add_up(tensors, lambda flat: dist.reduce(flat, group=self.group, group_dst=0))

    def copy_from_first(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite contiguous tensors with those of the first process."""
        if self.many:
            add_up(tensors, lambda flat: dist.broadcast(flat, group=self.group, group_src=0))

    def value_of_first(self, value: Any) -> Any:
        """A value of the first process."""
        if not self.many:
            return value
        box = [value]
        dist.broadcast_object_list(box, group=self.group, group_src=0)
        return box[0]

    def __getstate__(self) -> dict[str, Any]:
        """A process group belongs to its process."""
        return {"group": None, "given": False, "lost": self.lost or self.given}

    def __deepcopy__(self, memo: Any) -> Ranks:
        return Ranks(self.group if self.given else None)


def token_of(value: Any) -> int:
    """A number that stands for a value, by its representation: the same in all processes."""
    digest = hashlib.blake2b(repr(value).encode(), digest_size=7).digest()
    return int.from_bytes(digest, "big")
