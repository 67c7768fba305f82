"""Is a call a use, whose output holds samples, or does it make a value shared by all samples?

``W.t()`` or ``W * mask`` make a *derived* parameter; ``x * scale`` is a use of ``scale``. Shapes and
gradients tell the two apart; what is left open is settled later, by the audit and by the check that
samples do not mix, never by a guess that could go unnoticed.
"""

from __future__ import annotations

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
    if any(tensor.requires_grad for tensor in tensors if not tape.is_shared(tensor)):
        return True
    shapes = [tensor.shape for tensor in tensors]
    return torch.broadcast_shapes(*shapes) != torch.broadcast_shapes(*(t.shape for t in own))


def looks_up_samples(tape: Tape, arguments: Arguments, all_shared: bool) -> bool:
    """The indices are data (token ids), not one table for all samples (positions)."""
    indices, hint = arguments["input"], tape.hint
    if all_shared or not isinstance(indices, Tensor) or not indices.ndim:
        return False
    if hint is None or hint in indices.shape[:2]:
        return True
    return hint > 0 and indices.shape[0] % hint == 0 and indices.shape[0] > 0


def indexes_samples(tape: Tape, arguments: Arguments, all_shared: bool) -> bool:
    """As `looks_up_samples`, for ``table[indices]``, where constant tables are common."""
    indices = arguments["index"]
    if all_shared or not isinstance(indices, Tensor) or indices.dtype == torch.bool:
        return False
    return indices.ndim > 0 and (tape.hint is None or tape.hint in indices.shape[:2])


def gives_copies(tape: Tape, arguments: Arguments, all_shared: bool) -> bool:
    """A parameter is expanded or repeated along the sample axis (class tokens, queries)."""
    source, target = arguments["input"], arguments["target_shape"]
    before = (1,) * (len(target) - source.ndim) + tuple(source.shape)
    return any(
        old == 1 and new == tape.hint and (new > 1 or axis == 0)
        for axis, (old, new) in enumerate(zip(before[:2], target[:2], strict=True))
    )
