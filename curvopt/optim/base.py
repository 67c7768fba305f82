"""What every optimizer of the package shares: closures, recording, the step."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache, partial
from typing import Any, ClassVar, cast

import torch
from torch import Generator, Tensor
from torch.overrides import TorchFunctionMode

from curvopt.engine.backward import unspent
from curvopt.engine.computation import Computation
from curvopt.errors import SCALED, CurvoptError
from curvopt.looks import Conditions
from curvopt.optim.gradients import Gradients, check_closures, of_lightning
from curvopt.optim.joined import Backward
from curvopt.quantities import Quantity
from curvopt.recording.parked import WaitingTape
from curvopt.recording.stacks import untraced
from curvopt.recording.tape import Tape

Closure = Callable[[], Any]


class EngineOptimizer(Gradients):
    """An optimizer that pulls quantities from the engine inside ``step``.

    A subclass says in `_wanted` what it needs beside the gradient for the coming step, checks the
    settings of a group in `_validate`, and moves the parameters in `_update`, given ``p.grad`` and
    what the step's backward passes left in ``self.collected``. It checks first and changes
    state after: what fails must leave the parameters and their state as they were.

    As in all of torch, gradients add up until they are zeroed: backward passes of an ordinary
    loop, inside one closure, or in several ``with opt.record():`` blocks before one ``step()``. All
    of a step that measures must be recorded. A closure that does not call ``backward()`` gets its
    gradients zeroed.

    ``state_dict`` holds the attributes named in `saved` and the generator's state under
    ``"engine"``, so that a resumed run goes on bit for bit. Without a generator of its own an
    optimizer draws from torch's global one: save ``torch.get_rng_state()`` with the checkpoint.

    With several processes, the gradients are combined by what wraps the model
    (``DistributedDataParallel``, ``fully_shard``); what is measured beside them is combined once a
    measured step. Where nothing wraps it, ``process_group=`` combines both, and processes whose
    gradients differ are refused. The private optimizers always combine both.

    Args:
        params: parameters, (name, parameter) pairs, or parameter groups.
        defaults: default settings of a group.
        batch_size: number of samples, where the data flow leaves two readings; checked against it.
        reduction: ``"mean"`` or ``"sum"``: what a sample's own loss is where a sum is scaled by
            something that may be a count: N times its part of the loss, or its part.
        generator: source of what the optimizer draws; torch's global one by default.
        process_group: the processes of a step, where nothing wraps the model: their gradients are
            averaged in `step`. Default: those of the wrapper.

    Attributes:
        steps: number of steps taken.
        collected: what the backward passes since the last step left: a dict each, by the quantity's
            field, unless `_accumulate` is overridden; ``{}`` where nothing was wanted.
        saved: names of the attributes, numbers or tensors, that a checkpoint needs.
    """

    saved: ClassVar[tuple[str, ...]] = ("steps",)
    #: Refuse a loss that is not finite.
    finite_loss = True
    #: A failed step gives the gradients back that were there before it.
    restores_gradients = True

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        *,
        batch_size: int | None = None,
        reduction: str | None = None,
        generator: Generator | None = None,
        process_group: Any = None,
    ):
        self._validate(defaults)
        super().__init__(params, defaults)
        self.batch_size, self.reduction, self.generator = batch_size, reduction, generator
        self.steps = 0
        self._among(process_group)
        self._reserve()
        self._forget()
        self._arm()

    # -- for subclasses ---------------------------------------------------------------------------

    def _update(self) -> None:
        """Move the parameters; called once a step, without gradients."""
        raise NotImplementedError

    def _accumulate(
        self, computation: Computation, quantities: list[Quantity], backward: Backward
    ) -> None:
        """Take what one backward pass gives beside the gradient, to `collected`.

        Args:
            computation: of the loss.
            quantities: what `_wanted` said.
            backward: torch's own backward pass, which adds to ``p.grad``; to be called once,
                with True where the graph is still needed afterwards.
        """
        values = computation.run(quantities)
        backward()
        self.collected.append(values)

    def _tape(self) -> Tape:
        """What records a step."""
        return Tape(self._tracked(), batch_size=self.batch_size)

    # -- the step ---------------------------------------------------------------------------------

    def step(self, closure: Closure | None = None) -> Any:
        """Take one step.

        Args:
            closure: returns the loss, or ``(loss, output)`` with the model's output for a loss
                written by hand; it may or may not call ``zero_grad()`` and ``backward()``. It runs
                once, with gradients enabled. Without a closure the gradients are those of the
                forward and backward passes before, as in all of torch; a private optimizer needs
                them inside ``with opt.record():``.

        Returns:
            What the closure returned.

        Raises:
            CurvoptError: the closure returns no loss, the loss is not finite, a backward pass went
                unrecorded, ...; parameters, gradients and state are as before. (Private optimizers
                let go of the gradients, which are those of the step before.)
        """
        if "torch._dynamo" not in sys.modules:
            return self._step(closure)
        return _as_written(type(self)._step)(self, closure)  # in a compiled function, too

    @torch.no_grad()
    def _step(self, closure: Closure | None) -> Any:
        before = list(self.collected), self._recorded
        grads = left = None
        if self.restores_gradients:
            grads, left = [(p, p.grad) for p in self._parameters()], self._left
        loss = None
        self._met = False
        try:
            if self._overflowed():
                self._forget()
                self._arm()
                return None
            if closure is not None:
                check_closures()
                loss = self._run(closure)
                if loss is None and self._is_skipped(closure):
                    return None
            elif not self._recorded and self._begin_states():
                return None
            self._check_recorded()
            taken = self.steps
            with untraced():
                if self.goes_backward:
                    self._meet_others()
                with self._without_looks():
                    self._update()
            self.steps = taken + 1
        except BaseException as error:
            if self.goes_backward and isinstance(error, Exception):
                self._tell_of_step()
            if grads is not None and left is not None:
                for p, grad in grads:
                    p.grad = grad
                self._left = left
            self.collected, self._recorded = before
            for name in ("grad_scale", "found_inf"):  # GradScaler takes them away after a success
                vars(self).pop(name, None)
            raise
        self.collected.clear()
        self._note(recorded=False)
        self._arm()
        return loss

    def _run(self, closure: Closure) -> Any:
        """Run the closure, and the backward pass too where it does not."""
        pending, self._recorded = self._recorded, False
        with torch.enable_grad(), self.record() as tape:
            loss = closure()
        if self._recorded:
            return loss
        if loss is None and (pending or (self.goes_backward and of_lightning(closure))):
            self._recorded = pending
            return loss
        self.zero_grad()
        with torch.enable_grad():  # and no recording of the pass itself
            value, *others = loss if isinstance(loss, tuple) and loss else (loss,)
            outputs = [o for o in others if isinstance(o, Tensor) and o.ndim and o.requires_grad]
            output = outputs[0] if len(outputs) == len(others) == 1 else None
            tape.backward(value, output=output)
        return loss

    def record(self) -> AbstractContextManager[Any]:
        """Record the forward and backward pass of one step, where nothing else would.

        An ordinary loop needs no block: recording begins by itself when a `torch.nn.Module` with
        parameters of the optimizer is called. A block also sees what happens before, and serves
        models that are no modules; private optimizers need one, or a closure. Several blocks before
        one ``step()`` add up: gradient accumulation.

        Example:
            >>> opt = curvopt.DiagGGNOptimizer(model.parameters())
            >>> opt.zero_grad()
            >>> with opt.record():
            ...     loss = loss_fn(model(x), y)
            ...     loss.backward()
            >>> opt.step()
        """
        if (wrapped := wrapped_by(self)) is not None:
            return wrapped.record()
        if self._watch is not None:
            self._watch.drop()
        wanted = self._wanted()
        self._met = self._told = False
        if not wanted:
            return PlainBackward(self)

        tape = self._tape()
        tape.on_backward, tape.on_module = partial(self._watched, wanted), self._wrappers.meet
        tape.owner, tape.around = self, self._asleep
        return tape

    def _waiting_tape(self, on_backward: Callable[..., Any]) -> WaitingTape:
        self._met = self._told = False
        like = self._tape()
        named = [(name, p) for p, name in like.names.items()]
        tape = WaitingTape(named, batch_size=self.batch_size, on_backward=on_backward)
        tape.record.silent += like.record.silent
        tape.on_module = self._wrappers.meet
        return tape

    def _watched(
        self,
        wanted: list[Quantity],
        tape: Tape,
        loss: Tensor,
        gradient: Tensor | None = None,
        retain_graph: bool | None = None,
        create_graph: bool = False,
        inputs: Any = None,
        output: Tensor | None = None,
    ) -> None:
        if gradient is not None or create_graph or inputs is not None:
            raise CurvoptError(
                "a recorded backward() takes no arguments; scale the loss instead of giving a "
                "gradient, and go backward once over one forward pass"
            )

        noted: list[Conditions] = []

        def on(retain: bool = False) -> None:
            self._keep_gradients()
            for conditions in noted:
                conditions.send()
            tape.went = 1
            with unspent(), tape.trace.paused(), torch.enable_grad(), self._seeing():
                loss.backward(retain_graph=retain_graph or retain)
            tape.went = 2

        if self._spares(tape, loss):
            self._plain(loss, on)
            self._note_plain()
            return

        def make() -> Computation:
            return Computation(
                tape,
                loss,
                self.reduction,
                output=output,
                finite=self.finite_loss,
                declared=not self.goes_backward,
                penalties=True,
            )

        with torch.no_grad(), tape.trace.paused(), self._without_looks() as conditions:
            noted.append(conditions)
            computation = self._measure(tape, make, wanted, on)
        conditions.check()
        self._note(recorded=True)
        tape.consume(computation.reached)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients, and what was recorded with them.

        Args:
            set_to_none: to None, or to zeros (fresh ones: a failed step gives the old ones back).
        """
        if (wrapped := wrapped_by(self)) is not None:
            return wrapped.zero_grad(set_to_none)
        for p in self._parameters():
            if p.grad is not None:
                p.grad = None if set_to_none else torch.zeros_like(p.grad)
        self._forget()
        if self._watch is not None:
            self._watch.settle()
            if self._watch.aside and not self._watch.asleep:  # an ordinary loop may come now
                self._watch.aside = False
                self._arm()

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Makes GradScaler leave the scale to `step`; Lightning asks too, and would not clip."""
        return sys._getframe(1).f_globals.get("__name__") == "torch.amp.grad_scaler"

    def _overflowed(self) -> bool:
        """Whether GradScaler found the gradients not finite; else its scale is taken out."""
        if not hasattr(self, "found_inf"):  # it sets both for the length of the call
            return False
        if not self.goes_backward:
            raise CurvoptError(SCALED)
        found = bool(float(self.found_inf))
        if self._ranks.many and not self._told:  # all of them skip the step
            found = self._ranks.some(found)
        if found:
            return True
        scale = vars(self).get("grad_scale")
        measured = any(self.collected) or self._failed is not None
        if scale is None:  # unscale_() was called, so that the scale is not known any more
            if measured:
                raise CurvoptError(SCALED)
            return False
        inverse = 1 / float(scale)
        if measured and self._failed is None:
            self._rescale(inverse)
        for p in self._parameters():
            if p.grad is not None:
                p.grad = p.grad * inverse
        return False

    def _rescale(self, inverse: float) -> None:
        """Take a factor out of the loss that `collected` is of."""
        raise CurvoptError(SCALED)


@cache
def _as_written(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that Dynamo leaves alone."""
    return cast(Callable[..., Any], sys.modules["torch._dynamo"].disable(function))


def wrapped_by(optimizer: EngineOptimizer) -> EngineOptimizer | None:
    """The optimizer behind Lightning's wrapper, which poses as an instance of its class."""
    return vars(optimizer).get("_optimizer")


class PlainBackward(TorchFunctionMode):
    """Lets everything pass, but notices ``backward()``: for steps that need the gradient alone."""

    def __init__(self, optimizer: EngineOptimizer):
        super().__init__()
        self.optimizer = self.owner = optimizer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.backward:
            return self.backward(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def backward(self, loss: Tensor, *args: Any, output: Any = None, **kwargs: Any) -> None:
        """Go backward as usual."""

        def on() -> None:
            self.optimizer._keep_gradients()
            with unspent():
                loss.backward(*args, **kwargs)

        self.optimizer._plain(loss, on)
        self.optimizer.collected.append({})
        self.optimizer._note(recorded=True)
