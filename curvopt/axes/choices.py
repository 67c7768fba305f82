"""Which readings stand: penalties and tables left out, the others linked."""

from __future__ import annotations

from collections.abc import Sequence, Set
from functools import cached_property
from itertools import islice, product

import torch
from torch import Tensor

from curvopt.axes.kept import Kept, kept
from curvopt.axes.linking import Conflict, Linked, Shared, link
from curvopt.axes.owners import Replay
from curvopt.axes.readings import Claims, Entry, Outcome, Reading, Readings, Seeds
from curvopt.axes.refusals import conflict, contradicts, rows_shared
from curvopt.axes.wiring import only_indexes, parametric, pickings
from curvopt.errors import CurvoptError

# Combinations of readings that are tried, the outermost dims first.
_COMBINATIONS = 64


class Choices:
    """The good readings of a pass, and the choice among them.

    Args:
        readings: of the pass.
        batch_size: number of samples that the choice is to have, if given.
        constants: storages of buffers and of parameters without gradients.
    """

    def __init__(self, readings: Readings, batch_size: int | None, constants: Set[int]):
        self.readings, self.batch_size, self.constants = readings, batch_size, constants
        self.trace, self.frontier = readings.trace, readings.frontier
        self.notes: list[str] = []
        # Entries that reach rows; and those that reach coefficients only.
        self.reaching: list[Entry] = []
        self.weights: list[Entry] = []
        self.good: dict[Entry, Reading] = {}

    def _pack(self) -> None:
        """Read what goes with the rows of packed sequences, token by token, as packed like them."""
        rows = [r.outcome.links >= 0 for r in self.good.values() if r.entry.packed]
        for entry, reading in list(self.good.items()) if rows else ():
            meets = bool((torch.stack(rows).any(0) & (reading.outcome.links >= 0)).any())
            if entry.packed or not meets:
                continue
            options = (r for e in self.readings.packed(entry) for r in self.readings.of(e))
            packed = next(options, None)
            if packed is not None:
                del self.good[entry]
                self.good[packed.entry] = packed
                for entries in (self.reaching, self.weights):
                    entries[:] = [packed.entry if e == entry else e for e in entries]

    def _is_one(self) -> bool:
        """Whether every tensor that could hold samples holds one: a size of 1 stands in front."""
        if self.batch_size == 1 and (self._could_be_one() or self._lies_behind_one()):
            return True
        votes = []
        for entry in (*self.reaching, *self.weights):
            good = self.good.get(entry)
            single = 1 in entry.ref.shape
            if single and (good is None or entry.ref.shape.index(1) < good.dim):
                votes.append(True)
            elif good is not None:
                votes.append(False)
        return bool(votes) and all(votes)

    def _lies_behind_one(self) -> bool:
        """Whether all that goes through the model has a size of 1 in front, as a sequence alone."""
        used = list(filter(self._seeds_parameters, self.good.values()))
        return bool(used) and all(set(r.entry.ref.shape[: r.dim]) == {1} for r in used)

    def _could_be_one(self) -> bool:
        """Whether data without a batch axis, said to be one sample, does not look like a batch.

        A tensor that holds no samples along any dim either has a dim of size 1, or no dim of the
        length that others have samples of.
        """
        sizes = {reading.size for reading in self.good.values()}
        rest = [entry for entry in self.reaching if entry not in self.good]
        batches = [e for e in rest if sizes & set(e.ref.shape) and 1 not in e.ref.shape]
        lonely = [e for e in rest if sizes & set(e.ref.shape) and 1 in e.ref.shape]
        used = any(map(self._seeds_parameters, self.good.values()))
        return bool(rest) and not batches and (bool(lonely) or not used)

    def _leave_penalties(self) -> None:
        """Data that meets parameters element by element is no batch beside that of the model.

        What a penalty pulls parameters to (their start, a mean, an identity matrix) has rows, but
        each of them belongs to other elements of the parameters: they are no samples.
        """
        pieces: list[tuple[Tensor, list[Entry]]] = []  # the rows, and what holds their samples
        for entry, reading in self.good.items():
            rows, entries = reading.outcome.links >= 0, [entry]
            apart = []
            for other, others in pieces:
                if bool((rows & other).any()):
                    rows, entries = rows | other, [*others, *entries]
                else:
                    apart.append((other, others))
            pieces = [*apart, (rows, entries)]
        if len(pieces) < 2:
            return
        alone = [e for _, e in pieces if all(self._meets_parameters(self.good[x]) for x in e)]
        for entry in [x for e in alone for x in e] if len(alone) < len(pieces) else ():
            del self.good[entry]
            self.notes.append(f"{list(entry.ref.shape)} meets parameters alone")
            if entry in self.reaching:
                self.reaching.remove(entry)

    def _meets_parameters(self, reading: Reading) -> bool:
        """Whether a parameter has the samples' axis where it meets this data."""
        trace = self.trace
        weights = {s for s in self.readings.silent if s in trace.outside}
        seeds, claims = reading.entry.seed(trace, reading.dim)
        only = self.readings.only
        replay = Replay(trace, seeds, claims=claims, loose=weights, spread=False, only=only).run()
        return bool(replay.outsiders)

    def _rows_owned(self) -> Tensor:
        length = sum(torch.Size(row.shape).numel() for row in self.frontier.rows)
        owned = torch.zeros(length, dtype=torch.bool, device="cpu")
        for reading in self.good.values():
            owned |= reading.outcome.rows >= 0
        return owned

    def _linked(self) -> Linked:
        """The outermost readings that fit together, and `batch_size`."""
        wanted = self.batch_size
        first: Linked | CurvoptError
        try:
            first = self._try(list(self.good.values()))
            if wanted is None or first.n == wanted:
                return first
        except CurvoptError as error:
            first = error
        options = [list(self.readings.of(entry)) for entry in self.good]
        found = [first] if isinstance(first, Linked) else []
        for choice in islice(product(*options), _COMBINATIONS):
            try:
                linked = self._try(list(choice))
            except CurvoptError:
                continue
            if wanted is None or linked.n == wanted:
                return linked
            found.append(linked)
        for linked in found:
            overlaid = linked.overlaid(wanted or 0)
            if overlaid is not None:
                return overlaid
        if isinstance(first, CurvoptError):
            rest = self._without_tables() or self._without_constants()
            if rest is None:
                raise first
            return rest
        raise contradicts(wanted or 0, first.n, first.chosen)

    def _without_tables(self) -> Linked | None:
        """Leave out integers that index a table: the other data own all rows."""
        tables = [entry for entry in self.good if self._is_index(entry)]
        kept = [reading for entry, reading in self.good.items() if entry not in tables]
        # One element of many for all samples is one of theirs (a label), and no table.
        single = any(self.good[e].values.numel() == 1 < self.good[e].size for e in tables)
        if not tables or not kept or single:
            return None
        try:
            linked = self._try(kept)
        except CurvoptError:
            return None
        for entry in tables:
            if bool(((self.good[entry].outcome.links >= 0) & (linked.ids < 0)).any()):
                return None
        for entry in tables:
            del self.good[entry]
        return linked

    def _without_constants(self) -> Linked | None:
        """Leave out what broadcasts against the batch: weights of classes, scales of targets.

        The model's data, and all that fits it, own every row, and nothing that is left out has a
        dim as long as there are samples.
        """
        kept = {e: r for e, r in self.good.items() if self._seeds_parameters(r)}
        left, linked = [], None
        try:
            linked = self._try(list(kept.values())) if kept else None
        except CurvoptError:
            return None
        for entry in self.good:
            if entry not in kept:
                try:
                    linked = self._try([*kept.values(), self.good[entry]])
                    kept[entry] = self.good[entry]
                except CurvoptError:
                    left.append(entry)
        if linked is None or self.batch_size not in (None, linked.n):
            return None
        owned = all(
            not bool(((self.good[entry].outcome.links >= 0) & (linked.ids < 0)).any())
            for entry in left
        )
        if not owned or any(linked.n in entry.ref.shape for entry in left):
            return None
        for entry in left:
            del self.good[entry]
        return linked

    @cached_property
    def _pure(self) -> set[int]:
        """Ops with an input that is made of parameters and buffers alone."""
        return parametric(self.trace, self.readings.silent, self._outside()) & self.readings.only

    def _seeds_parameters(self, reading: Reading) -> bool:
        """Whether samples of a reading meet parameters: its tensor goes through the model."""
        return bool(reading.outcome.replay.owned & self._pure)

    def _feeds(self, entry: Entry) -> bool:
        """Whether a tensor goes through the model."""
        return bool(self.readings.whole(entry).replay.owned & self._pure)

    def _meets_model(self, outcome: Outcome, seeds: Seeds) -> bool:
        """Whether samples meet parameters; masks and indices that are no data may be in them."""
        weights = {
            self.trace.outside[s].shape for s in self.readings.silent & set(self.trace.outside)
        }
        masks = {
            e.storage
            for e in self.reaching
            if (e.ref.ndim > 1 and e.ref.shape in weights) or self._is_index(e)
        }
        data = self._outside() - (masks - set(seeds))
        pure = parametric(self.trace, self.readings.silent, data)
        return bool(outcome.replay.owned & pure & self.readings.only)

    def _fed(self, readings: list[Reading]) -> frozenset[int]:
        """Storages from outside that samples go through the model from."""
        fed = [reading.entry for reading in readings if self._seeds_parameters(reading)]
        return frozenset(s for entry in fed for s in entry.group or (entry.ref.storage,))

    def _look_at_constants(self, linked: Linked) -> None:
        """Raise where buffers, or parameters without gradients, hold rows of the samples."""
        if self.constants:
            seeds, claims = self._seeded(linked, [linked.owners(r) for r in linked.chosen])
            found = frozenset(kept(self.readings, self.constants, seeds, claims, linked.n))
            if found:
                raise Kept(found)

    def _seeded(self, linked: Linked, vectors: Sequence[Tensor]) -> tuple[Seeds, Claims]:
        """What the readings say together, given the owners along their dims."""
        seeds: Seeds = {}
        claims: Claims = {}
        for reading, owners in zip(linked.chosen, vectors, strict=True):
            more = reading.entry.seed(self.trace, reading.dim, owners)
            seeds.update(more[0])
            claims.update(more[1])
        return seeds, claims

    def _try(self, readings: list[Reading]) -> Linked:
        try:
            return link(
                readings,
                self._opaque,
                lambda reading: self._drawn(reading, readings),
                in_order=len(self.frontier.rows) == 1,
            )
        except Conflict as error:
            raise conflict(error) from None
        except Shared as error:
            raise rows_shared(error.reading, max(r.values.numel() for r in readings)) from None

    def _opaque(self, reading: Reading) -> Outcome:
        return self.readings.outcome(*reading.entry.seed(self.trace, reading.dim), opaque=True)

    def _drawn(self, reading: Reading, readings: list[Reading]) -> bool:
        """Whether all that is read of a tensor is picked by indices that belong to samples."""
        picks = set(reading.outcome.replay.picks)
        if not picks:
            return False
        seeds: Seeds = {}
        claims: Claims = {}
        for other in readings:
            if other.entry != reading.entry:
                more = other.entry.seed(self.trace, other.dim)
                seeds.update(more[0])
                claims.update(more[1])
        marked = self.readings.outcome(seeds, claims, marks=picks).replay.marked
        states = [marked[pick] for pick in picks]
        return all(s is not None and bool((s.owners >= 0).all()) for s in states)

    def _is_index(self, entry: Entry) -> bool:
        """Whether it says which elements to take, and is no number of a sample's."""
        if entry.floating or entry.storage is None:
            return False
        return only_indexes(self.trace, entry.storage)

    def _is_edge(self, entry: Entry) -> bool:
        """Whether it is an index that picks from no table of parameters."""
        if not self._is_index(entry):
            return False
        assert entry.storage is not None
        picked = pickings(self.trace, entry.storage)
        return not any(ref.storage in self.readings.silent for ref in picked)

    def _outside(self) -> set[int]:
        """Storages of data."""
        return set(self.trace.outside) - self.readings.silent
