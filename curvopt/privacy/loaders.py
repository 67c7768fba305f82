"""What a loader draws, in the words of the ledger, or why nothing can be said of it."""

from __future__ import annotations

import math
from collections.abc import Sized
from typing import Any, cast

from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
)

from curvopt.errors import CurvoptError
from curvopt.privacy.checks import require
from curvopt.privacy.sampling import MicroBatchSampler, PoissonBatchSampler, SamplerKind

Source = SamplerKind | DataLoader[Any] | PoissonBatchSampler | MicroBatchSampler
OURS = (PoissonBatchSampler, MicroBatchSampler)

WAY_OUT = (
    "Draw batches with curvopt.privacy.PoissonBatchSampler, or, where you know that a sample comes "
    "at most once in a batch, say sampler='none', or 'shuffle' where it comes at most once in an "
    "epoch"
)


def sampler_kind(loader: DataLoader[Any]) -> SamplerKind:
    """How a loader samples, in the words of :class:`~curvopt.privacy.PrivacyLedger`.

    Returns:
        ``"poisson"`` for a :class:`PoissonBatchSampler`, ``"shuffle"`` where every sample comes at
        most once per epoch.

    Raises:
        CurvoptError: a sample may come twice, or nothing is known of how it is drawn.
    """
    _refuse_copies(loader.dataset)
    batches = loader.batch_sampler
    if isinstance(batches, OURS):
        return "poisson"
    if isinstance(loader.dataset, IterableDataset):
        raise _refused(loader.dataset, "an iterable data set draws its samples itself, as it likes")
    if batches is None:
        raise _refused(loader.sampler, "the loader makes no batches (batch_size=None)")
    if type(batches) is not BatchSampler:
        raise _refused(batches, _why(batches))
    order: Any = batches.sampler
    if type(order) is SequentialSampler:
        return "shuffle"
    if type(order) is SubsetRandomSampler:
        if len(set(order.indices)) == len(order.indices):
            return "shuffle"
        raise _refused(order, "it holds an index twice")
    # That of accelerate draws from a generator that is the same everywhere, and nothing else.
    if type(order) is RandomSampler or type(order).__name__ == "SeedableRandomSampler":
        if order.replacement:
            raise _refused(order, "with replacement=True it draws a sample several times")
        if order.num_samples > len(order.data_source):
            many, few = order.num_samples, len(order.data_source)
            raise _refused(order, f"it draws {many} of {few} samples, some of them twice")
        return "shuffle"
    raise _refused(order, _why(order))


def _why(sampler: Any) -> str:
    """What may go wrong with a sampler that is not one of those that are known to be right."""
    known = {
        "WeightedRandomSampler": "it may draw a sample several times, and some more often",
        "DistributedSampler": "it repeats samples to fill up, or drops some (drop_last)",
        "DistributedSamplerWrapper": "it repeats samples to fill up, or drops some",
        "UnrepeatedDistributedSampler": "it drops or repeats none, but nothing shows the ranks",
        "BatchSamplerShard": "it hands each process every other batch, repeats samples to fill up, "
        "and halves the number of steps",
    }
    for kind in type(sampler).__mro__:
        if kind.__name__ in known:
            return known[kind.__name__]
    return "nothing is known of what it draws: it may draw a sample twice"


def _refused(sampler: Any, why: str) -> CurvoptError:
    return CurvoptError(f"Invalid sampling: {type(sampler).__name__}: {why}. {WAY_OUT}")


def _refuse_copies(data: Any) -> None:
    """A data set that holds a sample twice draws it twice."""
    if isinstance(data, Subset):
        if len(set(data.indices)) < len(data.indices):
            raise _refused(data, "it holds an index twice, so a sample may come twice in a batch")
        _refuse_copies(data.dataset)
    elif isinstance(data, ConcatDataset):
        if len({id(part) for part in data.datasets}) < len(data.datasets):
            raise _refused(data, "it holds a data set twice, so a sample may come twice in a batch")
        for part in data.datasets:
            _refuse_copies(part)


def batches_of(source: Source) -> Any:
    """The sampler of this package that draws the batches, or None."""
    batches = source.batch_sampler if isinstance(source, DataLoader) else source
    return batches if isinstance(batches, OURS) else None


def parts_of(source: Source) -> int:
    """In how many parts each logical batch comes."""
    batches = batches_of(source)
    return batches.parts if isinstance(batches, MicroBatchSampler) else 1


def sampling_of(
    source: Source,
    sample_rate: float | None,
    num_samples: int | None,
    expected_batch_size: float,
) -> tuple[SamplerKind, float, int | None]:
    """What the ledger needs to know of the sampling: kind, rate and number of samples.

    Args:
        source: What draws the batches, or its kind.
        sample_rate: q. Default: what ``source`` says, else ``expected_batch_size / num_samples``.
        num_samples: N. Default: what ``source`` says.
        expected_batch_size: qN.

    Raises:
        CurvoptError: A rate that would not be used, or none where it is needed, or a loader that
            may draw a sample twice.
    """
    if isinstance(source, str):
        kind = source
        require(kind in ("poisson", "shuffle", "none"), "sampler", kind, "poisson, shuffle or none")
        if kind == "none" and sample_rate is not None:
            raise CurvoptError(
                f"Invalid sampling: sample_rate={sample_rate} means nothing for sampler='none'; "
                "say sampler='poisson' (each sample joins a batch by itself, with that "
                "probability) or sampler='shuffle'"
            )
    else:
        batches = batches_of(source)
        kind = sampler_kind(source) if isinstance(source, DataLoader) else "poisson"
        if batches is not None:
            rate, size = batches.sample_rate, batches.num_samples
        else:
            loader = cast(DataLoader[Any], source)
            rate, size = 1 / len(loader), len(cast(Sized, loader.dataset))
        if sample_rate is not None and not math.isclose(sample_rate, rate):
            raise CurvoptError(
                f"Invalid sample rate: {sample_rate} (that of the sampler is {rate:g}; leave it "
                "out)"
            )
        sample_rate, num_samples = rate, num_samples or size
    if kind == "none":
        return kind, 1.0, num_samples
    if sample_rate is None and num_samples is not None:
        sample_rate = expected_batch_size / num_samples
    if sample_rate is None:
        raise CurvoptError(f"Invalid sampling: sampler={kind!r} needs sample_rate or num_samples")
    require(0 < sample_rate <= 1, "sample rate", sample_rate, "must be in (0, 1]")
    return kind, sample_rate, num_samples


def check_ranks(source: Any, rank: int, size: int) -> None:
    """Refuse a sampler that would give one sample to several processes of a logical batch.

    Args:
        source: What draws the batches, or its kind.
        rank: This process's number.
        size: The number of processes.

    Raises:
        CurvoptError: The sampler does not know of the processes.
    """
    if size == 1 or isinstance(source, str):
        return
    batches = batches_of(source)
    if batches is None:
        raise CurvoptError(
            f"Invalid sampling: {size} processes make up one logical batch, and nothing shows that "
            "this loader keeps to its own samples. Use PoissonBatchSampler(..., rank=, "
            "num_replicas=), or say sampler='shuffle' or 'none' where each sample has one process"
        )
    if (batches.rank, batches.num_replicas) != (rank, size):
        raise CurvoptError(
            f"Invalid sampling: this is process {rank} of {size} that make up one logical batch, "
            f"and its sampler is number {batches.rank} of {batches.num_replicas}: give "
            f"PoissonBatchSampler rank={rank} and num_replicas={size}"
        )
