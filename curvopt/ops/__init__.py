"""Rules of torch's ops: one file a family, registered by torch function."""

from curvopt.ops import (  # noqa: F401 (they register themselves)
    arithmetic,
    attention,
    bilinear,
    conv,
    embedding,
    linear,
    norm,
    recurrent,
    transposed,
)
