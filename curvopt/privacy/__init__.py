"""Differential privacy: how batches are drawn, what steps cost, where the noise comes from.

:func:`plan` makes the parts of a run from its budget: it draws batches with
:class:`PoissonBatchSampler`, has the noise multiplier of :func:`calibrate_noise`, and trains with
:class:`curvopt.DPSGD`, whose report says what was spent.
Accounting needs ``dp-accounting`` (``pip install 'curvopt-for-pytorch[privacy]'``), nothing else
here does.
"""

from curvopt.privacy.accounting import PrivacyLedger, calibrate_noise
from curvopt.privacy.averaging import weight_average
from curvopt.privacy.clipping import QuantileClipping
from curvopt.privacy.loaders import sampler_kind
from curvopt.privacy.noise import GaussianNoise, gaussian_noise
from curvopt.privacy.planning import PrivatePlan, plan
from curvopt.privacy.report import Phase, PrivacyReport
from curvopt.privacy.sampling import (
    EmptyBatchCollate,
    MicroBatchSampler,
    PoissonBatchSampler,
    micro_batches,
)
from curvopt.privacy.schedules import (
    CosineSchedule,
    ExponentialSchedule,
    LinearSchedule,
    PiecewiseSchedule,
    Schedule,
    value_at,
)
from curvopt.privacy.trainer import PrivateTrainerMixin

__all__ = [
    "CosineSchedule",
    "EmptyBatchCollate",
    "ExponentialSchedule",
    "GaussianNoise",
    "LinearSchedule",
    "MicroBatchSampler",
    "Phase",
    "PiecewiseSchedule",
    "PoissonBatchSampler",
    "PrivacyLedger",
    "PrivacyReport",
    "PrivatePlan",
    "PrivateTrainerMixin",
    "QuantileClipping",
    "Schedule",
    "calibrate_noise",
    "gaussian_noise",
    "micro_batches",
    "plan",
    "sampler_kind",
    "value_at",
    "weight_average",
]
