"""Ordinary loops: recording that begins by itself where a step will measure.

A hook that torch calls before every module notices the forward pass of a module with parameters of
the optimizer, gradients enabled; from there to the backward pass it is recorded. The hook is there
only while some optimizer's coming step measures; all other steps, and all evaluation, run plain.
"""

from __future__ import annotations

import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.overrides import _get_current_function_mode_stack

from curvopt.parallel.shards import parameters_of
from curvopt.recording.parked import WaitingTape, settle
from curvopt.recording.stacks import infra_modes

UNRECORDED = (
    "the gradients of this step were not recorded, and the step measures more than the gradient: "
    "call step(closure), or run the forward pass and backward() inside `with opt.record():` before "
    "step(). (Recording begins by itself when a torch.nn.Module with parameters of the optimizer "
    "is called with gradients enabled, and ends with loss.backward() in the same thread. It does "
    "not see into a compiled function, nor after model.compile(): torch.compile(model) is fine)"
)
UNSEEN = (
    "the gradients hold a backward pass that was not recorded (a second one over the same loss, "
    "torch.autograd.backward, one without `opt.record()`), so what was measured is not theirs: add "
    "the losses and call loss.backward() once, or call zero_grad() after the other pass"
)


class Measures(Protocol):
    """An optimizer whose steps measure more than the gradient."""

    _failed: Exception | None
    param_groups: list[dict[str, Any]]

    def _parameters(self) -> Iterable[Tensor]: ...

    def _waiting_tape(self, on_backward: Callable[..., Any]) -> WaitingTape: ...

    def _measures(self) -> bool: ...

    def _wanted(self) -> list[Any]: ...

    def _spares(self, tape: Any, loss: Any) -> bool: ...

    def _note_plain(self) -> None: ...

    def _watched(self, wanted: list[Any], tape: Any, loss: Tensor, *a: Any, **k: Any) -> None: ...


class Watch:
    """Records the ordinary loop of one optimizer.

    Args:
        optimizer: whose steps.

    Attributes:
        tape: what is being recorded, if anything is.
        unseen: parameters, by id, that a backward pass reached without being recorded.
        seeing: a recorded one is under way.
        ids: of the optimizer's parameters.
        kinds: what the hooks on those depend on.
        asleep: a block or a closure records.
        aside: steps are compiled, of functions without hooks.
        foreign: a module that runs and has none of those, as have none of its own modules.
        within: the modules of it, by id.
        lists: the groups' lists of them, in whose place others may be put (as accelerate does).
    """

    def __init__(self, optimizer: Measures):
        self.optimizer = weakref.ref(optimizer)
        self.tape: WaitingTape | None = None
        self.handles: list[Any] = []
        self.nodes: list[Any] = []
        self.unseen: set[int] = set()
        self.seeing = False
        self.ids: frozenset[int] = frozenset()
        self.kinds: list[Any] = []
        self.asleep = self.aside = False
        self.foreign: nn.Module | None = None
        self.within: frozenset[int] = frozenset()
        self.lists: list[Any] = []

    # -- armed, or at rest ------------------------------------------------------------------------

    def arm(self) -> None:
        """Record the coming step."""
        optimizer = self.optimizer()
        if optimizer is None:
            return
        self.foreign, self.within = None, frozenset()
        params = list(optimizer._parameters())
        self.lists = [group["params"] for group in optimizer.param_groups]
        kinds = [(id(p), p.requires_grad, p.dtype, p.device) for p in params]
        if self.handles and kinds == self.kinds:  # armed already: their nodes are the same
            self.unseen.clear()
            self.drop()
            settle()
            return
        self.rest()
        _ARMED.append(weakref.ref(self))
        _hook_modules()
        self.kinds, self.ids = kinds, frozenset(map(id, params))
        ref = weakref.ref(self)

        def arrived(key: int, *_: Any) -> None:
            watch = ref()
            if watch is not None and not watch.seeing:
                watch.unseen.add(key)

        for p in params:
            if p.requires_grad and p.is_leaf and type(p) in (Tensor, nn.Parameter):
                node: Any = get_gradient_edge(p).node
                self.nodes.append(node)  # torch itself holds it no longer than a graph
                self.handles.append(node.register_hook(partial(arrived, id(p))))

    def rest(self) -> None:
        """Stop recording."""
        _ARMED[:] = [ref for ref in _ARMED if ref() not in (None, self)]
        self.unseen.clear()
        self.nodes.clear()
        while self.handles:
            self.handles.pop().remove()
        self.drop()
        if not _ARMED and settle():
            _unhook_modules()

    def drop(self) -> None:
        """Forget what is being recorded: a block or a closure records instead."""
        if self.tape is not None:
            self.tape.end()
            self.tape = None

    def settle(self) -> None:
        """Leave the modes of a recording that is over."""
        settle()
        if self.tape is not None and not self.tape.busy:
            self.tape = None

    def __del__(self) -> None:
        if sys is not None and not sys.is_finalizing():  # modules go last
            self.rest()

    # -- modules ----------------------------------------------------------------------------------

    def before(self, module: nn.Module, args: Any) -> None:
        """A module is about to run, outermost of those with parameters or not."""
        self.settle()
        tape = self.tape if self.tape is not None and self.tape.busy else None
        here = tape is None or tape.thread == threading.get_ident()
        if tape is not None and here and tape.root is not None:
            tape.enter_module(module, args)
        elif _is_training() and self._begins(module):
            if tape is None or not here:
                if tape is not None:
                    tape.end()
                tape = self._open()
                tape.elsewhere = not here
            tape.enter_module(module, args)

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        """A module has run."""
        if module is self.foreign:
            self.foreign, self.within = None, frozenset()
        tape = self.tape
        if tape is not None and tape.busy and tape.thread == threading.get_ident():
            tape.leave_module(module, args, output)

    def _begins(self, module: nn.Module) -> bool:
        optimizer = self.optimizer()
        if optimizer is None:
            return False
        modes = _get_current_function_mode_stack()
        if any(getattr(mode, "owner", None) is optimizer for mode in modes):
            return False  # a closure or a block records; asked at every module, so first
        groups = optimizer.param_groups
        if len(groups) != len(self.lists) or any(
            group["params"] is not params for group, params in zip(groups, self.lists, strict=True)
        ):
            self.arm()
        if id(module) in self.within:
            return False
        ids = self.ids
        if not any(id(p) in ids and p.requires_grad for p in parameters_of(module)):
            self.foreign, self.within = module, frozenset(map(id, module.modules()))
            return False
        return not infra_modes() and optimizer._measures()

    def _open(self) -> WaitingTape:
        optimizer = self.optimizer()
        assert optimizer is not None
        ref = weakref.ref(self)

        def backward(tape: Any, loss: Tensor, *args: Any, **kwargs: Any) -> Any:
            watch = ref()
            optimizer = watch.optimizer() if watch is not None else None
            if watch is None or optimizer is None:
                with tape.trace.paused():
                    return loss.backward(*args, **kwargs)
            return watch._backward(optimizer, tape, loss, *args, **kwargs)

        self.tape = optimizer._waiting_tape(backward)
        return self.tape

    # -- backward ---------------------------------------------------------------------------------

    def _backward(
        self, optimizer: Measures, tape: WaitingTape, loss: Tensor, *args: Any, **kwargs: Any
    ) -> None:
        """Go backward as the user said, and measure if it is over what was recorded.

        What cannot be measured fails in `step`, if the gradients are still wanted then.
        """
        error: Exception | None = None
        ours = False
        try:
            ours = tape.unpark(loss)
            if ours:
                optimizer._watched(optimizer._wanted(), tape, loss, *args, **kwargs)
        except Exception as caught:  # whatever it is, the step raises it
            if tape.went == 1:  # torch's own
                raise
            error, ours = caught, True
        finally:
            went = tape.went
            if ours:
                tape.forget_found()
        if ours and error is None:
            return
        if error is not None:
            optimizer._failed = optimizer._failed or error
        if went == 2:
            return
        spared = error is None and optimizer._spares(tape, loss)
        self.seeing = spared or error is not None  # the failure is remembered already
        try:
            with tape.trace.paused():
                loss.backward(*args, **kwargs)
        finally:
            self.seeing = False
        if spared:
            optimizer._note_plain()


# -- hooks on all modules -------------------------------------------------------------------------

_ARMED: list[weakref.ref[Watch]] = []
_HANDLES: list[Any] = []
_COMPILED = r"Using `torch.compile\(module\)` when there are global hooks on modules"


def _hook_modules() -> None:
    # Compiled models warn that such hooks fire once more for them: ours may.
    if not any(getattr(f[1], "pattern", None) == _COMPILED for f in warnings.filters):
        warnings.filterwarnings("ignore", _COMPILED, UserWarning)
    if not _HANDLES:
        _HANDLES.append(register_module_forward_pre_hook(_before))
        _HANDLES.append(register_module_forward_hook(_after, always_call=True))


def _unhook_modules() -> None:
    while _HANDLES:
        _HANDLES.pop().remove()


@contextmanager
def without_hooks() -> Iterator[None]:
    """Leave modules without hooks inside, whoever is armed: for code that is captured."""
    hooked = bool(_HANDLES)
    if hooked:
        _unhook_modules()
    try:
        yield
    finally:
        if hooked:
            _hook_modules()


def _before(module: nn.Module, args: Any) -> None:
    if torch.compiler.is_compiling():
        return
    for ref in tuple(_ARMED):
        if (watch := ref()) is not None and not watch.asleep:
            watch.before(module, args)
    if not _ARMED and settle():  # the optimizers are gone
        _unhook_modules()


def _is_training() -> bool:
    """Whether a forward pass that begins now may be followed by a backward pass of ours."""
    return (
        torch.is_grad_enabled()
        and torch._C._current_graph_task_id() == -1
        and torch._C._get_tracing_state() is None
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def _after(module: nn.Module, args: Any, output: Any) -> None:
    if torch.compiler.is_compiling():
        return
    for ref in tuple(_ARMED):
        if (watch := ref()) is not None and not watch.asleep:
            watch.after(module, args, output)
