"""The one way in which this folder refuses an argument."""

from __future__ import annotations

from curvopt.errors import CurvoptError


def require(holds: bool, name: str, value: object, rule: str) -> None:
    """Raise ``CurvoptError("Invalid {name}: {value} ({rule})")`` unless ``holds``.

    Written as a condition that must hold, so that a NaN is refused too.
    """
    if not holds:
        raise CurvoptError(f"Invalid {name}: {value} ({rule})")
