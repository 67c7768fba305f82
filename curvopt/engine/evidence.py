"""Is a call a use, whose output holds samples, or does it make a value shared by all samples?

``W.t()`` or ``W * mask`` make a *derived* parameter; ``x * scale`` is a use of ``scale``. Shapes
and gradients tell the two apart; what is left open is settled later, by the audit and by the check
that samples do not mix, never by a guess that could go unnoticed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from curvopt.engine.tape import Tape

Arguments = dict[Any, Any]


def has_data(tape: Tape, arguments: Arguments, all_shared: bool) -> bool:
    """Some operand is not shared: the ordinary case."""
    return not all_shared


def combines_samples(tape: Tape, arguments: Arguments, all_shared: bool) -> bool:
    """An elementwise op meets an activation, or data larger than the parameters (no mask)."""
    tensors = [value for value in arguments.values() if isinstance(value, Tensor)]
    own = [tensor for tensor in tensors if tape.is_shared(tensor)]
    if len(own) == len(tensors):
        return False
    if tape.hint == 1:  # every op is one of the only sample
        return True
    if any(tensor.requires_grad for tensor in tensors if not tape.is_shared(tensor)):
        return True
    shapes = [tensor.shape for tensor in tensors]
    return torch.broadcast_shapes(*shapes) != torch.broadcast_shapes(*(t.shape for t in own))


def looks_up_samples(tape: Tape, arguments: Arguments, all_shared: bool) -> bool:
    """The indices are data (token ids), not one table for all samples (positions).

    A table that was repeated along the sample axis (token types by default) counts as data.
    """
    indices = arguments["input"]
    if all_shared:
        repeated = indices.ndim > 1 and indices.shape[0] == tape.hint
        return repeated and bool((indices == indices[:1]).all())
    return _holds_samples(tape, indices.shape)


def indexes_samples(tape: Tape, arguments: Arguments, all_shared: bool) -> bool:
    """As `looks_up_samples`, for ``table[indices]`` with one tensor of indices."""
    indices = arguments["index"]
    if all_shared or not isinstance(indices, Tensor) or indices.dtype == torch.bool:
        return False
    return _holds_samples(tape, indices.shape)


def _holds_samples(tape: Tape, shape: torch.Size) -> bool:
    """Whether indices of this shape are data; an axis of size 1 is for broadcasting."""
    if not shape or tape.hint == 1:
        return tape.hint == 1
    if not tape.record.uses and tape.hint and shape[0] % tape.hint == 0:
        return True  # the model's first op meets data, which it may have flattened
    time_first = tape.hint in shape[1:2] and (shape[0] != 1 or not tape.record.uses)
    return shape[0] == tape.hint or time_first


def gives_copies(target_shape: Callable[[Arguments], Sequence[int]]) -> Callable[..., bool]:
    """A parameter is expanded or repeated along the sample axis (class tokens, queries).

    Args:
        target_shape: shape of the output, from the arguments.
    """

    def applies(tape: Tape, arguments: Arguments, all_shared: bool) -> bool:
        target = target_shape(arguments)
        before = (1,) * (len(target) - arguments["input"].ndim) + arguments["input"].shape
        grown = [old == 1 and new > 1 for old, new in zip(before, target, strict=True)]
        if tape.hint is None:
            return grown[:1] == [True]
        along = [up and new == tape.hint for up, new in zip(grown[:2], target[:2], strict=True)]
        return tape.hint == 1 or any(along)

    return applies
