"""Where samples may lie: tensors that bring data into a pass, and readings of their dims.

A reading puts `arange` on one dim of one tensor, everything else constant, and replays the trace:
it is good if no row of the loss is mixed and some row is owned.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from curvopt.axes.lattice import DTYPE, MIXED, NONE, State, align, along, constant, join_all
from curvopt.axes.ops import Op, Ref
from curvopt.axes.owners import Mark, Meeting, Replay
from curvopt.axes.rows import PICKS, Frontier, Row
from curvopt.axes.rules import RULES, rule_for
from curvopt.axes.rules import made as makes_from_nothing
from curvopt.axes.trace import Trace
from curvopt.axes.wiring import ancestors, sources, steps_of

Seeds = dict[int, Tensor]
Claims = dict[Mark, Tensor]


@dataclass(frozen=True)
class Entry:
    """A tensor that brings data into the pass.

    Attributes:
        ref: the tensor (of a group, the stacked one).
        storage: from outside, the storage it is seeded on; else None.
        mark: of a second view from outside, or a tensor made in the pass: where it is claimed.
        group: storages that are stacked or concatenated, one sample each.
        packed: of a packed sequence from outside, the sample of every row.
    """

    ref: Ref
    storage: int | None = None
    mark: Mark | None = None
    group: tuple[int, ...] = ()
    packed: tuple[int, ...] = ()

    def seed(self, trace: Trace, dim: int, owners: Tensor | None = None) -> tuple[Seeds, Claims]:
        """Owners along a dim (0, 1, ... unless given), as seeds and claims of a replay."""
        if self.group:
            each = torch.arange(len(self.group), device="cpu") if owners is None else owners
            return {
                storage: constant(trace.outside[storage].ndim, int(each[n]))
                for n, storage in enumerate(self.group)
            }, {}
        if self.packed:
            rows = torch.tensor(self.packed, device="cpu")
            owners = rows if owners is None else owners[rows]
        values = (
            along(self.ref.shape, dim, owners)
            if self.ref.ndim
            else (constant(0, 0) if owners is None else owners.to(DTYPE).reshape(()))
        )
        if self.storage is not None:
            return {self.storage: values}, {}
        assert self.mark is not None
        return {}, {self.mark: values}

    def whole(self, owner: int = 0) -> tuple[Seeds, Claims]:
        """One sample in all."""
        values = constant(self.ref.ndim, owner)
        if self.storage is not None:
            return {self.storage: values}, {}
        return {}, {} if self.mark is None else {self.mark: values}

    @property
    def floating(self) -> bool:
        """Numbers, not indices."""
        return self.ref.dtype.is_floating_point or self.ref.dtype.is_complex


class Outcome:
    """What a replay says of the rows, and of what multiplies them."""

    def __init__(self, replay: Replay, frontier: Frontier):
        self.replay, self.frontier = replay, frontier

    @cached_property
    def rows(self) -> Tensor:
        """The owners of all positions of all rows, in one vector."""
        return torch.cat([self.of_row(n) for n in range(len(self.frontier.rows))])

    def of_row(self, n: int) -> Tensor:
        """The owners of the positions of row tensor n."""
        row = self.frontier.rows[n]
        if row.kind == "loss":
            owners = self.replay.rows.get(row.op)
            if owners is None and row.op in self.replay.owned:
                owners = constant(len(row.shape), MIXED)  # its rule does not cover the call
        else:
            state = self.replay.marked[row.mark]
            owners = None if state is None else state.owners
        owners = constant(len(row.shape)) if owners is None else owners
        return owners.expand(row.shape).reshape(-1)

    def _joined(self, k: int) -> tuple[Tensor, Tensor]:
        """The owners of a product, and of what multiplies or chooses the rows in it."""
        op = self.replay.trace.ops[k]
        inputs = op.inputs
        if op.name in PICKS:
            state = self.replay.marked[k + 1, op.outputs[0]]
            drawn = any(self.replay.marked[k, ref] for ref in inputs if not ref.requires_grad)
            picked = constant(op.outputs[0].ndim) if state is None else state.owners
            picked = picked.expand(op.outputs[0].shape).reshape(-1)
            return picked, torch.full_like(picked, 0 if drawn else NONE)
        shape = torch.broadcast_shapes(*(ref.shape for ref in inputs))
        owners: list[Tensor | None] = [None, None]
        for ref in inputs:
            state = self.replay.marked[k, ref]
            if state is not None:
                mine = align(state.owners, len(shape))
                owners[0] = join_all(owners[0], mine)
                owners[1] = owners[1] if ref.requires_grad else join_all(owners[1], mine)
        both, factor = (constant(len(shape)) if o is None else o for o in owners)
        return both.expand(shape).reshape(-1), factor.expand(shape).reshape(-1)

    @cached_property
    def products(self) -> Tensor:
        """The owners of products of rows by coefficients, in one vector."""
        found = [self._joined(k)[0] for k in self.frontier.products]
        return torch.cat(found) if found else torch.empty(0, dtype=DTYPE, device="cpu")

    @cached_property
    def links(self) -> Tensor:
        """Rows and products: which positions belong to which sample; mixed products to none."""
        products = self.products
        return torch.cat([self.rows, products.masked_fill(products == MIXED, NONE)])

    @cached_property
    def coefficients(self) -> list[State | None]:
        """The states of the coefficients."""
        return [self.replay.marked[c.mark] for c in self.frontier.coefficients]

    @property
    def mixed(self) -> bool:
        """A row depends on several samples."""
        return bool((self.rows == MIXED).any())

    @cached_property
    def weighing(self) -> list[int]:
        """Products in which a coefficient depends on other samples than what it multiplies."""
        found = []
        for k in self.frontier.products:
            both, factor = self._joined(k)
            if bool(((factor != NONE) & (both == MIXED)).any()):
                found.append(k)
        return found

    @property
    def touches(self) -> bool:
        """Some row is owned."""
        return bool((self.rows != NONE).any())

    @property
    def touches_coefficients(self) -> bool:
        """Some coefficient is owned."""
        return bool((self.products != NONE).any()) or any(s is not None for s in self.coefficients)

    def blame(self) -> Meeting | None:
        """The first op on the way to a mixed row in which samples met."""
        replay, trace = self.replay, self.replay.trace
        source = sources(trace)
        stack: list[int] = []

        def push(k: int, refs: Iterable[Ref]) -> bool:
            """Go on to the ops that made those of `refs`, inputs of op k, that are mixed."""
            makers = []
            for ref in refs:
                at = [source[k][i] for i, r in enumerate(trace.ops[k].inputs) if r is ref]
                j = at[0] if at else None
                if j is None:  # changed in place through another view: the last change counts
                    known = (j for j in range(k - 1, -1, -1) if j in replay.mixed)
                    j = next((j for j in known if _touches(trace.ops[j], ref.storage)), None)
                if j is not None and any(p[0] == ref.storage for p in replay.mixed.get(j, ())):
                    makers.append(j)
            stack.extend(makers)
            return bool(makers)

        found = []
        for n, row in enumerate(self.frontier.rows):
            if bool((self.of_row(n) == MIXED).any()):
                if row.kind == "output":
                    stack.append(row.op)
                elif not push(row.op, row_inputs(trace, row)) and row.kind == "loss":
                    found.append(row.op)
        seen: set[int] = set()
        while stack:
            k = stack.pop()
            if k not in seen:
                seen.add(k)
                if not push(k, trace.ops[k].inputs):
                    found.append(k)
        if not found:
            return None
        op = trace.ops[min(found)]
        shape = op.outputs[0].shape if op.outputs else ()
        known = rule_for(op.facts, RULES) is not None
        return Meeting(min(found), op.name, tuple(r.shape for r in op.inputs), shape, known)


def row_inputs(trace: Trace, row: Row) -> list[Ref]:
    """The tensors from which rows are made."""
    inputs = trace.ops[row.op].inputs
    return inputs if row.kind == "loss" else [inputs[row.input]]


def _touches(op: Op, storage: int) -> bool:
    return any(ref.storage == storage for ref in (*op.outputs, *op.written))


@dataclass
class Reading:
    """Samples along one dim of an entry, and what that makes of the rows."""

    entry: Entry
    dim: int
    outcome: Outcome

    @property
    def good(self) -> bool:
        """No row is mixed, and some row or weight is owned."""
        if self.outcome.mixed:
            return False
        return self.outcome.touches or (
            not self.outcome.weighing and bool((self.outcome.links >= 0).any())
        )

    @cached_property
    def values(self) -> Tensor:
        """The positions of the dim that reach rows."""
        links = self.outcome.links
        return torch.unique(links[links >= 0])

    @property
    def size(self) -> int:
        """The length of the dim."""
        if self.entry.group:
            return len(self.entry.group)
        if self.entry.packed:
            return max(self.entry.packed) + 1
        return self.entry.ref.shape[self.dim] if self.entry.ref.ndim else 1

    def __str__(self) -> str:
        return f"dim {self.dim} of {list(self.entry.ref.shape)}"


@dataclass
class Readings:
    """All readings of a pass.

    Attributes:
        trace, frontier: the pass.
        silent: storages of parameters and buffers.
        only: ops that may have a part in the loss.
    """

    trace: Trace
    frontier: Frontier
    silent: frozenset[int]
    only: set[int] = field(init=False)
    count: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.only = ancestors(self.trace, self.frontier.loss)
        marks = {row.mark for row in self.frontier.rows if row.kind != "loss"}
        marks |= {c.mark for c in self.frontier.coefficients} | set(self.frontier.means)
        for coefficient in self.frontier.coefficients:
            k = coefficient.op
            marks |= {(k, ref) for ref in self.trace.ops[k].inputs}
            marks |= {(k + 1, ref) for ref in self.trace.ops[k].outputs}
        self._marks = frozenset(marks)
        self._cache: dict[tuple[Entry, int | None], Outcome] = {}

    def outcome(
        self,
        seeds: Mapping[int, Tensor],
        claims: Mapping[Mark, Tensor],
        opaque: bool = False,
        marks: Iterable[Mark] = (),
    ) -> Outcome:
        """Replay what leads to the loss."""
        self.count += 1
        replay = Replay(
            self.trace,
            seeds,
            claims=claims,
            marks={*self._marks, *marks},
            only=self.only,
            opaque=opaque,
        )
        return Outcome(replay.run(), self.frontier)

    def forget(self) -> None:
        """Give up what the search kept."""
        self._cache.clear()

    @property
    def marks(self) -> frozenset[Mark]:
        """What an `Outcome` needs to see."""
        return self._marks

    def entries(self) -> Iterator[Entry]:
        """Tensors from outside that may reach the loss and are no parameter or buffer."""
        entered = {ref.storage for k in self.only for ref in self.trace.ops[k].inputs}
        outside = self.trace.outside
        for storage, ref in list(outside.items()):
            if storage in self.silent or storage not in entered:
                continue
            if ref.numel:
                yield Entry(ref, storage=storage)
        seen = {ref.place for ref in outside.values()}
        for step in steps_of(self.trace):
            if step.index in self.only:
                for ref in step.inputs:
                    if ref.place in seen or ref.storage in self.silent or not ref.numel:
                        continue
                    if ref.storage in outside:
                        yield Entry(ref, mark=(step.index, ref))
                    seen.add(ref.place)
            seen |= {ref.place for ref in step.outputs}

    def made(self) -> Iterator[Entry]:
        """Tensors that the pass itself makes of nothing: drawn, counted, filled."""
        for step in steps_of(self.trace):
            if step.index not in self.only or not step.outputs:
                continue
            ref = step.outputs[0]
            fills = RULES.get(step.name) is makes_from_nothing or step.name == "normal"
            inplace = fills and bool(step.written) and len(step.inputs) == 1
            own = all(r.storage not in self.trace.outside for r in step.inputs)
            if ref.numel and ref.ndim and own and (not step.inputs or inplace):
                yield Entry(ref, mark=(step.index + 1, ref))

    def groups(self) -> Iterator[Entry]:
        """Tensors from outside that are put beside each other: a sample each."""
        for step in steps_of(self.trace):
            storages = tuple(ref.storage for ref in step.inputs)
            if (
                step.name in ("stack", "cat")
                and step.index in self.only
                and len(set(storages)) == len(storages) > 1
                and all(s in self.trace.outside and s not in self.silent for s in storages)
            ):
                yield Entry(step.outputs[0], group=storages)

    def packed(self, entry: Entry) -> Iterator[Entry]:
        """The tensor as the rows of packed sequences that the pass was given."""
        for rows in dict.fromkeys(self.trace.packing.rows):
            if entry.storage is not None and entry.ref.shape[:1] == (len(rows),):
                yield replace(entry, packed=rows)

    def whole(self, entry: Entry) -> Outcome:
        """The entry as one sample."""
        key = (entry, None)
        if key not in self._cache:
            self._cache[key] = self.outcome(*entry.whole())
        return self._cache[key]

    def read(self, entry: Entry, dim: int) -> Reading:
        """The entry with samples along a dim."""
        key = (entry, dim)
        if key not in self._cache:
            self._cache[key] = self.outcome(*entry.seed(self.trace, dim))
        return Reading(entry, dim, self._cache[key])

    def of(self, entry: Entry) -> Iterator[Reading]:
        """The good readings, the outermost dim first."""
        for dim in dims_of(entry):
            reading = self.read(entry, dim)
            if reading.good:
                yield reading


def dims_of(entry: Entry) -> list[int]:
    """Dims that may be those of the samples."""
    if entry.group or entry.packed:
        return [0]
    return [d for d, n in enumerate(entry.ref.shape) if n > 1]
