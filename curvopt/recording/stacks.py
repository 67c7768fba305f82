"""Modes that outlive the call in which they were entered: at the bottom of torch's stacks.

Torch's modes are left in the reverse order of entering them. What is entered in a module's forward
pass and left at the backward pass does not keep to that: a mode of the user's, entered before and
left in between, would pop ours in place of itself. So ours go below all others, where torch's own
default device lies too, and are taken out from there.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, cast

import torch
from torch import overrides
from torch.overrides import TorchFunctionMode
from torch.utils import _python_dispatch as dispatch
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import TorchDispatchMode

from curvopt.axes.trace import Trace

# What torch remembers beside its stack of dispatch modes, and each mode of the time before it.
_FLAGS = {
    "_is_in_torch_dispatch_mode": "old_dispatch_mode_flags",
    "_is_in_non_infra_torch_dispatch_mode": "old_non_infra_dispatch_mode_flags",
    "_is_in_any_mode_without_ignore_compile_internals": (
        "old_without_ignore_compile_internals_dispatch_mode_flags"
    ),
}


def push_below(functions: TorchFunctionMode, ops: TorchDispatchMode) -> None:
    """Put two modes below all others; of function modes, above torch's default device alone."""
    held = [overrides._pop_mode() for _ in overrides._get_current_function_mode_stack()]
    # `with torch.device(...)` goes on top, and is left like any other.
    if held and isinstance(held[-1], DeviceContext) and hasattr(held[-1], "old_device"):
        overrides._push_mode(held.pop())
    for mode in [functions, *reversed(held)]:
        overrides._push_mode(mode)
    others = [dispatch._pop_mode() for _ in _users()]
    ops.__enter__()
    for mode in reversed(others):
        dispatch._push_mode(mode)


class Uncompiled:
    """Code under `torch.compile` runs as it was written while somebody records.

    Attributes:
        count: how many do.
    """

    def __init__(self) -> None:
        self.count, self._stance = 0, cast(Any, None)
        self._left: list[Any] = []
        self._lock = threading.RLock()  # the stance is that of all threads

    def begin(self) -> None:
        """One more."""
        with self._lock:
            if not self.count and "torch._dynamo" in sys.modules:
                self._stance = torch.compiler.set_stance("force_eager")
            self.count += 1

    def end(self) -> None:
        """One less."""
        with self._lock:
            self.count -= 1
            if not self.count and self._stance is not None:
                self._left.append(self._stance)
                self._stance = None
            self.settle()

    def settle(self) -> None:
        """Leave what is over: not where somebody has set another stance on top of it."""
        with self._lock:
            eval_frame: Any = sys.modules.get("torch._dynamo.eval_frame")
            for stance in self._left[::-1]:
                if eval_frame._stance is stance.stance:
                    with suppress(RuntimeError):  # in the middle of compiled code
                        stance.__exit__(None, None, None)
                        self._left.remove(stance)


UNCOMPILED = Uncompiled()


def infra_modes() -> bool:
    """Whether torch itself is tracing: what runs are no numbers."""
    return len(_users()) < len(dispatch._get_current_dispatch_mode_stack())


@contextmanager
def untraced() -> Iterator[None]:
    """Leave what runs inside out of every recording: a step is no part of a pass."""
    if not any(isinstance(mode, Trace) for mode in _users()):
        yield
        return
    with dispatch._disable_current_modes():
        yield


def _users() -> list[Any]:
    """The dispatch modes that are none of torch's own infrastructure, which has places apart."""
    stack = dispatch._get_current_dispatch_mode_stack()
    return [mode for mode in stack if getattr(mode, "_mode_key", None) is None]


def take_out(mode: TorchFunctionMode) -> bool:
    """Take a function mode out again.

    Returns:
        False where it is at work right now, so that torch will put it back: try again later.
    """
    if not any(m is mode for m in overrides._get_current_function_mode_stack()):
        return False
    held = []
    while (top := overrides._pop_mode()) is not mode:
        held.append(top)
    for other in reversed(held):
        overrides._push_mode(other)
    return True


def take_out_ops(mode: TorchDispatchMode) -> bool:
    """Take a dispatch mode out again; returns as `take_out` does."""
    if not any(m is mode for m in _users()):
        return False
    held = []
    while (top := dispatch._pop_mode()) is not mode:
        held.append(top)
    for other in reversed(held):
        dispatch._push_mode(other)
    left = dispatch._get_current_dispatch_mode_stack()
    for flag, before in _FLAGS.items():
        if left:  # entered later and left later: nothing will be below the lowest
            for flags in [getattr(left[0], before, None)]:
                if flags:
                    flags[0] = False
        elif hasattr(dispatch, flag):
            setattr(dispatch, flag, False)
    tell = getattr(dispatch, "set_is_in_mode_without_ignore_compile_internals", None)
    if tell is not None and not left:
        tell(False)
    for before in _FLAGS.values():
        if flags := getattr(mode, before, None):
            flags.pop()
    return True
