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
        of_rows: an output without a batch axis is a single sample.
    """

    function: Function
    names: tuple[str, ...]
    wants_logits: bool
    of_rows: bool = False


LOSSES: dict[Function, LossRule] = {}


def loss(*functions: Function, of_rows: bool = False) -> Callable[[Function], Function]:
    """Register the decorated function as the maker of the loss of some torch functions."""

    def decorate(function: Function) -> Function:
        names = list(inspect.signature(function).parameters)
        rule = LossRule(function, ("input", *names[2:]), "logits" in names, of_rows)
        LOSSES.update(dict.fromkeys(functions, rule))
        return function

    return decorate
