"""Rows link readings: which position of one tensor belongs to which of another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from curvopt.axes.lattice import DTYPE, NONE
from curvopt.axes.readings import Outcome, Reading


class Conflict(Exception):
    """Two readings belong to different samples: neither is a function of the other."""

    def __init__(self, reading: Reading, others: Sequence[Reading]):
        super().__init__()
        self.reading, self.others = reading, list(others)


class Shared(Exception):
    """One row of a tensor that looks like data is met by several samples."""

    def __init__(self, reading: Reading):
        super().__init__()
        self.reading = reading


@dataclass
class Linked:
    """Samples that several readings agree on.

    Attributes:
        ids: by position of the linked rows and products, the sample or -1.
        chosen: the readings whose tensors are seeded.
        shared: readings of tensors that all samples see, or that several draw from.
        drawn: readings of tensors that samples draw from by indices of their own.
    """

    ids: Tensor
    chosen: list[Reading] = field(default_factory=list)
    shared: list[Reading] = field(default_factory=list)
    drawn: list[Reading] = field(default_factory=list)

    @property
    def n(self) -> int:
        """Number of samples."""
        return int(torch.unique(self.ids[self.ids >= 0]).numel())

    def owners(self, reading: Reading) -> Tensor:
        """The samples of the positions of a reading's dim; -1 for positions that reach no row."""
        links = reading.outcome.links
        known = (links >= 0) & (self.ids >= 0)
        owners = torch.full((reading.size,), NONE, dtype=DTYPE, device="cpu")
        owners[links[known].long()] = self.ids[known]
        return owners

    def renumber(self, readings: Sequence[Reading]) -> None:
        """Samples get the numbers from 0 on: the pieces of a batch in the order of the readings."""
        owned = self.ids >= 0
        ids = torch.unique(self.ids[owned], return_inverse=True)[1]
        count = int(ids.max()) + 1 if len(ids) else 0
        piece = torch.full((count,), len(readings), device="cpu")
        self.ids[owned] = ids.to(DTYPE)
        for _ in range(2):  # a tensor that comes later may show that two pieces are one
            for number, reading in enumerate(readings):
                both = (reading.outcome.links >= 0) & owned
                members = self.ids[both].long()
                if len(members):
                    piece[members] = torch.minimum(
                        piece[members].min(), torch.tensor(number, device="cpu")
                    )
        order = torch.argsort(piece, stable=True)
        places = torch.empty_like(order)
        places[order] = torch.arange(count, device="cpu")
        self.ids[owned] = places[ids].to(DTYPE)

    def overlaid(self, size: int) -> Linked | None:
        """Rows i of several tensors of this size as one sample (views of it), if that fits all."""
        ids = torch.full_like(self.ids, NONE)
        for reading in self.chosen:
            links = reading.outcome.links
            if reading.size == size:
                owned = (links >= 0) & (self.ids >= 0)
                table = torch.full((int(self.ids.max()) + 1,), NONE, dtype=DTYPE, device="cpu")
                table[self.ids[owned].long()] = links[owned]
                fresh = (self.ids >= 0) & (ids < 0)
                ids[fresh] = table[self.ids[fresh].long()]
        if bool(((self.ids >= 0) & (ids < 0)).any()):
            return None
        return Linked(ids, self.chosen, self.shared, self.drawn)


def link(
    readings: Sequence[Reading],
    opaque: Callable[[Reading], Outcome],
    drawn: Callable[[Reading], bool],
    *,
    in_order: bool = False,
) -> Linked:
    """Lay the readings together; those that share no row hold samples of their own.

    Args:
        readings: the readings, one per tensor.
        opaque: replays a reading without a look at index values.
        drawn: whether a tensor is read by indices that belong to samples, and not otherwise.
        in_order: samples that share no row are numbered as they stand in the rows, in place of the
            order of the readings.

    Raises:
        Conflict: two readings do not fit together.
        Shared: one row of what looks like data serves several samples.
    """
    ordered = sorted(readings, key=lambda r: (not r.outcome.touches, -r.values.numel()))
    length = readings[0].outcome.links.numel()
    linked = Linked(torch.full((length,), NONE, dtype=DTYPE, device="cpu"))
    largest = max(r.values.numel() for r in readings)
    sizes = {largest, *(r.size for r in readings if not r.outcome.replay.picks)}
    fresh, groups = 0, [0]
    for reading in ordered:
        # A tensor as long as there are samples, with those that a mask left out, may be data of the
        # batch, picked across it.
        if reading.size not in sizes and drawn(reading):
            linked.drawn.append(reading)
            continue
        links, ids = reading.outcome.links, linked.ids
        both = (links >= 0) & (ids >= 0)
        known: dict[int, int] = {}
        if not bool(both.any()):
            groups.append(fresh)
        else:
            pairs = torch.unique(torch.stack([ids[both], links[both]]), dim=1)
            count = pairs.shape[1]
            of_ids = torch.unique(pairs[0]).numel() == count
            of_links = torch.unique(pairs[1]).numel() == count
            if of_ids and not of_links:
                if _is_shared(reading, largest, opaque):
                    linked.shared.append(reading)
                    continue
                _coarsen(linked, pairs)
                both = (links >= 0) & (linked.ids >= 0)
                pairs = torch.unique(torch.stack([linked.ids[both], links[both]]), dim=1)
            elif not of_links:
                raise Conflict(reading, linked.chosen)
            known = dict(zip(pairs[1].tolist(), pairs[0].tolist(), strict=True))
        values = reading.values.tolist()
        if len(values) < reading.size:  # drawn from a larger set: in the order of the rows
            values = list(dict.fromkeys(links[links >= 0].tolist()))
        if not reading.outcome.touches:  # it weighs rows, and has no samples of its own
            values = [value for value in values if value in known]
            if not values:
                continue
        table = torch.full((reading.size,), NONE, dtype=DTYPE, device="cpu")
        for value in values:
            if value not in known:
                known[value] = fresh
                fresh += 1
            table[value] = known[value]
        ids = linked.ids
        new = (links >= 0) & (ids < 0)
        if reading.outcome.touches:
            ids[new] = table[links[new].long()]
        fresh = max(fresh, int(ids.max()) + 1)
        linked.chosen.append(reading)
    if in_order:
        _order(linked, groups)
    linked.renumber([] if in_order else readings)
    return linked


def _order(linked: Linked, starts: list[int]) -> None:
    """Groups of samples that share no row get their numbers in the order of the loss's rows."""
    owned = linked.ids >= 0
    ids = linked.ids[owned].long()
    bounds = torch.tensor(sorted({*starts, int(ids.max()) + 1 if len(ids) else 1}), device="cpu")
    group = torch.searchsorted(bounds, ids, right=True) - 1
    seen = list(dict.fromkeys(group.tolist()))
    if seen == sorted(seen):
        return
    table = torch.zeros(len(bounds), dtype=torch.long, device="cpu")
    for place, number in enumerate(seen):
        table[number] = place * (int(ids.max()) + 1)
    linked.ids[owned] = (ids + table[group]).to(DTYPE)


def _coarsen(linked: Linked, pairs: Tensor) -> None:
    """Samples that share a row of another tensor are one sample."""
    first: dict[int, int] = {}
    table = torch.arange(int(linked.ids.max()) + 1, dtype=DTYPE, device="cpu")
    for sample, position in pairs.t().tolist():
        table[sample] = first.setdefault(position, sample)
    owned = linked.ids >= 0
    linked.ids[owned] = table[linked.ids[owned].long()]


def _is_shared(reading: Reading, largest: int, opaque: Callable[[Reading], Outcome]) -> bool:
    """Whether several samples draw from one row of it, as from a table."""
    entry, used = reading.entry, reading.values.numel()
    outside = entry.storage is not None or entry.mark is not None
    # Numbers are data; of indices, which may be positions, that one serves all is a sign of it.
    data = outside and (entry.floating or used == 1)
    if data and used < reading.size and 1 < largest in entry.ref.shape:
        raise Shared(reading)
    if used == 1:
        return True
    return opaque(reading).mixed or used < reading.size
