"""Packed sequences: rows of a padded batch, a time step's after the other's."""

from __future__ import annotations

import torch
from torch import Tensor

from curvopt.axes.lattice import State, squash
from curvopt.axes.rules.base import Call, Refuse, Result, rule
from curvopt.axes.trace import Trace

# What may happen to lengths: they are sorted, and rows are taken in that order.
_ORDERING = frozenset(
    "sort argsort _to_copy detach alias clone view scatter lift_fresh empty_like".split()
)
_TAKING = frozenset("index_select index _pack_padded_sequence".split())


def _places(lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Time and sample of every packed row, for lengths from long to short."""
    steps = torch.arange(int(lengths.max()) if len(lengths) else 0)
    alive = steps[:, None] < lengths[None]
    time, sample = alive.nonzero(as_tuple=True)
    return time, sample


@rule("_pack_padded_sequence")
def pack(call: Call) -> Result:
    """The rows that exist; how many a sample has is known of this pass alone."""
    x, lengths = call.inputs
    owners = call.owners(x)
    if call.state(lengths) is not None or owners is None:
        raise Refuse
    time, sample = _places(call.values(lengths))
    first, second = (sample, time) if call.arg("batch_first") else (time, sample)
    rows = owners.expand(*x.shape[:2], *owners.shape[2:])[first, second]
    return [State(squash(rows)), None]


def orderings(trace: Trace) -> set[int]:
    """Storages from outside that say how samples are packed, and nothing else.

    Their values are used as they are in this pass, so that they need no owners.
    """
    given = {
        ref.storage
        for op in trace.ops
        if op.name == "_pack_padded_sequence"
        for ref in op.inputs[1:]
    }
    if not given:
        return set()
    made: dict[int, set[int]] = {}
    for op in trace.ops:
        for ref in (*op.outputs, *op.written):
            made.setdefault(ref.storage, set()).update(r.storage for r in op.inputs)
    behind, stack = set(), list(given)
    while stack:
        storage = stack.pop()
        if storage not in behind:
            behind.add(storage)
            stack += made.get(storage, ())
    return {s for s in behind if s in trace.outside and _only_orders(trace, s)}


def _only_orders(trace: Trace, storage: int) -> bool:
    known = {storage}
    for op in trace.ops:
        at = [i for i, ref in enumerate(op.inputs) if ref.storage in known]
        if not at:
            continue
        if op.name in _ORDERING:
            known.update(ref.storage for ref in (*op.outputs, *op.written))
        elif op.name == "index_put" and not {0, len(op.inputs) - 1} & set(at):
            continue  # as places alone
        elif op.name not in _TAKING:
            return False
        elif 0 in at:  # they themselves, in another order
            known.update(ref.storage for ref in op.outputs)
    return True
