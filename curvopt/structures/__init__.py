"""Structures: per-sample gradients that are known without being formed (see `base`)."""

from curvopt.structures.base import Dense, Mended, Structure
from curvopt.structures.conv import Conv
from curvopt.structures.elementwise import Scale, Shift
from curvopt.structures.folded import Folded
from curvopt.structures.formed import Formed
from curvopt.structures.kronecker import Factors
from curvopt.structures.lookup import Lookup
from curvopt.structures.outer import Outer
from curvopt.structures.own import Own
from curvopt.structures.permuted import Permuted
from curvopt.structures.total import Disjoint, Pulled, Tied, Total, total

__all__ = [
    "Conv",
    "Dense",
    "Disjoint",
    "Factors",
    "Folded",
    "Formed",
    "Lookup",
    "Mended",
    "Outer",
    "Own",
    "Permuted",
    "Pulled",
    "Scale",
    "Shift",
    "Structure",
    "Tied",
    "Total",
    "total",
]
