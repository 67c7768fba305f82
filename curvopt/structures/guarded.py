"""Structures that outlive the pass: what they hold by reference must not change."""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from functools import cache
from typing import Any, TypeVar

from torch import Tensor

from curvopt.errors import CurvoptError
from curvopt.structures.base import Structure
from curvopt.structures.total import Pulled

S = TypeVar("S", bound=Structure)


def guarded(structure: S, name: str) -> S:
    """A structure, of its own class, that raises where a tensor it holds was changed in place.

    A linear layer's rows hold its input, not a copy. A parameter that rows are pulled back to may
    change: where the way back needs its values, autograd sees to it.

    Args:
        structure: the structure.
        name: the parameter's, for messages.
    """
    held = [(t, t._version) for t in _tensors(structure) if not t.is_inference()]
    result = copy(structure)
    for field, value in list(vars(result).items()):
        if isinstance(value, Structure):
            vars(result)[field] = guarded(value, name)
        elif isinstance(value, list):
            parts = [guarded(v, name) if isinstance(v, Structure) else v for v in value]
            vars(result)[field] = parts
    result.__class__ = _guarding(type(structure))
    vars(result)["_held"] = held, name
    return result


def _check(held: list[tuple[Tensor, int]], name: str) -> None:
    for tensor, version in held:
        if tensor._version != version:
            raise CurvoptError(
                f"the rows of {name} hold a tensor of shape {list(tensor.shape)} that was changed "
                "in place after they were computed, as an input buffer is that was filled with the "
                "next batch: use them before, or compute them from a copy of the batch (x.clone())"
            )


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Pulled):
        yield from _tensors(value.inner)
    elif isinstance(value, Structure):
        yield from _tensors(list(vars(value).values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _plain(kind: type[Structure], fields: dict[str, Any]) -> Structure:
    structure = object.__new__(kind)
    vars(structure).update(fields)
    return structure


@cache
def _guarding(kind: type[Structure]) -> Any:
    """The same class, which looks at what it holds whenever it is asked for something."""

    def look(self: Structure, name: str) -> Any:
        if not name.startswith("__"):
            _check(*vars(self)["_held"])
        return object.__getattribute__(self, name)

    def reduced(self: Structure, protocol: Any) -> Any:
        """Copies are of the class itself."""
        _check(*vars(self)["_held"])
        return _plain, (kind, {k: v for k, v in vars(self).items() if k != "_held"})

    names = {"__getattribute__": look, "__reduce_ex__": reduced, "__doc__": kind.__doc__}
    return type(kind.__name__, (kind,), {**names, "__module__": kind.__module__})
