"""Differential privacy: how batches are drawn, what steps cost, where the noise comes from.

A private run draws its batches with :class:`PoissonBatchSampler`, finds its noise multiplier with
:func:`calibrate_noise`, trains with :class:`curvopt.DPSGD` and prints the ledger's report.
Accounting needs ``dp-accounting`` (``pip install 'curvopt-for-pytorch[privacy]'``), nothing else
here does.
"""

from curvopt.privacy.accounting import PrivacyLedger, calibrate_noise
from curvopt.privacy.clipping import QuantileClipping
from curvopt.privacy.noise import GaussianNoise, gaussian_noise
from curvopt.privacy.report import Phase, PrivacyReport
from curvopt.privacy.sampling import (
    EmptyBatchCollate,
    PoissonBatchSampler,
    micro_batches,
    sampler_kind,
)
from curvopt.privacy.schedules import (
    CosineSchedule,
    ExponentialSchedule,
    LinearSchedule,
    PiecewiseSchedule,
    Schedule,
    value_at,
)

__all__ = [
    "CosineSchedule",
    "EmptyBatchCollate",
    "ExponentialSchedule",
    "GaussianNoise",
    "LinearSchedule",
    "Phase",
    "PiecewiseSchedule",
    "PoissonBatchSampler",
    "PrivacyLedger",
    "PrivacyReport",
    "QuantileClipping",
    "Schedule",
    "calibrate_noise",
    "gaussian_noise",
    "micro_batches",
    "sampler_kind",
    "value_at",
]
