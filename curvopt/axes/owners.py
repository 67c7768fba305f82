"""Replay a trace on owners: which sample does every element depend on?

The samples are seeded on tensors from outside; the op list is replayed with one small rule per kind
of op. Nothing is known of the tensors but their owners, and nothing is proved with numbers: what
holds for the owners holds for all values (for all with the same index values, where owners depend
on those: `Replay.value_dependent`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Set
from typing import Any, NamedTuple

import torch
from torch import Tensor

from curvopt.axes.lattice import (
    DTYPE,
    MIXED,
    NONE,
    State,
    constant,
    filled,
    join,
    merge,
    mixed,
    squash,
)
from curvopt.axes.ops import INDEXED, Ref
from curvopt.axes.rules import KNOWS_RAGGED, RULES, Call, Refuse, Rule, made, rule_for
from curvopt.axes.trace import Trace
from curvopt.axes.wiring import Step, steps_of

# Put elements beside others: what belongs to nobody there may belong to the slice's sample.
_FILLS = frozenset("cat stack constant_pad_nd where masked_fill index_put _index_put_impl".split())
_PRODUCTS = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1}

Mark = tuple[int, Ref]


class Meeting(NamedTuple):
    """An op in which samples met.

    Attributes:
        op, name: its number and name.
        shapes, output: of its inputs, and of the output.
        known: it has a rule; else it is only not known to keep samples apart.
    """

    op: int
    name: str
    shapes: tuple[tuple[int, ...], ...]
    output: tuple[int, ...]
    known: bool = True

    def __str__(self) -> str:
        inputs = ", ".join(str(list(shape)) for shape in self.shapes)
        return f"{self.name} of {inputs}"


def _window(ref: Ref) -> tuple[Any, ...]:
    return ref.offset, ref.shape, ref.stride, ref.dtype.itemsize


class Replay:
    """One pass over the ops of a trace, on owners.

    Args:
        trace: the recorded ops.
        seeds: by storage from outside, owners that broadcast against `trace.outside[storage]`.
        claims: by (k, ref), owners that are joined into those of `ref` just before op k.
        marks: (k, ref) pairs whose states just before op k are kept, in `marked`.
        loose: storages from outside without owners that are no parameter and no buffer: where one
            meets the samples along their axis, `outsiders` tells.
        spread: count as loose what they are spread over by others, as rows of a product with ones.
        only: numbers of the ops to replay; all others are skipped.
        fill: elements without owner that are put beside others take the owner of their slice.
        opaque: count what an index picks among samples as mixed.

    Attributes:
        marked: by (k, ref), the state or None.
        rows: by number of op, owners of the rows of a loss kernel before they were reduced.
        meetings: ops in which samples met that were apart in all inputs, in order.
        counted: loss kernels whose number of rows depends on the samples.
        mixed: by number of op, the places of its mixed outputs.
        outsiders: where a loose tensor met the samples along their axis.
        reads: numbers of ops by which Python read a number that depends on samples.
        owned: numbers of ops with an owned input.
        value_dependent: whether owners depend on index values of this pass.
        masked: a mask picked among samples.
        ragged: an axis was made whose length or order comes from owned values.
        picks: the indices that picked among samples, as marks.
    """

    #: Raise what goes wrong inside a rule instead of counting its outputs as mixed (for tests).
    strict = False

    def __init__(
        self,
        trace: Trace,
        seeds: Mapping[int, Tensor],
        *,
        claims: Mapping[Mark, Tensor] | None = None,
        marks: Iterable[Mark] = (),
        loose: Set[int] = frozenset(),
        spread: bool = True,
        only: Set[int] | None = None,
        fill: bool = False,
        opaque: bool = False,
    ):
        self.trace, self.loose, self.spread, self.only = trace, set(loose), spread, only
        self.fill, self.opaque = fill, opaque
        self.marked: dict[Mark, State | None] = {}
        self.rows: dict[int, Tensor] = {}
        self.meetings: list[Meeting] = []
        self.outsiders: list[Meeting] = []
        self.counted: set[int] = set()
        self.mixed: dict[int, set[Any]] = {}
        self.reads: list[int] = []
        self.owned: set[int] = set()
        self.value_dependent = False
        self.masked = self.ragged = False
        self.picks: list[Mark] = []
        # A storage is known by the states of its views, or, once it was written to through one of
        # several views, by the owners of all its elements.
        self._views: dict[int, dict[tuple[Any, ...], State | None]] = {}
        self._flat: dict[int, tuple[Tensor, int]] = {}
        self._changed: set[int] = set()  # storages of which more was known than one thing
        for storage, owners in seeds.items():
            window = _window(trace.outside[storage])
            self._views[storage] = {window: State(owners.to(DTYPE))}
        self._claims: dict[int, list[tuple[Ref, Tensor]]] = defaultdict(list)
        for (k, ref), owners in (claims or {}).items():
            self._claims[k].append((ref, owners.to(DTYPE)))
        self._marks: dict[int, list[Ref]] = defaultdict(list)
        for k, ref in marks:
            self._marks[k].append(ref)

    @property
    def met(self) -> Meeting | None:
        """The first op in which samples met."""
        return self.meetings[0] if self.meetings else None

    def run(self) -> Replay:
        """Replay; returns itself."""
        only = self.only
        for step in steps_of(self.trace):
            k = step.index
            if k in self._claims or k in self._marks:
                self._stop_at(k)
            if only is None or k in only:
                self._replay(step)
        self._stop_at(len(self.trace.ops))
        return self

    def _stop_at(self, k: int) -> None:
        for ref, owners in self._claims.get(k, ()):
            self._claim(ref, owners)
        for ref in self._marks.get(k, ()):
            self.marked[k, ref] = self.get(ref)

    def recalls(self, ref: Ref) -> bool:
        """Whether what `get` says at the end of the replay was always so."""
        views = self._views.get(ref.storage)
        known = self.only is None and (views is None or _window(ref) in views)
        return known and not (ref.storage in self._changed or ref.storage in self._flat)

    def _claim(self, ref: Ref, owners: Tensor) -> None:
        self._changed.add(ref.storage)
        state = self.get(ref)
        joined = (
            State(owners) if state is None else state._replace(owners=join(state.owners, owners))
        )
        if ref.storage in self._flat:
            self.put(ref, joined, write=True)
        else:  # of this view alone: the elements of an expanded view belong to several samples
            self._views.setdefault(ref.storage, {})[_window(ref)] = joined

    def _replay(self, step: Step) -> None:
        inputs = step.inputs
        states = [self.get(ref) for ref in inputs]
        rule = rule_for(step.facts, RULES)
        results: list[State | None]
        if all(state is None for state in states):
            if self.loose and rule is not made and self._is_loose(step):
                self.loose |= {ref.storage for ref in (*step.outputs, *step.written)}
            results = [None] * len(step.outputs)
        else:
            self.owned.add(step.index)
            if step.facts.reads:
                self.reads.append(step.index)
            results = self._apply(step, rule, states)
        written = {(ref.storage, _window(ref)) for ref in step.written}
        for ref, result in zip(step.outputs, results, strict=True):
            place = (ref.storage, _window(ref))
            self.put(ref, result, write=place in written)
            written.discard(place)
        for ref in step.written:  # and not returned
            if (ref.storage, _window(ref)) in written and any(s is not None for s in states):
                self.put(ref, mixed(ref.ndim), write=True)

    def _is_loose(self, step: Step) -> bool:
        """Whether what is made of loose tensors is loose."""
        sizes = [ref.numel for ref in step.inputs if ref.storage in self.loose]
        if not sizes or self.spread:
            return bool(sizes)
        alone = all(ref.storage in self.loose or ref.numel == 1 for ref in step.inputs)
        return alone or all(ref.numel <= max(sizes) for ref in step.outputs)

    def _apply(
        self, step: Step, rule: Rule | None, states: list[State | None]
    ) -> list[State | None]:
        results: list[State | None] | None = None
        ragged = any(state is not None and state.ragged is not None for state in states)
        if rule is not None and (not ragged or rule in KNOWS_RAGGED):
            count = len(step.inputs) - len(step.outs)  # `out` stands behind all else
            call = Call(self, step.index, step.op, step.inputs[:count], states[:count])
            try:
                found = rule(call)
                results = (
                    [found] * len(step.outputs)
                    if found is None or isinstance(found, State)
                    else list(found)
                )
                if len(results) != len(step.outputs):
                    raise Refuse
                for ref, result in zip(step.outputs, results, strict=True):
                    if result is not None and not _fits(result.owners.shape, ref.shape):
                        raise RuntimeError(f"{step.name}: {result.owners.shape}, {ref.shape}")
            except Refuse:
                results = None
            except Exception:  # a rule that does not fit a call must not stop a user's step
                if self.strict:
                    raise
                results = None
        if results is None:
            results = [mixed(ref.ndim) for ref in step.outputs]
        if self.fill and step.name in _FILLS:
            results = [r if r is None else r._replace(owners=filled(r.owners)) for r in results]
        self._watch(step, states, results)
        return results

    def _watch(self, step: Step, states: list[State | None], results: list[State | None]) -> None:
        """Note where samples met, and where a loose tensor met them."""
        for ref, result in zip(step.outputs, results, strict=True):
            if result is None:
                continue
            self.ragged |= result.ragged is not None
            if _has_mixed(result.owners):
                self.mixed.setdefault(step.index, set()).add(ref.place)
                if not any(s is not None and _has_mixed(s.owners) for s in states):
                    self.meetings.append(self._meeting(step, ref))
            if self.loose:
                self._outsider(step, ref, result.owners, states)

    @staticmethod
    def _meeting(step: Step, ref: Ref) -> Meeting:
        known = rule_for(step.facts, RULES) is not None
        return Meeting(step.index, step.name, tuple(r.shape for r in step.inputs), ref.shape, known)

    def _outsider(
        self, step: Step, output: Ref, owners: Tensor, states: list[State | None]
    ) -> None:
        """A loose tensor without owners that has the length of an owned axis where it meets it."""
        name, inputs = step.name, step.inputs
        if name in INDEXED and name not in ("index", "_unsafe_index"):
            return
        for n, (ref, state) in enumerate(zip(inputs, states, strict=True)):
            if state is not None or ref.storage not in self.loose:
                continue
            if any(ref is out for out in step.outs):
                continue
            if name in ("index", "_unsafe_index"):
                meets = ref is not inputs[0] and ref.dtype == torch.bool
            elif name.startswith("nll_loss"):
                scores = inputs[0]
                weight = step.op.args[2] if len(step.op.args) > 2 else None
                meets = ref.ndim > 0 and ref is not weight and scores.ndim > 1
                meets = meets and ref.shape[0] == scores.shape[0]
            else:
                summed = 0
                if name in _PRODUCTS and n >= _PRODUCTS[name]:
                    summed = -1 if n == _PRODUCTS[name] else -2
                meets = any(
                    -a != summed
                    and owners.shape[-a] > 1
                    and ref.shape[-a] == owners.shape[-a]
                    and ref.stride[-a] != 0
                    for a in range(1, min(output.ndim, ref.ndim, owners.ndim) + 1)
                )
            if meets:
                self.outsiders.append(self._meeting(step, ref))

    def get(self, ref: Ref) -> State | None:
        """The state of a tensor now."""
        flat = self._flat.get(ref.storage)
        if flat is not None:
            owners, itemsize = flat
            if itemsize != ref.dtype.itemsize or self.trace.end(ref) > len(owners):
                return mixed(ref.ndim)
            # A copy: what is written to the storage later must not change what is known of now.
            found = squash(owners.as_strided(ref.shape, ref.stride, self.trace.begin(ref))).clone()
            nobody = found.numel() == 1 and int(found) == NONE
            return None if nobody else State(found)
        views = self._views.get(ref.storage)
        if views is None:
            return None
        window = _window(ref)
        if window in views:
            return views[window]
        if all(state is None for state in views.values()):
            return None
        self.flatten(ref)
        return self.get(ref)

    def flatten(self, ref: Ref) -> None:
        """From now on, know the storage by the owners of its elements."""
        if ref.storage in self._flat:
            return
        itemsize = ref.dtype.itemsize
        length = max(self.trace.nbytes[ref.storage] // itemsize, self.trace.end(ref))
        flat = torch.full((length,), NONE, dtype=DTYPE, device="cpu")
        origin = self.trace.origins[ref.storage]
        for (offset, shape, stride, size), state in self._views.pop(ref.storage, {}).items():
            if state is None:
                continue
            if size != itemsize or state.ragged is not None:
                # Which elements of the storage a view of another type covers is not worked out.
                flat.fill_(MIXED)
                continue
            if 0 in shape:
                continue
            window, owners = _spread(flat, offset + origin, shape, stride, state.owners)
            window.copy_(join(window.clone(), owners))
        self._flat[ref.storage] = flat, itemsize

    def put(self, ref: Ref, state: State | None, write: bool = False) -> None:
        """Set the state of a tensor; `write` means that its elements changed under other views."""
        flat, window_of = self._flat.get(ref.storage), _window(ref)
        if write or window_of in self._views.get(ref.storage, ()):
            self._changed.add(ref.storage)
        if flat is not None:
            if write:
                owners, itemsize = flat
                if (
                    itemsize != ref.dtype.itemsize
                    or self.trace.end(ref) > len(owners)
                    or (state is not None and state.ragged is not None)
                ):
                    owners.fill_(MIXED)
                elif 0 not in ref.shape:
                    new = constant(ref.ndim) if state is None else state.owners
                    window, new = _spread(owners, self.trace.begin(ref), ref.shape, ref.stride, new)
                    window.copy_(new)
            return
        views = self._views.setdefault(ref.storage, {})
        if write:
            partial = ref.numel * ref.dtype.itemsize != self.trace.nbytes[ref.storage]
            others = any(window != window_of for window in views)
            if others or (not views and partial):
                if state is None and all(known is None for known in views.values()):
                    return
                self.flatten(ref)
                return self.put(ref, state, write=True)
        views[window_of] = None if state is not None and _is_nobody(state) else state


def _fits(owners: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    return len(owners) == len(shape) and all(
        a in (1, b) for a, b in zip(owners, shape, strict=True)
    )


def _has_mixed(owners: Tensor) -> bool:
    return bool((owners == MIXED).any()) if owners.numel() else False


def _is_nobody(state: State) -> bool:
    owners = state.owners
    return state.ragged is None and owners.numel() == 1 and int(owners) == NONE


def _spread(
    flat: Tensor, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], owners: Tensor
) -> tuple[Tensor, Tensor]:
    """The window on the flat owners, and what belongs there: expanded dims are one element."""
    owners = owners.expand(shape)
    sizes = list(shape)
    for d, n in enumerate(shape):
        if n > 1 and stride[d] == 0:
            owners, sizes[d] = merge(owners, [d]), 1
    return flat.as_strided(sizes, stride, offset), owners
