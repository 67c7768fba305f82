"""What a sample's part of the loss is multiplied by to be its own loss; or a question."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from curvopt.axes.endings import Ending, suspicious
from curvopt.axes.layout import Layout
from curvopt.engine.plan import Plan
from curvopt.errors import CurvoptError
from curvopt.losses import Loss
from curvopt.losses.cross_entropy import CrossEntropy

Factor = float | Tensor


def inverse_of(share: Factor) -> Factor:
    """1 / w_n; a sample without weight (all of its targets ignored) has no gradient either."""
    if isinstance(share, Tensor):
        return torch.where(share > 0, share.reciprocal(), 0)
    return 1 / share


class OwnLoss:
    """How one term of a loss is reduced over the samples.

    Args:
        plan: of the pass.
        index: the term's number in the plan.
        term: the term.
        reads: numbers of the batch that Python has read.
    """

    def __init__(self, plan: Plan, index: int, term: Loss, reads: Iterable[float]):
        self.plan, self.term, self.reads = plan, term, list(reads)
        self.layout: Layout | None = plan.term_layouts[index]
        self.end: Ending = plan.endings[index]

    @property
    def share(self) -> Factor:
        """A sample's share of the term's value."""
        return 1.0 if self.layout is None else self.term.share(self.layout)

    @property
    def sums(self) -> bool:
        """Whether the samples' parts are summed, and no mean is known."""
        end = self.end
        return self.term.reduction != "mean" and end.factor == 1.0 and not _is_mean(end)

    @property
    def mixed(self) -> str:
        """What weighs a sample and depends on others; empty if nothing does."""
        return self.end.open or self.plan.weighed

    def factor(self, reduction: str | None) -> Factor:
        """The factor.

        Args:
            reduction: the user's answer.

        Raises:
            CurvoptError: only the user can know.
        """
        if reduction == "sum":
            return 1.0
        if reduction == "mean":
            share = self.share
            return inverse_of(share) if isinstance(share, Tensor) else float(max(1, self.plan.n))
        why = self.mixed or self._count(declared=False) or self._part()
        if why:
            raise self._question(why)
        inverse = inverse_of(self.share)
        return inverse * self.end.factor if self.end.factor != 1.0 else inverse

    def check_private(self, reduction: str | None) -> None:
        """Refuse what makes a sample's contribution depend on the others.

        Args:
            reduction: the user's answer.

        Raises:
            CurvoptError: it does, or only the user can know.
        """
        if reduction is None:
            why = self.mixed or self._count(declared=True) or self._part()
            if why:
                raise self._question(why)
            return
        why = self.mixed or (self.end.scaled if self.sums else "")
        if why:
            raise CurvoptError(
                f"a sample's contribution would depend on the other samples ({self.term.name}: "
                f"{why}), whatever reduction= says: take a mean over all samples, or the sum, "
                "times weights of the samples' own or Python numbers"
            )
        numbers, n = self.end.numbers, self.plan.n
        if reduction == "sum" and not self.sums:
            why = f"it is a mean over {n} samples"
        elif reduction == "sum" and self._count(declared=False):
            why = self._count(declared=False)
        elif reduction == "mean" and self.sums and n > 1 and not _cancels(numbers, n):
            why = f"it is a sum that is not divided by the number of samples, {n}"
        if why:
            other = "mean" if reduction == "sum" else "sum"
            raise CurvoptError(
                f"with reduction={reduction!r}, a sample's contribution would depend on how many "
                f"others there are ({self.term.name}: {why}): give reduction={other!r} or leave it "
                "out"
            )

    def _count(self, declared: bool) -> str:
        """Why a sum's scale may belong to the batch."""
        end, layout = self.end, self.layout
        partial = layout is not None and layout.present < self.plan.n
        if not (self.sums or partial):
            return ""
        if end.scaled:
            return end.scaled
        if not end.numbers:
            return ""
        if declared and self.sums:
            number: float | None = end.numbers[0]
        else:
            number = suspicious(end.numbers, [*self._counts(), *self.reads])
        if number is None:
            return ""
        return f"it is a sum scaled by {number:g}, which may be a count of this batch"

    def _part(self) -> str:
        """Why a mean over a part of the samples has two readings: 1 or N / part times its rows."""
        if self.sums or self.layout is None or not self.plan.overlapping:
            return ""
        present, n = self.layout.present, self.plan.n
        if not 1 < present < n:  # a mean over one is no mean
            return ""
        return f"it is a mean over {present} of {n} samples, and other terms hold them too"

    def _counts(self) -> list[float]:
        rows = 1 if self.layout is None else math.prod(self.term.token_shape)
        counts: list[float] = [self.plan.n, rows, self.plan.partial, *self.plan.sizes]
        if isinstance(self.term, CrossEntropy) and not self.term.probabilities_given:
            kept = self.term.target != self.term.ignore_index
            counts.append(int(kept.sum()))
        return counts

    def _question(self, why: str) -> CurvoptError:
        return CurvoptError(
            f"how the loss is reduced over the samples is not known ({self.term.name}: {why}): "
            "give reduction='mean' (a sample's own loss is N times its part of the loss) or "
            f"reduction='sum' (its part){TRAINER if 'a sum scaled' in why else ''}"
        )


TRAINER = (
    ". In transformers.Trainer it is num_items_in_batch, the tokens of the whole batch: say "
    "trainer.model_accepts_loss_kwargs = False; private steps: curvopt.privacy.PrivateTrainerMixin"
)


def kind_of(terms: Iterable[OwnLoss]) -> str | None:
    """How a loss as a whole is reduced over the samples, if its terms agree."""
    kinds = set()
    for own in terms:
        if own.layout is None or own.end.open:
            return None
        inverse = inverse_of(own.share)
        mean = not isinstance(inverse, Tensor) and inverse * own.end.factor == own.plan.n
        kinds.add("mean" if mean else "sum")
    return kinds.pop() if len(kinds) == 1 else None


def _is_mean(end: Ending) -> bool:
    return end.crosses and not end.summed


def _cancels(numbers: Iterable[float], n: int) -> bool:
    """Whether one of the numbers divides by N or a multiple of it."""
    for number in numbers:
        for value in (number, 1 / number if number else 0.0):
            ratio = abs(value) / n
            if ratio >= 1 - 1e-9 and math.isclose(ratio, round(ratio), rel_tol=1e-9):
                return True
    return False
