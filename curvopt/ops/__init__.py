"""Rules of torch's ops: one file a family, registered by torch function."""

from curvopt.ops import conv, linear, recurrent  # noqa: F401 (they register themselves)
