"""What one step does to matrices: their polar factors, their rates, and the moves."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from curvopt.engine.audit import precision_of
from curvopt.errors import CurvoptError
from curvopt.optim.polar_factor import by_factors, polar, polar_of_rows
from curvopt.optim.rate import adapt
from curvopt.optim.state import held, sides
from curvopt.parallel.groups import Ranks
from curvopt.parallel.shards import cut, is_sharded, local, whole
from curvopt.structures import Outer, Structure

# Numbers of a gradient's random projection, along each axis, that the rate is led by.
SKETCH = 24
# Units of rounding by which the rows' product may differ from the gradient.
UNITS = 64.0
# Steps after which what is left of a momentum that stands still is set to zero.
CLEAN = 64


class Rows(NamedTuple):
    """A gradient's factors, ``L^T R``: n cotangents ``[n, O]`` and inputs ``[n, I]``.

    Attributes:
        number: n.
        factors: L and R; None where a matrix's other way is cheaper.
    """

    number: int
    factors: tuple[Tensor, Tensor] | None

    @classmethod
    def joined(cls, parts: Sequence[Rows | None]) -> Rows | None:
        """Those of several passes, one after the other; None where one is not known."""
        if len(parts) < 2:
            return parts[0] if parts else None
        known = [part for part in parts if part is not None]
        if len(known) < len(parts):
            return None
        number = sum(part.number for part in known)
        pairs = [part.factors for part in known if part.factors is not None]
        if len(pairs) < len(known):
            return cls(number, None)
        left, right = (torch.cat(side) for side in zip(*pairs, strict=True))
        return cls(number, (left, right))


def rows_of(structure: Structure) -> Rows | None:
    """The rows of a matrix's gradient, if it is a product of few."""
    if not isinstance(structure, Outer) or structure.groups > 1 or structure.columns > 1:
        return None
    number = structure.samples * structure.tokens
    if not by_factors(number, structure.outputs, structure.inputs):
        return Rows(number, None)
    left, right = structure.left[0].flatten(0, 2), structure.right.flatten(0, 2)
    return Rows(number, (right, left) if structure.transposed else (left, right))


def gathered(
    rows: dict[Tensor, Rows | None], params: Sequence[Tensor], ranks: Ranks
) -> dict[Tensor, Rows | None]:
    """The rows of all processes, one after the other, of those matrices that they are still few of.

    The gradient is the mean of the processes'; a common factor is nothing to the rows.

    Args:
        rows: of this process.
        params: all parameters, in an order that is the same everywhere.
        ranks: the processes.
    """
    place, count = ranks.place
    own = [rows.get(p) for p in params]
    table = torch.zeros(2, count, len(params), device=params[0].device)
    for index, part in enumerate(own):
        if part is not None:
            table[0, place, index] = part.number
            table[1, place, index] = part.factors is not None
    (table,) = ranks.sums([table])
    numbers, usable = table[0].T.long().tolist(), table[1].all(0).tolist()
    result: dict[Tensor, Rows | None] = {}
    for p, part, sizes, use in zip(params, own, numbers, usable, strict=True):
        total = sum(sizes)
        if part is None or part.factors is None or not (use and by_factors(total, *sides(p))):
            result[p] = Rows(total, None) if all(sizes) else None
            continue
        begin = sum(sizes[:place])
        whole = [side.new_zeros(total, side.shape[1]) for side in part.factors]
        for side, factor in zip(whole, part.factors, strict=True):
            side[begin : begin + sizes[place]] = factor
        left, right = ranks.sums(whole)
        result[p] = Rows(total, (left, right))
    return result


def check_dense(p: Tensor, name: Callable[[Tensor], str]) -> None:
    """Refuse gradients that are no matrix in memory."""
    if p.grad is not None and p.grad.layout is not torch.strided:
        raise CurvoptError(
            f"the gradient of {name(p)} is sparse, and has no polar factor: build the embedding "
            "with sparse=False"
        )


class Matrix:
    """What one step does to a matrix, or to a vector as one of a single column.

    Where processes have parts of it, each finds the factor of the whole, and moves its part.

    Args:
        p: the parameter.
        state: a copy of its state, whose numbers are made those to come.
        rows: of its gradient, if known.
        eps: the damping.
        name: of a parameter, for messages.

    Attributes:
        signal: the random projection of the gradient.
        factor: of the momentum, in the step.
        m: the momentum.
        left: and `right`, ``[O, n]`` and ``[n, I]``: the polar factor's own factors.
        u: or the polar factor.
        failed: the rows had no Cholesky factor.
    """

    def __init__(
        self,
        p: Tensor,
        state: dict[str, Any],
        rows: Rows | None,
        eps: float,
        name: Callable[[Tensor], str],
    ):
        self.p, self.state, self.shape, self.factor = p, state, sides(p), 0.0
        m = held(state, "momentum_buffer", p, name)
        if not local(m).is_contiguous():  # as somebody made it
            m = state["momentum_buffer"] = m.contiguous()
        self.m = local(m)
        self.grad = whole(p.grad).reshape(self.shape).to(m.dtype)
        if rows is not None:
            state["rows"] = rows.number
        self.left = self.right = self.u = cast(Tensor | None, None)
        self.failed = False
        try:
            if rows is None or rows.factors is None or not self._by(*rows.factors, eps):
                self.u = polar(self.grad, eps).view(p.shape)
                self.signal = self._projected()
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]  # public, untyped
            raise CurvoptError(f"the gradient of {name(p)} is not finite") from error
        del self.grad  # of a part's, the whole is in memory no longer than needed
        self._cut()

    def _cut(self) -> None:
        """Keep of the factor what moves this process's part."""
        if self.left is None or self.right is None:
            self.u = local(cut(cast(Tensor, self.u), self.p))
        elif is_sharded(self.p):
            placements: Any = self.p.placements  # type: ignore[attr-defined]  # a DTensor
            if all(placement.is_replicate() or placement.is_shard(0) for placement in placements):
                self.left = local(cut(self.left, self.p))
            else:
                self.u = local(cut((self.left @ self.right).view(self.p.shape), self.p))
                self.left = self.right = None
        if self.left is not None and self.right is not None:
            self.m = self.m.view(len(self.left), self.right.shape[1])

    def _by(self, left: Tensor, right: Tensor, eps: float) -> bool:
        """Go by the rows, if they are the cheaper way and their product is the gradient."""
        if not by_factors(len(left), *self.shape) or left.device.type == "mps":  # without eigh
            return False
        precise = precision_of([left, right, self.p])
        left, right = left.to(self.m.dtype), right.to(self.m.dtype)
        scale = self._scale(left, right, precise)
        if scale is None:
            return False
        found = polar_of_rows(left, right, eps)
        if found is None:
            self.failed = True
            return False
        self.left, self.right = found[0].mT, found[1]
        po, pi = self._projections()
        left, right = left if po is None else left @ po, right if pi is None else right @ pi
        self.signal = (left * scale).mT @ right
        return True

    def _scale(self, left: Tensor, right: Tensor, precise: float) -> float | None:
        """What the product of the rows is multiplied by to be the gradient, None if nothing is.

        The gradient may have been clipped as a whole. Anything else that it holds beside the
        samples' parts, a penalty or somebody's hand, is seen along a random direction.
        """
        signs = _signs(self.shape[1], left.dtype, left.device)
        along = right @ signs
        wanted, got = self.grad @ signs, left.mT @ along
        size = torch.linalg.vector_norm(left) * torch.linalg.vector_norm(along)  # of the terms
        both, ours, terms = torch.stack([wanted @ got, got @ got, size]).tolist()
        if not ours > 0 or not both > 0:
            return None
        scale = both / ours
        apart = float(torch.linalg.vector_norm(wanted.sub_(got, alpha=scale)))
        if apart > UNITS * precise * scale * terms:
            precise = max(precise, _rounded(left))
        return scale if apart <= UNITS * precise * scale * terms else None

    def _projections(self) -> tuple[Tensor | None, Tensor | None]:
        """Of both sides; None where a side is small, and kept whole."""
        (o, i), m = self.shape, self.m
        return _projection(0, o, m.dtype, m.device), _projection(1, i, m.dtype, m.device)

    def _projected(self) -> Tensor:
        po, pi = self._projections()
        small = self.grad if pi is None else self.grad @ pi
        return small if po is None else po.mT @ small


class MatrixPlan:
    """What one step does to the matrices of a group, computed before anything changes.

    Args:
        matrices: parameter, copy of its state, and rows of its gradient.
        group: the settings.
        name: of a parameter, for messages.
    """

    def __init__(
        self,
        matrices: Sequence[tuple[Tensor, dict[str, Any], Rows | None]],
        group: dict[str, Any],
        name: Callable[[Tensor], str],
    ):
        lr = float(group["lr"])
        self.weight, self.shrink = 1 - group["momentum"], 1 - lr * group["weight_decay"]
        self.moves = [Matrix(*matrix, group["eps"], name) for matrix in matrices]
        self.failed = sum(move.failed for move in self.moves)
        if self.moves:
            self._lead(group, lr, name)

    def _lead(self, group: dict[str, Any], lr: float, name: Callable[[Tensor], str]) -> None:
        """Find how far each matrix goes."""
        signals = [move.signal for move in self.moves]
        held = [move.state.get("signal") for move in self.moves]
        before = [
            torch.zeros_like(signal) if old is None else old
            for old, signal in zip(held, signals, strict=True)
        ]
        means = torch._foreach_lerp(before, signals, self.weight)
        wide = None if signals[0].device.type == "mps" else torch.float64
        norms = torch._foreach_norm([*signals, *means], 2, wide)
        lengths = torch.stack([norm.to(norms[0].device) for norm in norms]).tolist()
        number = len(signals)
        for index, (move, mean) in enumerate(zip(self.moves, means, strict=True)):
            gradient, length = lengths[index] ** 2, lengths[index + number] ** 2
            if not math.isfinite(gradient):
                raise CurvoptError(f"the gradient of {name(move.p)} is not finite")
            move.state["signal"] = mean
            state = move.state
            state["step"] += 1
            correction = 1 / (1 - group["momentum"] ** state["step"])
            if group["momentum"] and group["adaptation"]:
                adapt(state, group, gradient, length * correction**2)
            length = lr * correction * max(move.shape) ** 0.5
            length *= math.exp(state.get("log_rate", 0.0))
            move.factor = length if group["maximize"] else -length

    def carry_out(self, states: Any) -> None:
        """Change parameters and states, in place and without memory: nothing that could fail."""
        for move in self.moves:
            if move.left is not None and move.right is not None:
                move.m.addmm_(move.left, move.right, beta=1 - self.weight, alpha=self.weight)
            elif move.u is not None:
                move.m.lerp_(move.u, self.weight)
            if move.state["step"] % CLEAN == 0:  # denormal numbers are slow
                info = torch.finfo(move.m.dtype)
                torch.hardshrink(move.m, info.tiny / info.eps, out=move.m)
            states[move.p].update(move.state)
            weights = local(move.p)
            if self.shrink != 1:
                weights.mul_(self.shrink)
            weights.add_(move.m.view(weights.shape), alpha=move.factor)


def _rounded(values: Tensor) -> float:
    """Eps of the coarsest type that holds the values: of autocast's, products are rounded too."""
    half = [torch.bfloat16, torch.float16]
    held = (dtype for dtype in half if torch.equal(values.to(dtype).to(values.dtype), values))
    return float(torch.finfo(next(held, values.dtype)).eps)


@cache
def _projection(side: int, size: int, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """Gaussian columns, the same in every run, ``[size, SKETCH]``; None for a small side."""
    if size <= SKETCH:
        return None
    generator = torch.Generator().manual_seed(side)
    return torch.randn(size, SKETCH, generator=generator, dtype=torch.float64).to(device, dtype)


@cache
def _signs(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.empty(size).bernoulli_(0.5, generator=generator).mul_(2).sub_(1).to(device, dtype)
