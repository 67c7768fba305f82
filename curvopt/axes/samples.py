"""The samples that were found in a pass, and what can be asked of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from curvopt.axes.lattice import NONE
from curvopt.axes.ops import Read, Ref
from curvopt.axes.owners import Mark, Replay
from curvopt.axes.readings import Claims, Outcome, Readings, Seeds
from curvopt.axes.refusals import not_separate, outsider
from curvopt.axes.rows import Frontier, Row
from curvopt.axes.trace import Trace
from curvopt.axes.weights import Weighing, weighings
from curvopt.errors import CurvoptError


@dataclass
class Samples:
    """The samples of a pass.

    Attributes:
        n: how many.
        trace: the pass.
        seeds, claims: owners of the data, as a `Replay` takes them.
        frontier: the rows of the loss; `rows` are they.
        owners: int32, the sample of every position of every row, one row tensor after another; -1
            for rows that hold no sample (a penalty).
        weighings: what multiplies the rows and depends on several samples (a count, a
            normalization).
        shared: data from outside that all samples share (not parameters, not buffers, no single
            numbers).
        drawn: data sets from outside of which every sample draws by an index of its own.
        notes: what else was noticed.
        value_dependent: owners depend on index values of this pass: `follow` every pass.
        reads: numbers that Python read from the samples.
        fed: storages from outside whose samples go through the model: they meet parameters.
        picked: storages of data sets whose drawn rows go through the model, and the indices.
        steady: where the samples lie does not follow from index values, so that a later pass needs
            one replay.
    """

    n: int
    trace: Trace
    seeds: Seeds
    claims: Claims
    frontier: Frontier
    owners: Tensor
    _readings: Readings = field(repr=False)
    _again: Callable[[Trace], Samples] = field(repr=False)
    weighings: list[Weighing] = field(default_factory=list)
    shared: list[Ref] = field(default_factory=list)
    drawn: list[Ref] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    value_dependent: bool = False
    reads: list[Read] = field(default_factory=list)
    steady: bool = False
    fed: frozenset[int] = frozenset()
    picked: list[tuple[int, Mark]] = field(default_factory=list)
    _loose: frozenset[int] = frozenset()
    _fill: bool = True
    # The last replay, and with which further claims.
    _last: tuple[Replay, dict[Mark, Tensor]] | None = field(default=None, repr=False)

    @property
    def kind(self) -> str:
        """Say "separable", or "weights" if rows are apart but what multiplies them is not."""
        return "weights" if self.weighings else "separable"

    @property
    def reason(self) -> str:
        """Why the kind is not "separable"."""
        return self.weighings[0].why if self.weighings else ""

    @property
    def silent(self) -> frozenset[int]:
        """Storages of parameters and buffers."""
        return self._readings.silent

    @property
    def rows(self) -> list[Row]:
        """The tensors of rows."""
        return self.frontier.rows

    def owners_of(self, row: int) -> Tensor:
        """The sample of every position of one tensor of rows, in its shape."""
        sizes = [torch.Size(r.shape).numel() for r in self.rows]
        return self.owners.split(sizes)[row].reshape(self.rows[row].shape)

    def places(self) -> dict[int, Tensor]:
        """By storage of `fed`, where in it the samples begin: rows of a tensor, say."""
        found: dict[int, list[Tensor]] = defaultdict(list)
        seeded = [(self.trace.outside[storage], owners) for storage, owners in self.seeds.items()]
        for ref, owners in [*seeded, *((ref, owners) for (_, ref), owners in self.claims.items())]:
            if ref.storage in self.fed:
                at = torch.full((1,) * ref.ndim, ref.offset, device="cpu")
                for dim, size in enumerate(owners.shape):
                    along = torch.arange(size, device="cpu").view(-1, *[1] * (ref.ndim - dim - 1))
                    at = at + along * ref.stride[dim]
                found[ref.storage].append(at[owners >= 0])
        return {storage: torch.cat(parts) for storage, parts in found.items()}

    def replay(
        self,
        marks: Iterable[Mark] = (),
        claims: Mapping[Mark, Tensor] | None = None,
        trace: Trace | None = None,
        *,
        until: int | None = None,
        kind: Callable[..., Replay] = Replay,
    ) -> Replay:
        """The joint replay once more, with further marks and claims.

        Args:
            marks: (k, ref) whose states are wanted, in `.marked` of the result.
            claims: further owners, which hold if no row is mixed with them.
            trace: a later pass with the same key.
            until: replay the first ops alone.
            kind: what replays.

        Raises:
            CurvoptError: with the claims, or in the later pass, samples are not separate.
        """
        readings = self._readings if trace is None else Readings(trace, self.frontier, self.silent)
        self._last, further = None, dict(claims or {})
        replay = kind(
            readings.trace,
            self.seeds,
            claims={**self.claims, **further},
            marks={*readings.marks, *marks},
            loose=self._loose,
            only=None if until is None else set(range(until)),
            fill=self._fill,
        ).run()
        if self.n > 1:
            outcome = Outcome(replay, self.frontier)
            if outcome.mixed:
                raise not_separate(outcome.blame(), self.n)
            met = [m for m in replay.outsiders if m.op in readings.only]
            if met:
                raise outsider(met[0], self.n)
        self._last = replay, further
        return replay

    def filled(self) -> Replay | None:
        """The joint replay; None, from now on too, where it does not go with filled elements."""
        try:
            replay = self.replay()
            self._fill = not Outcome(replay, self.frontier).mixed
        except CurvoptError:
            self._fill = False
        return replay if self._fill else None

    def recalled(self, marks: Sequence[Mark], claims: Mapping[Mark, Tensor]) -> Replay:
        """As `replay`, by the last one where that tells of all marks: `marked` holds them."""
        if self._last is not None:
            replay, before = self._last
            same = before.keys() == claims.keys() and all(before[k] is claims[k] for k in claims)
            new = [mark for mark in marks if mark not in replay.marked]
            if same and replay.trace is self.trace and all(replay.recalls(ref) for _, ref in new):
                replay.marked.update({mark: replay.get(mark[1]) for mark in new})
                return replay
        return self.replay(marks, claims)

    def follow(self, trace: Trace) -> Samples:
        """The samples of a later pass with the same key, whose index values may differ.

        Raises:
            CurvoptError: samples are not separate in that pass.
        """
        if self.steady and self.kind == "separable":
            try:
                replay = self.replay(trace=trace)
            except CurvoptError:
                return self._again(trace)
            outcome = Outcome(replay, self.frontier)
            reads = [read for read in trace.reads if read.op in set(replay.reads)]
            same = torch.equal(outcome.rows == NONE, self.owners == NONE)
            if same and not weighings(outcome, [], reads):
                readings = Readings(trace, self.frontier, self.silent)
                return replace(
                    self, trace=trace, owners=outcome.rows, reads=reads, _readings=readings
                )
        return self._again(trace)
