"""Where the samples of a pass are: record its ops, replay them on owners, prove them apart."""

from curvopt.axes.infer import infer
from curvopt.axes.lattice import MIXED, NONE, State
from curvopt.axes.ops import Op, Ref
from curvopt.axes.owners import Replay
from curvopt.axes.rows import Frontier, Passed, Row, frontier
from curvopt.axes.samples import Samples
from curvopt.axes.trace import Trace

__all__ = [
    "MIXED",
    "NONE",
    "Frontier",
    "Op",
    "Passed",
    "Ref",
    "Replay",
    "Row",
    "Samples",
    "State",
    "Trace",
    "frontier",
    "infer",
]
