"""What a report says of a run: its phases of equal steps, and what they have spent."""

from __future__ import annotations

import dataclasses
import math

from curvopt.privacy.sampling import SamplerKind


@dataclasses.dataclass
class Phase:
    r"""Equal steps in a row.

    Attributes:
        noise_multiplier: :math:`\sigma`, the noise's standard deviation over the clipping norm.
        sample_rate: q.
        steps: How many.
        sampler: What drew the batches.
        min_grad_norm: The smallest clipping norm C of these steps, if known.
        max_grad_norm: The largest.
        aligned: Whether the first step began an epoch; matters to shuffled batches alone.
    """

    noise_multiplier: float
    sample_rate: float
    steps: int
    sampler: SamplerKind = "poisson"
    min_grad_norm: float | None = None
    max_grad_norm: float | None = None
    aligned: bool = True

    @property
    def kind(self) -> tuple[float, float, SamplerKind]:
        """What equal steps have in common."""
        return self.noise_multiplier, self.sample_rate, self.sampler

    @property
    def epochs(self) -> int:
        """The most shuffled orders that these steps can belong to."""
        length = epoch_length(self.sample_rate)
        return (self.steps - 1 + (0 if self.aligned else length - 1)) // length + 1

    @property
    def ends_an_epoch(self) -> bool:
        """Whether the last step was certainly the last one of an epoch."""
        length = epoch_length(self.sample_rate)
        whole = math.isclose(length * self.sample_rate, 1)  # else epochs may be a step longer
        return self.aligned and whole and self.steps % length == 0

    def __str__(self) -> str:
        low, high = self.min_grad_norm, self.max_grad_norm
        norm = "unknown" if high is None else f"{high:g}" if low == high else f"{low:g} to {high:g}"
        return (
            f"{self.steps} steps, sigma = {self.noise_multiplier:g}, q = {self.sample_rate:g}, "
            f"C = {norm}, {self.sampler}"
        )


@dataclasses.dataclass(frozen=True)
class PrivacyReport:
    """All that makes an epsilon mean something (Ponomareva et al. 2023, arXiv 2303.00654, 5.3).

    ``str`` gives a text for a paper or a model card, ``dataclasses.asdict`` the plain values.

    Attributes:
        epsilon: Upper bound on the privacy loss.
        delta: What may go beyond it; below 1 / number of samples.
        adjacency: Which data sets are told apart by no more than that.
        unit: What one sample is.
        sampler: What drew the batches and whether that amplifies.
        accountant: How epsilon was computed.
        accountant_version: With which package.
        steps: Number of noisy steps.
        phases: Noise multiplier, rate, clipping norm and number of equal steps in a row.
        num_samples: N, if known.
    """

    epsilon: float
    delta: float
    adjacency: str
    unit: str
    sampler: str
    accountant: str
    accountant_version: str
    steps: int
    phases: tuple[Phase, ...]
    num_samples: int | None

    def __str__(self) -> str:
        shown = [str(phase) for phase in self.phases[:8]]
        if len(self.phases) > len(shown):
            shown.append(f"and {len(self.phases) - len(shown)} more phases")
        samples = "" if self.num_samples is None else f" of {self.num_samples}"
        rows = {
            "unit": self.unit + samples,
            "adjacency": self.adjacency,
            "trust": "central: the data are seen in the clear by the training run alone",
            "covers": "all iterates of this run, so every checkpoint",
            "not covered": "the choice of hyperparameters; losses and norms that were looked at",
            "sampling": self.sampler,
            "mechanism": "Gaussian noise sigma C on the sum of gradients clipped to norm C",
            "accountant": f"{self.accountant}, {self.accountant_version}",
            "steps": str(self.steps),
            "phases": ("\n" + " " * 14).join(shown) or "none",
        }
        # Epsilon is rounded up: it is a bound.
        epsilon = math.ceil(self.epsilon * 1e4) / 1e4 if self.epsilon < math.inf else math.inf
        head = f"({epsilon:g}, {self.delta:g})-differential privacy\n"
        return head + "\n".join(f"  {name:<12}{text}" for name, text in rows.items())


def epoch_length(sample_rate: float) -> int:
    """Steps in which a shuffled sample comes at most once; rounding errors of 1/q do not count."""
    return math.floor(1 / sample_rate + 1e-9)
