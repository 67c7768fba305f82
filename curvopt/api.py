"""The two doors to the engine: `compute` with a closure, `record` without."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from curvopt.engine.checks import quantities_of
from curvopt.engine.computation import Computation
from curvopt.engine.result import Result
from curvopt.errors import CurvoptError
from curvopt.quantities import Gradient, Quantity
from curvopt.quantities.base import GRADIENT
from curvopt.recording.tape import Tape

Params = Iterable[Tensor] | Iterable[tuple[str, Tensor]]


class Recording(Tape):
    """A recorded forward pass, open to any number of `compute` calls; see `record`."""

    def compute(
        self,
        loss: Tensor,
        *quantities: Quantity,
        output: Tensor | None = None,
        reduction: str | None = None,
        max_columns: int | None = None,
    ) -> Result:
        """Compute quantities of a loss that was recorded.

        Args:
            loss: a scalar, computed inside the ``with`` block.
            *quantities: what to compute.
            output: the model's output that the loss was computed from, for the curvature of a loss
                written by hand.
            reduction: ``"mean"`` or ``"sum"``: what a sample's own loss is where a sum is scaled by
                something that may be a count: N times its part of the loss, or its part.
            max_columns: columns sent back together at most; bounded by memory in any case.
        """
        asked = quantities_of(quantities)
        self._refuse_hooks(asked)
        computation = Computation(self, loss, reduction, max_columns, output=output)
        values = computation.run(asked) if asked else {}
        result = Result(computation.loss.detach(), lambda: _complete(computation), self.names)
        for field, value in values.items():
            setattr(result, field, value)
        return result

    def _refuse_hooks(self, asked: list[Quantity]) -> None:
        """A hook on a parameter may change each sample's gradient, which no op makes."""
        samples = [q.field for q in asked if q.own and q.cotangent is GRADIENT]
        for p in self.params if samples else ():
            if p._backward_hooks:
                raise CurvoptError(
                    f"{self.name(p)} has a gradient hook, which may change every sample's "
                    f"gradient: {samples[0]} would be that without the hook. Remove the hook "
                    "(handle.remove()), compute, and register it again"
                )


def _complete(computation: Computation) -> dict[Tensor, Tensor]:
    gradient = computation.gradient()
    return {p: gradient.get(p, torch.zeros_like(p)) for p in computation.tape.params}


def record(
    params: Params, *, batch_size: int | None = None, create_graph: bool = False
) -> Recording:
    """Record a forward pass, to compute quantities of its loss.

    Args:
        params: parameters, or (name, parameter) pairs: the result and messages then speak of names.
        batch_size: number of samples, where the data flow leaves two readings; checked against it.
        create_graph: keep the quantities differentiable in the parameters and inputs.

    Returns:
        A context manager; inside it any model may run, unmodified.

    Example:
        >>> with curvopt.record(model.parameters()) as tape:
        ...     loss = torch.nn.functional.cross_entropy(model(x), y)
        >>> result = tape.compute(loss, curvopt.Variance())
        >>> result.variance[p].shape == p.shape
        True
    """
    return Recording(params, batch_size=batch_size, create_graph=create_graph)


def compute(
    closure: Callable[[], Any],
    params: Params,
    *quantities: Quantity,
    batch_size: int | None = None,
    reduction: str | None = None,
    create_graph: bool = False,
    max_columns: int | None = None,
) -> Result:
    """Compute quantities of the loss that a closure returns, in one forward pass.

    Args:
        closure: runs the model and returns the loss; it may call ``backward()`` on it, which
            then also adds the gradient to ``p.grad`` as usual. For the curvature of a loss that
            is none of torch.nn.functional's, it returns ``(loss, output)`` with the model's output.
        params: parameters, or (name, parameter) pairs: the result and messages then speak of names.
        *quantities: what to compute; those with the same cotangent share one backward pass.
        batch_size: number of samples, where the data flow leaves two readings; checked against it.
        reduction: ``"mean"`` or ``"sum"``: what a sample's own loss is where a sum is scaled by
            something that may be a count: N times its part of the loss, or its part.
        create_graph: keep the quantities differentiable in the parameters and inputs.
        max_columns: columns sent back together at most; bounded by memory in any case.

    Returns:
        A result with a mapping from parameters to values per quantity, ``loss``, and ``grad``.

    Raises:
        CurvoptError: something cannot be computed exactly; the message says what to do.

    Example:
        >>> result = curvopt.compute(
        ...     lambda: torch.nn.functional.cross_entropy(model(x), y),
        ...     model.named_parameters(),
        ...     curvopt.BatchGrad(),
        ...     curvopt.DiagGGNExact(),
        ... )
        >>> result.batch_grad["0.weight"].shape  # or result.batch_grad[p]
        torch.Size([8, 5, 4])
        >>> result.diag_ggn_exact
        diag_ggn_exact(0.weight: [5, 4], 0.bias: [5], 2.weight: [3, 5], 2.bias: [3])
    """
    tape = record(params, batch_size=batch_size, create_graph=create_graph)
    calls: list[Tensor] = []
    tape.on_backward = lambda tape, loss, *args, **kwargs: calls.append(loss)
    with torch.enable_grad(), tape:
        loss = closure()
    if len(calls) > 1:
        raise CurvoptError(
            f"the closure called backward() {len(calls)} times; compute takes one loss: add them"
        )
    output = None
    if isinstance(loss, tuple) and len(loss) == 2:
        loss, output = loss
    loss = calls[0] if calls else loss
    result = tape.compute(
        loss, *quantities, output=output, reduction=reduction, max_columns=max_columns
    )
    if calls:
        loss.backward(retain_graph=True)  # for what is asked of the result later
    return result


__all__ = ["Gradient", "Recording", "compute", "record"]
