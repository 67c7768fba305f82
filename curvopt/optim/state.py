"""What a step reads of a parameter's state before it changes anything."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from curvopt.errors import CurvoptError
from curvopt.parallel.shards import is_sharded


def held(state: dict[str, Any], key: str, p: Tensor, name: Callable[[Tensor], str]) -> Tensor:
    """A tensor of a parameter's state.

    Args:
        state: the parameter's state.
        key: the tensor's name.
        p: the parameter.
        name: gives a parameter's name and shape, for the message.

    Raises:
        CurvoptError: it is missing, or does not have the parameter's shape.
    """
    value = state.get(key)
    if type(value) is Tensor and value.shape == p.shape and not is_sharded(p):  # as a rule
        return value
    if isinstance(value, Tensor) and is_sharded(value) != is_sharded(p):
        raise CurvoptError(
            f"{key!r} in the state of {name(p)} is {'a shard' if is_sharded(value) else 'whole'}, "
            "and the parameter is not: save and load the state by torch.distributed.checkpoint "
            "(get_optimizer_state_dict, set_optimizer_state_dict)"
        )
    if not isinstance(value, Tensor) or value.shape != p.shape:
        what = f"is {list(value.shape)}" if isinstance(value, Tensor) else "is missing"
        raise CurvoptError(
            f"{key!r} in the state of {name(p)} {what}: it is not the state of this optimizer for "
            "this parameter; load another, or drop it from opt.state"
        )
    return value


def sides(p: Tensor) -> tuple[int, int]:
    """Rows and columns of a parameter as a matrix: outputs and inputs, or a column."""
    return (p.shape[0], p.numel() // p.shape[0]) if p.ndim > 1 else (p.numel(), 1)
