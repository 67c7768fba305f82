"""Which recorded losses make up a loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from curvopt.axes.endings import source, ways
from curvopt.axes.trace import Trace
from curvopt.engine.paths import walk
from curvopt.errors import CurvoptError
from curvopt.losses import Loss
from curvopt.losses.generic import Closure
from curvopt.losses.handwritten import Reduction

PENALTY = (
    "part of the loss does not go through a loss of torch.nn.functional nor through a "
    "mean() or sum() over the samples, recorded with the model (a penalty on the "
    "parameters, say, or a loss computed before recording began): use the optimizer's "
    "weight_decay, add its gradient yourself, or ask for the gradient alone"
)


def loss_terms(
    loss: Tensor, losses: list[Loss], trace: Trace, mixed: Callable[[Loss], bool]
) -> tuple[list[Loss], bool]:
    """The recorded losses that the loss is made of, found by walking its graph.

    Args:
        loss: the loss.
        losses: what was recorded.
        trace: the pass.
        mixed: whether the rows of a mean or sum hold several samples each.

    Returns:
        The terms, and whether some part of the loss is none of them.
    """
    table: dict[Any, Loss] = {term.end.node: term for term in losses}
    proper = {node: t for node, t in table.items() if not isinstance(t, Reduction)}
    terms: list[Loss] = []
    others = False
    done: set[Loss] = set()
    stack = [loss]
    while stack:
        nodes, loose = walk(stack.pop(), table)
        others = others or bool(loose)
        for node in nodes:
            term = table[node]
            if term in done:
                continue
            done.add(term)
            if not isinstance(term, Reduction):
                terms.append(term)
                continue
            inner, rest = walk(term.output, proper)
            known = [proper[node] for node in inner]
            if known and not rest and _linear(term, known, trace):
                terms += [t for t in known if t not in done]
                done.update(known)
            elif mixed(term):
                stack.append(term.output)
            else:
                terms.append(term)
    return terms, others


def _linear(outer: Loss, inner: list[Loss], trace: Trace) -> bool:
    """Whether a mean or sum is linear in the losses behind it."""
    stops = {made for t in inner if (made := made_by(t, trace)) is not None}
    return all(way.stop in stops for way in ways(trace, outer.value_ref, stops, outer.value_at))


def made_by(term: Loss, trace: Trace) -> int | None:
    """Index of the op that made a loss's value."""
    return source(trace, term.value_ref, term.value_at)


def closure_terms(loss: Tensor, output: Tensor, terms: list[Loss], kind: str | None) -> list[Loss]:
    """The loss as one term of an output that was returned beside it.

    Args:
        loss: the loss.
        output: the model's output.
        terms: the loss's terms as they were recorded.
        kind: how the loss is reduced over the samples, if that is known.

    Raises:
        CurvoptError: the loss does not depend on the model through the output alone, or how it was
            reduced over the samples is not known.
    """
    if not isinstance(output, Tensor) or output.grad_fn is None or not output.ndim:
        raise CurvoptError("(loss, output): the output must be the model's output, a tensor [N, *]")
    nodes, loose = walk(loss, {output.grad_fn})
    if loose or not nodes:
        raise CurvoptError(
            f"(loss, output): the loss does not depend on the model through the output "
            f"{list(output.shape)} alone; return the tensor that the loss was computed from"
        )
    if kind is None:
        raise CurvoptError(
            "how the loss was reduced over the samples is not known: give reduction='mean' or "
            "reduction='sum'"
        )
    return [Closure(output, loss, kind)]


def upstream(loss: Tensor, terms: list[Loss]) -> list[Tensor]:
    """Derivative of the loss in the value of each term."""
    if len(terms) == 1 and loss.grad_fn is terms[0].end.node:
        return [torch.ones_like(loss, requires_grad=False)]
    ends = [term.end for term in terms]
    with torch.enable_grad():
        grads = torch.autograd.grad(loss, ends, create_graph=True)
    nodes = {end.node for end in ends}
    if any(grad.grad_fn is not None and walk(grad, nodes)[0] for grad in grads):
        raise CurvoptError(
            f"the loss is no weighted sum of {', '.join(term.name for term in terms)} (a root, a "
            "power, a product of losses?), so it has no part that belongs to one sample; ask for "
            "the gradient alone, or change the loss"
        )
    return [grad.detach() for grad in grads]
