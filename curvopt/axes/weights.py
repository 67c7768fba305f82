"""What multiplies the rows of a loss and depends on several samples: counts, normalizations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from curvopt.axes.ops import Read, Ref
from curvopt.axes.readings import Entry, Outcome, Reading, Readings
from curvopt.axes.rows import Row
from curvopt.axes.trace import Trace
from curvopt.axes.wiring import ancestors


class Weighing(NamedTuple):
    """Something that multiplies rows and depends on several samples.

    Attributes:
        kind: "coefficient" (a tensor), "count" (of a mean, over rows that a mask left), "number"
            (that Python read from the samples).
        op: the op that multiplies or divides, or takes the mean.
        why: what is said of it.
    """

    kind: str
    op: int
    why: str


def weighings(outcome: Outcome, readings: list[Reading], reads: list[Read]) -> list[Weighing]:
    """What multiplies the rows and depends on several samples.

    Args:
        outcome: of the joint replay.
        readings: those that may tell which data it is.
        reads: numbers that Python read from the samples.
    """
    trace, frontier = outcome.replay.trace, outcome.frontier
    found: dict[int, Weighing] = {}

    def add(kind: str, op: int, why: str) -> None:
        found.setdefault(op, Weighing(kind, op, why))

    for reading in readings:
        for k in () if reading.outcome.mixed else reading.outcome.weighing:
            shape = list(reading.entry.ref.shape)
            add("coefficient", k, f"a coefficient depends on several rows of {shape}")
    for k in outcome.weighing:
        why = "a coefficient depends on other samples than the rows that it multiplies"
        add("coefficient", k, why)
    for k, ref in frontier.means:
        state = outcome.replay.marked[k, ref]
        if state is not None and state.ragged is not None:
            shape = list(ref.shape)
            add("count", k, f"a mean goes over {shape}, whose length depends on the samples")
    for k in sorted(outcome.replay.counted):
        if _is_mean(trace, k):
            why = "a mean goes over the rows that a mask left: their number depends on the samples"
            add("count", k, why)
    for row in frontier.rows:
        for k in _counts(trace, row):
            why = "a mean goes over rows picked by a mask: their number belongs to the batch"
            add("count", k, why)
    passed = [p for row in frontier.rows for path in row.paths for p in path]
    for read in reads:
        for p in passed:
            if isinstance(read.value, int | float) and p.number == read.value:
                why = f"the loss is scaled by {read.value}, which Python read from the samples"
                add("number", p.op, why)
    return list(found.values())


def of_data(readings: Readings, entry: Entry, known: list[Weighing]) -> list[Weighing]:
    """Coefficients made of data that has as many rows as there are samples."""
    states = readings.whole(entry).coefficients
    coefficients = zip(readings.frontier.coefficients, states, strict=True)
    ops = {c.op for c, state in coefficients if state is not None} - {w.op for w in known}
    why = f"a coefficient is made of data of shape {list(entry.ref.shape)}"
    return [Weighing("coefficient", k, why) for k in sorted(ops)]


def _is_mean(trace: Trace, k: int) -> bool:
    op = trace.ops[k]
    return "reduction" in op.facts.arguments and op.argument("reduction") == 1


def _counts(trace: Trace, row: Row) -> Iterator[int]:
    """Means that were passed above a choice by a mask."""
    for path in row.paths:
        mean = None
        for passed in path:
            mean = passed.op if passed.name == "mean" else mean
            if mean is not None and passed.name in ("index", "masked_select"):
                inputs = trace.ops[passed.op].inputs
                if any(_is_mask(trace, passed.op, inputs[i]) for i in passed.data):
                    yield mean


def _is_mask(trace: Trace, k: int, ref: Ref) -> bool:
    if ref.dtype == torch.bool:
        return True
    return any(trace.ops[j].name == "nonzero" for j in ancestors(trace, ref, before=k))
