"""Whether every path of a pass to a parameter is one that a use accounts for."""

from __future__ import annotations

from collections.abc import Iterable

from curvopt.engine.paths import unaccounted
from curvopt.engine.plan import Plan
from curvopt.losses import Loss
from curvopt.recording.tape import Tape
from curvopt.recording.uses import OwnUse, Use


def paths_of(
    plan: Plan, tape: Tape, uses: Iterable[Use], terms: list[Loss]
) -> tuple[dict[int, str], bool]:
    """Parameters that paths lead to which no use accounts for (see `unaccounted`)."""
    calls = tape.record.calls
    own = {use.call for use in uses if isinstance(use, OwnUse)}
    return unaccounted(
        [term.output.grad_fn for term in terms],
        [use.call for use in uses],
        [calls[index] for index in plan.derived if calls[index] not in own],
        {id(p): index for index, p in enumerate(tape.params)},
    )
