"""Samples that come one by one, each in tensors of its own, as in a loop over them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from curvopt.axes.lattice import NONE
from curvopt.axes.readings import Claims, Entry, Readings, Seeds


class Pieces:
    """Tensors that reach the loss, told apart by the rows that they reach.

    Args:
        readings: of the pass.
        entries: the tensors.
        feeds: whether a tensor goes through the model.

    Attributes:
        samples: pieces that share no row, each with data that goes through the model, in the order
            in which the pass met them. Empty if that is one piece.
        common: what reaches all rows, where the others are pieces beside it alone.
    """

    def __init__(
        self, readings: Readings, entries: Sequence[Entry], feeds: Callable[[Entry], bool]
    ):
        self.readings, self.feeds = readings, feeds
        self.rows = {entry: readings.whole(entry).rows != NONE for entry in entries}
        self.common: list[Entry] = []
        self.samples = self._told(list(entries))
        if not self.samples:
            common = [entry for entry, rows in self.rows.items() if bool(rows.all())]
            self.samples = self._told([entry for entry in entries if entry not in common])
            self.common = common if self.samples else []

    def _told(self, entries: list[Entry]) -> list[list[Entry]]:
        pieces: list[tuple[Tensor, list[Entry]]] = []
        for entry in entries:
            rows, mine = self.rows[entry], [entry]
            rest = []
            for other, theirs in pieces:
                if bool((other & rows).any()):
                    rows, mine = rows | other, [*theirs, *mine]
                else:
                    rest.append((other, theirs))
            pieces = [*rest, (rows, mine)]
        if len(pieces) < 2 or not bool(torch.stack([rows for rows, _ in pieces]).any(0).all()):
            return []
        if not all(any(map(self.feeds, piece)) for _, piece in pieces):
            return []
        return sorted((piece for _, piece in pieces), key=lambda p: min(map(entries.index, p)))

    @property
    def stacked(self) -> bool:
        """Whether as many losses as there are pieces are put side by side."""
        ops = self.readings.trace.ops
        return any(
            ops[k].name in ("stack", "cat") and len(ops[k].inputs) == len(self.samples)
            for k in self.readings.only
        )

    def seeds(self, weights: Sequence[Entry]) -> tuple[Seeds, Claims]:
        """Owners of the data, and of what weighs the rows of one piece alone."""
        seeds: Seeds = {}
        claims: Claims = {}

        def own(entry: Entry, number: int) -> None:
            more = entry.whole(number)
            seeds.update(more[0])
            claims.update(more[1])

        reach = []
        for number, piece in enumerate(self.samples):
            links = torch.stack([self.readings.whole(entry).links != NONE for entry in piece])
            reach.append(links.any(0))
            for entry in piece:
                own(entry, number)
        for entry in weights:
            weighed = self.readings.whole(entry).links != NONE
            met = [number for number, links in enumerate(reach) if bool((links & weighed).any())]
            if len(met) == 1:
                own(entry, met[0])
        return seeds, claims
