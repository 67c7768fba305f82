"""Find the sample axis of every loss and use, and prove that samples do not mix."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from curvopt.engine.backward import pull_back
from curvopt.engine.samples import Layout, layouts, sample_counts
from curvopt.engine.tape import Tape, Use
from curvopt.errors import CurvoptError, Uncovered
from curvopt.losses import Loss
from curvopt.losses.base import per_sample

Axes = tuple[int, list[Layout], dict[Use, Layout | None]]

# Powers of two that tell samples apart: from 1 up, so that half precision keeps small numbers.
_POWERS = 13

# Sample axes that were found to hold, by first parameter and signature of the forward pass: a
# repeated forward pass is not checked again.
_known_layouts: Any = WeakTensorKeyDictionary()


def pass_key(tape: Tape) -> tuple[Any, ...]:
    """What repeated forward passes have in common."""
    return tape.record.signature, len(tape.record.uses), tape.batch_size, len(tape.params)


class SampleAxes:
    """The sample axes of one recorded forward pass.

    Args:
        tape: the recording.
        terms: the losses that make up the loss.
    """

    def __init__(self, tape: Tape, terms: list[Loss]):
        self.tape, self.record, self.terms = tape, tape.record, terms
        self.inconclusive = False
        #: Known to need no slow path: a new signature whose rules covered all uses while proven.
        self.covered = False

    def find(self) -> Axes:
        """Number of samples, and the sample axis of every loss and use, checked once."""
        uses = self.record.uses
        known = _known_layouts.setdefault(self.tape.params[0], {})
        key = pass_key(self.tape)
        if key not in known:
            if len(known) > 1000:  # shapes that never repeat
                known.clear()
            n, terms, of_uses = self._search()
            if not self.inconclusive:
                known[key] = n, terms, [of_uses[use] for use in uses]
            return n, terms, of_uses
        n, terms, in_order = known[key]
        return n, terms, dict(zip(uses, in_order, strict=True))

    def _search(self) -> Axes:
        outputs = [term.output for term in self.terms]
        given, rows = self.tape.batch_size, list(outputs[0].shape)
        uses = self.record.uses
        first = list(uses[0].shape) if uses else rows
        if given is not None:
            counts = [given]
        else:
            counts = sample_counts(tuple(first), tuple(rows), self.tape.hint)
        mixing = None
        for n in counts:
            # All terms share one kind of layout: trying every combination would find chance hits.
            per_term = [list(self._readable(term, n, first)) for term in self.terms]
            if not all(per_term):
                continue
            for choice in range(max(map(len, per_term))):
                chosen = [options[min(choice, len(options) - 1)] for options in per_term]
                found, mixing_here = self._separable(n, outputs, chosen)
                if found is not None:
                    return n, chosen, found
                mixing = mixing or mixing_here
        if mixing is None:
            given_text = "" if given is None else f"batch_size={given} does not fit: "
            raise CurvoptError(
                f"{given_text}the number of samples cannot be read from the first op's output "
                f"{first} and the loss's input {rows}: give the right batch_size="
            )
        raise CurvoptError(
            f"samples are not separate: the loss of one sample depends on others at {mixing}. "
            "Per-sample quantities need a model that treats samples one by one (no statistics "
            "over the batch). If the samples are not on the first axis, give batch_size=; if the "
            "op's data is a constant for all samples (positions, say), make it a buffer"
        )

    def _readable(self, term: Loss, n: int, first: list[int]) -> Iterator[Layout]:
        """Layouts of a loss's input; time first is read into it only where shapes leave no doubt.

        (A batch that the model handles in parts looks the same as time steps.)
        """
        time_first = first[1:2] == [n] and len(first) > 2 and first[0] * n == term.output.shape[0]
        time_first = time_first and first[0] != n
        for layout in term.layouts(n):
            shown = layout.kind == "batch" or (layout.kind == "time-flat" and time_first)
            if shown or self.tape.batch_size is not None:
                yield layout

    def _separable(
        self, n: int, outputs: list[Tensor], chosen: list[Layout]
    ) -> tuple[dict[Use, Layout | None] | None, str]:
        """Find each use's sample axis, given that of the outputs.

        If samples do not mix, multiplying the cotangent of sample n by a_n multiplies row n at
        every use by a_n. With two draws of distinct powers of two (exact in floating point), a
        wrong axis, or a single pair of samples that mix, breaks this.
        """
        candidates = {use: list(layouts(use.shape, n)) for use in self.record.uses}
        if n < 2:
            return self._one_sample(outputs, candidates)
        factors = draw_factors(n)
        marks: dict[Use, dict[Layout, list[Tensor]]] = {
            use: {layout: [] for layout in options} for use, options in candidates.items()
        }
        targets = [use.edge for use in candidates] + self.tape.params
        for column in probes(factors, outputs, chosen):
            grads: list[Tensor | None] = []  # one by one: each holds the cotangents of all uses
            grads = pull_back(outputs, column, targets, batched=False)
            for index, use in enumerate(candidates):
                if (arrived := grads[index]) is not None:
                    for layout, found in marks[use].items():
                        found.append(mark(arrived[0], layout))
            arrived = None
        result: dict[Use, Layout | None] = {}
        for use, options in candidates.items():
            if not options or not marks[use][options[0]]:
                result[use] = options[0] if options else None
                continue
            # Zeros prove nothing (behind weights that start at zero, say): look again next time.
            self.inconclusive |= not marks[use][options[0]][0].any()
            result[use] = next((o for o in options if scales(marks[use][o], factors)), None)
            if result[use] is None and not use.rule.tentative:
                return None, f"{use.op} (output {list(use.shape)}, {n} samples)"
        direct = any(grad is not None for grad in grads[len(candidates) :])
        self.covered = not direct and all(map(covers, candidates, grads, result.values()))
        return result, ""

    def _one_sample(
        self, outputs: list[Tensor], candidates: dict[Use, list[Layout]]
    ) -> tuple[dict[Use, Layout | None] | None, str]:
        """A batch of one cannot mix, but many rows of a loss must all be that sample's."""
        found = {use: options[0] if options else None for use, options in candidates.items()}
        rows = outputs[0].shape[0]
        if self.tape.hint != 1 and rows > 1 and candidates:
            first = next(iter(candidates))
            half = torch.zeros(2, rows, *[1] * (outputs[0].ndim - 1))
            half[0, ::2], half[1, 1::2] = 1, 1
            cotangent = half.to(outputs[0]).expand(2, *outputs[0].shape)
            (grad,) = pull_back(outputs[:1], [cotangent], [first.edge], batched=False)
            if grad is None or not all(part.any() for part in grad):
                return None, f"{first.op} (output {list(first.shape)}, {rows} rows of the loss)"
        return found, ""


def covers(use: Use, grad: Tensor | None, layout: Layout | None) -> bool:
    """Whether the rule of a use has structures for a cotangent after all."""
    if grad is None:
        return True
    if layout is None:
        return False
    try:
        use.structures(grad, layout)
    except Uncovered:
        return False
    return True


def draw_factors(n: int) -> list[Tensor]:
    """Factors per sample: ones, and two draws of powers of two."""
    generator = torch.Generator().manual_seed(0)
    draws = [torch.randperm(n, generator=generator) for _ in range(2)]
    return [torch.ones(n), *(draw.mul(_POWERS).div(n).floor().exp2() for draw in draws)]


def probes(
    factors: list[Tensor], outputs: list[Tensor], chosen: list[Layout]
) -> Iterator[list[Tensor]]:
    """Columns of one random cotangent, scaled by each of the factors."""
    for factor in factors:
        generator = torch.Generator().manual_seed(1)
        noise = (torch.rand(output.shape, generator=generator).add_(0.5) for output in outputs)
        yield [
            per_sample(base, factor, layout).to(output).unsqueeze(0)
            for base, output, layout in zip(noise, outputs, chosen, strict=True)
        ]


def mark(grad: Tensor, layout: Layout) -> Tensor:
    """Two numbers per sample that tell its rows: along a random direction, and their norm."""
    rows = layout.split(grad).flatten(1)
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    direction = torch.randn(rows.shape[1], generator=torch.Generator().manual_seed(0))
    return torch.stack([rows @ direction.to(rows), torch.linalg.vector_norm(rows, dim=1)])


def scales(marks: list[Tensor], factors: list[Tensor]) -> bool:
    """Whether the rows of each sample scale with its factor (the first factors are ones)."""
    along, size = marks[0]
    for (mark, _), factor in zip(marks[1:], factors[1:], strict=True):
        error = (mark - factor.to(along) * along).abs()
        # A product of zero and infinity is no sign of mixing.
        error = torch.where(error.isnan(), 0, error)
        if (error > 1e-2 * factor.to(size) * size.nan_to_num(0)).any():
            return False
    return True
