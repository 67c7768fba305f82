"""What every optimizer of the package shares: closures, recording, the torch.optim contract."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from copy import deepcopy
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor
from torch.overrides import TorchFunctionMode

from curvopt.engine.compute import Computation, check_loss
from curvopt.engine.tape import Tape
from curvopt.errors import CurvoptError
from curvopt.quantities import Gradient, Quantity

Closure = Callable[[], Any]


class EngineOptimizer(torch.optim.Optimizer):
    """An optimizer that pulls quantities from the engine inside ``step``.

    A subclass says in `_wanted` what it needs beside the gradient for the coming step, checks the
    settings of a group in `_validate`, and moves the parameters in `_update`, given ``p.grad`` and
    what the step's backward passes left in ``self.collected``. It checks first and changes
    state after: what fails must leave the parameters and their state as they were.

    As in all of torch, gradients add up until they are zeroed: backward passes inside one closure,
    or in several ``with opt.record():`` blocks before one ``step()``. All of them must be recorded.
    A closure that does not call ``backward()`` gets its gradients zeroed.

    ``state_dict`` holds the attributes named in `saved` and the generator's state under
    ``"engine"``, so that a resumed run goes on bit for bit. Without a generator of its own an
    optimizer draws from torch's global one: save ``torch.get_rng_state()`` with the checkpoint.

    Gradients and quantities are those of this process; the private optimizers alone combine those
    of several (``DistributedDataParallel``'s hooks do not see a recorded backward pass).

    Args:
        params: parameters, (name, parameter) pairs, or parameter groups.
        defaults: default settings of a group.
        batch_size: number of samples, where the model's first op and the loss do not tell.
        reduction: ``"mean"`` or ``"sum"``: how a loss written by hand is reduced over samples.
        generator: source of what the optimizer draws; torch's global one by default.

    Attributes:
        steps: number of steps taken.
        collected: what the backward passes since the last step left: a dict each, by the quantity's
            field, unless `_accumulate` is overridden; ``{}`` where nothing was wanted.
        saved: names of the attributes, numbers or tensors, that a checkpoint needs.
    """

    saved: ClassVar[tuple[str, ...]] = ("steps",)
    #: Refuse a loss that is not finite.
    finite_loss = True
    #: Leaves of the graph that are not this optimizer's get their gradient too, as in torch.
    serves_others = True
    #: A failed step gives the gradients back that were there before it.
    restores_gradients = True
    # Makes GradScaler leave the scale to `step`, which refuses it.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        *,
        batch_size: int | None = None,
        reduction: str | None = None,
        generator: Generator | None = None,
    ):
        self._validate(defaults)
        super().__init__(params, defaults)
        self.batch_size, self.reduction, self.generator = batch_size, reduction, generator
        self.steps = 0
        self._forget()

    def _forget(self) -> None:
        self.collected: list[Any] = []
        self._left: list[tuple[Tensor, Tensor, int]] = []  # parameter, gradient, its version
        self._recorded = False

    # -- for subclasses ---------------------------------------------------------------------------

    def _validate(self, group: dict[str, Any]) -> None:
        """Raise ValueError for settings that make no sense; called for every new group."""
        lr = group["lr"]
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError(f"Invalid learning rate: {lr} (a tensor must have one element)")
        names = {"lr": "learning rate", "weight_decay": "weight_decay", "momentum": "momentum"}
        for key, name in names.items():
            if not 0 <= group.get(key, 0) < float("inf"):
                raise ValueError(f"Invalid {name}: {group[key]}")

    def _wanted(self) -> list[Quantity]:
        """Quantities of the coming step, beside the gradient."""
        raise NotImplementedError

    def _update(self) -> None:
        """Move the parameters; called once a step, without gradients."""
        raise NotImplementedError

    def _accumulate(self, computation: Computation, quantities: list[Quantity]) -> None:
        """Take what one backward pass gives: gradients to ``p.grad``, the rest to `collected`.

        Earlier gradients are those of recorded passes, None where there are none.
        """
        values = computation.run([Gradient(), *quantities], free=True)
        self._add_gradients(computation, dict(values.pop("grad")))
        self.collected.append(values)

    def _add_gradients(self, computation: Computation, grads: dict[Tensor, Tensor]) -> None:
        """Add to ``p.grad``, which stays None for parameters that took no part in the loss."""
        uses = (value for use in computation.reached for value in use.values.values())
        reached = {root for value in uses for root in value.roots}
        for p, grad in grads.items():
            if id(p) in reached or grad.any():
                # Out of place: a failed step gives the old tensors back.
                p.grad = grad.to(p.dtype) if p.grad is None else p.grad + grad.to(p.dtype)

    def _tape(self) -> Tape:
        """What records a step."""
        return Tape(self._named(), batch_size=self.batch_size)

    # -- the step ---------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        """Take one step.

        Args:
            closure: returns the loss, or ``(loss, output)`` with the model's output for a loss
                written by hand; it may or may not call ``zero_grad()`` and ``backward()``. It runs
                once, with gradients enabled. Without a closure the forward and backward pass must
                have run inside ``with opt.record():``.

        Returns:
            What the closure returned.

        Raises:
            CurvoptError: the closure returns no loss, the loss is not finite, a backward pass went
                unrecorded, ...; parameters, gradients and state are as before. (Private optimizers
                let go of the gradients, which are those of the step before.)
        """
        before = list(self.collected), self._recorded
        grads = left = None
        if self.restores_gradients:
            grads, left = [(p, p.grad) for p in self._parameters()], self._left
        loss = None
        try:
            self._refuse_scaling()
            if closure is not None:
                loss = self._run(closure)
            if not self._recorded:
                raise CurvoptError(
                    "nothing was recorded for this step: call step(closure), or run the forward "
                    "pass and backward() inside `with opt.record():` before step()"
                )
            taken = self.steps
            self._update()
            self.steps = taken + 1
        except BaseException:
            if grads is not None and left is not None:
                for p, grad in grads:
                    p.grad = grad
                self._left = left
            self.collected, self._recorded = before
            raise
        self.collected.clear()
        self._note(recorded=False)
        return loss

    def _run(self, closure: Closure) -> Any:
        """Run the closure, and the backward pass too where it does not."""
        pending, self._recorded = self._recorded, False
        with torch.enable_grad(), self.record() as tape:
            loss = closure()
        if self._recorded:
            return loss
        if loss is None and pending:  # Lightning's manual optimization: an empty closure
            self._recorded = True
            return loss
        self.zero_grad()
        with torch.enable_grad():  # and no recording of the pass itself
            value, *others = loss if isinstance(loss, tuple) and loss else (loss,)
            outputs = [o for o in others if isinstance(o, Tensor) and o.ndim and o.requires_grad]
            output = outputs[0] if len(outputs) == len(others) == 1 else None
            tape.backward(value, output=output)
        return loss

    def record(self) -> AbstractContextManager[Any]:
        """Record the forward and backward pass of one step, for loops without a closure.

        Several blocks before one ``step()`` add up: gradient accumulation. Frameworks: PyTorch
        Lightning's automatic optimization hands `step` a closure and needs nothing, but it cannot
        accumulate gradients, for it runs the first closures elsewhere; its manual optimization
        records. Under Accelerate, record with the optimizer that was given to ``prepare``.
        `transformers.Trainer` owns both passes, and records them as shown.

        Example:
            >>> opt.zero_grad()
            >>> with opt.record():
            ...     loss = loss_fn(model(x), y)
            ...     loss.backward()
            >>> opt.step()

            >>> class Recorded(transformers.Trainer):
            ...     def training_step(self, *args, **kwargs):
            ...         with getattr(self.optimizer, "optimizer", self.optimizer).record():
            ...             return super().training_step(*args, **kwargs)
        """
        if (wrapped := _wrapped(self)) is not None:
            return wrapped.record()
        wanted = self._wanted()
        if not wanted:
            return PlainBackward(self)

        def backward(
            tape: Tape,
            loss: Tensor,
            gradient: Tensor | None = None,
            retain_graph: bool | None = None,
            create_graph: bool = False,
            inputs: Any = None,
            output: Tensor | None = None,
        ) -> None:
            if gradient is not None or create_graph or inputs is not None or retain_graph:
                raise CurvoptError(
                    "a recorded backward() takes no arguments; scale the loss instead of giving a "
                    "gradient, and go backward once over one forward pass"
                )
            computation = Computation(
                tape, loss, self.reduction, output=output, finite=self.finite_loss
            )
            self._begin_pass()
            if self.serves_others:
                computation.backward_to_others()
            try:
                with torch.no_grad():
                    self._accumulate(computation, wanted)
            except CurvoptError as error:
                if not tape.spent:
                    raise
                raise CurvoptError(
                    f"{error}. Or was this a second backward pass over one forward pass? Then add "
                    "the losses and call backward once"
                ) from error
            self._note(recorded=True)
            tape.consume(computation.reached)

        tape = self._tape()
        tape.on_backward = backward
        return tape

    # -- what p.grad holds ------------------------------------------------------------------------

    def _begin_pass(self) -> None:
        """See to it that ``p.grad`` holds the gradients of recorded passes, or None."""
        if self._unchanged():
            return
        for p in self._parameters():
            if p.grad is not None and p.grad.any():
                raise CurvoptError(
                    f"{self._name(p)} holds a gradient that was not recorded, so nothing is known "
                    "of its samples: call zero_grad() first, and run every backward pass of a "
                    "step inside its closure or `with opt.record():`"
                )
        self.zero_grad()

    def _unchanged(self) -> bool:
        """Whether ``p.grad`` is as the last recorded pass or step left it."""
        grads = [(p, p.grad) for p in self._parameters() if p.grad is not None]
        return len(grads) == len(self._left) and all(
            p is q and grad is left and grad._version == version
            for (p, grad), (q, left, version) in zip(grads, self._left, strict=True)
        )

    def _note(self, *, recorded: bool) -> None:
        """Remember ``p.grad`` as it is: what changes it from now on went unrecorded."""
        self._recorded = recorded
        grads = ((p, p.grad) for p in self._parameters())
        self._left = [(p, grad, grad._version) for p, grad in grads if grad is not None]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients, and what was recorded with them.

        Args:
            set_to_none: to None, or to zeros (fresh ones: a failed step gives the old ones back).
        """
        if (wrapped := _wrapped(self)) is not None:
            return wrapped.zero_grad(set_to_none)
        for p in self._parameters():
            if p.grad is not None:
                p.grad = None if set_to_none else torch.zeros_like(p.grad)
        self._forget()

    def _refuse_scaling(self) -> None:
        if hasattr(self, "found_inf"):  # GradScaler.step sets both for the length of the call
            vars(self).pop("grad_scale"), vars(self).pop("found_inf")
            raise CurvoptError(
                "GradScaler scales the loss, and with it everything that is computed beside the "
                "gradient: use torch.autocast with bfloat16, which needs no scaling, or disable it"
            )

    # -- torch.optim's contract -------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, with settings of its own or the defaults.

        Raises:
            ValueError: a setting is invalid, or a parameter is complex or given twice.
        """
        params = param_group["params"]
        if not isinstance(params, (Tensor, set)):
            param_group["params"] = params = list(params)
            seen: set[int] = set()
            for index, item in enumerate(params):
                name, p = item if isinstance(item, tuple) else (f"parameter {index}", item)
                if id(p) in seen:
                    raise ValueError(f"Invalid params: {name} is given twice")
                if isinstance(p, Tensor) and p.is_complex():
                    raise ValueError(f"Invalid params: {name} is complex; use its real view")
                seen.add(id(p))
        self._validate(self.defaults | param_group)
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """As in torch, with one more entry, ``"engine"``: counters and the generator's state."""
        engine = {name: deepcopy(getattr(self, name)) for name in self.saved}
        if self.generator is not None:
            engine["generator"] = self.generator.get_state()
        return super().state_dict() | {"engine": engine}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, but state keeps its dtype: float32 also for half-precision parameters."""
        final: dict[str, Any] = {}
        hook = self.register_load_state_dict_pre_hook(lambda _, loaded: final.update(loaded))
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
        indices = (index for group in final["param_groups"] for index in group["params"])
        for index, p in zip(indices, self._parameters(), strict=True):
            for key, value in final["state"].get(index, {}).items():
                if isinstance(value, Tensor):
                    self.state[p][key] = value.to(p.device, copy=True)
        engine = dict(final.get("engine", {}))
        generator = engine.pop("generator", None)
        for name, value in engine.items():
            setattr(self, name, deepcopy(value))
        if generator is not None and self.generator is not None:
            self.generator.set_state(generator.cpu())

    def __getstate__(self) -> dict[str, Any]:
        """All but hooks, gradients of a step under way, and ``step``, which schedulers wrap."""
        kept = vars(self).items()
        passing = ("step", "collected", "_left", "_recorded")
        return {k: v for k, v in kept if k not in passing and not k.startswith("_optimizer_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()
        for group in self.param_groups:  # of an older version, which lacked some settings
            for key in self.defaults.keys() - {"differentiable"}:  # which torch adds
                group.setdefault(key, self.defaults[key])

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

    def _name(self, parameter: Tensor) -> str:
        """The parameter's name and shape, for messages."""
        name = next(name for name, p in self._named() if p is parameter)
        return f"{name} {list(parameter.shape)}"


def _wrapped(optimizer: EngineOptimizer) -> EngineOptimizer | None:
    """The optimizer behind Lightning's wrapper, which poses as an instance of its class."""
    return vars(optimizer).get("_optimizer")


class PlainBackward(TorchFunctionMode):
    """Lets everything pass, but notices ``backward()``: for steps that need the gradient alone."""

    def __init__(self, optimizer: EngineOptimizer):
        super().__init__()
        self.optimizer = optimizer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.backward:
            return self.backward(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def backward(self, loss: Tensor, *args: Any, output: Any = None, **kwargs: Any) -> None:
        """Go backward as usual."""
        check_loss(loss)
        self.optimizer._begin_pass()
        for p in self.optimizer._parameters():
            if p.grad is not None:  # autograd adds in place; a failed step gives the old one back
                p.grad = p.grad.clone()
        loss.backward(*args, **kwargs)
        self.optimizer.collected.append({})
        self.optimizer._note(recorded=True)
