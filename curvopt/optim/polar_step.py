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
from curvopt.looks import may_look, refuse
from curvopt.optim.lead import wide
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
# Types that autocast rounds to, the coarsest first.
HALF = (torch.bfloat16, torch.float16)
# Steps after which what is left of a momentum that stands still is set to zero: at 1, 65, ..., as a
# rule those that look at the number of rows as well.
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


class Fixed(NamedTuple):
    """Random tensors that are the same in every run.

    Attributes:
        left: projects the outputs of a gradient, ``[O, SKETCH]``; None where they are few.
        right: its inputs, ``[I, SKETCH]``.
        signs: the direction along which rows and gradient are compared, ``[I]``.
    """

    left: Tensor | None
    right: Tensor | None
    signs: Tensor


class Matrix:
    """What one step does to a matrix, or to a vector as one of a single column.

    Where processes have parts of it, each finds the factor of the whole, and moves its part.

    Args:
        p: the parameter.
        grad: its gradient.
        state: a copy of its state, whose numbers are made those to come.
        rows: of its gradient, if known.
        eps: the damping.
        name: of a parameter, for messages.
        fixed: what is random in a step, where that is at hand.

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
        grad: Tensor,
        state: dict[str, Any],
        rows: Rows | None,
        eps: float,
        name: Callable[[Tensor], str],
        fixed: Fixed | None = None,
    ):
        self.p, self.state, self.shape, self.factor = p, state, sides(p), 0.0
        m = held(state, "momentum_buffer", p, name)
        if not local(m).is_contiguous():  # as somebody made it
            m = state["momentum_buffer"] = m.contiguous()
        self.m = local(m)
        self.grad = whole(grad).reshape(self.shape).to(m.dtype)
        self.fixed = fixed_of(self.shape, self.m) if fixed is None else fixed
        if rows is not None:
            state["rows"] = rows.number
        self.left = self.right = self.u = cast(Tensor | None, None)
        self.failed = False
        try:
            factors = None if rows is None else rows.factors
            if factors is None or not self._by(*factors, eps):
                if factors is not None and self.grad.any():
                    state["rows"] = math.inf  # a penalty comes again: no rows until the next look
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
        if isinstance(scale, Tensor):  # of a gradient of zeros, the factor is zero
            self.left = torch.where(scale > 0, self.left, 0)
        po, pi, _ = self.fixed
        left, right = left if po is None else left @ po, right if pi is None else right @ pi
        self.signal = (left * scale).mT @ right
        return True

    def _scale(self, left: Tensor, right: Tensor, precise: float) -> float | Tensor | None:
        """What the product of the rows is multiplied by to be the gradient, None if nothing is.

        The gradient may have been clipped as a whole. Anything else that it holds beside the
        samples' parts, a penalty or somebody's hand, is seen along a random direction.
        """
        signs = self.fixed.signs
        along = right @ signs
        wanted, got = wide(self.grad @ signs), wide(left.mT @ along)
        size = _norm(left) * _norm(along)  # of the terms
        if not may_look():
            return _scale_unseen(wanted, got, size, left, precise, ~self.grad.any())
        both, ours, terms = torch.stack([wanted @ got, got @ got, size]).tolist()
        if not ours > _least(left) or not both > 0:
            return None
        scale = both / ours
        apart = float(torch.linalg.vector_norm(wanted - scale * got))
        if apart > UNITS * precise * scale * terms:
            precise = max(precise, _rounded(left))
        return scale if apart <= UNITS * precise * scale * terms else None

    def _projected(self) -> Tensor:
        po, pi, _ = self.fixed
        small = self.grad if pi is None else self.grad @ pi
        return small if po is None else po.mT @ small


class MatrixPlan:
    """What one step does to the matrices of a group, computed before anything changes.

    Args:
        matrices: parameter, gradient, copy of the state, and rows of the gradient.
        group: the settings.
        name: of a parameter, for messages.
    """

    def __init__(
        self,
        matrices: Sequence[tuple[Tensor, Tensor, dict[str, Any], Rows | None]],
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
            if cleans(move.state["step"]):  # denormal numbers are slow
                info = torch.finfo(move.m.dtype)
                torch.hardshrink(move.m, info.tiny / info.eps, out=move.m)
            states[move.p].update(move.state)
            weights = local(move.p)
            if self.shrink != 1:
                weights.mul_(self.shrink)
            weights.add_(move.m.view(weights.shape), alpha=move.factor)


def cleans(step: int) -> bool:
    """Whether denormal numbers are looked for in a matrix's step, the first one being 1."""
    return step % CLEAN == 1


def _least(rows: Tensor) -> float:
    """Below this square of a gradient the factors of its polar factor may be too large a number."""
    return float(torch.finfo(rows.dtype).tiny)


def _norm(x: Tensor) -> Tensor:
    """In double precision, where there is one: no square is too small."""
    return torch.linalg.vector_norm(x, dtype=None if x.device.type == "mps" else torch.float64)


def _scale_unseen(
    wanted: Tensor, got: Tensor, size: Tensor, left: Tensor, precise: float, zero: Tensor
) -> Tensor:
    """`Matrix._scale` where nobody may look: 0 for zeros, else None is refused.

    Args:
        wanted: the gradient along a direction.
        got: the product of the rows, likewise.
        size: of the terms.
        left: the rows.
        precise: eps of the type in which they were added up.
        zero: whether the gradient is zero.
    """
    both, ours = wanted @ got, got @ got
    scale, precision = both / ours, torch.full_like(size, precise)
    for dtype in HALF:
        held = (left.to(dtype).to(left.dtype) == left).all()
        precision = torch.where(held, precision.clamp(min=torch.finfo(dtype).eps), precision)
    apart = torch.linalg.vector_norm(wanted - got * scale)
    fits = (ours > _least(left)) & (both > 0) & (apart <= UNITS * precision * scale * size)
    error = CurvoptError("the product of the rows is not the gradient")
    refuse(~(fits | zero), lambda: error)
    return torch.where(zero, 0, scale)


def fixed_of(shape: tuple[int, int], like: Tensor) -> Fixed:
    """What is random in the step of a matrix ``[O, I]``, of a tensor's type and device."""
    (o, i), dtype, device = shape, like.dtype, like.device
    return Fixed(
        _projection(0, o, dtype, device), _projection(1, i, dtype, device), _signs(i, dtype, device)
    )


def _rounded(values: Tensor) -> float:
    """Eps of the coarsest type that holds the values: of autocast's, products are rounded too."""
    held = (dtype for dtype in HALF if torch.equal(values.to(dtype).to(values.dtype), values))
    return float(torch.finfo(next(held, values.dtype)).eps)


@cache
def _projection(side: int, size: int, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """Gaussian columns, the same in every run, ``[size, SKETCH]``; None for a small side."""
    if size <= SKETCH:
        return None
    generator = torch.Generator().manual_seed(side)
    return torch.randn(size, SKETCH, generator=generator, dtype=torch.float64, device="cpu").to(
        device, dtype
    )


@cache
def _signs(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return (
        torch.empty(size, device="cpu")
        .bernoulli_(0.5, generator=generator)
        .mul_(2)
        .sub_(1)
        .to(device, dtype)
    )
