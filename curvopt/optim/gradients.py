"""What ``p.grad`` holds at a step: whether it was recorded, and all of it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, cast

import torch
from torch import Tensor

from curvopt.engine.paths import walk
from curvopt.errors import CurvoptError
from curvopt.optim.automatic import UNRECORDED, UNSEEN, Watch
from curvopt.optim.joined import Joined
from curvopt.parallel.shards import local, stamps
from curvopt.quantities import Quantity
from curvopt.recording.parked import WaitingTape
from curvopt.recording.tape import Tape


class Gradients(Joined):
    """Keeps track of the gradients, from a backward pass to the step."""

    batch_size: int | None

    def _wanted(self) -> list[Quantity]:
        """Quantities of the coming step, beside the gradient."""
        raise NotImplementedError

    def _watched(self, wanted: list[Quantity], tape: Tape, loss: Tensor, *a: Any, **k: Any) -> None:
        """Go backward, and have what is wanted on the way."""
        raise NotImplementedError

    def _tape(self) -> Tape:
        """What records a step."""
        raise NotImplementedError

    def _waiting_tape(self, on_backward: Callable[..., Any]) -> WaitingTape:
        """What records an ordinary loop."""
        raise NotImplementedError

    def _measures(self) -> bool:
        """Whether the coming step wants more than the gradient; nothing is drawn for it."""
        return bool(self._wanted())

    def _arm(self) -> None:
        """Get ready for the coming step."""
        if not self.goes_backward:
            return
        if self._watch is None:
            self._watch = Watch(self)
            self._watch.arm()
        elif self._measures():
            self._watch.arm()
        else:
            self._watch.rest()

    @contextmanager
    def _seeing(self) -> Iterator[None]:
        """A backward pass that is recorded."""
        if self._watch is None:
            yield
            return
        self._watch.seeing = True
        try:
            yield
        finally:
            self._watch.seeing = False

    @contextmanager
    def _asleep(self) -> Iterator[None]:
        """A block or a closure records."""
        if self._watch is None:
            yield
            return
        self._watch.asleep = True
        try:
            yield
        finally:
            self._watch.asleep = False

    def _spares(self, tape: Tape, loss: Any) -> bool:
        """Whether a loss reaches parameters of ours, but none of those that are recorded."""
        if not isinstance(loss, Tensor) or loss.grad_fn is None:
            return False
        own = {id(p) for p in self._parameters() if p.requires_grad} - tape.by_id.keys()
        if not own:
            return False
        with torch._C.DisableTorchFunction():
            leaves = {id(leaf) for leaf in walk(loss, ())[1]}
        return not leaves.isdisjoint(own) and leaves.isdisjoint(tape.by_id)

    def _note_plain(self) -> None:
        """A backward pass that went by, of which nothing but the gradient was wanted."""
        self.collected.append({})
        self._note(recorded=True)

    def _keep_gradients(self) -> None:
        """Copy the gradients, to which autograd adds in place: a failed step gives them back."""
        for p in self._parameters():
            if p.grad is not None:
                p.grad = p.grad.clone()

    def _begin_pass(self) -> None:
        """See to it that ``p.grad`` holds the gradients of recorded passes, or None."""
        if self._unchanged():
            return
        for p in self._parameters():
            if self._is_filled(p):
                raise CurvoptError(
                    f"{self._name(p)} holds a gradient that was not recorded, so nothing is known "
                    "of its samples: call zero_grad() first, and run every backward pass of a "
                    "step inside its closure or `with opt.record():`"
                )
        self.zero_grad()

    def _is_filled(self, p: Tensor) -> bool:
        """Whether there is a gradient, which must have come from somewhere."""
        return p.grad is not None and bool(local(p.grad).any())

    def _unchanged(self) -> bool:
        """Whether ``p.grad`` is as the last recorded pass or step left it."""
        grads = [(p, p.grad) for p in self._parameters() if p.grad is not None]
        if len(grads) != len(self._left):
            return False
        return all(
            p is q and grad is left and stamp == before
            for (p, grad), (q, left, before), stamp in zip(
                grads, self._left, stamps([grad for _, grad in grads]), strict=True
            )
        )

    def _note(self, *, recorded: bool) -> None:
        """Remember ``p.grad`` as it is: what changes it from now on went unrecorded."""
        self._recorded = recorded
        params = [p for p in self._parameters() if p.grad is not None]
        grads = [cast(Tensor, p.grad) for p in params]
        self._left = list(zip(params, grads, stamps(grads), strict=True))

    def _is_skipped(self, closure: Any) -> bool:
        """Whether Lightning's ``training_step`` returned None: nothing is to be done then."""
        return (
            of_lightning(closure)
            and self.goes_backward
            and not self._recorded
            and self._failed is None
            and all(p.grad is None for p in self._parameters())
        )

    def _check_recorded(self) -> None:
        """See that what the step needs was recorded with all of its gradients."""
        if self._failed is not None:
            raise self._failed
        unseen = self._watch.unseen if self._watch is not None else set()
        if self._recorded and not unseen:
            return
        wanted = self.goes_backward and self._measures()
        spared = bool(unseen) and wanted and unseen.isdisjoint(self._tape().by_id)
        if self._recorded:
            if wanted and unseen and not spared:
                raise CurvoptError(UNSEEN)
            return
        if all(p.grad is None for p in self._parameters()) or not self.goes_backward:
            raise CurvoptError(
                "nothing was recorded for this step: call step(closure), or run the forward "
                "pass and backward() inside `with opt.record():` before step()"
            )
        if wanted and not spared:
            raise CurvoptError(UNRECORDED)
        self.collected.append({})  # the gradient alone: whatever it is


def of_lightning(closure: Any) -> bool:
    """Whether a closure is Lightning's, which returns what ``training_step`` does, None too.

    It is empty in manual optimization.
    """
    module = getattr(getattr(closure, "func", closure), "__module__", None) or ""
    return module.startswith(("lightning.", "pytorch_lightning."))


def check_closures() -> None:
    """Refuse closures where Accelerate accumulates gradients: it calls `step` for some of them.

    Raises:
        CurvoptError: it does.
    """
    state = sys.modules.get("accelerate.state")
    shared = getattr(getattr(state, "GradientState", None), "_shared_state", {})
    if ((shared.get("plugin_kwargs") or {}).get("num_steps") or 1) <= 1:
        return
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__") != "accelerate.optimizer":
        frame = frame.f_back
    if frame is not None:
        raise CurvoptError(
            "Accelerate accumulates gradients (gradient_accumulation_steps > 1), and leaves out "
            "the closures of all batches but each last one: call accelerator.backward(loss) and "
            "opt.step() without a closure"
        )
