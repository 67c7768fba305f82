"""Schedules of the noise multiplier and the clipping norm, which look at the step and nothing else.

A schedule is any function from the number of finished steps to a value. A value that depends on the
data, such as a validation loss, would have to be paid for: see
:class:`~curvopt.privacy.QuantileClipping` for one that is. ``every`` keeps a value for that many
steps: accounting with PLD costs a fraction of a second per *distinct* noise multiplier.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from curvopt.privacy.checks import require

Schedule = Callable[[int], float]


def value_at(schedule: float | Schedule, step: int) -> float:
    """The value of a schedule, or of a constant, after ``step`` finished steps."""
    return float(schedule(step) if callable(schedule) else schedule)


@dataclass(frozen=True)
class LinearSchedule:
    """From ``start`` to ``end`` in ``steps`` steps along a line, then ``end``.

    Example:
        >>> from curvopt.privacy import LinearSchedule
        >>> LinearSchedule(2.0, 1.0, steps=10)(5)
        1.5
    """

    start: float
    end: float
    steps: int
    every: int = 1

    def __post_init__(self) -> None:
        """Refuse empty intervals."""
        require(self.steps > 0, "schedule length", self.steps, "must be positive")
        require(self.every > 0, "schedule interval", self.every, "must be positive")

    def __call__(self, step: int) -> float:
        """The value after ``step`` finished steps."""
        return self.start + (self.end - self.start) * self._progress(step)

    def _progress(self, step: int) -> float:
        return min(step // self.every * self.every, self.steps) / self.steps


@dataclass(frozen=True)
class CosineSchedule(LinearSchedule):
    """From ``start`` to ``end`` in ``steps`` steps along half a cosine, then ``end``."""

    def _progress(self, step: int) -> float:
        return (1 - math.cos(math.pi * super()._progress(step))) / 2


@dataclass(frozen=True)
class ExponentialSchedule:
    """``start * decay ** k`` after ``k`` times ``every`` steps.

    Example:
        >>> from curvopt.privacy import ExponentialSchedule
        >>> ExponentialSchedule(2.0, decay=0.5, every=100)(250)
        0.5
    """

    start: float
    decay: float
    every: int = 1

    def __post_init__(self) -> None:
        """Refuse empty intervals."""
        require(self.every > 0, "schedule interval", self.every, "must be positive")

    def __call__(self, step: int) -> float:
        """The value after ``step`` finished steps."""
        return self.start * self.decay ** (step // self.every)


@dataclass(frozen=True)
class PiecewiseSchedule:
    """Constants and schedules one after the other, each counting from its own first step.

    Args:
        pieces: First step of a piece -> its constant or schedule; one must start at 0.

    Example:
        >>> from curvopt.privacy import LinearSchedule, PiecewiseSchedule
        >>> PiecewiseSchedule({0: 1.5, 100: LinearSchedule(1.5, 0.7, steps=200)})(200)
        1.1
    """

    pieces: Mapping[int, float | Schedule]

    def __post_init__(self) -> None:
        """Refuse a schedule without a value at the first step."""
        require(min(self.pieces, default=1) == 0, "pieces", self.pieces, "one must start at step 0")

    def __call__(self, step: int) -> float:
        """The value after ``step`` finished steps."""
        first = max(start for start in self.pieces if start <= step)
        return value_at(self.pieces[first], step - first)
