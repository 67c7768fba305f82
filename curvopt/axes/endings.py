"""What happens to the values of the losses on their way to the loss, read from the trace.

A sample's own loss is what the same code gives for a batch of one. It is known where the way is
linear and each step on it is a sum or a mean along the samples, a number that has nothing to do
with the batch, or a weight of the sample's own. Where a step may be a normalization by something of
the batch (a count, a sum of weights), only the user knows what is meant.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from curvopt.axes.lattice import MIXED
from curvopt.axes.trace import Op, Ref, Trace

#: Ops that are linear in what requires a gradient, the other operands held.
LINEAR = frozenset(
    """
    sum mean nansum add sub rsub neg mul div view reshape _unsafe_view _reshape_alias unsqueeze
    squeeze stack cat select slice expand permute transpose t clone contiguous alias detach _to_copy
    copy_ copy lift_fresh split split_with_sizes unbind diagonal index index_select mm dot mv bmm
    matmul where masked_fill movedim flatten add_ sub_ mul_ div_ fill_ zero_ select_backward
    """.split()
)
_REDUCING = frozenset(["sum", "mean", "nansum"])
_SCALING = frozenset("mul div mul_ div_ where masked_fill mm dot mv bmm matmul".split())


@dataclass(eq=False)
class Step:
    """One op on the way from a loss's value to the loss.

    Attributes:
        index: the op's place in the trace.
        op: the op.
        at: the operand on the way.
        others: operands that need no gradient.
        numbers: which arguments of the op are numbers that the value is multiplied or divided by.
    """

    index: int
    op: Op
    at: Ref
    others: list[Ref] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)


@dataclass
class Way:
    """One way from the loss down to where it stops.

    Attributes:
        steps: the steps, the loss's own first.
        stop: index of the op where it ends; None for a tensor from outside.
        end: the tensor that it ends in.
        at: number of ops before the place where that tensor is met.
    """

    steps: list[Step]
    stop: int | None
    end: Ref
    at: int


def ways(trace: Trace, loss: Ref, stops: Container[int], before: int | None = None) -> list[Way]:
    """All ways from the loss down to the ops in ``stops``, or to what is not linear.

    Args:
        trace: the pass.
        loss: the loss.
        stops: indices of the ops that made the values of the losses.
        before: number of ops before the place where the loss is met; all by default.
    """
    found: list[Way] = []
    start = len(trace.ops) if before is None else before
    stack: list[tuple[Ref, int, list[Step]]] = [(loss, start, [])]
    while stack and len(found) < 10_000:
        ref, before, steps = stack.pop()
        index = source(trace, ref, before)
        if index is None or index in stops:
            found.append(Way(steps, index, ref, before))
            continue
        op = trace.ops[index]
        name, ins = op.name, op.inputs
        onward = [r for r in ins if r.requires_grad]
        linear = name in LINEAR and op.grad and bool(onward)
        if name in ("mul", "div", "mm", "dot", "mv", "bmm", "matmul", "mul_", "div_"):
            linear = linear and len(onward) == 1
            linear = linear and (not name.startswith("div") or ins[0].requires_grad)
        if name == "where":
            linear = linear and not ins[0].requires_grad
        if not linear:
            found.append(Way(steps, index, ref, before))
            continue
        for at in onward:
            step = Step(index, op, at)
            if name in _SCALING:
                step.others = [r for r in ins if not r.requires_grad]
                step.numbers = [k for k, a in enumerate(op.args) if _is_number(a)]
            stack.append((at, index, [*steps, step]))
    return found


def source(trace: Trace, ref: Ref, before: int) -> int | None:
    """Index of the last op before that made or changed a tensor; None if it is from outside."""
    for index in range(before - 1, -1, -1):
        op = trace.ops[index]
        for out in op.outputs:
            if out.storage == ref.storage:
                same = out.offset == ref.offset and out.shape == ref.shape
                if same and out.stride == ref.stride:
                    return index
        if any(written.storage == ref.storage for written in op.written):
            return index
    return None


@dataclass
class Ending:
    """How a loss's rows are reduced over the samples on the way to the loss.

    Attributes:
        factor: what a sample's part of the loss is multiplied by to be its own loss, so far as the
            way decides it.
        crosses: whether samples are joined on the way.
        summed: whether they are added.
        numbers: numbers that a sum was multiplied or divided by.
        places: which arguments of which ops are further ones.
        scaled: why a scale of a sum is not known: a tensor that holds no samples.
        open: why only the user can say what a sample's own loss is; empty if it is known.
    """

    factor: float = 1.0
    crosses: bool = False
    summed: bool = False
    numbers: list[float] = field(default_factory=list)
    places: list[tuple[int, int]] = field(default_factory=list)
    scaled: str = ""
    open: str = ""

    def of(self, trace: Trace) -> Ending:
        """With the numbers of a pass."""
        numbers = [float(trace.ops[k].args[at]) for k, at in self.places]
        return replace(self, numbers=[*self.numbers, *numbers], places=[])


def ending(
    way: Way,
    owners: Callable[[int, Ref], Tensor | None],
    ragged: Callable[[int, Ref], bool],
    filled: Callable[[int, Ref], float | None],
    silent: Container[int] = (),
) -> Ending:
    """What a way says about a sample's own loss.

    Args:
        way: from the loss to the value of one of its losses.
        owners: the owners of an op's operand, None where it holds no samples.
        ragged: whether an operand has an axis whose length depends on values of the batch.
        filled: the number that an operand was filled with, if there is one.
        silent: storages of parameters and buffers.
    """
    result = Ending()
    for step in reversed(way.steps):
        name, own = step.op.name, owners(step.index, step.at)
        if name in _REDUCING and step.at.shape:
            dims = _dims(step)
            _reduce(result, step, own, dims, ragged(step.index, step.at))
        elif name in ("mm", "dot", "mv", "bmm", "matmul") and own is not None:
            result.crosses = result.summed = True
        for other in step.others:
            theirs = owners(step.index, other)
            if theirs is not None and bool((theirs == MIXED).any()):
                result.open = result.open or (
                    f"it is scaled by a tensor {list(other.shape)} made of several samples "
                    f"({step.op.name})"
                )
            if theirs is None and other.storage not in silent:
                number = filled(step.index, other)
                if number is not None:
                    result.numbers.append(number)
                elif other.numel == 1 and name in ("mul", "div"):
                    result.scaled = "it is a sum scaled by a tensor, which may be a count"
        result.places += [(step.index, at) for at in step.numbers]
    return result


def _dims(step: Step) -> list[int]:
    ndim = len(step.at.shape)
    given = step.op.argument("dim") if "dim" in step.op.facts.arguments else None
    if given is None or given == ():
        return list(range(ndim))
    given = [given] if isinstance(given, int) else given
    return [d % ndim for d in given]


def _reduce(result: Ending, step: Step, own: Tensor | None, dims: list[int], ragged: bool) -> None:
    if own is None:
        return
    mean = step.op.name == "mean"
    if bool((own == MIXED).any()):
        if mean and any(own.shape[d] != 1 or step.at.shape[d] != 1 for d in dims):
            result.open = result.open or "a mean is taken over values that samples share"
        return
    varying = [d for d in dims if own.shape[d] > 1]
    if not varying:
        return
    result.crosses = True
    if not mean:
        result.summed = True
        return
    if ragged:
        result.open = (
            result.open or "a mean is taken over a number of rows that depends on the data"
        )
        return
    full = own.expand([n if d in varying else own.shape[d] for d, n in enumerate(step.at.shape)])
    lines = full.movedim(varying, list(range(len(varying)))).flatten(0, len(varying) - 1)
    lines = lines.reshape(len(lines), -1)
    counts = {int((lines == n).sum(0).max()) for n in lines.unique().tolist() if n >= 0}
    least = {int((lines == n).sum(0).min()) for n in lines.unique().tolist() if n >= 0}
    if len(counts) != 1 or counts != least:
        result.open = result.open or "a mean is taken over different numbers of rows of the samples"
        return
    result.factor *= len(lines) / next(iter(counts))


def suspicious(numbers: Iterable[float], counts: Iterable[float]) -> float | None:
    """A number that a sum was scaled by and that may be a count of the batch, or None."""
    known = {float(count) for count in counts if count not in (0, 1)}
    for number in numbers:
        for value in (number, 1 / number if number else math.inf):
            if any(math.isclose(abs(value), count, rel_tol=1e-9) for count in known):
                return number
    return None


def filled_with(trace: Trace, index: int, ref: Ref) -> float | None:
    """The number that a tensor was filled with before an op, None if it was not."""
    made = source(trace, ref, index)
    op = None if made is None else trace.ops[made]
    if op is None or op.name not in ("full", "full_like", "new_full", "fill", "scalar_tensor"):
        return None
    numbers = [a for a in op.args if _is_number(a)]
    return float(numbers[-1]) if numbers else None


def marks_of(found: Iterable[Way]) -> list[tuple[int, Ref]]:
    """The places of the trace whose owners `ending` asks for."""
    marks = []
    for way in found:
        marks.append((way.at, way.end))
        for step in way.steps:
            marks += [(step.index, ref) for ref in (step.at, *step.others)]
    return marks


def read_numbers(trace: Trace) -> list[float]:
    """Numbers of the batch that Python has read."""
    values: list[Any] = [read[-1] for read in trace.reads]
    return [float(v) for v in values if _is_number(v)]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


__all__ = ["Ending", "Step", "Way", "ending", "marks_of", "read_numbers", "suspicious", "ways"]
