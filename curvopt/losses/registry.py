"""Which torch functions are losses."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Function = Callable[..., Any]


@dataclass(frozen=True)
class LossRule:
    """How a recorded loss call becomes a `curvopt.losses.base.Loss`.

    Attributes:
        function: ``function(output, value, *other arguments of the loss) -> Loss``.
        names: the loss function's argument names, the output's first.
        wants_logits: the loss is applied to a log-softmax, whose input it wants.
    """

    function: Function
    names: tuple[str, ...]
    wants_logits: bool


LOSSES: dict[Function, LossRule] = {}


def loss(*functions: Function) -> Callable[[Function], Function]:
    """Register the decorated function as the maker of the loss of some torch functions."""

    def decorate(function: Function) -> Function:
        names = list(inspect.signature(function).parameters)
        rule = LossRule(function, ("input", *names[2:]), "logits" in names)
        LOSSES.update(dict.fromkeys(functions, rule))
        return function

    return decorate
