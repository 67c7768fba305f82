"""A private run from its budget: sampler, loader, noise, and what holds at its end."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from torch import Generator
from torch.utils.data import DataLoader

from curvopt.privacy.accounting import PrivacyLedger, calibrate_noise
from curvopt.privacy.checks import require
from curvopt.privacy.epsilon import Accountant
from curvopt.privacy.report import PrivacyReport
from curvopt.privacy.sampling import EmptyBatchCollate, MicroBatchSampler, PoissonBatchSampler
from curvopt.privacy.schedules import Schedule


@dataclass(frozen=True)
class PrivatePlan:
    """The parts of a private run, and what it will have spent.

    Attributes:
        sampler: draws the logical batches, or their parts.
        loader: a `DataLoader` that uses it; an empty batch is collated to tensors of length 0.
        noise_multiplier: sigma, a number or a schedule.
        steps: number of steps of the whole run.
        epochs: number of passes over the loader.
        max_grad_norm: C.
        unit: what one sample is.
        report: what holds after the last step.
    """

    sampler: PoissonBatchSampler | MicroBatchSampler
    loader: DataLoader[Any]
    noise_multiplier: float | Schedule
    steps: int
    epochs: int
    max_grad_norm: float
    unit: str
    report: PrivacyReport

    @property
    def optimizer(self) -> dict[str, Any]:
        """Arguments of `curvopt.DPSGD` or `curvopt.DPAdam`, beside parameters and learning rate."""
        return {
            "noise_multiplier": self.noise_multiplier,
            "max_grad_norm": self.max_grad_norm,
            "expected_batch_size": self.sampler.expected_batch_size,
            "sampler": self.sampler,
        }

    def __str__(self) -> str:
        size = self.sampler.expected_batch_size
        return (
            f"{self.epochs} epochs of {self.steps // self.epochs} steps on {size:g} samples each "
            f"in the mean; at their end:\n{self.report}"
        )


def plan(
    data: Any,
    *,
    epsilon: float,
    delta: float,
    epochs: int,
    expected_batch_size: float,
    max_grad_norm: float,
    micro_batches: int = 1,
    schedule: Schedule | None = None,
    accountant: Accountant = "pld",
    unit: str = "one sample",
    progress: bool | None = None,
    generator: Generator | None = None,
    rank: int = 0,
    num_replicas: int = 1,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    **loader: Any,
) -> PrivatePlan:
    r"""Make a private run from its budget.

    Args:
        data: the data set; a sample of it is the privacy unit.
        epsilon: the budget at the end of the run.
        delta: of the budget, below 1/N.
        epochs: how often each sample is drawn, in the mean.
        expected_batch_size: B, the mean number of samples of a logical batch. Larger batches need
            less noise per sample: thousands are common.
        max_grad_norm: C. The learning rate goes with 1 / C.
        micro_batches: in how many parts the loader hands out each logical batch, where a framework
            accumulates gradients over them.
        schedule: the shape of the noise: step t has :math:`\sigma\,\mathrm{schedule}(t)`.
        accountant: ``"pld"`` or ``"rdp"``.
        unit: what one sample is, for the report.
        progress: show a bar while the noise is found. Default: in a terminal, where a schedule
            makes it take seconds.
        generator: draws the sampler's key, to repeat a run; the operating system by default.
        rank: this process in a data-parallel run.
        num_replicas: the number of processes.
        collate_fn: what collates samples. Default: torch's.
        **loader: further arguments of the `DataLoader`, such as ``num_workers``.

    Raises:
        CurvoptError: a value is out of range.
        ImportError: ``dp-accounting`` is not installed.

    Example:
        >>> from curvopt.privacy import plan
        >>> data = torch.utils.data.TensorDataset(torch.randn(500, 4), torch.arange(500) % 3)
        >>> run = plan(
        ...     data, epsilon=3.0, delta=1e-4, epochs=5, expected_batch_size=50, max_grad_norm=1.0
        ... )
        >>> model = torch.nn.Linear(4, 3)
        >>> opt = curvopt.DPSGD(model.parameters(), lr=0.5, **run.optimizer)
        >>> for _ in range(run.epochs):
        ...     for x, y in run.loader:
        ...         if not len(x):
        ...             opt.empty_step()
        ...             continue
        ...         loss = opt.step(lambda: torch.nn.functional.cross_entropy(model(x), y))
        >>> opt.privacy_spent(1e-4) <= 3.0
        True
    """
    require(epochs >= 1 and int(epochs) == epochs, "number of epochs", epochs, "an integer >= 1")
    require(max_grad_norm > 0, "max_grad_norm", max_grad_norm, "must be positive")
    poisson = PoissonBatchSampler(
        data,
        expected_batch_size=expected_batch_size,
        generator=generator,
        rank=rank,
        num_replicas=num_replicas,
    )
    require(0 < delta < 1 / len(data), "delta", delta, f"must be in (0, 1/N = {1 / len(data):g})")
    steps = int(epochs) * len(poisson)
    slow = schedule is not None and sys.stderr.isatty()
    with _bar(slow if progress is None else progress) as update:
        sigma = calibrate_noise(
            epsilon, delta, poisson.sample_rate, steps,
            schedule=schedule, accountant=accountant, progress=update,
        )  # fmt: skip
    noise: float | Schedule = sigma
    ledger = PrivacyLedger(len(data))
    if schedule is None:
        ledger.log(sigma, poisson.sample_rate, steps, max_grad_norm=max_grad_norm)
    else:
        noise = Scaled(schedule, sigma)
        for step in range(steps):
            ledger.log(noise(step), poisson.sample_rate, max_grad_norm=max_grad_norm)
    sampler = poisson.in_parts(micro_batches) if micro_batches != 1 else poisson
    batches = DataLoader(
        data, batch_sampler=sampler, collate_fn=EmptyBatchCollate(data, collate_fn), **loader
    )
    report = ledger.report(delta, accountant, unit)
    return PrivatePlan(
        sampler, batches, noise, steps, int(epochs), max_grad_norm, unit, report
    )  # fmt: skip


@dataclass(frozen=True)
class Scaled:
    """A schedule times a number."""

    schedule: Schedule
    factor: float

    def __call__(self, step: int) -> float:
        """The value after ``step`` finished steps."""
        return self.factor * self.schedule(step)


@contextmanager
def _bar(shown: bool) -> Iterator[Callable[[], None]]:
    """A progress bar that moves when called; tqdm's where that is installed."""
    if not shown:
        yield _nothing
        return
    try:
        tqdm: Any = import_module("tqdm").tqdm
    except ImportError:
        tqdm = None
    if tqdm is None:
        yield lambda: print(".", end="", file=sys.stderr, flush=True)
        print(file=sys.stderr)
        return
    with tqdm(desc="noise for the budget", unit="try") as bar:

        def update() -> None:
            bar.update()

        yield update


def _nothing() -> None:
    """Show no progress."""
