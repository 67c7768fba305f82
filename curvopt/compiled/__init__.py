"""One graph per step: `curvopt.compile`."""

from curvopt.compiled.step import CompiledStep, compile

__all__ = ["CompiledStep", "compile"]
