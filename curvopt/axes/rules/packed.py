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
# What says how long sequences are: which have not ended, how many there are.
_COUNTING = frozenset("select slice lt _local_scalar_dense".split())


def _places(lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Time and sample of every packed row, for lengths from long to short."""
    steps = torch.arange(int(lengths.max()) if len(lengths) else 0, device="cpu")
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


def note_packed(trace: Trace, sizes: Tensor, order: Tensor | None, back: Tensor | None) -> None:
    """Note how a packed sequence is packed, if it was before the pass began.

    Args:
        trace: the pass.
        sizes: how many sequences have a row at each time step.
        order: the sequences from the longest to the shortest one; as they are if None.
        back: the inverse of the order.
    """
    length = trace.ref(sizes).storage
    orders = {trace.ref(tensor).storage for tensor in (order, back) if tensor is not None}
    if {length, *orders} <= trace.outside.keys():
        trace.packing.lengths.add(length)
        trace.packing.orders |= orders
        rows = torch.cat([torch.arange(size, device="cpu") for size in sizes.tolist()])
        rows = rows if order is None else order.cpu()[rows]
        trace.packing.rows.append(tuple(rows.tolist()))


def orderings(trace: Trace) -> set[int]:
    """Storages from outside that say how samples are packed, and nothing else.

    Their values are used as they are in this pass, so that they need no owners.
    """
    given = trace.packing.orders | {
        ref.storage
        for op in trace.ops
        if op.name == "_pack_padded_sequence"
        for ref in op.inputs[1:]
    }
    lengths = {s for s in trace.packing.lengths if _only_counts(trace, s)}
    if not given:
        return lengths
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
    found = {s for s in behind if s in trace.outside and _only_orders(trace, s)}
    return found | lengths


def _only_counts(trace: Trace, storage: int) -> bool:
    uses = (op for op in trace.ops if any(ref.storage == storage for ref in op.inputs))
    return all(op.name in _COUNTING for op in uses)


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
