"""`DiagGGNOptimizer` in a graph."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from curvopt.compiled.updates import Groups, Moved, Traced, Update, Write, all_or_none
from curvopt.engine.computation import Computation
from curvopt.errors import CurvoptError
from curvopt.looks import refuse
from curvopt.optim.lead import NUMBERS, Known, known_of, lead, numbers_of
from curvopt.optim.squares import nothing
from curvopt.quantities import Quantity

TENSORS = ("momentum_buffer", "curvature", "inverse")


class NewtonUpdate(Update):
    """Damped Newton steps; the numbers of all tensors that follow from values are one table."""

    _table: Tensor
    _views: Sequence[Tensor | None] = ()

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
        """Momentum, curvature, its inverse, and the table of `NUMBERS`."""
        states = [self.opt.state[p] for p in params]
        held = [state[key] for key in TENSORS for state in states]
        now = [state.get(NUMBERS[-1]) for state in states]
        known = len(now) == len(self._views)
        if not known or any(a is not b for a, b in zip(now, self._views, strict=True)):
            self._hold(states, groups)
        return [*held, self._table]

    def _hold(self, states: list[dict[str, Any]], groups: Groups) -> None:
        """Have the numbers in one table, of which the states hold views."""
        device = states[0]["momentum_buffer"].device
        self._table = numbers_of(states).to(device, torch.float64, copy=True)
        rows = [row.unbind() for row in self._table.unbind()]
        views: list[Tensor | None] = []
        for index, (state, group) in enumerate(zip(states, groups, strict=True)):
            if group["momentum"] and group["adaptation"]:
                state.update({name: row[index] for name, row in zip(NUMBERS, rows, strict=True)})
            views.append(state.get(NUMBERS[-1]))
        self._views = views

    def numbers(
        self, mode: Hashable, params: Sequence[Tensor], groups: Groups, samples: int
    ) -> Sequence[Sequence[float]]:
        """Those of `Known`, and the weight of what is known of the curvature."""
        states = [self.opt.state[p] for p in params]
        rows: list[list[float]] = [[], [], []]
        for group, part in _runs(groups):
            steps = [states[k]["step"] + 1 for k in part]
            known = known_of(steps, [float(group["lr"])] * len(steps), group)
            for mine, more in zip(rows, known, strict=True):
                mine += more
        return [*rows, [_weight(s, g) for s, g in zip(states, groups, strict=True)]]

    def move(self, traced: Traced) -> Moved:
        """The formulas of `DiagGGNOptimizer`."""
        count = len(traced.params)
        ms, hs, inverses = (traced.state[k * count : (k + 1) * count] for k in range(3))
        table, weights = traced.state[-1], traced.numbers[3]
        writes: list[Write] = []
        if traced.quantities:
            (diagonal,) = [*traced.values.values()]
            inverses = [*inverses]
            for k, (leaf, group) in enumerate(zip(traced.params, traced.groups, strict=True)):
                h = hs[k].lerp(diagonal[leaf].to(hs[k].dtype), 1 - group["curvature_decay"])
                inverses[k] = _inverted(h, weights[k].to(h), group["damping"])
                writes += [(hs[k], h), (traced.state[2 * count + k], inverses[k])]
        means, found = [], []
        for m, grad, inverse, group in zip(ms, traced.grads, inverses, traced.groups, strict=True):
            means.append(m.lerp(grad.to(m.dtype), 1 - group["momentum"]))
            parts = (means[-1] * inverse, means[-1], grad.to(m.dtype))
            found.append(torch.stack([(part * part).sum() for part in parts]))
        squares = torch.stack(found).to(table.dtype)
        # A square alone may be too large.
        refuse(squares[:, 0].isinf(), lambda: CurvoptError("a step is too long"))
        tables, factors = [], []
        for group, part in _runs(traced.groups):
            known = Known(*(row[part[0] : part[-1] + 1] for row in traced.numbers[:3]))
            sizes = [group["max_step"] * traced.params[k].numel() ** 0.5 for k in part]
            # One by one, for a constant tensor would be one more input.
            bound = torch.stack([torch.full_like(table[0, 0], size) for size in sizes])
            numbers, factor = lead(
                table[:, part[0] : part[-1] + 1], squares[part[0] : part[-1] + 1], known, bound,
                group,
            )  # fmt: skip
            tables.append(numbers)
            factors += [*factor.unbind()]
        writes.append((table, torch.cat(tables, 1)))
        for k, (p, m, mean, group) in enumerate(
            zip(traced.params, ms, means, traced.groups, strict=True)
        ):
            rate, step = traced.numbers[0][k], mean * inverses[k] * factors[k].to(mean)
            kept = p * (1 - rate * group["weight_decay"]).to(p) if group["weight_decay"] else p
            writes.append((p, (kept + step).to(p.dtype)))
            if traced.quantities:  # denormal numbers are slow
                small = torch.nn.functional.hardshrink(m, nothing(m))
                mean = small.lerp(traced.grads[k].to(m.dtype), 1 - group["momentum"])
            writes.append((m, mean))
        return Moved(writes, traced.grads)

    def done(
        self,
        mode: Hashable,
        params: Sequence[Tensor],
        groups: Groups,
        samples: int,
        seen: Sequence[Tensor],
    ) -> None:
        """Count."""
        for p, group in zip(params, groups, strict=True):
            state = self.opt.state[p]
            if mode:
                state["weight"] = _weight(state, group)
            state["step"] += 1


def _weight(state: dict[str, Any], group: dict[str, Any]) -> float:
    """The weight of all measurements, with one more."""
    return 1 - group["curvature_decay"] * (1 - state["weight"])


def _inverted(h: Tensor, weight: Tensor, damping: float) -> Tensor:
    """The damped inverse of the curvature."""
    mean = h.mean() / weight
    shift = torch.where(mean > nothing(h), damping * mean, damping)
    inverse = (shift + h * (1 / weight)).reciprocal()
    return inverse if damping else inverse.nan_to_num(posinf=0)


def _runs(groups: Groups) -> list[tuple[dict[str, Any], list[int]]]:
    """Numbers of neighbours that share a group."""
    runs = groupby(range(len(groups)), key=lambda k: id(groups[k]))
    return [(groups[part[0]], part) for part in ([*run] for _, run in runs)]
