"""From a recorded forward pass to quantities: cotangents, one pass each, reductions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from curvopt.axes.keys import first_cuts
from curvopt.axes.layout import Layout
from curvopt.engine.accounts import paths_of
from curvopt.engine.backward import unspent
from curvopt.engine.changes import Changes, changed_above, sums_changed
from curvopt.engine.hessian import Hessian
from curvopt.engine.hooks import check_backward, passing
from curvopt.engine.own import kind_of
from curvopt.engine.paths import REENTRANT, walk
from curvopt.engine.penalties import penalty_gradients
from curvopt.engine.plan import Plan, drawn_by, uses_of
from curvopt.engine.planner import plan_of
from curvopt.engine.reduction import Reduction
from curvopt.engine.result import Values
from curvopt.engine.terms import PENALTY, closure_terms, upstream
from curvopt.errors import Coupled, CurvoptError
from curvopt.losses import Loss
from curvopt.losses.generic import Closure
from curvopt.quantities.base import Context, Cotangent, Pass, Quantity
from curvopt.quantities.first_order import Gradient
from curvopt.recording.hooks import Hooked, HookedNode, random_kept
from curvopt.recording.uses import Call
from curvopt.structures import Dense, Structure, total


class Computation(Reduction):
    """All quantities of one loss on one recorded forward pass.

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

    # -- public -----------------------------------------------------------------------------------

    def run(self, quantities: Sequence[Quantity], *, free: bool = False) -> dict[str, Any]:
        """Values by quantity's field, as `Values`.

        Args:
            quantities: what to compute.
            free: free the graph as the last pass goes over it.
        """
        names = self.tape.names
        if all(isinstance(quantity, Gradient) for quantity in quantities):
            return {q.field: Values(q.field, self.gradient(), names) for q in quantities}
        values: dict[str, Any] = {}
        with (
            self.tape.trace.paused(),
            torch.set_grad_enabled(self.tape.create_graph),
            unspent(),
            self.record.hooks.unseen(),
        ):
            self.prepare()
            free = free and not self.slow
            passes = self._passes(quantities)
            for index, (one, asked) in enumerate(passes.items()):
                last = free and index == len(passes) - 1
                for quantity, result in self._run_pass(one, asked, last).items():
                    whole, field = not isinstance(result, dict), quantity.field
                    values[field] = result if whole else Values(field, result, names)
        return values

    def gradient(self) -> dict[Tensor, Tensor]:
        """Gradient of the loss as written, of the parameters that took part."""
        params = self.tape.params
        with self.tape.trace.paused(), self.record.hooks.unseen():
            grads = torch.autograd.grad(
                self.loss,
                params,
                allow_unused=True,
                retain_graph=True,
                create_graph=self.tape.create_graph,
            )
        return {p: g for p, g in zip(params, grads, strict=True) if g is not None}

    @contextmanager
    def watching(self, quantities: Sequence[Quantity], values: dict[str, Any]) -> Iterator[None]:
        """Compute quantities of the samples' parts of the gradient while torch goes backward.

        Args:
            quantities: of the gradient as written.
            values: filled in when the pass is over.
        """
        with self.tape.trace.paused(), torch.no_grad(), self.record.hooks.unseen():
            self.prepare()
            self.changes.check_rows(self.tape)
            slow = [] if self.covered_only else list(self.slow)
            slow_rows: list[Tensor] = []
            if slow:
                ones = [up.unsqueeze(0) for up in self._gradients()]
                slow_rows = self._rows(slow, [t.output for t in self.terms], ones)
        due, left = self._due("watch"), list[Tensor]()
        if any(quantity.reads_totals for quantity in quantities):
            left = self._undisturbed()
        with passing(self.uses, self.tape.params) as caught:
            yield
        with self.tape.trace.paused(), torch.no_grad(), self.record.hooks.unseen():
            sent = {use: c.unsqueeze(0) for use, c in caught.items()}
            parts = self._structures([*sent], [*sent.values()])
            for p, rows in zip(slow, slow_rows, strict=True):
                parts[p] = [Dense(rows)]
            structures = {p: total(parts[p]) for p in self.tape.params if p in parts}
            self._audit("watch", structures, {p: p.grad for p in due}, sent)
            # What follows may change the gradient in place.
            totals = {
                p: p.grad.clone()
                for p in left
                if p in structures and p.grad is not None and self._tells(p.grad, sent)
            }
            del sent
            values.update(self._of_gradient(quantities, structures, totals))

    def leave(self) -> None:
        """Leave the pass to torch: nothing is known of its samples, and nothing asked."""
        self.plan = Plan(0, [], [], [])

    def outline(self) -> dict[Tensor, Structure]:
        """Structures of zero cotangents: their kinds and sizes, before any backward pass."""
        with self.tape.trace.paused(), torch.no_grad():
            self.prepare()
            zeros = []
            for use in self.uses:
                value = next(iter(use.values.values())).tensor
                zeros.append(value.new_zeros(()).expand(1, *use.shape))
            parts = self._structures(self.uses, zeros)
        return {p: total(found) for p, found in parts.items()}

    @property
    def reached(self) -> list[Call]:
        """The calls that the loss leads to, and that no other loss may share."""
        calls = self.record.calls
        if self.plan is None:  # it holds no sample
            return calls
        return [calls[index] for index in self.plan.reached]

    @property
    def reached_parameters(self) -> set[Tensor]:
        """The parameters that take part, once the pass is prepared."""
        roots = {r for use in self.uses for value in use.values.values() for r in value.roots}
        return {self.tape.by_id[root] for root in roots} | set(self.slow)

    @property
    def shared(self) -> list[list[int]]:
        """Shapes of data that all samples share, and that is no parameter and no buffer."""
        return self._plan.shared

    def seen(self) -> Iterator[tuple[int, bool, Tensor]]:
        """Of the data that goes through the model: storage, whether it is drawn from, which rows.

        Raises:
            CurvoptError: several samples are one row of a data set.
        """
        for storage, places in self._plan.places.items():
            _, begin = self.cuts.get(storage, (0, 0))
            begin += self.tape.trace.origins[storage]
            yield storage, False, places + begin
        for draw in self._plan.draws:
            drawn = drawn_by(draw, self.tape.trace)
            if drawn is None:
                shape = list(self.tape.trace.outside[draw.storage].shape)
                raise CurvoptError(
                    f"several samples are the same row of {shape}, drawn by an index: it would "
                    "contribute up to C each time. Draw each row once (a sampler, torch.randperm); "
                    "a table that is no data of theirs is a buffer (register_buffer)"
                )
            yield draw.storage, True, drawn

    @property
    def updated(self) -> list[Tensor]:
        """Buffers that the pass wrote samples to."""
        return [self.record.silent[index] for index in self._plan.updated]

    def penalty_gradients(self) -> dict[Tensor, Tensor]:
        """Gradients of the parts of the loss that hold no sample, of parameters they depend on.

        Raises:
            CurvoptError: such a part is made of more than parameters, buffers and numbers, or is
                scaled by something of the samples.
        """
        self.prepare()
        if not self._plan.loose:
            return {}
        if self._plan.impure:
            raise CurvoptError(self._plan.impure)
        terms = [self.record.losses[index] for index in self._plan.terms]
        with self.tape.trace.paused():
            return penalty_gradients(self.loss, terms, self.tape.params)

    @property
    def derives(self) -> bool:
        """Whether rows of values made of parameters are pulled back through the graph."""
        return any(value.call is not None for use in self.uses for value in use.values.values())

    # -- samples, uses, terms ---------------------------------------------------------------------

    def prepare(self) -> None:
        """Find the losses, the samples and the uses."""
        if self.plan is None:
            with self.tape.trace.paused(), self.record.hooks.unseen():
                self._prepare()

    def _prepare(self) -> None:
        if self.tape.spent and walk(self.loss, self.tape.spent)[0]:
            raise CurvoptError(
                "a second backward pass over one recorded forward pass: add the losses and call "
                "backward once"
            )
        if self.record.reentrant:
            raise CurvoptError(REENTRANT)
        try:
            self.cuts = first_cuts(self.tape.trace)
            self.plan = self.tape.known or plan_of(self.tape, self.loss)
        except Coupled as error:
            if self.record.coupled:
                raise CurvoptError(
                    f"{self.record.coupled} a norm within samples, such as torch.nn.GroupNorm"
                ) from error
            if self.output is None or self.declared:
                raise
            self.plan = self._plan_of_output(error)
        plan = self.plan
        self.samples = plan.n
        self.terms = [self.record.losses[index] for index in plan.terms]
        self.term_layouts = plan.term_layouts
        if plan.loose and not self.penalties:
            raise CurvoptError(PENALTY)
        by_output = self.output is not None and not plan.terms
        guessed = by_output or any(_unknown(term) for term in self.terms)
        if self.output is not None and guessed:
            self.terms = closure_terms(self.loss, self.output, self.terms, self._kind())
            if not by_output:
                self.term_layouts = [self._output_layout()]
        hooks = self.record.hooks
        nodes = hooks.look(self.loss) if self.record.hooked else []
        with hooks.absent():
            self.upstream = upstream(self.loss, self.terms)
        self.use_layouts = uses_of(plan, self.tape)
        params = self.tape.params
        found, custom = paths_of(plan, self.tape, self.use_layouts, self.terms)
        self.slow = {params[index]: op for index, op in (found | plan.slow).items()}
        self.uses = list(self.use_layouts)
        if not self.samples:
            self.uses, self.slow = [], {}
        elif not self.uses and not self.slow:
            raise CurvoptError(
                "no recorded use of a parameter leads to the loss: compute the model's output "
                "while recording, with gradients enabled, and go backward over it once"
            )
        self.hooked = custom or self.record.hooked
        if self.hooked and self.samples:
            self._check_hooks(nodes)

    def _check_hooks(self, nodes: Sequence[tuple[Any, HookedNode]]) -> None:
        tape, grads = self.tape, [grad.detach() for grad in self._gradients()]
        with random_kept(tape.params):  # hooks that draw: as if they had not run
            above = changed_above(tape, self.loss, self.terms)
            changed = check_backward(
                tape, self.loss, self.terms, self.uses, grads, samples=self.samples
            )
        values = [one.roots for one in changed if isinstance(one, Hooked) and one.roots]
        uses = [use.call for use in self.uses]
        values += sums_changed(tape, uses, [pair for pair in nodes if pair[1] in changed])
        self.changes = Changes(above, values, bool(changed))

    def _plan_of_output(self, error: CurvoptError) -> Plan:
        """The plan of a loss of which nothing is known but the output that it was made of.

        Raises:
            CurvoptError: the loss couples the output's rows, or the user does not say how it is
                reduced.
        """
        assert self.output is not None
        if self.reduction is None:
            raise CurvoptError(
                f"how the loss is reduced over the samples is not known ({error}): give "
                "reduction='mean' (a sample's own loss is N times its part of the loss) or "
                "reduction='sum' (its part)"
            ) from error
        (term,) = closure_terms(self.loss, self.output, [], self.reduction)
        assert isinstance(term, Closure)
        term.slope()
        return plan_of(self.tape, self.loss, self.output)

    def _output_layout(self) -> Layout:
        assert self.output is not None
        layouts = [layout for layout in self.term_layouts if layout is not None]
        rows = len(self.output)
        for layout in layouts:
            if layout.kind != "gather" and rows % max(1, layout.n) == 0:
                kind = layout.kind if layout.kind != "time" else "batch"
                return Layout(kind, layout.n, rows // max(1, layout.n))
        raise CurvoptError(
            f"(loss, output): the samples do not lie on the first axis of the output "
            f"{list(self.output.shape)}"
        )

    def _kind(self) -> str | None:
        """How the loss as a whole is reduced over the samples, if its terms agree."""
        return self.reduction or kind_of(self._own())

    def _passes(self, quantities: Sequence[Quantity]) -> dict[Pass, list[Quantity]]:
        """Group the quantities by what they need sent back."""
        by_cotangent: dict[Cotangent, list[Quantity]] = defaultdict(list)
        for quantity in quantities:
            by_cotangent[quantity.cotangent].append(quantity)
        passes: dict[Pass, list[Quantity]] = {}
        for cotangent, asked in by_cotangent.items():
            own = any(quantity.own for quantity in asked)
            if all(quantity.own == own for quantity in asked):
                passes[Pass(cotangent, own)] = asked
                continue
            same_share = self.uniform or (len(self.terms) == 1 and cotangent.kind == "gradient")
            if same_share and cotangent.kind == "gradient":
                passes[Pass(cotangent, True)] = asked
            elif self.uniform and cotangent.kind != "hessian":
                passes[Pass(cotangent, False)] = asked
            else:
                for kind in (False, True):
                    part = [quantity for quantity in asked if quantity.own is kind]
                    passes[Pass(cotangent, kind)] = part
        return passes

    # -- the pass ---------------------------------------------------------------------------------

    def _run_pass(self, one: Pass, asked: list[Quantity], free: bool) -> dict[Quantity, Any]:
        kind = one.cotangent.kind
        if kind == "gradient":
            self.changes.check_rows(self.tape)
            return self._made(one, asked, free)
        with self.record.hooks.absent():
            results = self._made(one, asked, free)
        parts = [part for part in results.values() if isinstance(part, dict)]
        if any(callable(value) for part in parts for value in part.values()):
            self.changes.check_later(everywhere=kind == "hessian")
        return results

    def _made(self, one: Pass, asked: list[Quantity], free: bool) -> dict[Quantity, Any]:
        if one.cotangent.kind == "hessian":
            hessian = Hessian(self, one.own)
            return {quantity: quantity.from_hessian(hessian) for quantity in asked}
        chosen = one.cotangent.subsample
        if chosen is not None and max(chosen) >= self.samples:
            raise CurvoptError(f"subsample has index {max(chosen)} of {self.samples} samples")
        results: dict[Quantity, Any] = {}
        chunks = iter(self._columns(one, free))
        outputs = [term.output for term in self.terms]
        cotangents = next(chunks)
        while True:
            following = next(chunks, None)
            due = None
            if one.cotangent.kind == "gradient":
                due = self._due(self._asker)
            structures = self._reduced(outputs, cotangents, free and following is None, due)
            if chosen is not None:
                structures = {p: s.take(chosen) for p, s in structures.items()}
            count = self.samples if chosen is None else len(chosen)
            for quantity in asked:
                first = quantity not in results
                context = Context(count, *self._scaling(one, quantity), first, self.tape.name)
                part = quantity.reduce_all(structures, context)
                if quantity in results:
                    part = quantity.combine_all(results[quantity], part)
                results[quantity] = part
            if following is None:
                return {quantity: quantity.finish(part) for quantity, part in results.items()}
            del structures  # freed before the next columns go
            cotangents = following


def _unknown(term: Loss) -> bool:
    return type(term).__name__ == "Reduction"
