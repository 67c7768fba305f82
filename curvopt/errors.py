"""The package's one exception type, and its one warning."""


class CurvoptError(ValueError):
    """Something cannot be computed exactly; the message says where, what was got, what to do."""


class Coupled(CurvoptError):
    """The loss, as it was recorded, is no sum over samples."""


class NoSamples(CurvoptError):
    """Nothing but parameters and buffers was seen to reach the loss."""


class Uncovered(CurvoptError):
    """A use that its op's rule does not cover after all; the engine takes the slow path."""


class SlowPathWarning(UserWarning):
    """Something is computed exactly, but slowly: one sample or element at a time."""


SCALED = (
    "GradScaler scales the loss, and with it everything that is computed beside the gradient, by a "
    "number that is not known here: use torch.autocast with bfloat16, which needs no scaling. "
    "(DiagGGNOptimizer and VarianceAdaptiveSGD take scaler.step(opt) without scaler.unscale_(opt))"
)
