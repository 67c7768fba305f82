"""Who made what in a trace, and what was written when."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Hashable, Iterator, Set
from typing import Any

import torch
from torch import Tensor

from curvopt.axes.lattice import bags_of
from curvopt.axes.ops import Op, Ref, refs_in
from curvopt.axes.trace import Trace

# How many ops a name looks back.
_DEPTH = 4


class Step:
    """An op, with what every replay asks of it at hand."""

    __slots__ = ("facts", "index", "inputs", "name", "op", "outputs", "outs", "written")

    def __init__(self, index: int, op: Op):
        self.index, self.op, self.facts = index, op, op.facts
        self.name = self.facts.name
        self.inputs, self.outputs, self.written = op.inputs, op.outputs, op.written
        # Tensors that are given as `out`: written to, not read.
        self.outs = [ref for name in self.facts.outs for ref in refs_in(op.argument(name))]

    @property
    def touched(self) -> list[Ref]:
        """What the op makes or changes, also running statistics, of which its schema is silent."""
        names = [n for n in ("running_mean", "running_var") if n in self.facts.arguments]
        return [*self.outputs, *self.written, *filter(None, map(self.op.argument, names))]


def steps_of(trace: Trace) -> list[Step]:
    """The trace's ops, prepared once."""
    steps: list[Step] = trace.__dict__.setdefault("_steps", [])
    for k in range(len(steps), len(trace.ops)):
        steps.append(Step(k, trace.ops[k]))
    return steps


def sources(trace: Trace) -> list[list[int | None]]:
    """For every input of every op, the op that made it as it is then.

    None for what came from outside, or was changed through another view.
    """
    known: list[list[int | None]] = trace.__dict__.setdefault("_sources", [])
    if len(known) == len(trace.ops):
        return known
    known.clear()
    made: dict[Any, int] = {}
    wrote: dict[int, int] = {}
    for step in steps_of(trace):
        row: list[int | None] = []
        for ref in step.inputs:
            at = made.get(ref.place)
            row.append(None if at is None or wrote.get(ref.storage, -1) > at else at)
        known.append(row)
        for ref in step.written:
            wrote[ref.storage] = step.index
        for ref in step.outputs:
            made[ref.place] = step.index
    return known


def version(trace: Trace, storage: int, k: int) -> int:
    """How often a storage was written to before op k."""
    known: tuple[int, dict[int, list[int]]] = trace.__dict__.get("_writes", (-1, {}))
    if known[0] != len(trace.ops):
        writes: dict[int, list[int]] = defaultdict(list)
        for step in steps_of(trace):
            for ref in step.written:
                writes[ref.storage].append(step.index)
        known = trace.__dict__["_writes"] = len(trace.ops), writes
    return bisect_right(known[1].get(storage, []), k - 1)


def name_of(trace: Trace, k: int, ref: Ref, depth: int = _DEPTH) -> Hashable:
    """A name for the values of an input of op k: equal names mean equal values.

    A mask that is computed twice in the same way has the same name.
    """
    op = trace.ops[k]
    at = next((i for i, r in enumerate(op.inputs) if r.place == ref.place), None)
    maker = None if at is None or depth == 0 else sources(trace)[k][at]
    made = None if maker is None else trace.ops[maker]
    if made is None or maker is None or made.written or made.facts.random or len(made.outputs) > 1:
        return ref.place, version(trace, ref.storage, k)

    def named(value: Any) -> Hashable:
        if isinstance(value, Ref):
            return name_of(trace, maker, value, depth - 1)
        if isinstance(value, tuple):
            return tuple(named(item) for item in value)
        return value

    return id(made.func), named(made.args), named(made.kwargs)


def ancestors(trace: Trace, ref: Ref, before: int | None = None) -> set[int]:
    """Ops that may have a part in this tensor, as it is before an op or at the end of the trace."""
    needed, found = {ref.storage}, set()
    for step in reversed(steps_of(trace)[:before]):
        if any(r.storage in needed for r in step.touched):
            found.add(step.index)
            needed |= {r.storage for r in step.inputs}
    return found


def descendants(trace: Trace, storage: int) -> set[int]:
    """Ops in which this storage, or what is made of it, may have a part."""
    reached, found = {storage}, set()
    for step in steps_of(trace):
        if any(ref.storage in reached for ref in step.inputs):
            found.add(step.index)
            reached |= {ref.storage for ref in step.touched}
    return found


def parametric(trace: Trace, silent: Set[int], data: Set[int]) -> set[int]:
    """Ops with an input that is made of parameters and buffers, of masks for them too."""
    own, others = set(silent), set(data)
    found = set()
    for step in steps_of(trace):
        if any(ref.storage in own and ref.storage not in others for ref in step.inputs):
            found.add(step.index)
        touched = {ref.storage for ref in step.touched} - set(silent)
        if any(ref.storage in own for ref in step.inputs):
            own |= touched
        if any(ref.storage in others for ref in step.inputs):
            others |= touched
    return found


def picking(trace: Trace, silent: Set[int]) -> set[int]:
    """Storages from outside that pick rows of data, as the indices of a batch do."""
    return {
        ref.storage
        for op in trace.ops
        if op.name in ("index", "_unsafe_index", "index_select", "gather")
        and op.inputs[0].storage not in silent
        for ref in op.inputs[1:]
    }


_MOVES = frozenset(
    "view _unsafe_view reshape expand unsqueeze squeeze slice select clone detach alias t "
    "transpose permute unbind split lift_fresh contiguous".split()
)
_INDEXES = frozenset(
    "index _unsafe_index index_select gather embedding index_add index_copy index_put index_fill "
    "scatter scatter_add scatter_reduce take _embedding_bag _embedding_bag_forward_only".split()
)


def only_indexes(trace: Trace, storage: int) -> bool:
    """Whether a tensor from outside says which elements to take, and nothing else."""
    known = {storage}
    for op in trace.ops:
        inputs = op.inputs
        at = [i for i, ref in enumerate(inputs) if ref.storage in known]
        if not at:
            continue
        if op.name in _MOVES or (
            op.name == "_to_copy" and not op.outputs[0].dtype.is_floating_point
        ):
            known.update(ref.storage for ref in op.outputs)
        elif op.name not in _INDEXES or 0 in at:
            return False
    return True


def pickings(trace: Trace, storage: int) -> Iterator[Ref]:
    """What an index from outside, or a view or copy of it, picks elements of."""
    known = {storage}
    for op in trace.ops:
        inputs = op.inputs
        at = [i for i, ref in enumerate(inputs) if ref.storage in known]
        if at and (op.name in _MOVES or op.name == "_to_copy"):
            known.update(ref.storage for ref in op.outputs)
        elif at and op.name in _INDEXES:
            yield inputs[0]


def index_vectors(trace: Trace, ref: Ref) -> Iterator[Tensor]:
    """Integer vectors that say to which sample each row of a tensor may belong.

    They are those by which rows are added up, as nodes are to graphs; or the bags of an
    embedding_bag, for what is looked up.
    """
    for k, values in trace.values.items():
        op = trace.ops[k]
        if op.name.startswith("_embedding_bag") and ref.storage == op.inputs[1].storage:
            starts = values[2]
            assert starts is not None
            yield bags_of(starts.cpu(), ref.shape[0]).to(torch.int32)
        adds = op.name in ("index_add", "scatter_add", "scatter_reduce")
        if not adds or not ref.dtype.is_floating_point:
            continue
        for value in values:
            if value is None or value.dtype == torch.bool or not value.ndim or not value.numel():
                continue
            column = value.reshape(len(value), -1)[:, 0]
            if column.shape == ref.shape[:1]:
                yield column.cpu().to(torch.int32).reshape(-1, *[1] * (ref.ndim - 1))
