"""Batches kept where constants are: in buffers, and in parameters without gradients.

What has a row for every sample where it meets them is data of theirs. Batches are found by hope:
what is made of all rows at once is overlooked as long as something else says which row is whose.
That is no proof. It tells what to look at as data, and how samples lie there is proved of that.
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from typing import Any

import torch
from torch import Tensor

from curvopt.axes.lattice import MIXED, State, along
from curvopt.axes.ops import INDEXED, Ref
from curvopt.axes.owners import Replay
from curvopt.axes.readings import Claims, Readings, Seeds
from curvopt.axes.rules import Rule
from curvopt.axes.wiring import Step


class Kept(Exception):
    """Storages of buffers and of parameters without gradients that hold rows of the samples."""

    def __init__(self, storages: Set[int]):
        super().__init__()
        self.storages = storages


class _Noting(Replay):
    """Keeps the states of what every op takes and makes."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.states: dict[int, tuple[list[State | None], list[State | None]]] = {}

    def _apply(
        self, step: Step, rule: Rule | None, states: list[State | None]
    ) -> list[State | None]:
        results = super()._apply(step, rule, states)
        self.states[step.index] = states, results
        return results


class _Hoping(Replay):
    """Follows the rows of a constant to where they meet samples.

    Attributes:
        sample: by row, the sample that it meets.
        over: a row meets several samples, or a sample several rows.
    """

    def __init__(self, noted: _Noting, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.noted, self.live = noted, set(self._views)
        self.sample: dict[int, int] = {}
        self.over = False

    def _replay(self, step: Step) -> None:
        if not self.over and any(ref.storage in self.live for ref in step.inputs):
            super()._replay(step)
            self.live.update(ref.storage for ref in (*step.outputs, *step.written))

    def _apply(
        self, step: Step, rule: Rule | None, states: list[State | None]
    ) -> list[State | None]:
        nothing: list[State | None] = [None] * len(step.outputs)
        theirs, made = self.noted.states.get(step.index, ([], nothing))
        if step.name in INDEXED and any(state is not None for state in theirs[1:]):
            return nothing  # a table, from which samples draw
        clear = [None if state is None or _lost(state) else state for state in states]
        if not any(state is not None for state in clear):
            return nothing
        results = super()._apply(step, rule, clear)
        if not any(state is not None for state in theirs):
            results = [
                _in_place(step, ref, clear) if result is not None and _lost(result) else result
                for ref, result in zip(step.outputs, results, strict=True)
            ]
        for mine, their in zip(results, made, strict=True):
            if mine is not None and their is not None:
                self._meet(mine.owners, their.owners)
        if step.index in self.rows and step.index in self.noted.rows:
            self._meet(self.rows[step.index], self.noted.rows[step.index])
        return [None if result is None or _lost(result) else result for result in results]

    def _meet(self, rows: Tensor, samples: Tensor) -> None:
        rows, samples = torch.broadcast_tensors(rows, samples)
        both = (rows >= 0) & (rows != MIXED) & (samples >= 0) & (samples != MIXED)
        pairs = torch.unique(torch.stack([rows[both], samples[both]]), dim=1).t().tolist()
        for row, sample in pairs:
            self.over = self.over or self.sample.setdefault(row, sample) != sample
        self.over = self.over or len(set(self.sample.values())) < len(self.sample)


def _in_place(step: Step, output: Ref, states: list[State | None]) -> State | None:
    """Rows of what depends on all rows, where they surely stay in place: of a norm, say.

    They do not in a product, where an axis of the same length takes the place of theirs.
    """
    alike = [n for n, ref in enumerate(step.inputs) if ref.ndim >= output.ndim]
    stays = len(alike) == 1 and step.inputs[alike[0]].shape == output.shape
    return states[alike[0]] if stays else None


def _lost(state: State) -> bool:
    return bool((state.owners == MIXED).all())


def kept(
    readings: Readings, constants: Set[int], seeds: Seeds, claims: Claims, n: int
) -> Iterator[int]:
    """Storages among the constants that have a row for every sample.

    Args:
        readings: of the pass.
        constants: storages of buffers, and of parameters without gradients.
        seeds: owners of the data, by storage from outside.
        claims: owners of data at places of the pass.
        n: number of samples.
    """
    trace, only = readings.trace, readings.only
    entered = {ref.storage for k in only for ref in trace.ops[k].inputs}
    outside = trace.outside
    candidates = [
        (storage, dim)
        for storage in sorted(constants & entered & outside.keys())
        for dim, size in enumerate(outside[storage].shape)
        if size == n > 1
    ]
    if not candidates:
        return
    noted = _Noting(trace, seeds, claims=claims, only=only)
    noted.run()
    for storage, dim in candidates:
        rows = {storage: along(outside[storage].shape, dim)}
        replay = _Hoping(noted, trace, rows, only=only)
        replay.run()
        if not replay.over and len(replay.sample) > 1:
            yield storage
