"""What passes have in common: ops, wherever batches lie and whatever values are scaled by.

A pass that cuts its batch out of a data set, as in ``model(X[i : i + 8])``, is compared as if the
first batch that it cuts out were always the same one. Numbers that values are scaled by, as
schedules change them at every step, make no difference to what samples do in it.
"""

from __future__ import annotations

from typing import Any

import torch

from curvopt.axes.ops import Op, Ref, refs_in
from curvopt.axes.trace import Key, Trace

CUTS = frozenset({torch.ops.aten.slice.Tensor, torch.ops.aten.select.int})
# Ops that work element by element, whatever their numbers are.
SCALING = frozenset(
    "mul div add sub rsub pow lerp addcmul addcdiv clamp native_dropout bernoulli".split()
)


def first_cuts(trace: Trace) -> dict[int, tuple[int, int]]:
    """By storage, where the first batch begins that is cut out of it: which row, and its offset.

    Of data from outside; empty if all begin with row 0, or if some data is looked at as a whole:
    that may be the batch, or rows in another order.
    """
    found: dict[int, tuple[int, int]] = {}
    rows = set()
    for op in trace.ops:
        if op.func in CUTS and op.args[0].storage not in found and _is_whole(trace, op.args[0]):
            whole, dim = op.args[0], op.argument("dim")
            begin = op.outputs[0].offset - whole.offset
            found[whole.storage] = begin // max(1, whole.stride[dim]), begin
            rows.add(whole.shape[dim])
    if not any(begin for _, begin in found.values()):
        return {}
    others = (ref for storage, ref in trace.outside.items() if storage not in found)
    if any(not rows.isdisjoint(ref.shape) for ref in others):
        return {}
    for op in trace.ops:
        if op.func not in CUTS:
            for ref in op.inputs:
                if ref.storage in found and _is_whole(trace, ref):
                    return {}
    return found


def key_of_ops(trace: Trace) -> Any:
    """`Trace.key`, the same for all positions of batches and numbers that values are scaled by.

    Numbers are a part of it where Python has read some of the batch: they may be those.
    """
    ops = trace.ops if trace.reads else [_unscaled(op) for op in trace.ops]
    cuts = first_cuts(trace)
    if not cuts:
        return Key(tuple(ops))
    begins = {storage: begin for storage, (_, begin) in cuts.items()}
    rows = [row for row, _ in cuts.values()]
    # What is used together comes from the same rows, or not.
    apart = tuple(row - rows[0] for row in rows)
    return Key(tuple(_moved(trace, op, begins) for op in ops)), apart


def _unscaled(op: Op) -> Op:
    if op.facts.name in SCALING and float in map(type, op.args):
        return op._replace(args=tuple("number" if type(a) is float else a for a in op.args))
    return op


def _is_whole(trace: Trace, ref: Ref) -> bool:
    outside = trace.outside.get(ref.storage)
    return outside is not None and outside.place == ref.place and not ref.requires_grad


def _moved(trace: Trace, op: Op, begins: dict[int, int]) -> Op:
    args: Any
    if op.func in CUTS and op.args[0].storage in begins and _is_whole(trace, op.args[0]):
        # Its length is that of the output, and its begin the output's.
        step = op.argument("step") if "step" in op.facts.arguments else 1
        args = op.args[0], op.argument("dim"), "cut", step
        return op._replace(args=args, outputs=_moved_refs(op.outputs, begins))
    if any(ref.storage in begins for ref in refs_in((op.args, op.kwargs, op.outputs))):
        args, kwargs, outputs = (
            _moved_refs(value, begins) for value in (op.args, op.kwargs, op.outputs)
        )
        return op._replace(args=args, kwargs=kwargs, outputs=outputs)
    return op


def _moved_refs(value: Any, begins: dict[int, int]) -> Any:
    if isinstance(value, Ref):
        return value._replace(offset=value.offset - begins.get(value.storage, 0))
    if isinstance(value, tuple):
        return tuple(_moved_refs(item, begins) for item in value)
    return value
