"""Steps along the polar factor of the batch's gradient, at a rate that finds itself."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from curvopt.engine.computation import Computation
from curvopt.errors import CurvoptError
from curvopt.optim.base import Backward, EngineOptimizer
from curvopt.optim.diag_ggn import Move, Plan
from curvopt.optim.polar_factor import by_factors
from curvopt.optim.polar_step import MatrixPlan, Rows, rows_of, sides
from curvopt.quantities import DiagGGNMC, Quantity
from curvopt.quantities.base import Context
from curvopt.quantities.raw import Structures
from curvopt.recording.tape import Tape
from curvopt.structures import Conv, Lookup, Outer, Own, Permuted, Pulled, Shift, Structure, Total

# Steps from one look at the number of rows to the next, while no matrix is stepped by its factors.
LOOK = 64


class PolarOptimizer(EngineOptimizer):
    r"""Steps along the damped polar factor of the gradient.

    Args:
        params: parameters, (name, parameter) pairs, or parameter groups.
    """

    saved: ClassVar[tuple[str, ...]] = ("steps", "waiting")
    #: A parameter takes part whose kind, or curvature, is not known.
    waiting = True

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 3e-3,
        momentum: float = 0.9,
        *,
        eps: float = 1e-3,
        adaptation: float = 0.1,
        margin: float = 0.05,
        weight_decay: float = 0.0,
        damping: float = 0.1,
        curvature_decay: float = 0.95,
        curvature_every: int = 10,
        generator: Generator | None = None,
        maximize: bool = False,
        batch_size: int | None = None,
        reduction: str | None = None,
    ):
        if curvature_every < 1:
            raise ValueError(f"Invalid curvature_every: {curvature_every}")
        defaults = dict(
            lr=lr, momentum=momentum, eps=eps, adaptation=adaptation, margin=margin,
            weight_decay=weight_decay, damping=damping, curvature_decay=curvature_decay,
            maximize=maximize,
        )  # fmt: skip
        super().__init__(
            params, defaults, batch_size=batch_size, reduction=reduction, generator=generator
        )
        self.curvature_every = curvature_every

    def _validate(self, group: dict[str, Any]) -> None:
        super()._validate(group)
        for key in ("momentum", "curvature_decay"):
            if not 0 <= group[key] < 1:
                raise ValueError(f"Invalid {key}: {group[key]}")
        if not 0 < group["eps"] < 1:
            raise ValueError(f"Invalid eps: {group['eps']}")
        for key in ("damping", "adaptation"):
            if not 0 <= group[key] < float("inf"):
                raise ValueError(f"Invalid {key}: {group[key]}")
        if not -1 <= group["margin"] <= 1:
            raise ValueError(f"Invalid margin: {group['margin']}")

    def add_param_group(self, param_group: dict[str, Any]) -> None:  # noqa: D102 (as in torch)
        super().add_param_group(param_group)
        self.waiting = True

    # -- what a step measures ---------------------------------------------------------------------

    def _wanted(self) -> list[Quantity]:
        if self.waiting or self.steps % LOOK == 0:
            return [Structures()]
        sketched, factored = self._measured()
        sketch = [Diagonal(generator=self.generator)] if sketched else []
        return [*sketch, Structures()] if factored else [*sketch]

    def _measured(self) -> tuple[list[Tensor], list[Tensor]]:
        """Parameters whose curvature is due, and those that are stepped by their rows."""
        steps, every = self.steps, self.curvature_every
        due = steps % every == 0 or (steps < every and steps & (steps - 1) == 0)
        sketched, factored = [], []
        for p, state in self.state.items():
            if "curvature" in state:
                if due:
                    sketched.append(p)
            elif state.get("rows") and by_factors(state["rows"], *sides(p)):
                factored.append(p)
        return sketched, factored

    def _tape(self) -> Tape:
        """Records what is measured alone: the rest costs nothing."""
        if self.waiting or self.steps % LOOK == 0:
            return super()._tape()
        sketched, factored = self._measured()
        wanted = {id(p) for p in (*sketched, *factored)}
        named = [(name, p) for name, p in self._named() if id(p) in wanted and p.requires_grad]
        return Tape(named, batch_size=self.batch_size) if named else super()._tape()

    def _accumulate(
        self, computation: Computation, quantities: list[Quantity], backward: Backward
    ) -> None:
        values: dict[str, Any] = {}
        first = [quantity for quantity in quantities if isinstance(quantity, Diagonal)]
        if first:
            values.update(computation.run(first))
        if len(first) == len(quantities):
            backward()
            self.collected.append(values)
            return
        anew = self.waiting or self.steps % LOOK == 0
        with computation.watching([Structures()], values):
            backward(computation.derives or anew)
        structures = values.pop(Structures.field)
        if anew and any(is_table(p, s) for p, s in structures.items()):
            values.update(computation.run([Diagonal(generator=self.generator)]))
        if anew:
            values["kinds"] = {p: False for p in computation.tape.params}
            values["kinds"] |= {p: is_table(p, s) for p, s in structures.items()}
        values["rows"] = {p: rows_of(s) for p, s in structures.items() if p.ndim == 2}
        self.collected.append(values)

    def _update(self) -> None:
        passes: list[dict[str, Any]] = self.collected
        waiting, plans = False, []
        for group in self.param_groups:
            diagonal, matrices = [], []
            for p in group["params"]:
                if p.grad is None or not p.numel():
                    continue
                state = dict(self.state[p]) if p in self.state else {}
                parts = [v[Diagonal.field][p] for v in passes if p in v.get(Diagonal.field, ())]
                if not state:
                    kinds = [v["kinds"][p] for v in passes if p in v.get("kinds", ())]
                    if parts:
                        m = _zeros(p)
                        state = dict(step=0, weight=0.0, momentum_buffer=m)
                        state["curvature"] = torch.zeros_like(m)
                    elif p.ndim < 2 or (kinds and not any(kinds)):
                        state = dict(step=0, momentum_buffer=_zeros(p))
                if not state:
                    waiting = True  # it takes part for the first time: looked at next
                elif "curvature" in state:
                    diagonal.append(Move(p, p.grad, state, parts, self._name))
                else:
                    rows = [v["rows"].get(p) if "rows" in v else None for v in passes]
                    matrices.append((p, state, Rows.joined(rows)))
            plans.append(Plan(diagonal, {**group, "max_step": 1.0}))
            plans.append(MatrixPlan(matrices, group, self._name))
        self.waiting = waiting
        for plan in plans:  # nothing has changed so far
            plan.carry_out(self.state)

    def _join(self) -> None:
        raise NotImplementedError


def _zeros(p: Tensor) -> Tensor:
    """Contiguous, so that it is a matrix without being copied."""
    return torch.zeros(
        p.shape, dtype=torch.promote_types(p.dtype, torch.float32), device=p.device
    )


class Diagonal(DiagGGNMC):
    """A sketch of the GGN's diagonal, of the parameters that are no matrices."""

    def reduce_all(  # noqa: D102 (as in the base class)
        self, structures: dict[Tensor, Structure], context: Context
    ) -> dict[Tensor, Any]:
        return {p: self.reduce(s, context) for p, s in structures.items() if is_table(p, s)}


def is_table(p: Tensor, structure: Structure) -> bool:
    """Whether a parameter of two axes or more is a table, not a matrix that acts on inputs."""
    if p.ndim < 2:
        return False
    if isinstance(structure, (Pulled, Permuted)):
        return is_table(p, structure.inner)
    if isinstance(structure, Total):
        return any(is_table(p, part) for part in structure.parts)
    if isinstance(structure, (Outer, Conv)):
        return structure.groups > 1
    return isinstance(structure, (Lookup, Shift, Own))
