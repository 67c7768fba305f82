"""One small rule per kind of op: from the owners of its inputs to those of its outputs."""

from curvopt.axes.rules import (
    contractions,
    elementwise,
    gradients,
    indexing,
    kernels,
    losses,
    movement,
    packed,
    reductions,
    scattering,
)
from curvopt.axes.rules.base import KNOWS_RAGGED, RULES, Call, Refuse, Result, Rule, rule
from curvopt.axes.rules.elementwise import made, rule_for
from curvopt.axes.rules.losses import LOSSES

__all__ = [
    "KNOWS_RAGGED",
    "LOSSES",
    "RULES",
    "Call",
    "Refuse",
    "Result",
    "Rule",
    "contractions",
    "elementwise",
    "gradients",
    "indexing",
    "kernels",
    "losses",
    "made",
    "movement",
    "packed",
    "reductions",
    "rule",
    "rule_for",
    "scattering",
]
