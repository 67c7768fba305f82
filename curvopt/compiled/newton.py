"""`DiagGGNOptimizer` in a graph."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from curvopt.compiled.led import Led, NewtonMove, weight_of
from curvopt.compiled.tracing import Proof
from curvopt.compiled.updates import Groups, Traced, all_or_none
from curvopt.engine.computation import Computation
from curvopt.quantities import Quantity

TENSORS = ("momentum_buffer", "curvature", "inverse")


class NewtonUpdate(Led):
    """Damped Newton steps."""

    def mode(self, params: Sequence[Tensor]) -> Hashable | None:
        """Whether the curvature is measured."""
        opt = self.opt
        if opt.waiting or not all(opt.state.get(p, {}).get("weight") for p in params):
            return None
        return all_or_none([opt._due(p) for p in params])

    def settings(self) -> Hashable:
        """As in the base class."""
        return super().settings(), self.opt.estimator, self.opt.samples

    def quantities(self, mode: Hashable) -> list[Quantity]:
        """The curvature's diagonal, where it is measured."""
        return self.opt._wanted() if mode else []

    def measure(
        self,
        computation: Computation,
        quantities: list[Quantity],
        numbers: Sequence[Tensor] | None = None,
        drawn: Sequence[Tensor] = (),
    ) -> tuple[list[Tensor | None], dict[str, Any]]:
        """The curvature's columns go first, as in a step that is not compiled."""
        values = computation.run(quantities)
        with torch.enable_grad():
            grads = torch.autograd.grad(
                computation.loss, computation.tape.params, allow_unused=True
            )
        return [*grads], values

    def tensors(self, mode: Hashable, params: Sequence[Tensor], groups: Groups) -> list[Tensor]:
        """Momentum, curvature, its inverse, and the table."""
        states = [self.opt.state[p] for p in params]
        held = [state[key] for key in TENSORS for state in states]
        return [*held, self.table(params, groups)]

    def moves(self, traced: Traced) -> list[NewtonMove]:
        """The formulas of `DiagGGNOptimizer`."""
        count = len(traced.params)
        found = next(iter(traced.values.values())) if traced.quantities else {}
        moves = []
        for k, (p, group) in enumerate(zip(traced.params, traced.groups, strict=True)):
            held, weight = traced.state[k : 3 * count : count], traced.numbers[3][k]
            grad, measured = traced.grads[k], found.get(p)
            moves.append(NewtonMove(p, grad, held, weight, measured, group, group["max_step"]))
        return moves

    def done(
        self,
        mode: Hashable,
        params: Sequence[Tensor],
        groups: Groups,
        proof: Proof,
        seen: Sequence[Tensor],
    ) -> None:
        """Count."""
        for p, group in zip(params, groups, strict=True):
            state = self.opt.state[p]
            if mode:
                state["weight"] = weight_of(state, group)
            state["step"] += 1
