"""What a run has spent: a ledger of its noisy steps, and the noise that a budget allows."""

from __future__ import annotations

import dataclasses
import math
import secrets
import warnings
from collections.abc import Callable, Iterable
from importlib import import_module
from importlib.metadata import version
from typing import Any

from curvopt.privacy.checks import require
from curvopt.privacy.epsilon import Accountant, Releases, accounting, epsilon_of, on_grid
from curvopt.privacy.report import Phase, PrivacyReport, epoch_length
from curvopt.privacy.sampling import SamplerKind
from curvopt.privacy.schedules import Schedule

ADD_OR_REMOVE = "add or remove one sample"
ZERO_OUT = "zero out one sample (it stays in its batch and contributes nothing)"


class PrivacyLedger:
    r"""Logs the noisy steps of a run as they happen and says what they have spent.

    One step of DP-SGD releases :math:`\sum_n \mathrm{clip}_C(g_n) + N(0, \sigma^2 C^2 I)` over a
    batch. What all steps together spend depends on how the batches were drawn:

    ``"poisson"``
        Each sample independently with rate q: the subsampled Gaussian mechanism, under adding or
        removing one sample.
    ``"shuffle"``
        Each sample at most once per epoch, in batches of a fixed size. Poisson's amplification does
        *not* hold for it (it understates epsilon 1.95 against at least 10.99 in one example of the
        papers), so it gets none: one full release per epoch of :math:`\lfloor 1/q \rfloor` steps,
        with neighbours that zero out one sample. Give ``q = 1 / len(loader)`` and call
        :meth:`new_epoch` after an epoch that was cut short. A change of the noise within an epoch
        counts as one more release.
    ``"none"``
        Anything else with a sample at most once in a batch: every step is a full release, with
        neighbours that zero out one sample.

    Args:
        num_samples: N, to check ``delta < 1/N`` and for the report.

    Attributes:
        phases: The steps so far, equal ones in a row counted.
        num_samples: N.

    Example:
        >>> from curvopt.privacy import PrivacyLedger
        >>> ledger = PrivacyLedger(num_samples=60_000)
        >>> ledger.log(noise_multiplier=1.1, sample_rate=0.004, steps=15_000)
        >>> round(ledger.epsilon(delta=1e-5), 3)
        2.295

    References:
        PLD: Doroshenko et al. 2022, arXiv 2207.04380. RDP: Mironov et al. 2019, arXiv 1908.10530.
        Shuffling: Chua et al. 2024, arXiv 2403.17673 and 2411.04205.
    """

    def __init__(self, num_samples: int | None = None) -> None:
        require(
            num_samples is None or num_samples > 0,
            "number of samples",
            num_samples,
            "must be positive",
        )
        self.num_samples = num_samples
        self.phases: list[Phase] = []
        # Of the next shuffled step: may it join the last phase, does it certainly begin an epoch?
        self._merges, self._aligned = False, True
        self._line: list[tuple[str, int]] = []  # the runs that it has gone on from
        self.run_name = secrets.token_hex(8)

    @property
    def steps(self) -> int:
        """Number of noisy steps so far."""
        return sum(phase.steps for phase in self.phases)

    def log(
        self,
        noise_multiplier: float,
        sample_rate: float,
        steps: int = 1,
        *,
        sampler: SamplerKind = "poisson",
        max_grad_norm: float | None = None,
    ) -> None:
        r"""Add steps: one entry per logical batch, also for an empty one.

        Args:
            noise_multiplier: :math:`\sigma \ge 0`; 0 is not private: epsilon becomes infinite.
            sample_rate: q in (0, 1].
            steps: How many equal steps.
            sampler: What drew the batches.
            max_grad_norm: C, for the report alone.

        Raises:
            CurvoptError: A value is out of range.

        Warns:
            UserWarning: On the first shuffled step, saying how it is accounted.
        """
        require(
            0 <= noise_multiplier < math.inf, "noise multiplier", noise_multiplier, "must be >= 0"
        )
        require(0 < sample_rate <= 1, "sample rate", sample_rate, "must be in (0, 1]")
        require(steps >= 1 and int(steps) == steps, "number of steps", steps, "an integer >= 1")
        require(sampler in ("poisson", "shuffle", "none"), "sampler", sampler, "is not known")
        norm = max_grad_norm
        require(norm is None or norm > 0, "clipping norm", norm, "must be positive")
        new = Phase(float(noise_multiplier), float(sample_rate), int(steps), sampler)
        last = self.phases[-1] if self.phases else None
        if sampler == "shuffle":
            shuffled = [phase for phase in self.phases if phase.sampler == "shuffle"]
            new.aligned = self._aligned or not shuffled or shuffled[-1].ends_an_epoch
            if not self._merges:
                last = None
            self._merges, self._aligned = True, False
            if not shuffled:
                warnings.warn(
                    "Shuffled batches are accounted without amplification, as one full release per "
                    f"epoch of {epoch_length(sample_rate)} steps, under zeroing out one sample. "
                    "For amplification sample with curvopt.privacy.PoissonBatchSampler.",
                    stacklevel=2,
                )
        if last and last.kind == new.kind:
            last.steps += new.steps
        else:
            self.phases.append(last := new)
        if norm is not None:
            last.min_grad_norm = min(norm, last.min_grad_norm or norm)
            last.max_grad_norm = max(norm, last.max_grad_norm or norm)

    def new_epoch(self) -> None:
        """Say that the next step begins a new shuffled order, after an epoch was cut short."""
        self._merges, self._aligned = False, True

    def epsilon(self, delta: float, accountant: Accountant = "pld") -> float:
        """The epsilon spent so far: an upper bound, also where it was computed numerically.

        Cheap enough to call every epoch: settled phases are composed once. The first call for a
        noise multiplier takes some tenths of a second; one that is below 0.4 or changes all the
        time takes longer (from 33 different ones on, they are rounded down by up to 2 %, which
        overstates epsilon a little).

        Args:
            delta: In (0, 1), below 1/N.
            accountant: ``"pld"``, privacy loss distributions, the tightest, or ``"rdp"``, Renyi
                differential privacy, a tenth larger and faster.

        Returns:
            Epsilon; 0 before the first step and infinity after one without noise.

        Raises:
            CurvoptError: ``delta`` is not in (0, 1), or the accountant is not known.
            ImportError: ``dp-accounting`` is not installed.

        Warns:
            UserWarning: ``delta >= 1/N`` allows a mechanism that publishes a whole sample.
        """
        require(0 < delta < 1, "delta", delta, "must be in (0, 1)")
        require(accountant in ("pld", "rdp"), "accountant", accountant, "'pld' or 'rdp'")
        if self.num_samples is not None and delta >= 1 / self.num_samples:
            warnings.warn(
                f"delta = {delta:g} is not below 1/N = {1 / self.num_samples:g}: publishing one "
                "sample picked at random would satisfy it. Choose a smaller delta.",
                stacklevel=2,
            )
        return epsilon_of(self._releases(), float(delta), accountant)

    def report(
        self, delta: float, accountant: Accountant = "pld", unit: str = "one sample"
    ) -> PrivacyReport:
        """All that makes the epsilon mean something; ``print`` it or take its fields.

        Args:
            delta: As in :meth:`epsilon`.
            accountant: As in :meth:`epsilon`.
            unit: What one sample is, such as ``"one image"`` or ``"one text of 512 tokens"``. If a
                person can have several samples, say that the unit is not the person.
        """
        samplers = list(dict.fromkeys(phase.sampler for phase in self.phases))
        explained = {
            "poisson": "Poisson, amplified by q",
            "shuffle": "shuffled, not amplified: one full release per epoch",
            "none": "unknown, not amplified: every step a full release",
        }
        return PrivacyReport(
            epsilon=self.epsilon(delta, accountant),
            delta=delta,
            # Elsewhere a removed sample moves others to another batch. Poisson sampling has both.
            adjacency=ADD_OR_REMOVE if set(samplers) <= {"poisson"} else ZERO_OUT,
            unit=unit,
            sampler="; ".join(explained[sampler] for sampler in samplers) or "none",
            accountant={"pld": "PLD, pessimistic", "rdp": "RDP"}[accountant],
            accountant_version=f"dp-accounting {version('dp-accounting')}",
            steps=self.steps,
            phases=tuple(dataclasses.replace(phase) for phase in self.phases),
            num_samples=self.num_samples,
        )

    def state_dict(self) -> dict[str, Any]:
        """The history in plain values."""
        return {
            "num_samples": self.num_samples,
            "phases": [dataclasses.asdict(phase) for phase in self.phases],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved history; within a shuffled epoch, with an order that may be new."""
        self.num_samples = state["num_samples"]
        self.phases = [Phase(**phase) for phase in state["phases"]]
        self._line, self.run_name = [], secrets.token_hex(8)
        self._merges, self._aligned = False, False

    def put_back(self, state: dict[str, Any], line: Iterable[tuple[str, int]] = ()) -> bool:
        """Go on from a saved history, and forget none of the steps that were taken here since.

        What such a step has shown remains known, whatever becomes of the parameters.

        Args:
            state: as :meth:`state_dict` gave it.
            line: as :meth:`line` gave it then.

        Returns:
            Whether there were such steps.
        """
        saved, behind = PrivacyLedger(), [(name, steps) for name, steps in line]
        saved.load_state_dict(state)
        common = 0
        for (mine, here), (theirs, there) in zip(self.line(), behind, strict=False):
            if mine != theirs:
                break
            common = min(here, there)
            if here != there:
                break
        own = self._after(common)
        if own and saved.steps == common:
            return True  # it was saved in this very run
        self.load_state_dict(state)
        self._line = behind
        self.phases += own
        return bool(own)

    def line(self) -> list[tuple[str, int]]:
        """The names of the runs up to here, and the number of steps at the end of each."""
        return [*self._line, (self.run_name, self.steps)]

    def _after(self, steps: int) -> list[Phase]:
        """The phases behind the first steps."""
        found = []
        for phase in self.phases:
            rest = phase.steps - steps
            if rest > 0:
                aligned = phase.aligned and rest == phase.steps
                found.append(dataclasses.replace(phase, steps=rest, aligned=aligned))
            steps = max(0, -rest)
        return found

    def _releases(self) -> Releases:
        """Equal releases together, in the order of their last use, so that prefixes stay cached."""
        counts: dict[tuple[float, float], int] = {}
        unamplified = 0.0
        for phase in self.phases:
            sigma, rate, count = phase.noise_multiplier, phase.sample_rate, phase.steps
            if sigma == 0:
                return ((0.0, 1.0, 1),)
            if phase.sampler == "shuffle":
                count = phase.epochs
            if phase.sampler != "poisson" or rate == 1:
                # Full Gaussian releases compose exactly to one: 1 / sigma^2 adds up.
                unamplified += count / sigma**2
            else:
                counts[sigma, rate] = counts.pop((sigma, rate), 0) + count
        if len(counts) > 32:
            counts = on_grid(counts)
        full = ((unamplified**-0.5, 1.0, 1),) if unamplified else ()
        return full + tuple((sigma, rate, count) for (sigma, rate), count in counts.items())


def calibrate_noise(
    target_epsilon: float,
    delta: float,
    sample_rate: float,
    steps: int,
    *,
    sampler: SamplerKind = "poisson",
    accountant: Accountant = "pld",
    ledger: PrivacyLedger | None = None,
    schedule: Schedule | None = None,
    tolerance: float = 1e-4,
    progress: Callable[[], None] | None = None,
) -> float:
    r"""The smallest noise multiplier whose epsilon is at most ``target_epsilon``.

    Args:
        target_epsilon: Epsilon at the end of the run.
        delta: In (0, 1), below 1/N.
        sample_rate: q in (0, 1].
        steps: Number of steps.
        sampler: What draws the batches; see :class:`PrivacyLedger`.
        accountant: ``"pld"`` or ``"rdp"``.
        ledger: What was spent before and counts too. Default: nothing.
        schedule: The shape of the noise: step t has the noise multiplier
            :math:`\sigma \, \mathrm{schedule}(t)`. Default: constant 1.
        tolerance: Of the result, which is never too small.
        progress: Called after each try: about ten, of a fraction of a second each, or of seconds
            with a schedule.

    Returns:
        :math:`\sigma`.

    Raises:
        CurvoptError: A value is out of range, or no noise is enough.
        ImportError: ``dp-accounting`` is not installed.

    Example:
        >>> from curvopt.privacy import calibrate_noise
        >>> round(calibrate_noise(target_epsilon=3.0, delta=1e-5, sample_rate=0.01, steps=2000), 2)
        0.93
    """
    require(0 < target_epsilon < math.inf, "target epsilon", target_epsilon, "must be positive")
    require(tolerance > 0, "tolerance", tolerance, "must be positive")
    accounting()  # says what to install; scipy comes with it
    brentq = import_module("scipy.optimize").brentq

    before = ledger or PrivacyLedger()
    spent = before.epsilon(delta, accountant)
    require(spent < target_epsilon, "target epsilon", target_epsilon, f"{spent:.3g} is spent")

    def excess(sigma: float) -> float:
        plan = PrivacyLedger(before.num_samples)
        plan.load_state_dict(before.state_dict())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # this is a plan; the run itself will warn
            if schedule is None:
                plan.log(sigma, sample_rate, steps, sampler=sampler)
            else:
                for step in range(steps):
                    plan.log(sigma * schedule(step), sample_rate, sampler=sampler)
            found = plan.epsilon(delta, accountant) - target_epsilon
        if progress is not None:
            progress()
        return found

    low, high = 0.5, 1.0  # to be widened until low is too little noise, and high enough
    while excess(high) > 0:
        low, high = high, 2 * high
        require(high < 1e6, "target epsilon", target_epsilon, "no noise is enough for it")
    while excess(low) <= 0:
        low, high = low / 2, low
    sigma: float = brentq(excess, low, high, xtol=tolerance / 2)
    while excess(sigma) > 0:
        sigma += tolerance / 2
    return sigma
