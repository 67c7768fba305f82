"""Makes the plan of a pass: its terms, on top of its calls."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate
from operator import mul

import torch
from torch import Tensor

from curvopt.axes.endings import Ending, Way, ending, marks_of, ways
from curvopt.axes.keys import first_cuts
from curvopt.axes.layout import Layout, owned, single
from curvopt.axes.ops import Op, Ref
from curvopt.axes.wiring import steps_of
from curvopt.engine.penalties import beside, impure
from curvopt.engine.plan import Draw, Plan, code_of, key_of, made_once
from curvopt.engine.resolve import Resolver, made_by
from curvopt.engine.terms import PENALTY, loss_terms
from curvopt.errors import Coupled, CurvoptError
from curvopt.losses import Loss
from curvopt.losses.handwritten import Reduction
from curvopt.recording.tape import Tape


class Planner(Resolver):
    """Makes the plan of a pass.

    Args:
        tape: the recording.
        loss: the loss.
        output: the model's output, where all that is to be known of the loss is that it is made of
            its rows.
    """

    def make(self) -> Plan:
        """The plan."""
        self.calls = self._reached()
        marks = [call.mark for call in self.calls if call.mark is not None]
        marks += [term.mark for term in self.record.losses]
        self.marks = [*marks, *(pick for _, pick in self.samples.picked)]
        self._replay()
        self._claim()
        plan = self._terms() if self.output is None else self._rows_of(self.output)
        derived, uses, own, slow = self._resolve()
        numbers = {call: index for index, call in enumerate(self.record.calls)}
        plan.uses = [(numbers[call], names, layout) for call, names, layout in uses]
        plan.own = [(numbers[call], name, layout) for call, name, layout in own]
        plan.derived = [numbers[call] for call in derived]
        plan.slow = slow
        plan.reached = [numbers[call] for call in self.calls if call not in derived]
        plan.updated = self._updated()
        # What was made of Python's numbers in the pass is what nobody can see through.
        made = {op.inputs[0].storage for op in self.trace.ops if op.name == "lift_fresh"}
        shared = (ref for ref in self.samples.shared if ref.storage not in made)
        plan.shared = [list(ref.shape) for ref in shared]
        plan.places = self.samples.places()
        for storage, (_, begin) in first_cuts(self.trace).items():
            if storage in plan.places:
                plan.places[storage] -= begin
        plan.draws = self._draws()
        plan.value_dependent = self.value_dependent
        return plan

    def _draws(self) -> list[Draw]:
        """What draws rows of a data set for the model, and for which samples."""
        found: dict[tuple[int, int], Draw] = {}
        for storage, (k, ref) in self.samples.picked:
            owners, op = self._owners(k, ref), self.trace.ops[k]
            if owners is None or ref.dtype == torch.bool:  # a mask draws none twice
                continue
            shape = op.inputs[0].shape
            dims = [d for d, index in enumerate(op.args[1]) if index is ref] if _lists(op) else []
            draw = found.setdefault((storage, k), Draw(storage, k, [], [], []))
            draw.indices.append(next(i for i, r in enumerate(op.inputs) if r is ref))
            draw.sizes.append(shape[dims[0]] if dims else max(shape))
            draw.owners.append(owners.expand(ref.shape))
        return list(found.values())

    def _updated(self) -> list[int]:
        """Buffers that hold something of the samples when the pass is over."""
        end = len(self.trace.ops)
        refs = [self.trace.ref(buffer) for buffer in self.record.silent]
        written = {ref.storage for step in steps_of(self.trace) for ref in step.touched}
        marks = {k: (end, ref) for k, ref in enumerate(refs) if ref.storage in written}
        if not marks:
            return []
        self.marks = [*self.marks, *marks.values()]
        self._replay()
        return [k for k, mark in marks.items() if self._owners(*mark) is not None]

    def _mixed(self, term: Loss) -> bool:
        return self._layout(term.mark) is None and self._owners(*term.mark) is not None

    def _terms(self) -> Plan:
        terms, loose = loss_terms(self.loss, self.record.losses, self.trace, self._mixed)
        stops: dict[int | None, Loss] = {}
        for term in terms:
            at = term.mark if isinstance(term, Reduction) else (term.value_at, term.value_ref)
            stops[made_by(self.trace, at)] = term
        found = ways(self.trace, self.loss_ref, {s for s in stops if s is not None})
        self.arithmetic = {step.index for way in found for step in way.steps}
        self.marks = [*self.marks, *marks_of(found), *beside(found)]
        self._replay()
        by_term: dict[Loss, list[Ending]] = {term: [] for term in terms}
        free: list[Way] = []  # to what holds no samples
        for way in found:
            met = stops.get(way.stop)
            if met is not None:
                if self._owners(*met.mark) is None:
                    free.append(way)
                by_term[met].append(
                    ending(way, self._owners, self._ragged, self._filled, self.silent)
                )
            elif self._owners(way.at, way.end) is not None:
                self._refuse(way)
            else:
                loose = True
                free.append(way)
        kept = [t for t in terms if self._owners(*t.mark) is not None or not self.n]
        loose = loose or len(kept) < len(terms)
        if not kept:
            raise CurvoptError(PENALTY)
        layouts = [self._term_layout(term) for term in kept]
        numbers = {term: index for index, term in enumerate(self.record.losses)}
        plan = Plan(
            self.n,
            [numbers[t] for t in kept],
            layouts,
            [_one(by_term[t]) for t in kept],
            weighed=self._weighed(kept),
            loose=loose,
        )
        why = (impure(self.trace, way, self._owners, self.silent) for way in free)
        plan.impure = next(filter(None, why), "") if loose else ""
        present = [self.n if layout is None else layout.present for layout in layouts]
        outside = self.trace.outside
        shapes = [outside[storage].shape for storage in self.samples.seeds if storage in outside]
        plan.sizes = frozenset(n for shape in shapes for n in accumulate(shape, mul))
        plan.partial = sum(number < self.n for number in present)
        plan.overlapping = plan.partial > 0 and sum(present) > self.n
        return plan

    def _rows_of(self, output: Tensor) -> Plan:
        """The plan of any loss of the rows of an output."""
        mark = len(self.trace.ops), self.loss_ref
        self.marks = [*self.marks, mark]
        self.arithmetic = set()
        self._replay()
        owners = self._owners(*mark)
        layout = None if owners is None else owned(owners, tuple(output.shape), self.n)
        if layout is None or layout.axes > 1:
            raise CurvoptError(
                f"(loss, output): the samples do not lie on the first axis of the output "
                f"{list(output.shape)}"
            )
        return Plan(self.n, [], [layout], [])

    def _refuse(self, way: Way) -> None:
        op = self.trace.ops[way.stop].name if way.stop is not None else "a tensor"
        passed = {way.stop, *(step.index for step in way.steps)}
        for name, place in self.record.unknown:
            if made_by(self.trace, place) in passed:
                raise Coupled(
                    f"part of the loss is {name} of several outputs of the model, reduced inside "
                    "torch, so a sample's own loss is not known: call it with reduction='none' and "
                    "end the loss with mean() or sum() over the rows"
                )
        raise Coupled(
            f"part of the loss, {op} of shape {list(way.end.shape)}, holds samples but goes into "
            "the loss by no mean() or sum() that was recorded, so a sample's own loss is not "
            "known: end the loss with rows.mean() or rows.sum() over one row per sample"
        )

    def _weighed(self, terms: list[Loss]) -> str:
        """The weight of the rows that depends on several samples; "" if there is none.

        What a known loss divides by is its own business.
        """
        inside = [range(t.begin, t.value_at) for t in terms if not isinstance(t, Reduction)]
        for weighing in self.samples.weighings:
            if weighing.kind != "count" and not any(weighing.op in ops for ops in inside):
                return weighing.why
        return ""

    def _term_layout(self, term: Loss) -> Layout | None:
        owners = self._owners(*term.mark)
        if not self.n:
            return Layout("batch", 0, 1)
        if self.n == 1 and term.mark[1].shape:
            return Layout("batch", 1, term.mark[1].shape[0])
        if owners is None:
            return None
        if not term.mark[1].shape:
            return single(owners, self.n)
        tokens = term.token_axes(owners.ndim)
        layout = owned(owners, tuple(term.mark[1].shape), self.n)
        if layout is None or layout.kind == "batch" or set(range(layout.axes)) <= tokens:
            return layout
        return None


def plan_of(tape: Tape, loss: Tensor, output: Tensor | None = None) -> Plan:
    """The plan of a pass, made once for equal passes.

    Args:
        tape: the recording.
        loss: the loss.
        output: see `Planner`.
    """
    if tape.trace.unsupported:  # what the pass left may not even have a key
        raise CurvoptError(tape.trace.unsupported)
    key = key_of(tape, loss), None if output is None else tape.trace.ref(output)
    plan = made_once(key, lambda: Planner(tape, loss, output).make(), lambda: code_of(tape))
    if any(end.places for end in plan.endings):
        plan = replace(plan, endings=[end.of(tape.trace) for end in plan.endings])
    return plan


def _lists(op: Op) -> bool:
    """Whether an op takes a list of indices, one for each dim."""
    return len(op.args) > 1 and isinstance(op.args[1], tuple) and not isinstance(op.args[1], Ref)


def _one(endings: list[Ending]) -> Ending:
    """The ways of one term, which should agree."""
    first = endings[0] if endings else Ending()
    for other in endings[1:]:
        if other.factor != first.factor or other.crosses != first.crosses:
            first.open = first.open or "it enters the loss in several ways"
        first.open = first.open or other.open
        first.numbers += other.numbers
        first.places += other.places
        first.scaled = first.scaled or other.scaled
        first.summed = first.summed or other.summed
    return first
