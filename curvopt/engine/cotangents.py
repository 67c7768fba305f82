"""What is sent back: cotangents at the outputs of the terms, for each pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from curvopt.axes.endings import read_numbers
from curvopt.axes.layout import Layout
from curvopt.engine.changes import Changes
from curvopt.engine.checks import check_loss
from curvopt.engine.hooks import before_hooks
from curvopt.engine.own import OwnLoss, inverse_of
from curvopt.engine.plan import Plan
from curvopt.engine.slow import CHUNK_BYTES
from curvopt.errors import CurvoptError
from curvopt.losses import Loss
from curvopt.losses.base import per_sample
from curvopt.losses.generic import Closure
from curvopt.quantities.base import Pass, Quantity
from curvopt.recording.tape import Tape
from curvopt.recording.uses import Use


class Cotangents:
    """A loss on a recorded forward pass, and what is sent back from its terms.

    What `prepare` finds is declared here and set there.

    Args:
        tape: the recording.
        loss: the loss, a scalar that was computed while recording.
        reduction: how the loss is reduced over the samples, where the way it was written leaves
            that open.
        max_columns: cotangent columns that go together at most; bounded by memory in any case.
        output: the model's output that a loss written by hand was computed from.
        finite: refuse a loss that is not finite.
        declared: a sum that is scaled by a number must be declared by `reduction`.
        penalties: leave parts of the loss that hold no samples to the gradient.
    """

    samples: int
    term_layouts: list[Layout | None]
    upstream: list[Tensor]
    use_layouts: dict[Use, Layout]
    uses: list[Use]
    slow: dict[Tensor, str]
    #: Leave the rows of parameters that no rule covers: for quantities that can do without them.
    covered_only = False

    def __init__(
        self,
        tape: Tape,
        loss: Tensor,
        reduction: str | None = None,
        max_columns: int | None = None,
        *,
        output: Tensor | None = None,
        finite: bool = True,
        declared: bool = False,
        penalties: bool = False,
    ):
        self.tape, self.loss, self.record = tape, loss, tape.record
        if max_columns is not None and max_columns < 1:
            raise ValueError(f"Invalid max_columns: {max_columns}")
        self.max_columns, self.output = max_columns, output
        if reduction not in (None, "mean", "sum"):
            raise ValueError(f"Invalid reduction: {reduction!r} (use 'mean' or 'sum')")
        self.reduction, self.declared, self.penalties = reduction, declared, penalties
        check_loss(loss, finite=finite)
        self.terms: list[Loss] = []
        self.plan: Plan | None = None
        self.hooked = False
        self.changes = Changes()
        self._inverse: list[float | Tensor] | None = None

    @property
    def _plan(self) -> Plan:
        assert self.plan is not None
        return self.plan

    # -- a sample's own loss ----------------------------------------------------------------------

    @property
    def inverse(self) -> list[float | Tensor]:
        """By term, what a sample's part of the loss is multiplied by to be its own loss.

        Raises:
            CurvoptError: only the user can know.
        """
        if self._inverse is None:
            own = self._own()
            if self.declared and self.samples:
                for one in own:
                    one.check_private(self.reduction)
            if any(isinstance(term, Closure) for term in self.terms):
                (term,) = self.terms
                self._inverse = [inverse_of(term.share(self._known_layout(0)))]
            else:
                self._inverse = [one.factor(self.reduction) for one in own]
        return self._inverse

    @property
    def uniform(self) -> bool:
        """Every sample of every term has one factor: its own loss is the loss times a number."""
        first = self.inverse[0]
        return all(not isinstance(f, Tensor) and f == first for f in self.inverse)

    def _own(self) -> list[OwnLoss]:
        """How the recorded terms are reduced over the samples."""
        reads = read_numbers(self.tape.trace)
        losses = self.record.losses
        return [OwnLoss(self._plan, i, losses[k], reads) for i, k in enumerate(self._plan.terms)]

    def _known_layout(self, index: int) -> Layout:
        layout = self.term_layouts[index]
        if layout is None:
            term = self.terms[index]
            raise CurvoptError(
                f"the rows of {term.name} {list(term.output.shape)} cannot be told apart by "
                "sample: reduce them over the samples last"
            )
        return layout

    def _factors(self, one: Pass) -> list[float | Tensor]:
        """By term, the factor of each sample in what is sent back."""
        if one.own:
            return self.inverse
        chosen = one.cotangent.subsample
        if chosen is None:
            return [1.0] * len(self.terms)
        return [enlarged(inverse, chosen) for inverse in self.inverse]

    def _share(self, chosen: tuple[int, ...] | None = None) -> float | Tensor | None:
        """Sample n's share of the loss, None if the terms differ."""
        if len(self.terms) > 1 and not self.uniform:
            return None
        inverse = self.inverse[0]
        share = inverse_of(inverse)
        if chosen is not None and not isinstance(share, Tensor):
            grown = enlarged(inverse, chosen)
            share = share * grown if not isinstance(grown, Tensor) else share
        return share

    def _scaling(self, one: Pass, quantity: Quantity) -> tuple[float, float | Tensor | None]:
        """Factor of the rows, and the share of a sample in a sum over rows."""
        chosen = one.cotangent.subsample
        if one.cotangent.kind == "gradient":
            return 1.0, self._share(chosen) if one.own else 1.0
        if quantity.own is one.own:
            return 1.0, 1.0
        inverse = self.inverse[0]
        assert isinstance(inverse, float)  # only a uniform share mixes the two in one pass
        if chosen is not None:
            grown = enlarged(inverse, chosen)
            inverse = inverse / grown if not isinstance(grown, Tensor) else inverse
        return (inverse**0.5 if quantity.own else inverse**-0.5), 1.0

    # -- columns ----------------------------------------------------------------------------------

    def _gradients(
        self, factors: Sequence[float | Tensor] | None = None, *, free: bool = False, **options: Any
    ) -> list[Tensor]:
        """Gradient of the loss in each term's output, each sample's part times its factor."""
        result = []
        retain = not free or len(self.terms) > 1
        factors = [1.0] * len(self.terms) if factors is None else factors
        for term, up, factor, layout in zip(
            self.terms, self.upstream, factors, self.term_layouts, strict=True
        ):
            if not isinstance(factor, Tensor):  # of all samples: cheaper before the rows
                up, factor = up if factor == 1 else up * factor, 1.0
            options["retain_graph"] = retain
            with self.record.hooks.absent():
                if self.hooked:
                    grad = before_hooks(term.end, term.output, up, **options)
                else:
                    (grad,) = torch.autograd.grad(term.end, term.output, up, **options)
            if isinstance(factor, Tensor):
                assert layout is not None
                grad = per_sample(grad, factor.to(grad), layout)
            result.append(grad)
        return result

    def _columns(self, one: Pass, free: bool = False) -> Iterator[list[Tensor]]:
        """Chunks of cotangents, a ``[V, *output.shape]`` per term; `free`: free the losses too."""
        kind = one.cotangent.kind
        factors = self._factors(one)
        if kind in ("gradient", "hessian"):
            options = {"create_graph": self.tape.create_graph or kind == "hessian"}
            free = free and kind != "hessian"
            grads = self._gradients(factors, free=free, **options)
            yield [grad.unsqueeze(0) for grad in grads]
            return
        layouts = [self._known_layout(i) for i in range(len(self.terms))]
        scales = [
            term.scale(up, factor.to(up) if isinstance(factor, Tensor) else factor, layout)
            for term, up, factor, layout in zip(
                self.terms, self.upstream, factors, layouts, strict=True
            )
        ]
        if not self.samples:
            yield [term.output.new_zeros(1, *term.output.shape) for term in self.terms]
            return
        limit = self._chunk()
        for term, scale, layout in zip(self.terms, scales, layouts, strict=True):
            cotangent = one.cotangent
            count = cotangent.samples if kind == "sketch" else term.columns_per_sample(layout)
            for start in range(0, count, limit):
                stop = min(start + limit, count)
                if kind == "sketch":
                    part = term.sketch(
                        stop - start, scale, cotangent.estimator, cotangent.generator
                    )
                    part = part if count == 1 else part / count**0.5
                else:
                    part = term.columns(start, stop, scale, layout)
                yield [
                    part if t is term else part.new_zeros(()).expand(len(part), *t.output.shape)
                    for t in self.terms
                ]

    def _chunk(self) -> int:
        """Columns that may go together: their cotangents at all uses stay under `CHUNK_BYTES`."""
        fitting = max(1, CHUNK_BYTES // max(1, 4 * self._elements()))
        return min(fitting, self.max_columns or fitting)

    def _elements(self) -> int:
        return sum(use.shape.numel() for use in self.uses)


def enlarged(inverse: float | Tensor, chosen: tuple[int, ...]) -> float | Tensor:
    """What a sample's share grows by in the loss of some samples alone."""
    if isinstance(inverse, Tensor):
        share = inverse_of(inverse)
        assert isinstance(share, Tensor)
        return share[list(chosen)].sum().reciprocal().expand(len(share))
    return 1.0 if inverse == 1 else inverse / len(chosen)
