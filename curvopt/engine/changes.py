"""What hooks of the user's change in the backward pass of the gradient, and what that rules out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from curvopt.engine.terms import upstream
from curvopt.errors import CurvoptError
from curvopt.losses import Loss
from curvopt.recording.tape import Tape


@dataclass
class Changes:
    """What hooks change in the backward pass of the gradient.

    Attributes:
        terms: losses between whose value and the loss, or between whose output and value, they do.
        values: values made of parameters on which they do: ids of those.
        tensors: whether hooks on any tensor from the losses' outputs on do.
        modules: whether hooks of modules do, anywhere.
    """

    terms: list[Loss] = field(default_factory=list)
    values: list[frozenset[int]] = field(default_factory=list)
    tensors: bool = False
    modules: bool = False

    def check_rows(self, tape: Tape) -> None:
        """Refuse what needs samples' gradients.

        Raises:
            CurvoptError: what hooks make of those is not known.
        """
        for term in self.terms:
            raise CurvoptError(
                f"a hook between the loss and the input of {term.name} {list(term.output.shape)} "
                "changes the gradient there, and what of that is a sample's own is not known: "
                "multiply the loss instead (weight * loss), put the hook on the model's output, "
                "or ask for the gradient alone"
            )
        for roots in self.values:
            names = ", ".join(tape.name(tape.by_id[root]) for root in roots)
            raise CurvoptError(
                f"a hook on a value made of {names} changes the gradient there, which is a sum "
                "over the samples: what it makes of a sample's own is not known. Take the hook "
                "off (handle.remove()) and change p.grad before the step, multiply the value "
                "itself (by a mask, say), or ask for the gradient alone"
            )

    def check_curvature(self, *, later: str = "") -> None:
        """Refuse what is no curvature of the loss.

        Args:
            later: what later backward passes go through, in which hooks on tensors are not absent:
                ``"all"``, or ``"values"`` that were made of parameters.

        Raises:
            CurvoptError: hooks have changed it, or will.
        """
        changed = {"all": self.tensors or bool(self.terms), "values": bool(self.values)}
        if self.modules or changed.get(later):
            raise CurvoptError(
                "a hook changes gradients on their way back through the model, and would change "
                "the curvature of the loss, which no hook is part of: remove the hook "
                "(handle.remove()), compute, and register it again"
            )


def changed_above(tape: Tape, loss: Tensor, terms: Sequence[Loss]) -> tuple[list[Loss], bool]:
    """The terms on whose way from the loss to their output, not on that, a hook changes a gradient.

    Also whether one is a module's.

    Args:
        tape: the recording.
        loss: the loss.
        terms: the losses that it is made of.
    """
    hooks, trace = tape.record.hooks, tape.trace
    if not hooks:
        return [], False
    with hooks.watched() as changed:
        ups = upstream(loss, list(terms))
    found, modules = list(terms) if changed else [], None in changed
    for term, up in zip(terms, ups, strict=True):
        with hooks.watched() as changed:
            torch.autograd.grad(term.end, term.output, up, retain_graph=True)
        place, modules = trace.ref(term.output), modules or None in changed
        if any(hooked is None or hooked.place != place for hooked in changed):
            found.append(term)
    return found, modules
