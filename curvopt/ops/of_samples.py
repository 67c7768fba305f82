"""Values made of parameters that hold a part for every sample, used where no other rule applies."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from curvopt.engine.registry import RULES, rule
from curvopt.structures import Own, Structure

if TYPE_CHECKING:
    from curvopt.engine.registry import Arguments
    from curvopt.engine.tape import Tape, UseView


def of_samples(value: Tensor) -> Tensor:
    """The value itself, as a use: what happens to it afterwards is the samples' own business."""
    if has_torch_function((value,)):
        return handle_torch_function(of_samples, (value,), value)
    return value.view_as(value)


def _derived(tape: Tape, arguments: Arguments, all_shared: bool) -> bool:
    return True


@rule(of_samples, parameters="value", applies=_derived)
def _of_samples(use: UseView, value: Tensor) -> dict[str, Structure]:
    return {"value": Own(use.cotangent, use.layout)}


RULES[of_samples].tentative = True
