"""What every optimizer of the package shares: closures, recording, the torch.optim contract."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from curvopt.engine.compute import Computation, Values, check_loss
from curvopt.engine.tape import Tape
from curvopt.errors import CurvoptError
from curvopt.quantities import Gradient, Quantity

Closure = Callable[[], Any]


class EngineOptimizer(torch.optim.Optimizer):
    """An optimizer that pulls quantities from the engine inside ``step``.

    A subclass says in `_wanted` what it needs beside the gradient for the coming step, and moves
    the parameters in `_update`, given what the step's backward passes left in ``self.collected``.

    Args:
        params: parameters, (name, parameter) pairs, or parameter groups.
        defaults: default settings of a group.
        batch_size: number of samples, where the model's first op and the loss do not tell.
        reduction: ``"mean"`` or ``"sum"``: how a loss written by hand is reduced over samples.
    """

    #: Refuse a loss that is not finite.
    finite_loss = True

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        *,
        batch_size: int | None = None,
        reduction: str | None = None,
    ):
        super().__init__(params, defaults)
        self.batch_size, self.reduction = batch_size, reduction
        self.collected: list[dict[str, Values]] = []
        self._recorded: list[Tensor] = []

    def _wanted(self) -> list[Quantity]:
        """Quantities of the coming step, beside the gradient."""
        raise NotImplementedError

    def _update(self) -> None:
        """Move the parameters; called once a step, without gradients."""
        raise NotImplementedError

    def _accumulate(self, computation: Computation, quantities: list[Quantity]) -> None:
        """Take what one backward pass gives: gradients to ``p.grad``, the rest to `collected`."""
        values = computation.run([Gradient(), *quantities], free=True)
        for p, grad in values.pop("grad").items():
            p.grad = grad if p.grad is None else p.grad.add_(grad)
        self.collected.append(values)

    def _tape(self) -> Tape:
        """What records a step."""
        return Tape(self._named(), batch_size=self.batch_size)

    # -- the step ---------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:  # type: ignore[override]
        """Take one step.

        Args:
            closure: returns the loss; it may or may not call ``zero_grad()`` and ``backward()``.
                It runs once, with gradients enabled. Without a closure the forward and backward
                pass must have run inside ``with opt.record():``.

        Returns:
            What the closure returned.

        Raises:
            CurvoptError: the closure returns no loss, the loss is not finite, ...; the parameters
                are unchanged.
        """
        loss = None
        try:
            if closure is not None:
                self.collected.clear()
                with torch.enable_grad(), self.record() as tape:
                    loss = closure()
                    if not self.collected:
                        for p in self._parameters():
                            p.grad = None
                        tape.on_backward(_first(loss))
            if not self.collected:
                raise CurvoptError(
                    "nothing was recorded for this step: call step(closure), or run the forward "
                    "pass and backward() inside `with opt.record():` before step()"
                )
            self._update()
        finally:
            self.collected.clear()
        return loss

    def record(self) -> AbstractContextManager[Any]:
        """Record the forward and backward pass of one step, for loops without a closure.

        Example:
            >>> with opt.record():
            ...     loss = loss_fn(model(x), y)
            ...     loss.backward()
            >>> opt.step()
        """
        self.collected.clear()
        wanted = self._wanted()
        if not wanted:
            return PlainBackward(self.collected)
        tape = self._tape()

        def backward(
            loss: Tensor,
            gradient: Tensor | None = None,
            retain_graph: bool | None = None,
            create_graph: bool = False,
            inputs: Any = None,
        ) -> None:
            if gradient is not None or create_graph or inputs is not None or retain_graph:
                raise CurvoptError(
                    "a recorded backward() takes no arguments; scale the loss instead of giving a "
                    "gradient, and go backward once over one forward pass"
                )
            computation = Computation(tape, loss, self.reduction, finite=self.finite_loss)
            self._accumulate(computation, wanted)
            tape.consume(computation.reached)

        tape.on_backward = backward
        return tape

    def __getstate__(self) -> dict[str, Any]:
        """All but hooks, and ``step``, which learning rate schedulers wrap."""
        kept = self.__dict__.items()
        return {k: v for k, v in kept if k != "step" and not k.startswith("_optimizer_")}

    def _parameters(self) -> Iterable[Tensor]:
        return (p for group in self.param_groups for p in group["params"])

    def _named(self) -> list[tuple[str, Tensor]]:
        named: list[tuple[str, Tensor]] = []
        for group in self.param_groups:
            params = group["params"]
            names = group.get("param_names") or [
                f"parameter {len(named) + i}" for i in range(len(params))
            ]
            named += zip(names, params, strict=True)
        return named


class PlainBackward(TorchFunctionMode):
    """Lets everything pass, but notices ``backward()``: for steps that need the gradient alone."""

    def __init__(self, collected: list[Any]):
        super().__init__()
        self.collected = collected

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.backward:
            return self.on_backward(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def on_backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Go backward as usual."""
        check_loss(loss)
        loss.backward(*args, **kwargs)
        self.collected.append({})


def _first(loss: Any) -> Any:
    """The loss of a closure that returns it alone, or first in a tuple."""
    return loss[0] if isinstance(loss, tuple) and loss else loss
