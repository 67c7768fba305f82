"""Find the samples of a pass, and prove that they do not mix."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set

import torch
from torch import Tensor

from curvopt.axes.choices import Choices
from curvopt.axes.kept import Kept
from curvopt.axes.lattice import DTYPE, MIXED, NONE
from curvopt.axes.linking import Linked
from curvopt.axes.ops import Ref
from curvopt.axes.owners import Replay
from curvopt.axes.pairs import check_pairs
from curvopt.axes.pieces import Pieces
from curvopt.axes.readings import Claims, Entry, Outcome, Reading, Readings, Seeds, dims_of
from curvopt.axes.refusals import (
    ambiguous,
    kept_as_constant,
    no_data,
    not_recorded,
    not_separate,
)
from curvopt.axes.rows import frontier
from curvopt.axes.samples import Samples
from curvopt.axes.trace import Trace
from curvopt.axes.weights import of_data, weighings
from curvopt.axes.wiring import descendants, index_vectors, parametric, picking
from curvopt.errors import CurvoptError


def infer(
    trace: Trace,
    loss: Tensor | Ref,
    *,
    silent: Set[int],
    constants: Set[int] = frozenset(),
    batch_size: int | None = None,
) -> Samples:
    """Find the samples of a pass.

    Args:
        trace: the recorded pass.
        loss: the loss that was computed in it.
        silent: storages of parameters and buffers: shared by all samples, and rightly so.
        constants: those of them without gradients. One that has a row for every sample where it
            meets them is data that is kept there.
        batch_size: number of samples, as a constraint: it chooses among readings and is never
            believed against the data flow.

    Raises:
        CurvoptError: samples mix; there is more than one reading, or none; `batch_size` is not
            what the data flow shows.
    """
    if trace.unsupported:
        raise CurvoptError(trace.unsupported)
    ref = trace.ref(loss) if isinstance(loss, Tensor) else loss
    found = frontier(trace, ref, silent)
    if found is None:
        raise not_recorded()
    readings = Readings(trace, found, frozenset(silent))

    def again(later: Trace) -> Samples:
        return infer(later, ref, silent=silent, constants=constants, batch_size=batch_size)

    try:
        return _Search(readings, batch_size, again, constants).run()
    except Kept as data:
        readings = Readings(trace, found, frozenset(silent - data.storages))
        try:
            return _Search(readings, batch_size, again).run()
        except CurvoptError as error:
            refs = [trace.outside[storage] for storage in data.storages]
            raise kept_as_constant(error, refs) from error


def _could_hold_one(entry: Entry) -> bool:
    """Whether it may be one sample: it has a size of 1, or is a number."""
    return 1 in entry.ref.shape or not entry.ref.ndim


def _many(linked: Linked) -> bool:
    return all(reading.size > 1 for reading in linked.chosen)


class _Search(Choices):
    """One search for the samples of a pass."""

    def __init__(
        self,
        readings: Readings,
        batch_size: int | None,
        again: Callable[[Trace], Samples],
        constants: Set[int] = frozenset(),
    ):
        super().__init__(readings, batch_size, constants)
        self.again = again

    def run(self) -> Samples:
        """Propose readings, link them, and replay them jointly."""
        self._look()
        length = sum(torch.Size(row.shape).numel() for row in self.frontier.rows)
        if length == 0:
            return self._found(0, {}, {})
        if self._is_one():
            apart = None if self.batch_size == 1 else self._one_by_one()
            if apart is not None or self.batch_size in (None, 1):
                return apart or self._one()
        self._complete()
        if not any(reading.outcome.touches for reading in self.good.values()):
            if self.batch_size == 1 and self.reaching:
                return self._one()
            apart = self._one_by_one()
            if apart is not None:
                return apart
            raise self._refusal()
        self._leave_penalties()
        linked = self._linked()
        self._look_at_constants(linked)
        if self.batch_size is None:
            self._ask(linked)
        return self._joint(linked)

    def _look(self) -> None:
        for entry in self.readings.entries():
            first = (self.readings.read(entry, dim) for dim in dims_of(entry)[:1])
            touches = any(reading.outcome.touches for reading in first)
            touches = touches or self.readings.whole(entry).touches
            weighs = not touches and self.readings.whole(entry).touches_coefficients
            if not (touches or weighs):
                continue
            entries = (entry, *self.readings.packed(entry))
            reading = next((r for e in entries for r in self.readings.of(e)), None)
            entry = entry if reading is None else reading.entry
            (self.reaching if touches else self.weights).append(entry)
            if reading is not None and (touches or bool((reading.outcome.products >= 0).any())):
                self.good[entry] = reading
        self._pack()

    def _one(self) -> Samples:
        seeds: Seeds = {}
        claims: Claims = {}
        for entry in (*self.reaching, *self.weights):
            if self.batch_size == 1 or _could_hold_one(entry):
                more = entry.whole()
                seeds.update(more[0])
                claims.update(more[1])
        samples = self._judged(self._found(1, seeds, claims))
        readings = [self.readings.read(e, d) for e in self.reaching for d in dims_of(e)[:1]]
        samples.fed = self._fed(readings)
        return samples

    def _one_by_one(self) -> Samples | None:
        """Samples in tensors of their own, as a loop over them has them; None if they are not."""
        pieces = Pieces(self.readings, self.reaching, self._feeds)
        n = len(pieces.samples)
        if not n or self.batch_size not in (None, n):
            return None
        batches = all(_could_hold_one(e) for piece in pieces.samples for e in piece)
        links = [e for e in pieces.common if _could_hold_one(e)]
        # What links them is the one sample's: its label, or else perhaps a constant.
        constant = pieces.stacked and any(map(self._feeds, links))
        if self.batch_size is None and batches and links and not constant:
            return None
        if self.batch_size is None and (links or not (batches or pieces.stacked)):
            raise ambiguous(
                f"one sample in {len(self.reaching)} tensors of data",
                f"{n} samples, whose tensors reach different parts of the loss",
                (1, n),
            )
        seeds, claims = pieces.seeds(self.weights)
        common = [entry.ref for entry in pieces.common if not self._is_index(entry)]
        samples = self._judged(self._found(n, seeds, claims, common))
        fed = filter(self._feeds, (entry for piece in pieces.samples for entry in piece))
        samples.fed = frozenset(entry.storage for entry in fed if entry.storage is not None)
        return samples

    def _complete(self) -> None:
        """Read groups and tensors made in the pass, for rows that belong to nobody so far."""
        stuck = [entry for entry in self.reaching if entry not in self.good]
        storages = {entry.storage for entry in stuck}
        for entry in self.readings.groups() if stuck else ():
            if set(entry.group) <= storages:
                self._add(entry)
        rows = self._rows_owned()
        for entry in self.readings.made() if not bool(rows.all()) else ():
            for dim in dims_of(entry) or [0]:
                reading = self.readings.read(entry, dim)
                if not reading.outcome.touches:
                    break
                fresh = (reading.outcome.rows >= 0) & ~self._rows_owned()
                if reading.good and bool(fresh.any()):
                    self.good[entry] = reading
                    break
        self._complete_made()

    def _complete_made(self) -> None:
        """Read what the pass made and gave to a model, where targets own all rows already."""
        alone = parametric(self.trace, self.readings.silent, self._outside()) & self.readings.only
        for reading in self.good.values():
            alone -= reading.outcome.replay.owned
        for entry in self.readings.made() if self.good else ():
            if self._is_filled(entry):  # a place for results, no data
                continue
            if entry not in self.good and alone & descendants(self.trace, entry.ref.storage):
                for reading in self.readings.of(entry):
                    if reading.outcome.replay.owned & alone and self._agrees(reading):
                        self.good[entry] = reading
                        break

    def _is_filled(self, entry: Entry) -> bool:
        """Whether all elements of what the pass made are one number."""
        assert entry.mark is not None
        op = self.trace.ops[entry.mark[0] - 1]
        return not op.facts.random and op.name not in ("arange", "linspace", "logspace", "range")

    def _agrees(self, reading: Reading) -> bool:
        """Whether rows belong to the same positions as by every other reading."""
        mine = reading.outcome.rows
        rows = [other.outcome.rows for other in self.good.values()]
        return all(torch.equal(r, mine) for r in rows if bool(((r >= 0) & (mine >= 0)).any()))

    def _add(self, entry: Entry) -> None:
        reading = next(self.readings.of(entry), None)
        if reading is not None:
            self.good[entry] = reading

    def _ask(self, linked: Linked) -> None:
        """Raise where the data flow has two readings, or shows one sample of a larger tensor."""
        n = linked.n
        seeded = {reading.entry for reading in linked.chosen}
        rows = self.frontier.rows
        if n == 1 and not any(row.shape[:1] == (1,) for row in rows) and _many(linked):
            reading, many = linked.chosen[0], next((row.shape[:1] for row in rows), ())
            raise ambiguous(
                f"one sample, since the loss sees one position of {reading}",
                f"{many[0]} samples, the rows of the loss" if many else f"{reading.size} along it",
                (1, *many),
            )
        behind = [r for r in linked.chosen if r.dim and set(r.entry.ref.shape[: r.dim]) == {1}]
        if n > 1 and behind:
            raise ambiguous(
                f"one sample, as {list(behind[0].entry.ref.shape)} has a size of 1 in front",
                f"{n} samples, along {behind[0]}",
                (1, n),
            )
        inner = [r for r in linked.chosen if r.dim and r.entry.ref.shape[0] > 1]
        if n > 1 and inner and len(inner) == len(linked.chosen):
            raise ambiguous(
                f"{n} samples along {inner[0]}, since those along dim 0 are not separate",
                f"{inner[0].entry.ref.shape[0]} samples along dim 0, which the model mixes",
                (n,),
            )
        for entry in self.reaching:
            shape = entry.ref.shape
            if entry not in seeded and n > 1 and 1 in shape and n in shape:
                raise ambiguous(
                    f"one sample, as {list(shape)} has a size of 1",
                    f"{n} samples, along {linked.chosen[0]}",
                    (1, n),
                )

    def _joint(self, linked: Linked) -> Samples:
        vectors = self._with_unused(linked)
        check_pairs(linked, vectors, picking(self.trace, self.readings.silent))
        seeds, claims = self._seeded(linked, vectors)
        n = max(linked.n, *[int(owners.max()) + 1 for owners in vectors])
        self._seed_by_vectors(seeds, claims, linked)
        sizes = {n, *(reading.size for reading in linked.chosen)}
        shared = [r.entry.ref for r in linked.shared]
        seeded = {reading.entry for reading in (*linked.chosen, *linked.shared, *linked.drawn)}
        for entry in self.reaching:
            if entry in seeded or entry.storage in seeds:
                continue
            if n == 1 and 1 in entry.ref.shape:  # the one sample, of which others picked a part
                more = entry.whole()
                seeds.update(more[0])
                claims.update(more[1])
                continue
            if self.batch_size == n and 1 in entry.ref.shape:
                shared.append(entry.ref)
                continue
            packed = bool(dims_of(entry)) and any(self.readings.packed(entry))
            hit = [d for d in dims_of(entry) if entry.ref.shape[d] in sizes or packed]
            outcome = self.readings.read(entry, hit[0]).outcome if n > 1 and hit else None
            # Numbers are data, and so is what looks up parameters (items of a batch); indices of
            # other data are edges, unless a mask is made of them.
            if outcome is not None and (outcome.replay.ragged or not self._is_edge(entry)):
                raise not_separate(outcome.blame(), n, entry.ref)
            if not self._is_index(entry):  # positions and edges are the model's own business
                shared.append(entry.ref)
        samples = self._found(n, seeds, claims, shared)
        strangers = [ref for ref in shared[len(linked.shared) :] if ref.numel > 1]
        replay = samples.filled()
        plainly = replay is None or bool(strangers)
        outcome = self.readings.outcome(seeds, claims) if plainly else None
        if outcome is not None and outcome.mixed:
            raise not_separate(outcome.blame(), n)
        asks = outcome is not None and n > 1 and self.batch_size is None and bool(strangers)
        if asks and outcome is not None and not self._meets_model(outcome, seeds):
            raise ambiguous(
                f"{n} samples along {linked.chosen[0]}, which meet no parameter",
                f"one sample, with {list(strangers[0].shape)} as its data",
                (n, 1),
            )
        samples = self._judged(samples, replay, linked.chosen)
        samples.fed = self._fed(linked.chosen)
        samples.drawn = [reading.entry.ref for reading in linked.drawn]
        for reading in filter(self._seeds_parameters, linked.drawn):
            if (storage := reading.entry.ref.storage) in self.trace.outside:
                samples.picked += [(storage, pick) for pick in reading.outcome.replay.picks]
        owned = [owners[owners >= 0] for owners in vectors]
        packed = any(reading.entry.packed for reading in linked.chosen)
        unique = all(len(o.unique()) == len(o) for o in owned)
        samples.steady = unique and not self.notes and not packed
        return samples

    def _with_unused(self, linked: Linked) -> list[Tensor]:
        """Owners along the readings' dims; samples whose rows a mask left out are samples too."""
        vectors = [linked.owners(reading) for reading in linked.chosen]
        first = vectors[0]
        if all(torch.equal(v, first) for v in vectors) and bool((first == NONE).any()):
            replays = [reading.outcome.replay for reading in linked.chosen]
            drawn = (self._opaque(reading).mixed for reading in linked.chosen)
            if any(replay.masked for replay in replays) and not any(drawn):
                whole = torch.arange(len(first), dtype=DTYPE, device="cpu")
                table = torch.full((linked.n,), NONE, dtype=DTYPE, device="cpu")
                table[first[first >= 0].long()] = whole[first >= 0]
                owned = linked.ids >= 0
                linked.ids[owned] = table[linked.ids[owned].long()]
                return [whole] * len(vectors)
        return vectors

    def _seed_by_vectors(self, seeds: Seeds, claims: Claims, linked: Linked) -> None:
        """Graphs: an integer vector from outside says which sample a row of a tensor belongs to."""
        ids = linked.ids[: self._rows_owned().numel()]
        for entry in self.reaching:
            if entry in self.good or entry.storage is None:
                continue
            for owners in index_vectors(self.trace, entry.ref):
                rows = self.readings.outcome({entry.storage: owners}, {}).rows
                fits = (rows == ids) | (rows == NONE)  # empty graphs and bags
                if not bool((rows == MIXED).any()) and bool(fits[ids >= 0].all()):
                    seeds[entry.storage] = owners
                    self.notes.append(f"{list(entry.ref.shape)} is owned by an index vector")
                    break

    def _refusal(self) -> CurvoptError:
        """Why there is no good reading."""
        for entry in self.reaching:
            for dim in dims_of(entry):
                meeting = self.readings.read(entry, dim).outcome.blame()
                if meeting is not None:
                    return not_separate(meeting, None, entry.ref, single=self.batch_size is None)
        return no_data()

    def _found(self, n: int, seeds: Seeds, claims: Claims, shared: Sequence[Ref] = ()) -> Samples:
        """Samples that no replay has judged so far."""
        loose = frozenset(
            entry.storage
            for entry in self.reaching
            if entry.storage is not None and entry.storage not in seeds
        )
        return Samples(
            n,
            self.trace,
            seeds,
            claims,
            self.frontier,
            torch.empty(0, dtype=DTYPE, device="cpu"),
            self.readings,
            self.again,
            shared=[ref for ref in shared if ref.numel > 1],
            notes=self.notes,
            _loose=loose,
        )

    def _judged(
        self, samples: Samples, replay: Replay | None = None, chosen: Sequence[Reading] = ()
    ) -> Samples:
        """What the trusted joint replay says of the samples, and of the coefficients."""
        replay = replay or samples.filled() or samples.replay()
        samples.value_dependent = replay.value_dependent
        outcome = Outcome(replay, self.frontier)
        samples.owners = outcome.rows
        if bool((outcome.rows == NONE).any()):
            samples.notes.append("rows that hold no sample")
        samples.reads = [read for read in self.trace.reads if read.op in set(replay.reads)]
        weights = [self.readings.read(e, d) for e in self.weights for d in dims_of(e)]
        candidates = [*chosen, *(r for r in weights if r.entry not in self.good)]
        if samples.n > 1:
            samples.weighings = weighings(outcome, candidates, samples.reads)
            seeded = {reading.entry for reading in chosen}
            for entry in self.weights:
                if entry not in seeded and samples.n in entry.ref.shape:
                    samples.weighings += of_data(self.readings, entry, samples.weighings)
        self.readings.forget()
        return samples
