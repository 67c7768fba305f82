"""Which recorded losses make up a loss, and how much each sample's own loss counts in it."""

from __future__ import annotations

from collections.abc import Container
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from curvopt.errors import CurvoptError
from curvopt.losses import Loss
from curvopt.losses.generic import Closure
from curvopt.losses.handwritten import Reduction

if TYPE_CHECKING:
    from curvopt.engine.tape import Record


def loss_terms(loss: Tensor, record: Record, reduction: str | None) -> list[Loss]:
    """The recorded losses that the loss is made of, found by walking its graph.

    Raises:
        CurvoptError: some part of the loss does not go through a recorded loss, or how it was
            reduced over the samples is not known.
    """
    table = {term.value.grad_fn: term for term in record.losses}
    nodes, loose = walk(loss.grad_fn, table)
    if loose or not nodes:
        raise CurvoptError(
            "part of the loss does not go through a loss of torch.nn.functional nor through a "
            "mean() or sum() over the samples, recorded with the model (a penalty on the "
            "parameters, say): use the optimizer's weight_decay, add its gradient yourself, or "
            "ask for the gradient alone"
        )
    proper = {node: t for node, t in table.items() if not isinstance(t, Reduction)}
    terms: list[Loss] = []
    for node in nodes:
        term = table[node]
        if not isinstance(term, Reduction):
            terms.append(_ended(term, reduction))
            continue
        if reduction is None and term.reduction == "sum" and _divided(loss, node, record):
            raise CurvoptError(
                "the loss is a sum divided by a tensor; whether that divisor belongs to the batch "
                "or to each sample is not known: give reduction='mean' or reduction='sum'"
            )
        inner, loose = walk(term.output.grad_fn, proper)
        if reduction is None and _across(term, record):
            raise CurvoptError(
                f"the loss was reduced over its first axis before the final {term.name}; give "
                "reduction='mean' or reduction='sum' over the samples, and batch_size="
            )
        if inner and not loose:
            terms += [_ended(proper[node], reduction or term.reduction) for node in inner]
        else:
            term.ending = reduction
            terms.append(term)
    return terms


def closure_terms(
    loss: Tensor, output: Tensor, record: Record, reduction: str | None
) -> list[Loss]:
    """The loss as one term of an output that was returned beside it.

    Raises:
        CurvoptError: the loss does not depend on the model through the output alone, or how it was
            reduced over the samples is not known.
    """
    try:
        terms = loss_terms(loss, record, reduction)
    except CurvoptError:
        terms = []
    if terms and not any(isinstance(term, Reduction) for term in terms):
        return terms  # of losses that are known better than by their output
    if not isinstance(output, Tensor) or output.grad_fn is None or not output.ndim:
        raise CurvoptError("(loss, output): the output must be the model's output, a tensor [N, *]")
    nodes, loose = walk(loss.grad_fn, {output.grad_fn})
    if loose or not nodes:
        raise CurvoptError(
            f"(loss, output): the loss does not depend on the model through the output "
            f"{list(output.shape)} alone; return the tensor that the loss was computed from"
        )
    if reduction is None:
        kinds = {
            "sum" if (t.ending if t.reduction == "none" else t.reduction) == "sum" else "mean"
            for t in terms
        }
        if len(kinds) != 1:
            raise CurvoptError(
                "how the loss was reduced over the samples is not known: give reduction='mean' or "
                "reduction='sum'"
            )
        (reduction,) = kinds
    return [Closure(output, loss, reduction)]


def walk(start: Any, stops: Container[Any]) -> tuple[list[Any], list[Tensor]]:
    """Walk a graph from a node: the first nodes met among ``stops``, and the leaves met."""
    found, leaves, seen, stack = [], [], set(), [start]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in stops:
            found.append(node)
        elif hasattr(node, "variable"):
            leaves.append(node.variable)
        else:
            stack += [following for following, _ in node.next_functions]
    return found, leaves


def _ended(term: Loss, ending: str | None) -> Loss:
    term.ending = ending
    if term.reduction == "none" and ending is None:
        raise CurvoptError(
            f"{term.name} has reduction='none' and no mean() or sum() over its rows was recorded: "
            "give reduction='mean' or reduction='sum'"
        )
    return term


def _divided(loss: Tensor, node: Any, record: Record) -> bool:
    """Whether a scalar was divided by a tensor between this node and the loss."""
    divisions, _ = walk(loss.grad_fn, record.divisions)
    return any(node in walk(division, {node})[0] for division in divisions)


def _across(term: Loss, record: Record) -> bool:
    """Whether a first axis was reduced after the model's last use, before the loss's last step."""
    ends = {use.edge.node for use in record.uses} | {t.value.grad_fn for t in record.losses}
    met, _ = walk(term.output.grad_fn, record.across | ends)
    return any(node in record.across for node in met)


def upstream(loss: Tensor, terms: list[Loss]) -> list[Tensor]:
    """Derivative of the loss in the value of each term."""
    if len(terms) == 1 and loss is terms[0].value:
        return [torch.ones_like(loss, requires_grad=False)]
    values = [term.value for term in terms]
    with torch.enable_grad():
        grads = torch.autograd.grad(loss, values, create_graph=True)
    nodes = {value.grad_fn for value in values}
    if any(grad.grad_fn is not None and walk(grad.grad_fn, nodes)[0] for grad in grads):
        raise CurvoptError(
            f"the loss is no weighted sum of {', '.join(term.name for term in terms)} (a root, a "
            "power, a product of losses?), so it has no part that belongs to one sample; ask for "
            "the gradient alone, or change the loss"
        )
    return [grad.detach() for grad in grads]
