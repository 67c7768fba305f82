"""What a recorded forward pass leaves: calls, uses, losses."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from curvopt.axes.layout import Layout
from curvopt.axes.trace import Ref
from curvopt.errors import CurvoptError
from curvopt.losses import Loss
from curvopt.ops.registry import Rule
from curvopt.ops.use import UseView
from curvopt.recording.hooks import Hooks
from curvopt.structures import Own, Structure

#: A place in the trace of a pass: the number of ops before it, and a tensor at that time.
Mark = tuple[int, Ref]

#: The type of the graph nodes that add to a leaf's gradient, where every path ends.
ACCUMULATE: Any = type(get_gradient_edge(torch.zeros((), requires_grad=True, device="cpu")).node)


@dataclass(eq=False)
class Shared:
    """A value that holds no samples, as far as is known: a parameter, a constant, what they make.

    Attributes:
        tensor: the value.
        version: its version when it was made; an in-place change afterwards may mix in data.
        roots: the tracked parameters it may be made of, by id; none for a constant.
        isometry: it only selects and rearranges elements of one parameter, each at most once.
        call: the call that made it; None for parameters and constants.
        mark: its place in the trace, where it may be made of parameters.
        made: tensors were made from numbers on the way, which may be data all the same.
    """

    tensor: Tensor
    version: int
    roots: frozenset[int]
    isometry: bool = False
    call: Call | None = None
    mark: Mark | None = None
    made: bool = False

    @property
    def fresh(self) -> bool:
        """Whether the value is still the one that was made."""
        return self.tensor._version == self.version


@dataclass(eq=False)
class Call:
    """One call of a torch function with values that may be made of tracked parameters.

    Attributes:
        op: the function's name, for messages.
        rule: the rule that covers it, if its output holds samples.
        arguments: the arguments by name, where there is a rule.
        inputs: the values that may be made of parameters, by argument name.
        edge: the gradient edge at which the output's cotangent is met.
        shape: the output's shape.
        mark: the output, in the trace.
        kept: tensors whose values the rule reads, with their versions.
        sources: graph nodes of the arguments, where the call's own part of the graph ends.
        outputs: graph nodes of the outputs.
        value: the output, where it may be a value made of parameters.
    """

    op: str
    rule: Rule | None
    arguments: dict[Any, Any]
    inputs: dict[Any, Shared]
    edge: GradientEdge | None
    shape: torch.Size
    mark: Mark | None
    kept: list[tuple[Tensor, int]]
    sources: list[Any]
    outputs: list[Any]
    value: Shared | None = None

    def entrances(self) -> set[Any]:
        """The nodes by which a path may come: the outputs'."""
        more = self.rule.nodes(self.arguments) if self.rule else ()
        nodes = {*self.outputs, *(first for first, _ in more)}
        return nodes if self.edge is None else {*nodes, self.edge.node}

    def own_nodes(self) -> set[Any]:
        """The nodes of the graph that belong to this call, its outputs' among them."""
        found: set[Any] = set()
        ends = set(self.sources)
        for pair in self.rule.nodes(self.arguments) if self.rule else ():
            found.update(node for node in pair if node is not None)
        stack = list(self.outputs)
        while stack:
            node = stack.pop()
            if node is None or node in found or node in ends or type(node) is ACCUMULATE:
                continue
            found.add(node)
            stack += [following for following, _ in node.next_functions]
        return found


class Use:
    """One use of tracked values by an op that a rule covers.

    Args:
        call: the call.
        values: the values made of parameters, by argument name.

    Attributes:
        op: the op's name, for messages.
        edge: the gradient edge of the output.
        shape: shape of the output.
    """

    def __init__(self, call: Call, values: dict[Any, Shared]):
        self.call, self.values = call, values
        self.op, self.rule, self.arguments = call.op, call.rule, call.arguments
        self.shape = call.shape
        assert call.edge is not None
        self.edge = call.edge

    def structures(self, cotangent: Tensor, layout: Layout) -> dict[Any, Structure]:
        """Structures by argument name, for a cotangent ``[V, *shape]``."""
        for tensor, version in self.call.kept:
            if tensor._version != version:
                raise CurvoptError(
                    f"an input of {self.op}, of shape {list(tensor.shape)}, was changed in place "
                    "after the op had used it; use the out-of-place form of that operation"
                )
        assert self.rule is not None
        parameters = {name: value.tensor for name, value in self.values.items()}
        view = UseView(self.op, parameters, cotangent, layout)
        return self.rule.structures(view, self.arguments)


class OwnUse(Use):
    """A value made of parameters that holds a part for every sample: copies of a token, states.

    Args:
        value: the value, whose call made it.
    """

    def __init__(self, value: Shared):
        assert value.call is not None
        self.call, self.values = value.call, {"value": value}
        self.op, self.rule, self.arguments = value.call.op, None, {}
        self.shape, self.edge = value.tensor.shape, get_gradient_edge(value.tensor)

    def structures(self, cotangent: Tensor, layout: Layout) -> dict[Any, Structure]:
        """As in the base class."""
        tensor = self.values["value"].tensor
        view = UseView(self.op, {"value": tensor}, cotangent, layout)
        return {"value": Own(view.cotangent, layout, tensor.shape)}


@dataclass
class Record:
    """What one forward pass left.

    Attributes:
        calls: calls with tracked values, in order.
        losses: loss calls, and means and sums, in order.
        unknown: names and places of the values of losses that are none of those.
        coupled: what is to be said of an op that took statistics over the batch.
        silent: tensors that are the same for all samples: parameters and buffers met.
        hooked: code of the user's may have been attached to the backward pass.
        hooks: what is known of that code.
        reentrant: a parameter was used inside of a reentrant checkpoint, torch's or another.
    """

    calls: list[Call] = field(default_factory=list)
    losses: list[Loss] = field(default_factory=list)
    unknown: list[tuple[str, Mark]] = field(default_factory=list)
    coupled: str = ""
    silent: list[Tensor] = field(default_factory=list)
    hooked: bool = False
    hooks: Hooks = field(default_factory=Hooks)
    reentrant: bool = False


def tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among the arguments of a call, those in lists too."""
    for value in values:
        kind = type(value)
        if kind is Tensor or isinstance(value, Tensor):
            yield value
        elif kind is list or kind is tuple:
            yield from tensors_in(value)
        elif kind is dict:
            yield from tensors_in(value.values())


def output_edge(output: Tensor, inputs: list[Tensor]) -> GradientEdge:
    """Where the cotangent of an op's output is met, whatever happens to the output in place.

    An in-place change of a view rewrites the view's history: there the base's own node stays.
    """
    if output._is_view():
        base = output._base
        whole = (
            base is not None
            and base.grad_fn is not None
            and base.numel() == output.numel()
            and base.is_contiguous()
            and output.is_contiguous()
            and not any(t is base or t._base is base for t in inputs)
        )
        if whole and base is not None:
            return get_gradient_edge(base)
    return get_gradient_edge(output)
