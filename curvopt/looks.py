"""Whether Python may look at values.

On a CPU a look costs nothing. On an accelerator it waits until the device has computed all that was
asked of it before, and in a graph that is being traced there are no values. Code that would branch
on a value asks `may_look`, and has a form without the branch; what must not be is left to `refuse`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from curvopt.errors import CurvoptError

Error = Callable[[], CurvoptError]


class Conditions:
    """What must not be, and is not looked at yet.

    Attributes:
        flags: a boolean each, on their devices.
        errors: what is raised where one is true.
    """

    def __init__(self) -> None:
        self.flags: list[Tensor] = []
        self.errors: list[Error] = []
        self._sent: list[tuple[Tensor, Any]] = []
        self._fetched = 0

    def any(self) -> Tensor | None:
        """Whether any is true, as a tensor; None if there are none."""
        if len(self.flags) < 2:
            return self.flags[0] if self.flags else None
        return torch.stack([flag.to(self.flags[0].device) for flag in self.flags]).any()

    def send(self) -> None:
        """Have the flags so far fetched, without waiting for it: the device goes on meanwhile."""
        for flag in self.flags[self._fetched :]:
            if flag.device.type != "cuda":
                self._sent.append((flag, None))
                continue
            copy = torch.empty(flag.shape, dtype=flag.dtype, pin_memory=True, device="cpu")
            copy.copy_(flag, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record(torch.cuda.current_stream(flag.device))
            self._sent.append((copy, arrived))
        self._fetched = len(self.flags)

    def check(self) -> None:
        """Look at all of them.

        Raises:
            CurvoptError: of the first that is true.
        """
        self.send()
        for (flag, arrived), error in zip(self._sent, self.errors, strict=True):
            if arrived is not None:  # it waits for what came before the flag, and for no more
                arrived.synchronize()
            if bool(flag):
                raise error()


_unseen: list[Conditions] = []


def waits(tensors: Iterable[Tensor]) -> bool:
    """Whether a look at such tensors waits for a device."""
    return any(tensor.device.type != "cpu" for tensor in tensors)


def may_look() -> bool:
    """Whether Python may look at values here."""
    return not _unseen


@contextmanager
def not_looking(when: bool = True) -> Iterator[Conditions]:
    """Look at no value inside.

    Args:
        when: if not, look as ever.

    Yields:
        What is refused meanwhile.
    """
    conditions = Conditions()
    if not when:
        yield conditions
        return
    _unseen.append(conditions)
    try:
        yield conditions
    finally:
        _unseen.remove(conditions)


def refuse(bad: Tensor, error: Error) -> None:
    """Refuse something, at once or later.

    Args:
        bad: a boolean, or several.
        error: what is to be said if one is true.

    Raises:
        CurvoptError: one is, as is seen at once.
    """
    bad = bad.detach().any() if bad.ndim else bad.detach()
    if _unseen:
        _unseen[-1].flags.append(bad)
        _unseen[-1].errors.append(error)
    elif bool(bad):
        raise error()
