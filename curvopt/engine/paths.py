"""Walks over an autograd graph: which losses it holds, and whether every path is a recorded one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Iterable, Sequence
from typing import Any

from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge

from curvopt.errors import CurvoptError
from curvopt.recording.uses import ACCUMULATE, Call

# Nodes in Python that leave gradients as they are, and do something on the way.
_SINK = "_DDPSinkBackward"
_TORCHS_OWN = frozenset([_SINK, "RegisterPostBackwardFunctionBackward"])

REENTRANT = (
    "part of the model ran under reentrant checkpointing, or in a custom autograd.Function that "
    "was not given the parameters it uses, where nothing is known of their samples: use "
    "torch.utils.checkpoint.checkpoint(..., use_reentrant=False), or give them to apply()"
)


def walk(tensor: Tensor, stops: Container[Any]) -> tuple[list[Any], list[Tensor]]:
    """Walk a tensor's graph: the first nodes met among ``stops``, and the leaves met."""
    found, leaves, seen = [], [], set()
    stack: list[tuple[Any, int]] = [(tensor.grad_fn, tensor.output_nr)]
    while stack:
        node, number = stack.pop()
        handed = type(node).__name__ == _SINK
        place = (node, number) if handed else node
        if node is None or place in seen:
            continue
        seen.add(place)
        if node in stops:
            found.append(node)
        elif hasattr(node, "variable"):
            leaves.append(node.variable)
        else:
            stack += behind(node, number) if handed else node.next_functions
    return found, leaves


def is_custom(node: Any) -> bool:
    """Whether a node is of a custom autograd.Function, or calls hooks of modules."""
    return isinstance(node, BackwardCFunction) and type(node).__name__ not in _TORCHS_OWN


def behind_custom(tensors: Iterable[Tensor]) -> list[GradientEdge]:
    """Where gradients go from nodes of custom functions in the graphs of tensors."""
    found: dict[tuple[Any, int], GradientEdge] = {}
    stack = [tensor.grad_fn for tensor in tensors]
    seen = set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for following, number in node.next_functions:
            if following is not None:
                stack.append(following)
                if is_custom(node):
                    found[following, number] = GradientEdge(following, number)
    return list(found.values())


def behind(node: Any, number: int) -> Sequence[tuple[Any, int]]:
    """The edges that an output of a node leads to: all, or the one that it hands on."""
    edges: Sequence[tuple[Any, int]] = node.next_functions
    if type(node).__name__ != _SINK:
        return edges
    place = sum(node.needs_input_grad[1 : number + 1])  # of those that have a gradient
    return [edge for edge in edges if edge[0] is not None][place : place + 1]


def unaccounted(
    starts: Iterable[Any],
    uses: Iterable[Call],
    derived: Iterable[Call],
    parameters: dict[int, int],
) -> tuple[dict[int, str], bool]:
    """Parameters to which a path leads that no recorded use accounts for, and the node's name.

    Also whether there is code of the user's on the way: a custom autograd.Function, module hooks.

    The nodes between a call's output and its arguments are its own. Into those of a use a path may
    come by its output alone; into those of a value made of parameters, and to a parameter itself,
    only from a call that was recorded with it. (A gradient taken inside the forward pass enters a
    use by its saved weight.)

    Args:
        starts: nodes of the losses' inputs.
        uses: calls that are uses.
        derived: calls that made values of parameters.
        parameters: numbers of the parameters by id.

    Raises:
        CurvoptError: part of the forward pass ran under reentrant checkpointing.
    """
    # Autocast's copy of a weight is a node of all its uses: a node may have several owners.
    owners: dict[Any, list[set[Any]]] = defaultdict(list)
    free: set[Any] = set()
    entrances: set[Any] = set()
    for call in derived:
        own = call.own_nodes()
        free |= own
        for node in own:
            owners[node].append(own)
    for call in uses:
        own = call.own_nodes()
        entrances |= call.entrances()
        for node in own:
            owners[node].append(own)
    custom = False
    found: dict[int, str] = {}
    tainted: list[Any] = []
    seen: set[Any] = set()
    stack: list[Any] = []

    def enter(node: Any, came: Any) -> None:
        """Judge one edge of the graph."""
        if type(node) is ACCUMULATE:
            number = parameters.get(id(node.variable))
            if number is not None and came not in owners:
                found.setdefault(number, _name(came))
        elif node in owners and node not in entrances:
            inside = came in owners if node in free else any(came in own for own in owners[node])
            if not inside:
                tainted.append((node, came))

    for start in starts:
        if start is not None and start not in seen:
            seen.add(start)
            stack.append(start)
            enter(start, None)
    while stack:
        node = stack.pop()
        if type(node).__name__ == "CheckpointFunctionBackward":
            raise CurvoptError(REENTRANT)
        custom = custom or is_custom(node)
        for following, _ in node.next_functions:
            if following is None:
                continue
            enter(following, node)
            if following not in seen:
                seen.add(following)
                stack.append(following)
    for node, came in tainted:  # everything below is reached by that path as well
        for parameter in _below(node, parameters, owners):
            found.setdefault(parameter, _name(came))
    return found, custom


def _below(node: Any, parameters: dict[int, int], owner: Container[Any]) -> set[int]:
    """The parameters below a node, within recorded calls."""
    found: set[int] = set()
    seen, stack = {node}, [node]
    while stack:
        node = stack.pop()
        if type(node) is ACCUMULATE:
            found.update({parameters[i] for i in [id(node.variable)] if i in parameters})
            continue
        for following, _ in node.next_functions:
            known = following in owner or type(following) is ACCUMULATE
            if following is not None and known and following not in seen:
                seen.add(following)
                stack.append(following)
    return found


def _name(node: Any) -> str:
    name = type(node).__name__ if node is not None else "the loss"
    return f"an op that was not recorded ({name})"
