"""Checks of what was asked for, and of what."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from curvopt.errors import CurvoptError
from curvopt.looks import may_look, refuse
from curvopt.quantities.base import Quantity


def check_loss(loss: Any, *, finite: bool = True) -> None:
    """Refuse what is no (finite) scalar loss with a graph."""
    if not isinstance(loss, Tensor):
        raise CurvoptError(
            f"the closure returned {type(loss).__name__}, not the loss as a tensor: "
            "end it with `return loss`"
        )
    if loss.numel() != 1:
        raise CurvoptError(f"the loss has shape {list(loss.shape)}; reduce it to a scalar")
    if not loss.requires_grad:
        raise CurvoptError(
            "the loss does not depend on any parameter that requires a gradient (was it "
            "computed under no_grad, or detached?)"
        )
    if not finite:
        return
    if not may_look():
        with _disable_current_modes():  # it is part of nobody's pass
            refuse(~loss.detach().isfinite(), partial(_not_finite, loss.detach()))
    elif not math.isfinite(loss.detach().item()):
        raise _not_finite(loss.detach())


def _not_finite(loss: Tensor) -> CurvoptError:
    return CurvoptError(
        f"the loss is {loss.item()}, not finite; nothing was changed. Lower the learning "
        "rate, or look for inputs that are not finite"
    )


def quantities_of(quantities: Iterable[Quantity]) -> list[Quantity]:
    """Check what was asked for."""
    asked = list(quantities)
    for quantity in asked:
        if not isinstance(quantity, Quantity):
            hint = "()" if isinstance(quantity, type) else ""
            raise TypeError(f"{quantity!r} is no quantity; pass an instance{hint}")
    fields = [quantity.field for quantity in asked]
    twice = {field for field in fields if fields.count(field) > 1}
    if twice:
        raise CurvoptError(f"asked twice for {', '.join(sorted(twice))}; a result has one of each")
    return asked
