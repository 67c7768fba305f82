"""`PolarOptimizer` in a graph."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from curvopt.compiled.led import Led, LedMove, NewtonMove, weight_of
from curvopt.compiled.newton import TENSORS
from curvopt.compiled.tracing import Proof, Unsuited
from curvopt.compiled.updates import Groups, Traced, all_or_none
from curvopt.engine.computation import Computation
from curvopt.errors import CurvoptError
from curvopt.looks import refuse
from curvopt.optim.lead import square, wide
from curvopt.optim.polar import Diagonal
from curvopt.optim.polar_step import Fixed, Matrix, Rows, cleans, fixed_of, rows_of
from curvopt.optim.state import sides
from curvopt.quantities import Quantity
from curvopt.quantities.raw import Structures


class Step(NamedTuple):
    """What a step does.

    Attributes:
        sketches: it measures curvature.
        due: that of the tables here.
        tables: numbers of the parameters that are tables.
        factored: of the matrices that are stepped by their rows.
    """

    sketches: bool
    due: bool
    tables: tuple[int, ...]
    factored: tuple[int, ...]


class PolarUpdate(Led):
    """Polar factors by rows or Gram matrices; looks at the number of rows are taken eagerly."""

    #: Of each matrix, where its `Fixed` are among the tensors that no step writes to.
    _places: Sequence[Sequence[int | None]] = ()

    def mode(self, params: Sequence[Tensor]) -> Hashable | None:
        """Which matrices are stepped by their rows, and whether tables are measured."""
        opt = self.opt
        if not all(p.numel() for p in params):
            raise Unsuited("a parameter has no elements")
        if opt._looks():
            return None
        states = [opt.state.get(p, {}) for p in params]
        if not all(s.get("weight") if "curvature" in s else "signal" in s for s in states):
            return None
        tables = tuple(k for k, state in enumerate(states) if "curvature" in state)
        if any(cleans(s["step"] + 1) for s in states if "signal" in s):
            return None
        due = all_or_none([opt._due(params[k]) for k in tables]) if tables else False
        if due is None:
            return None
        sketched, by_rows = opt._measured()
        ids = {*map(id, by_rows)}
        factored = tuple(k for k, p in enumerate(params) if id(p) in ids)
        return Step(bool(sketched), due, tables, factored)

    def quantities(self, mode: Any) -> list[Quantity]:
        """The curvature of tables, where it is measured, and rows, where they are used."""
        wanted: list[Quantity] = [self.opt._sketch()] if mode.sketches else []
        return [*wanted, Structures()] if mode.factored else wanted

    def measure(
        self,
        computation: Computation,
        quantities: list[Quantity],
        numbers: Sequence[Tensor] | None = None,
        drawn: Sequence[Tensor] = (),
    ) -> tuple[list[Tensor | None], dict[str, Any]]:
        """The curvature's columns go first, as in a step that is not compiled."""
        computation.prepare()
        sketches = [quantity for quantity in quantities if isinstance(quantity, Diagonal)]
        values = computation.run(sketches) if sketches else {}
        if len(sketches) < len(quantities):
            grads, found = computation.with_gradient(quantities[-1:])
            structures = found[Structures.field].items()
            return grads, values | {"rows": {p: rows_of(s) for p, s in structures if p.ndim == 2}}
        with torch.enable_grad():
            only = torch.autograd.grad(computation.loss, computation.tape.params, allow_unused=True)
        return [*only], values

    def facts(self, values: dict[str, Any]) -> Any:
        """The number of rows of each matrix."""
        return {p: rows.number for p, rows in values.get("rows", {}).items() if rows is not None}

    def tensors(self, mode: Any, params: Sequence[Tensor], groups: Groups) -> list[Tensor]:
        """Momentum; curvature and inverse of tables, or signal; what is fixed; the table."""
        states = [self.opt.state[p] for p in params]
        held, fixed = list[Tensor](), dict[int, Tensor]()
        order, places = dict[int, int](), list[Sequence[int | None]]()
        for k, (p, state) in enumerate(zip(params, states, strict=True)):
            if k in mode.tables:
                held += [state[key] for key in TENSORS]
                places.append(())
                continue
            held += [state["momentum_buffer"], state["signal"]]
            parts = fixed_of(sides(p), state["momentum_buffer"])
            for part in parts:
                if part is not None:
                    order.setdefault(id(part), len(order))
                    fixed[id(part)] = part
            places.append([None if part is None else order[id(part)] for part in parts])
        self._places = places
        return [*held, *fixed.values(), self.table(params, groups)]

    def moves(self, traced: Traced) -> list[LedMove]:
        """The formulas of `PolarOptimizer`."""
        diagonal, rows = (traced.values.get(key, {}) for key in (Diagonal.field, "rows"))
        state, moves = iter(traced.state), list[LedMove]()
        kept = [[next(state) for _ in range(2 if at else 3)] for at in self._places]
        fixed = [*state]
        mode: Any = traced.mode
        for k, (p, grad, group) in enumerate(
            zip(traced.params, traced.grads, traced.groups, strict=True)
        ):
            if k in mode.tables:
                measured = diagonal.get(p) if mode.due else None
                weight = traced.numbers[3][k]
                moves.append(NewtonMove(p, grad, kept[k], weight, measured, group, 1.0))
                continue
            left, right, signs = (None if at is None else fixed[at] for at in self._places[k])
            assert signs is not None
            found = rows.get(p) if k in mode.factored else None
            moves.append(
                MatrixMove(
                    p, grad, kept[k], found, group, Fixed(left, right, signs), self.opt._name
                )
            )
        return moves

    def done(
        self,
        mode: Any,
        params: Sequence[Tensor],
        groups: Groups,
        proof: Proof,
        seen: Sequence[Tensor],
    ) -> None:
        """Count."""
        for k, (p, group) in enumerate(zip(params, groups, strict=True)):
            state = self.opt.state[p]
            if mode.due and k in mode.tables:
                state["weight"] = weight_of(state, group)
            if k in mode.factored and p in proof.facts:
                state["rows"] = proof.facts[p]
            state["step"] += 1


class MatrixMove(LedMove):
    """A step along the polar factor.

    Args:
        p: the parameter.
        grad: its gradient.
        held: momentum and signal.
        rows: of the gradient, where it is stepped by them.
        group: the settings.
        fixed: what is random.
        name: of a parameter, for messages.
    """

    def __init__(
        self,
        p: Tensor,
        grad: Tensor,
        held: Sequence[Tensor],
        rows: Rows | None,
        group: dict[str, Any],
        fixed: Fixed,
        name: Callable[[Tensor], str],
    ):
        (m, signal), weight = held, 1 - group["momentum"]
        one = Matrix(p, grad, {"momentum_buffer": m}, rows, group["eps"], name, fixed)
        mean = signal.lerp(one.signal, weight)
        if one.left is not None and one.right is not None:
            moved = torch.addmm(one.m, one.left, one.right, beta=1 - weight, alpha=weight)
        else:
            assert one.u is not None
            moved = one.m.lerp(one.u, weight)
        self.length, self.moved = max(one.shape) ** 0.5, moved.view(p.shape)
        self.writes = [(m, self.moved), (signal, mean)]
        gradient = square(wide(one.signal))
        refuse(~gradient.isfinite(), lambda: CurvoptError("a gradient is not finite"))
        self.squares = torch.stack([torch.zeros_like(gradient), square(wide(mean)), gradient])

    def step(self, factor: Tensor) -> Tensor:
        """Along the momentum."""
        return self.moved * (factor * self.length).to(self.moved)
