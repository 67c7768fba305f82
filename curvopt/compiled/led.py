"""Steps whose rates find themselves, in a graph: what their optimizers share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from curvopt.compiled.updates import Groups, Moved, Traced, Update, Write
from curvopt.errors import CurvoptError
from curvopt.looks import refuse
from curvopt.optim.lead import NUMBERS, Known, known_of, lead, numbers_of
from curvopt.optim.squares import nothing


class LedMove(ABC):
    """What one step does to a tensor.

    Attributes:
        squares: of the step, the averaged gradient and the gradient, as `lead` wants them, ``[3]``.
        bound: of the step's length.
        writes: to the state.
    """

    squares: Tensor
    bound = float("inf")
    writes: list[Write]

    @abstractmethod
    def step(self, factor: Tensor) -> Tensor:
        """The step, of a length that `lead` has found."""


class Led(Update):
    """The numbers of all tensors that follow from values are one table."""

    _table: Tensor
    _views: Sequence[Tensor | None] = ()

    def table(self, params: Sequence[Tensor], groups: Groups) -> Tensor:
        """`NUMBERS` of all parameters, ``[3, P]``, of which their states hold views."""
        states = [self.opt.state[p] for p in params]
        now = [state.get(NUMBERS[-1]) for state in states]
        if len(now) != len(self._views) or not all(
            a is b and (isinstance(a, Tensor) or not _adapts(group))
            for a, b, group in zip(now, self._views, groups, strict=True)
        ):
            self._hold(states, groups)
        return self._table

    def _hold(self, states: list[dict[str, Any]], groups: Groups) -> None:
        device = states[0]["momentum_buffer"].device
        self._table = numbers_of(states).to(device, torch.float64, copy=True)
        rows = [row.unbind() for row in self._table.unbind()]
        views: list[Tensor | None] = []
        for index, (state, group) in enumerate(zip(states, groups, strict=True)):
            if _adapts(group):
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
        return [*rows, [weight_of(s, g) for s, g in zip(states, groups, strict=True)]]

    @abstractmethod
    def moves(self, traced: Traced) -> Sequence[LedMove]:
        """What the step does to each parameter."""

    def move(self, traced: Traced) -> Moved:
        """Find how far each parameter goes, and go."""
        table, moves = traced.state[-1], self.moves(traced)
        squares = torch.stack([move.squares.to(table.dtype) for move in moves])
        # A gradient may not be a number, or a square alone be too large.
        refuse(~squares.isfinite(), lambda: CurvoptError("a square is not finite"))
        tables, factors = [], []
        for group, part in _runs(traced.groups):
            these = slice(part[0], part[-1] + 1)
            known = Known(*(row[these] for row in traced.numbers[:3]))
            # One by one, for a constant tensor would be one more input.
            bound = torch.stack([torch.full_like(table[0, 0], moves[k].bound) for k in part])
            numbers, factor = lead(table[:, these], squares[these], known, bound, group)
            tables.append(numbers)
            factors += [*factor.unbind()]
        writes: list[Write] = [(table, torch.cat(tables, 1))]
        for p, group, move, rate, factor in zip(
            traced.params, traced.groups, moves, traced.numbers[0].unbind(), factors, strict=True
        ):
            kept = p * (1 - rate * group["weight_decay"]).to(p) if group["weight_decay"] else p
            writes += [*move.writes, (p, (kept + move.step(factor)).to(p.dtype))]
        return Moved(writes, traced.grads)


class NewtonMove(LedMove):
    """The formulas of `DiagGGNOptimizer`.

    Args:
        p: the parameter.
        grad: its gradient.
        held: momentum, curvature and its inverse.
        weight: of what is known of the curvature, with this step.
        measured: the curvature; None where it was not measured.
        group: the settings.
        max_step: the largest root mean square of a step before its rate.
    """

    def __init__(
        self,
        p: Tensor,
        grad: Tensor,
        held: Sequence[Tensor],
        weight: Tensor,
        measured: Tensor | None,
        group: dict[str, Any],
        max_step: float,
    ):
        (m, h, self.inverse), news = held, 1 - group["momentum"]
        self.bound, self.writes = max_step * p.numel() ** 0.5, []
        grad = grad.to(m.dtype)
        self.mean = after = m.lerp(grad, news)
        if measured is not None:
            curved = h.lerp(measured.to(h.dtype), 1 - group["curvature_decay"])
            self.writes = [(h, curved)]
            self.inverse = _inverted(curved, weight.to(h), group["damping"])
            self.writes.append((held[2], self.inverse))
            # Denormal numbers are slow.
            after = torch.nn.functional.hardshrink(m, nothing(m)).lerp(grad, news)
        self.writes.append((m, after))
        parts = (self.mean * self.inverse, self.mean, grad)
        self.squares = torch.stack([(part * part).sum() for part in parts])

    def step(self, factor: Tensor) -> Tensor:
        """Newton's step."""
        return self.mean * self.inverse * factor.to(self.mean)


def weight_of(state: dict[str, Any], group: dict[str, Any]) -> float:
    """The weight of all measurements, with one more."""
    return float(1 - group["curvature_decay"] * (1 - state.get("weight", 0.0)))


def _adapts(group: dict[str, Any]) -> bool:
    return bool(group["momentum"] and group["adaptation"])


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
