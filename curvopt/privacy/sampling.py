"""Poisson sampling for torch's DataLoader, empty batches and physical micro-batches."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sized
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.utils.data import Sampler, default_collate

from curvopt.errors import CurvoptError
from curvopt.privacy.checks import require
from curvopt.privacy.noise import generator_from_key, key_from

SamplerKind = Literal["poisson", "shuffle", "none"]


NO_BATCH_SIZE = (
    "batches of Poisson sampling have no fixed size, and none may be dropped, repeated or handed "
    "to one process of several. Several processes: give PoissonBatchSampler rank= and "
    "num_replicas=, and keep its loader out of accelerator.prepare; in Lightning, say "
    "Trainer(use_distributed_sampler=False)"
)


class PoissonBatchSampler(Sampler[list[int]]):
    r"""Batches that each sample joins independently with probability q.

    This is the sampling that amplified accounting is about; shuffled batches of a fixed size are
    not (Chua et al. 2024). Batch sizes vary around qN, and a batch may be empty: it is a step like
    any other. Batch t depends on a secret key and t alone, so a run can go on at any step.

    An iteration goes on from :attr:`step` to the end of its epoch of ``steps`` batches.

    Args:
        data: The data set, or its number of samples N.
        sample_rate: q in (0, 1]. Give it or ``expected_batch_size``.
        expected_batch_size: qN; the same number goes to the optimizer. The rate then depends on
            N, which is as good as published.
        steps: Batches per iteration. Default: 1/q, rounded, after which each sample was drawn once
            on average.
        generator: Draws the key, to repeat a run; not used afterwards. Default: the operating
            system's randomness, as amplification needs batches that nobody can guess.
        rank: This process in a data-parallel run of ``num_replicas``, which gets the samples
            ``rank, rank + num_replicas, ...`` of the logical batch, whatever the key of the others.
        num_replicas: The number of processes.

    Attributes:
        step: Number of batches handed out so far.

    Raises:
        CurvoptError: A rate out of (0, 1], an empty data set, none or both of q and qN.

    Note:
        A DataLoader with workers asks for batches before they are trained on. To save in the middle
        of an epoch, pass the number of steps that were *trained*: ``state_dict(step=...)``. A new
        iterator of the restored sampler's loader then goes on with exactly the next batch.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> from curvopt.privacy import EmptyBatchCollate, PoissonBatchSampler
        >>> data = torch.utils.data.TensorDataset(torch.randn(1000, 3))
        >>> sampler = PoissonBatchSampler(data, expected_batch_size=50)
        >>> loader = DataLoader(data, batch_sampler=sampler, collate_fn=EmptyBatchCollate(data))
        >>> len(loader), sampler.sample_rate
        (20, 0.05)

    References:
        Abadi et al. 2016, arXiv 1607.00133; Chua et al. 2024, arXiv 2403.17673.
    """

    def __init__(
        self,
        data: Sized | int,
        sample_rate: float | None = None,
        *,
        expected_batch_size: float | None = None,
        steps: int | None = None,
        generator: torch.Generator | None = None,
        rank: int = 0,
        num_replicas: int = 1,
    ) -> None:
        num_samples = data if isinstance(data, int) else len(data)
        require(num_samples > 0, "number of samples", num_samples, "must be positive")
        if (sample_rate is None) == (expected_batch_size is None):
            raise CurvoptError(
                "Invalid sampling: give either sample_rate or expected_batch_size, got "
                f"sample_rate={sample_rate}, expected_batch_size={expected_batch_size}"
            )
        if sample_rate is None:
            sample_rate = cast(float, expected_batch_size) / num_samples
        require(0 < sample_rate <= 1, "sample rate", sample_rate, "must be in (0, 1]")
        steps = max(1, round(1 / sample_rate)) if steps is None else steps
        require(steps > 0, "number of steps", steps, "must be positive")
        require(0 <= rank < num_replicas, "rank", rank, f"must be in [0, {num_replicas})")
        self.num_samples = num_samples
        self.sample_rate = float(sample_rate)
        self.steps = steps
        self.rank = rank
        self.num_replicas = num_replicas
        self.step = 0
        self._key = key_from(generator)
        self._drawn: dict[bytes, int] = {}  # batches handed out under keys of before

    @property
    def expected_batch_size(self) -> float:
        """The mean size of a logical batch, qN."""
        return self.sample_rate * self.num_samples

    @property
    def batch_size(self) -> int:
        """There is none; it is asked for by what would hand each process some of the batches.

        Raises:
            CurvoptError: always.
        """
        raise CurvoptError(NO_BATCH_SIZE)

    def in_parts(self, parts: int) -> MicroBatchSampler:
        """Each logical batch in a fixed number of parts, for gradient accumulation by a framework.

        Args:
            parts: how many; some may be empty.

        Example:
            >>> from curvopt.privacy import PoissonBatchSampler
            >>> sampler = PoissonBatchSampler(1000, expected_batch_size=50).in_parts(4)
            >>> len(sampler), len(list(sampler))
            (80, 80)
        """
        return MicroBatchSampler(self, parts)

    def __len__(self) -> int:
        """Batches per epoch."""
        return self.steps

    def __iter__(self) -> Iterator[list[int]]:
        """The batches from :attr:`step` to the end of its epoch."""
        end = (self.step // self.steps + 1) * self.steps
        while self.step < end:
            self.step += 1
            yield self.batch(self.step - 1)

    def batch(self, step: int) -> list[int]:
        """The indices of batch ``step``, in increasing order."""
        generator = generator_from_key(self._key + step.to_bytes(8, "little"))
        # float64: in float32 a rate of 1e-4 would really be 0.05 % larger.
        draws = torch.rand(self.num_samples, generator=generator, dtype=torch.float64, device="cpu")
        mine = draws[self.rank :: self.num_replicas] < self.sample_rate
        return (mine.nonzero().squeeze(1) * self.num_replicas + self.rank).tolist()

    def state_dict(self, step: int | None = None) -> dict[str, Any]:
        """What it takes to go on: plain values, and secret like the data.

        Args:
            step: The number of batches that were trained on. Default: those handed out, which is
                the same without workers or at the end of an epoch.
        """
        return {
            "key": self._key.hex(),
            "step": self.step if step is None else step,
            "num_samples": self.num_samples,
            "sample_rate": self.sample_rate,
            "steps": self.steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state.

        Where this sampler itself has gone on since, its next batches are other ones: a second step
        on a batch that was drawn before is not what is accounted.

        Raises:
            CurvoptError: The state is of another number of samples, rate or epoch length.
        """
        for name in ("num_samples", "sample_rate", "steps"):
            expected = getattr(self, name)
            require(state[name] == expected, f"{name} in the state", state[name], f"is {expected}")
        key = bytes.fromhex(state["key"])
        self._drawn[self._key] = max(self.step, self._drawn.get(self._key, 0))
        while state["step"] < self._drawn.get(key, 0):
            key = hashlib.sha256(key + b"again").digest()
        self._key, self.step = key, state["step"]


class MicroBatchSampler(Sampler[list[int]]):
    """The logical batches of a Poisson sampler, each in the same number of parts.

    Where a framework accumulates gradients over ``parts`` batches of its loader, all that it
    accumulates must be one logical batch: several Poisson batches would draw a sample twice. Give
    it to the private optimizer as ``sampler=``, which then takes that many passes for one step.

    Args:
        sampler: draws the logical batches.
        parts: in how many parts each is cut; as in the framework's setting. Parts may be empty.

    Raises:
        CurvoptError: fewer parts than one.

    Example:
        >>> from curvopt.privacy import MicroBatchSampler, PoissonBatchSampler
        >>> sampler = MicroBatchSampler(PoissonBatchSampler(1000, expected_batch_size=50), 4)
        >>> first = [batch for _, batch in zip(range(4), sampler)]
    """

    def __init__(self, sampler: PoissonBatchSampler, parts: int) -> None:
        require(parts >= 1 and int(parts) == parts, "number of parts", parts, "an integer >= 1")
        self.sampler, self.parts = sampler, int(parts)

    def __len__(self) -> int:
        """Parts per epoch."""
        return len(self.sampler) * self.parts

    def __iter__(self) -> Iterator[list[int]]:
        """The parts of the logical batches that are left of the epoch."""
        for batch in self.sampler:
            for part in range(self.parts):
                start, end = (len(batch) * (part + k) // self.parts for k in (0, 1))
                yield batch[start:end]

    def __getattr__(self, name: str) -> Any:
        """All else is the sampler's: its rate, number of samples, place among the processes."""
        if name in ("sampler", "__setstate__"):
            raise AttributeError(name)
        return getattr(self.sampler, name)


class EmptyBatchCollate:
    """A collate function that turns no samples into tensors of length 0.

    The shapes and dtypes are those of the collated first sample; its values are dropped.

    Args:
        data: The data set, whose sample 0 is the pattern.
        collate_fn: What collates the other batches. Default: torch's.

    Example:
        >>> from curvopt.privacy import EmptyBatchCollate
        >>> data = torch.utils.data.TensorDataset(torch.randn(10, 3), torch.arange(10))
        >>> [tuple(part.shape) for part in EmptyBatchCollate(data)([])]
        [(0, 3), (0,)]
    """

    def __init__(self, data: Any, collate_fn: Callable[[list[Any]], Any] | None = None) -> None:
        self.data = data
        self.collate_fn = collate_fn or default_collate

    def __call__(self, samples: list[Any]) -> Any:
        """Collate ``samples``, which may be empty."""
        if samples:
            return self.collate_fn(samples)
        return _rows(self.collate_fn([self.data[0]]), slice(0))


def micro_batches(batch: Any, max_physical_batch_size: int) -> Iterator[Any]:
    """Split a logical batch in parts that fit in memory.

    For a closure that calls ``backward()`` once per part: clipped sums add up, and the optimizer
    adds noise once. Each sample counts by its own loss, so no part is rescaled.

    Args:
        batch: A tensor, or tuples, lists and mappings of tensors, samples on axis 0.
        max_physical_batch_size: The most samples in a part.

    Yields:
        Parts like ``batch``; for an empty batch one empty part, as it is a step too.

    Raises:
        CurvoptError: A size below 1, or a batch without a tensor.

    Example:
        >>> from curvopt.privacy import micro_batches
        >>> [len(part) for part in micro_batches(torch.zeros(10, 3), 4)]
        [4, 4, 2]

        In a training step::

            def closure():
                total = 0.0
                for x, y in micro_batches(batch, 64):
                    loss = loss_fn(model(x), y)
                    loss.backward()
                    total += loss.detach()
                return total
    """
    size = max_physical_batch_size
    require(size >= 1, "physical batch size", size, "must be at least 1")
    length = batch_length(batch)
    if length is None:
        raise CurvoptError(f"Invalid batch: {type(batch).__name__} (there is no tensor in it)")
    for start in range(0, max(length, 1), size):
        yield _rows(batch, slice(start, start + size))


def batch_length(batch: Any) -> int | None:
    """The size of axis 0 of the first tensor in a collated batch."""
    if isinstance(batch, Tensor):
        return len(batch) if batch.ndim else None
    parts = batch.values() if isinstance(batch, Mapping) else batch
    if isinstance(batch, Mapping | list | tuple):
        return next((n for n in map(batch_length, parts) if n is not None), None)
    return None


def _rows(batch: Any, rows: slice) -> Any:
    """Cut samples out of a collated batch, whatever it is made of."""
    if isinstance(batch, Tensor):
        return batch[rows] if batch.ndim else batch
    if isinstance(batch, Mapping):
        part = cast(dict[Any, Any], copy.copy(batch))
        part.update({key: _rows(value, rows) for key, value in batch.items()})
        return part
    if isinstance(batch, list | tuple):
        if not any(isinstance(part, Tensor | Mapping | list | tuple) for part in batch):
            return batch[rows]  # plain values such as strings, one per sample
        parts = [_rows(part, rows) for part in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    return batch
