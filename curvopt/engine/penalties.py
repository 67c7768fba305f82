"""Terms of a loss that hold no sample: whether they are of the parameters alone, their gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Set
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from curvopt.axes.endings import Way, read_numbers, suspicious
from curvopt.axes.ops import Ref
from curvopt.axes.trace import Trace
from curvopt.axes.wiring import ancestors
from curvopt.engine.checks import check_loss
from curvopt.errors import CurvoptError
from curvopt.losses import Loss
from curvopt.recording.tape import Tape

SCALES = frozenset(["mul", "div", "mul_", "div_", "add", "add_", "sub", "sub_"])
Owners = Callable[[int, Ref], Tensor | None]


def beside(ways: Iterable[Way]) -> list[tuple[int, Ref]]:
    """The places of the trace whose owners `impure` asks for."""
    return [(step.index, ref) for way in ways for step in way.steps for ref in step.op.inputs]


def impure(trace: Trace, way: Way, owners: Owners, silent: Set[int]) -> str:
    """Why a part of the loss that holds no sample is not of the parameters alone; "" if it is.

    Beside parameters, buffers and numbers it may hold what has the shape of a parameter: what a
    penalty pulls it to, or the weights of that.

    Args:
        trace: the pass.
        way: from the loss to that part.
        owners: the owners of an op's operand, None where it holds no samples.
        silent: storages of parameters and buffers.
    """
    for step in way.steps:
        for ref in step.op.inputs:
            if not ref.requires_grad and owners(step.index, ref) is not None:
                return (
                    f"a term of the parameters is scaled by {list(ref.shape)} of the samples "
                    f"({step.op.name}), which would have no noise: take that out of it"
                )
    met, behind = [way.end], [trace.ops[k] for k in ancestors(trace, way.end, way.at)]
    for op in behind:
        met += op.inputs
    scales = [op for op in [*behind, *(step.op for step in way.steps)] if op.name in SCALES]
    numbers = [a for op in scales for a in op.args if isinstance(a, int | float)]
    read = suspicious(numbers, read_numbers(trace))
    if read is not None:
        return (
            f"a term of the parameters is scaled by {read:g}, which was read from a tensor in this "
            "pass: if that holds samples, the term has no noise. Make it a constant"
        )
    shapes = {trace.outside[s].shape for s in silent if s in trace.outside}
    for ref in met:
        outside = trace.outside.get(ref.storage)
        if outside is None or ref.storage in silent:
            continue
        if ref.requires_grad:
            return (
                f"a term of the loss goes through a tensor {list(ref.shape)} that was computed "
                "before recording began, from nobody knows what: compute it inside"
            )
        if ref.numel > 1 and outside.shape not in shapes:
            return (
                f"a term of the loss holds data of shape {list(ref.shape)} that is no sample, no "
                "parameter and no buffer, so its gradient has no noise although it may be made of "
                "samples. Make a constant a buffer (register_buffer)"
            )
    return ""


def alone(tape: Tape, loss: Tensor) -> dict[Tensor, Tensor]:
    """The gradient of a loss that holds no sample.

    Args:
        tape: the recording.
        loss: the loss.

    Raises:
        CurvoptError: it holds data.
    """
    check_loss(loss)
    trace, silent = tape.trace, [*tape.names, *tape.record.silent]
    way = Way([], None, trace.ref(loss), len(trace.ops))
    why = impure(trace, way, lambda k, ref: None, {trace.ref(t).storage for t in silent})
    if why:
        raise CurvoptError(why)
    return penalty_gradients(loss, [], tape.params)


def penalty_gradients(
    loss: Tensor, terms: Iterable[Loss], params: list[Tensor]
) -> dict[Tensor, Tensor]:
    """The gradient of all that enters the loss beside some terms; nothing goes through these.

    Args:
        loss: the loss.
        terms: the terms that hold samples.
        params: what to take the gradient of.
    """
    stops: set[Any] = {term.value.grad_fn for term in terms}
    edges = _beside(loss, stops) if stops else [get_gradient_edge(loss)]
    if not edges:
        return {}
    wanted = [p for p in params if p.requires_grad]
    # From the loss to the edges, and on from there. An edge may be met behind a term as well, as a
    # value that the model and the penalty share is: nothing may arrive by that way.
    handles = [stop.register_prehook(lambda grads: (None,) * len(grads)) for stop in stops]
    try:
        sent = torch.autograd.grad(loss, edges, retain_graph=True, allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    some = [(edge, s) for edge, s in zip(edges, sent, strict=True) if s is not None]
    grads = torch.autograd.grad(
        [edge for edge, _ in some],
        wanted,
        [s for _, s in some],
        retain_graph=True,
        allow_unused=True,
    )
    return {p: g.clone() for p, g in zip(wanted, grads, strict=True) if g is not None}


def _beside(loss: Tensor, stops: Set[Any]) -> list[GradientEdge]:
    """The edges at which one leaves the nodes between the loss and some others."""
    root: Any = loss.grad_fn
    leads = dict.fromkeys(stops, True)  # whether one of them is below
    stack = [root]
    while stack:
        node = stack[-1]
        if node in leads:
            stack.pop()
            continue
        below = [n for n, _ in node.next_functions if n is not None]
        rest = [n for n in below if n not in leads]
        if rest:
            stack += rest
        else:
            leads[node] = any(leads[n] for n in below)
            stack.pop()
    edges: dict[tuple[Any, int], None] = {}
    seen, stack = {root}, [root] if leads[root] and root not in stops else []
    while stack:
        for node, number in stack.pop().next_functions:
            if node is None or node in stops:
                continue
            if not leads[node]:
                edges[node, number] = None
            elif node not in seen:
                seen.add(node)
                stack.append(node)
    return [GradientEdge(node, number) for node, number in edges]
