"""What a rule is: from the owners of an op's inputs to those of its outputs."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from curvopt.axes.lattice import State, align, constant, join, merge
from curvopt.axes.ops import Op, Ref
from curvopt.axes.trace import Trace
from curvopt.axes.wiring import name_of

Result: TypeAlias = "State | Sequence[State | None] | None"
Rule: TypeAlias = "Callable[[Call], Result]"

#: Rules by the name of the op; a name without rule mixes all samples that reach it.
RULES: dict[str, Rule] = {}
#: Rules that know what a ragged axis is; before all others such an axis is refused.
KNOWS_RAGGED: set[Rule] = set()


class Refuse(Exception):
    """A rule does not cover this call: all its outputs are mixed."""


def rule(names: str, ragged: bool = False) -> Callable[[Rule], Rule]:
    """Register a rule for the ops of these names."""

    def register(function: Rule) -> Rule:
        for name in names.split():
            RULES[name] = function
        if ragged:
            KNOWS_RAGGED.add(function)
        return function

    return register


class Replay(Protocol):
    """What a rule may see and note of the `curvopt.axes.owners.Replay` that it is part of."""

    trace: Trace
    rows: dict[int, Tensor]
    counted: set[int]
    value_dependent: bool
    masked: bool
    opaque: bool
    picks: list[tuple[int, Ref]]

    def get(self, ref: Ref) -> State | None:
        """The owners of a tensor at this point of the replay."""

    def put(self, ref: Ref, state: State | None, write: bool) -> None:
        """Set the owners of a tensor, of all views of its storage where it was written to."""

    def flatten(self, ref: Ref) -> Any:
        """Hold the owners of a storage element by element from now on."""


class Call:
    """One op in a replay, as its rule sees it.

    Attributes:
        op: the op; `inputs` (without `out`) and `outputs` are its refs, `x` is the first input.
    """

    __slots__ = ("_states", "index", "inputs", "op", "outputs", "replay")

    def __init__(
        self, replay: Replay, index: int, op: Op, inputs: list[Ref], states: list[State | None]
    ):
        self.replay, self.index, self.op, self.inputs = replay, index, op, inputs
        self.outputs = op.outputs
        self._states = dict(zip(map(id, inputs), states, strict=True))

    @property
    def x(self) -> Ref:
        """The first input."""
        return self.inputs[0]

    @property
    def states(self) -> list[State | None]:
        """The states of the inputs."""
        return [self._states[id(ref)] for ref in self.inputs]

    def state(self, value: Any) -> State | None:
        """The state of an input; None for what is no tensor."""
        return self._states.get(id(value)) if isinstance(value, Ref) else None

    def owners(self, value: Any) -> Tensor | None:
        """The owners of an input."""
        state = self.state(value)
        return None if state is None else state.owners

    def full(self, value: Any, ndim: int) -> Tensor:
        """The owners of an input of `ndim` dims, also where there are none."""
        owners = self.owners(value)
        return constant(ndim) if owners is None else owners

    def merged(self, ref: Any, dims: Iterable[int]) -> Tensor | None:
        """The owners of an input, merged over `dims`."""
        owners = self.owners(ref)
        return None if owners is None else merge(owners, [d % owners.ndim for d in dims])

    def arg(self, name: str) -> Any:
        """An argument by its name in the op's schema."""
        return self.op.argument(name)

    def has(self, name: str) -> bool:
        """Whether the op's schema has an argument of this name."""
        return name in self.op.facts.arguments

    def values(self, ref: Ref) -> Tensor:
        """The index values of this pass; to ask for them makes the owners depend on them."""
        if ref.storage not in self.replay.trace.fixed:
            self.replay.value_dependent = True
        kept = self.replay.trace.values.get(self.index, ())
        for each, value in zip(self.op.inputs, kept, strict=True):
            if each is ref and value is not None:
                return value.cpu()
        raise Refuse

    def name_of(self, ref: Ref) -> Hashable:
        """A name for the elements of an input: equal names mean equal values."""
        return name_of(self.replay.trace, self.index, ref)


def ones(owners: Tensor | None) -> State | None:
    """A state, unless there are no owners."""
    return None if owners is None else State(owners)


def spreads(call: Call, ref: Ref, ragged: tuple[int, Hashable], length: int) -> bool:
    """Whether an operand is surely the same along a ragged axis, of this length in this pass.

    Where the axis has one element today, a size of 1 says nothing: it may be that of a table with
    an entry for each element. A whole tensor from outside has its size whatever the data.
    """
    state, dim = call.state(ref), ragged[0]
    if state is not None and state.ragged is not None:
        return False
    if ref.ndim < -dim:
        return True
    outside = call.replay.trace.outside.get(ref.storage)
    whole = outside is not None and outside.numel == ref.numel
    return ref.shape[dim] == 1 and (length != 1 or whole)


def shared_ragged(call: Call, refs: Iterable[Ref]) -> tuple[int, Hashable] | None:
    """The ragged axis of operands that broadcast; Refuse where one has another axis there.

    What does not know the order of the axis (a table by position) would tell how many elements of
    other samples stand in front.
    """
    refs = list(refs)
    states = [(ref, call.state(ref)) for ref in refs]
    found = [(ref, s.ragged) for ref, s in states if s is not None and s.ragged is not None]
    if not found:
        return None
    first, ragged = found[-1]
    length = first.shape[ragged[0]]
    for ref, state in states:
        if (state is None or state.ragged != ragged) and not spreads(call, ref, ragged, length):
            raise Refuse
    return ragged


def broadcast(call: Call, refs: Iterable[Ref], ndim: int) -> State | None:
    """The join of operands that broadcast."""
    refs = list(refs)
    ragged = shared_ragged(call, refs)
    result = None
    for ref in refs:
        owners = call.owners(ref)
        if owners is not None:
            owners = align(owners, ndim)
            result = owners if result is None else join(result, owners)
    return None if result is None else State(result, ragged)


def dims_of(value: Any, ndim: int) -> list[int]:
    """Dims as an argument gives them: none means all."""
    if value is None or value == ():
        return list(range(ndim))
    return [d % max(ndim, 1) for d in (value if isinstance(value, tuple) else (value,))]


INT64_MAX = torch.iinfo(torch.int64).max
