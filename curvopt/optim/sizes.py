"""Sizes of batches that the sampler does not explain."""

from __future__ import annotations

import warnings

# Logical batches of one size in a row that Poisson sampling would not give in a lifetime.
EQUAL_SIZES = 10


def check_sizes(
    size: int, before: tuple[int, int], expected: float, sampler: str, sample_rate: float
) -> tuple[int, int]:
    """Warn of batch sizes that the expected size and the sampler do not explain.

    Args:
        size: that of the logical batch.
        before: size of the one before, and how often in a row.
        expected: the expected size.
        sampler: the sampler's kind.
        sample_rate: the probability of a sample.

    Returns:
        ``before``, of the next one.
    """
    last, count = before
    count = count + 1 if size == last else 1
    if size > expected + 10 * expected**0.5 + 10:
        warnings.warn(
            f"a batch has {size} samples where {expected:g} are expected. If the model treats "
            "the rows of a sample as samples of their own, give batch_size=: privacy is that "
            "of one sample",
            stacklevel=5,
        )
    # At a variance of 5 and more, two sizes agree with a probability below 1/7.
    varies = sampler == "poisson" and size * (1 - sample_rate) >= 5
    if varies and count == EQUAL_SIZES:
        warnings.warn(
            f"{EQUAL_SIZES} batches in a row had {size} samples: this is not Poisson sampling, "
            "so the epsilon that is accounted does not hold. Draw batches with "
            "curvopt.privacy.PoissonBatchSampler, or say sampler='shuffle'",
            stacklevel=5,
        )
    return size, count
