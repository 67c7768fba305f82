"""What hooks of the user's change in the backward pass of the gradient, and what that rules out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from curvopt.engine.terms import upstream
from curvopt.errors import CurvoptError
from curvopt.losses import Loss
from curvopt.recording.hooks import Hooked, HookedNode
from curvopt.recording.tape import Tape
from curvopt.recording.uses import ACCUMULATE, Call


@dataclass
class Changes:
    """What hooks change in the backward pass of the gradient.

    Attributes:
        terms: losses between whose value and the loss, or between whose output and value, they do.
        values: values made of parameters on which they do: ids of those.
        below: whether any do, from the losses' outputs on.
    """

    terms: list[Loss] = field(default_factory=list)
    values: list[frozenset[int]] = field(default_factory=list)
    below: bool = False

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

    def check_later(self, *, everywhere: bool) -> None:
        """Refuse products with the curvature that take backward passes later, hooks and all.

        Args:
            everywhere: they start at the losses; else at what parameters were used in.

        Raises:
            CurvoptError: hooks would change them.
        """
        if self.values or (everywhere and (self.below or self.terms)):
            raise CurvoptError(
                "a hook changes gradients on their way back through the model, and would change "
                "the curvature of the loss, which no hook is part of: remove the hook "
                "(handle.remove()), compute, and register it again"
            )


def changed_above(tape: Tape, loss: Tensor, terms: Sequence[Loss]) -> list[Loss]:
    """The terms on whose way from the loss to their output, not on that, a hook changes a gradient.

    Args:
        tape: the recording.
        loss: the loss.
        terms: the losses that it is made of.
    """
    hooks, trace = tape.record.hooks, tape.trace
    if not hooks:
        return []
    with hooks.watched() as changed:
        ups = upstream(loss, list(terms))
    found = list(terms) if changed else []
    for term, up in zip(terms, ups, strict=True):
        with hooks.watched() as changed:
            torch.autograd.grad(term.end, term.output, up, retain_graph=True)
        place = trace.ref(term.output)
        if any(not isinstance(one, Hooked) or one.place != place for one in changed):
            found.append(term)
    return found


def sums_changed(
    tape: Tape, uses: Sequence[Call], changed: Sequence[tuple[Any, HookedNode]]
) -> list[frozenset[int]]:
    """Ids of the parameters whose gradients, sums over samples, hooks on nodes change.

    Args:
        tape: the recording.
        uses: its calls that are uses: what comes to their outputs holds samples.
        changed: nodes whose hooks change something.
    """
    found = []
    for call in tape.record.calls if changed else ():
        own = call.own_nodes()
        roots = frozenset().union(*(entry.roots for entry in call.inputs.values()))
        entrances = call.entrances() if call in uses else set()
        for node, hooked in changed:
            if node not in own:
                continue
            behind = [following for following, _ in node.next_functions]
            to_sums = any(behind[k] in own or type(behind[k]) is ACCUMULATE for k in hooked.changed)
            if node not in entrances or (to_sums and not hooked.before):
                found.append(roots)
    return found
