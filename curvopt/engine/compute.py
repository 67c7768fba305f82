"""From a recorded forward pass to quantities: cotangents, one pass each, reductions."""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from curvopt.engine.axes import SampleAxes, draw_factors, mark, pass_key, probes, scales
from curvopt.engine.backward import BATCH_BELOW, pull_back
from curvopt.engine.hessian import Hessian
from curvopt.engine.registry import FunctionRule
from curvopt.engine.result import Values
from curvopt.engine.samples import Layout, layouts
from curvopt.engine.tape import Tape, Use
from curvopt.engine.terms import closure_terms, loss_terms, upstream, walk
from curvopt.errors import CurvoptError, SlowPathWarning, Uncovered
from curvopt.losses import Loss
from curvopt.losses.base import per_sample
from curvopt.quantities.base import Context, Cotangent, Pass, Quantity
from curvopt.quantities.first_order import Gradient
from curvopt.structures import Dense, Own, Pulled, Structure, total

# Bytes of cotangents that one chunk of columns may hold at the uses.
CHUNK_BYTES = 1 << 25

# Forward passes, by first parameter and signature, that needed no slow path: the next pass over
# such a graph may free it.
_known_fast: Any = WeakTensorKeyDictionary()


Parts = dict[Tensor, list[Structure]]


class Computation:
    """All quantities of one loss on one recorded forward pass.

    Args:
        tape: the recording.
        loss: the loss, a scalar that was computed while recording.
        reduction: how a loss that was written by hand is reduced over the samples.
        max_columns: cotangent columns that go together at most; bounded by memory in any case.
        output: the model's output that a loss written by hand was computed from.
        finite: refuse a loss that is not finite.
    """

    def __init__(
        self,
        tape: Tape,
        loss: Tensor,
        reduction: str | None = None,
        max_columns: int | None = None,
        *,
        output: Tensor | None = None,
        finite: bool = True,
    ):
        self.tape, self.loss, self.record = tape, loss, tape.record
        if max_columns is not None and max_columns < 1:
            raise ValueError(f"Invalid max_columns: {max_columns}")
        self.max_columns, self.output = max_columns, output
        if reduction not in (None, "mean", "sum"):
            raise ValueError(f"Invalid reduction: {reduction!r} (use 'mean' or 'sum')")
        self.reduction = reduction
        check_loss(loss, finite=finite)
        if any(leaf.grad is not None for leaf in self.record.leaves):
            raise CurvoptError(
                "torch.autograd.backward() went over the recorded graph unseen; call "
                "loss.backward() instead, once"
            )
        self.terms: list[Loss] = []
        self.reached: list[Use] = []
        #: Whether some use was left to the slow path, which goes over the graph again.
        self.slow = False

    # -- public -----------------------------------------------------------------------------------

    def run(self, quantities: Sequence[Quantity], *, free: bool = False) -> dict[str, Any]:
        """Values by quantity's field, as `Values`.

        Args:
            quantities: what to compute.
            free: free the graph as the last pass goes over it.
        """
        if all(isinstance(quantity, Gradient) for quantity in quantities):
            return {q.field: Values(q.field, self.gradient(free=free)) for q in quantities}
        values: dict[str, Any] = {}
        with torch.set_grad_enabled(self.tape.create_graph):
            covered = self._prepare()
            free = free and (covered or self._fast(("run", pass_key(self.tape))))
            passes = self._passes(quantities)
            for index, (one, asked) in enumerate(passes.items()):
                last = free and index == len(passes) - 1
                for quantity, result in self._run_pass(one, asked, last).items():
                    whole = not isinstance(result, dict)
                    values[quantity.field] = result if whole else Values(quantity.field, result)
        self._remember(("run", pass_key(self.tape)))
        return values

    def gradient(self, *, free: bool = False) -> dict[Tensor, Tensor]:
        """Gradient of the loss as written, of the parameters that took part."""
        params = self.tape.params
        if self.tape.create_graph:
            grads = torch.autograd.grad(self.loss, params, allow_unused=True, create_graph=True)
            return {p: g for p, g in zip(params, grads, strict=True) if g is not None}
        one = self.loss.new_ones(1, *self.loss.shape)
        custom = {u for u in self.record.uses if isinstance(u.rule, FunctionRule)}
        free = free and not custom and self._fast(("gradient", pass_key(self.tape)))
        uses, cotangents, direct = self._pull([self.loss], [one], free)
        self.reached = uses
        result = {p: grad[0] for p, grad in direct.items()}
        # A sum over the samples does not need to know them: the batch counts as one sample. Custom
        # rules know batches only; there autograd has the sum.
        whole = {
            use: Layout("batch", 1, use.shape[0]) if use.shape and use not in custom else None
            for use in uses
        }
        with torch.no_grad():
            parts, uncovered = self._structures(uses, cotangents, whole)
            self.slow = bool(uncovered)
            self._remember(("gradient", pass_key(self.tape)))
            for use in uncovered:
                leaves = [use.arguments[name] for name in use.values]
                grads = torch.autograd.grad(self.loss, leaves, retain_graph=True)
                self._add(
                    parts,
                    use,
                    {n: Dense(g[None, None]) for n, g in zip(use.values, grads, strict=True)},
                )
            for p, structures in parts.items():
                for structure in structures:
                    grad = structure.sum().to(p.dtype)
                    result[p] = result[p] + grad if p in result else grad
        return result

    def backward_to_others(self) -> None:
        """Give the leaves that are not tracked (inputs, other parameters) their gradient."""
        known = {id(leaf) for leaf in (*self.record.leaves, *self.tape.params)}
        others = [leaf for leaf in walk(self.loss.grad_fn, ())[1] if id(leaf) not in known]
        if others:
            grads = torch.autograd.grad(self.loss, others, retain_graph=True)
            for leaf, grad in zip(others, grads, strict=True):
                leaf.grad = grad if leaf.grad is None else leaf.grad + grad

    # -- the sample axis --------------------------------------------------------------------------

    def _prepare(self) -> bool:
        """Find the losses and the samples; says whether the rules are known to cover all uses."""
        if self.record.coupled:
            raise CurvoptError(
                f"{self.record.coupled} is in training mode: its statistics mix the samples, so "
                "that no sample has a gradient of its own. Put the layer in eval mode "
                "(module.eval()), or use a norm within samples, such as torch.nn.GroupNorm"
            )
        if self.output is None:
            self.terms = loss_terms(self.loss, self.record, self.reduction)
        else:
            self.terms = closure_terms(self.loss, self.output, self.record, self.reduction)
        self.upstream = upstream(self.loss, self.terms)
        axes = SampleAxes(self.tape, self.terms)
        self.samples, self.term_layouts, self.use_layouts = axes.find()
        self.shares = [
            term.share(layout) for term, layout in zip(self.terms, self.term_layouts, strict=True)
        ]
        first = self.shares[0]
        #: Every sample of every term has one share: its own loss is the loss times a number.
        self.uniform = all(not isinstance(s, Tensor) and s == first for s in self.shares)
        return axes.covered

    def _fast(self, key: tuple[Any, ...]) -> bool:
        return key in _known_fast.get(self.tape.params[0], ())

    def _remember(self, key: tuple[Any, ...]) -> None:
        known = _known_fast.setdefault(self.tape.params[0], set())
        if len(known) > 1000:
            known.clear()
        if not self.slow:
            known.add(key)

    # -- cotangents -------------------------------------------------------------------------------

    def _passes(self, quantities: Sequence[Quantity]) -> dict[Pass, list[Quantity]]:
        """Group the quantities by what they need sent back."""
        by_cotangent: dict[Cotangent, list[Quantity]] = defaultdict(list)
        for quantity in quantities:
            by_cotangent[quantity.cotangent].append(quantity)
        passes: dict[Pass, list[Quantity]] = {}
        for cotangent, asked in by_cotangent.items():
            own = any(quantity.own for quantity in asked)
            same_share = self.uniform or (len(self.terms) == 1 and cotangent.kind == "gradient")
            if same_share and (cotangent.kind == "gradient" or all(q.own for q in asked)):
                passes[Pass(cotangent, own)] = asked
            elif self.uniform and cotangent.kind != "hessian":
                passes[Pass(cotangent, False)] = asked
            else:
                for kind in (False, True):
                    part = [quantity for quantity in asked if quantity.own is kind]
                    if part:
                        passes[Pass(cotangent, kind)] = part
        return passes

    def _columns(self, one: Pass, free: bool = False) -> Iterator[list[Tensor]]:
        """Chunks of cotangents, a ``[V, *output.shape]`` per term; `free`: free the losses too."""
        kind = one.cotangent.kind
        options = {"create_graph": self.tape.create_graph or kind == "hessian"}
        chosen = one.cotangent.subsample
        inverse = [
            _inverse(share) if one.own else _enlarged(share, chosen) for share in self.shares
        ]
        if kind in ("gradient", "hessian"):
            chunk = []
            retain = not free or kind == "hessian" or len(self.terms) > 1
            for term, up, factor, layout in zip(
                self.terms, self.upstream, inverse, self.term_layouts, strict=True
            ):
                if not isinstance(factor, Tensor):  # of all samples: cheaper before the rows
                    up, factor = up if factor == 1 else up * factor, 1.0
                (grad,) = torch.autograd.grad(
                    term.value, term.output, up, retain_graph=retain, **options
                )
                chunk.append(per_sample(grad, factor, layout).unsqueeze(0))
            yield chunk
            return
        scales = [
            term.scale(up, factor, layout)
            for term, up, factor, layout in zip(
                self.terms, self.upstream, inverse, self.term_layouts, strict=True
            )
        ]
        if not self.samples:
            yield [term.output.new_zeros(1, *term.output.shape) for term in self.terms]
            return
        limit = self._chunk()
        for term, scale, layout in zip(self.terms, scales, self.term_layouts, strict=True):
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
        return sum(use.shape.numel() for use in self.record.uses)

    # -- the pass ---------------------------------------------------------------------------------

    def _run_pass(self, one: Pass, asked: list[Quantity], free: bool) -> dict[Quantity, Any]:
        if one.cotangent.kind == "hessian":
            hessian = Hessian(self, one.own)
            return {quantity: quantity.from_hessian(hessian) for quantity in asked}
        chosen = one.cotangent.subsample
        if chosen is not None and max(chosen) >= self.samples:
            raise CurvoptError(f"subsample has index {max(chosen)} of {self.samples} samples")
        share = self.shares[0] if self.uniform or len(self.terms) == 1 else None
        if chosen is not None and not isinstance(share, Tensor) and share is not None:
            share = share * _enlarged(share, chosen)
        results: dict[Quantity, Any] = {}
        chunks = iter(self._columns(one, free))
        outputs = [term.output for term in self.terms]
        cotangents = next(chunks)
        while True:
            following = next(chunks, None)
            uses, grads, direct = self._pull(outputs, cotangents, free and following is None)
            self.reached = uses
            parts, uncovered = self._structures(uses, grads, self.use_layouts)
            self.slow = self.slow or bool(uncovered or direct)
            self._go_slowly(uncovered, direct, outputs, cotangents, parts)
            columns = len(cotangents[0])
            structures = {
                p: total(parts[p]) if p in parts else self._nothing(p, columns)
                for p in self.tape.params
            }
            del grads, parts  # a structure may let go of its factors
            if chosen is not None:
                structures = {p: s.take(chosen) for p, s in structures.items()}
            count = self.samples if chosen is None else len(chosen)
            for quantity in asked:
                first = quantity not in results
                scaling = self._scaling(one, quantity, share)
                context = Context(count, *scaling, first, self.tape.name)
                part = quantity.reduce_all(structures, context)
                if quantity in results:
                    before = results[quantity]
                    part = quantity.combine_all(before, part)
                results[quantity] = part
            if following is None:
                return {quantity: quantity.finish(part) for quantity, part in results.items()}
            del structures  # freed before the next columns go
            cotangents = following

    def _scaling(
        self, one: Pass, quantity: Quantity, share: float | Tensor | None
    ) -> tuple[float, float | Tensor | None]:
        """Factor of the rows, and the share of a sample in a sum over rows."""
        if one.cotangent.kind == "gradient":
            return 1.0, share if one.own else 1.0
        if quantity.own is one.own:
            return 1.0, 1.0
        assert isinstance(share, float)  # only a uniform share mixes the two in one pass
        return (share**-0.5 if quantity.own else share**0.5), 1.0

    def _pull(
        self, outputs: list[Tensor], cotangents: list[Tensor], free: bool
    ) -> tuple[list[Use], list[Tensor], dict[Tensor, Tensor]]:
        """Cotangents at the uses that were reached, and what reached parameters directly."""
        uses, spent = self.record.uses, self.tape.spent
        create_graph = self.tape.create_graph
        audited = [] if create_graph else self.tape.params
        inputs = [use.edge for use in uses] + spent + audited
        batched = self._elements() < BATCH_BELOW
        grads = pull_back(
            outputs,
            cotangents,
            inputs,
            batched=batched,
            retain_graph=not free,
            create_graph=create_graph,
        )
        if any(grad is not None for grad in grads[len(uses) : len(uses) + len(spent)]):
            raise CurvoptError(
                "a second backward pass over one recorded forward pass: add the losses and call "
                "backward once"
            )
        pairs = [(u, g) for u, g in zip(uses, grads, strict=False) if g is not None]
        arrived = zip(audited, grads[len(uses) + len(spent) :], strict=True)
        direct = {p: grad for p, grad in arrived if grad is not None}
        if create_graph:
            direct = self._unrecorded(outputs)
        if not pairs and not direct:
            raise CurvoptError(
                "no recorded use of a parameter leads to the loss: compute the model's output "
                "while recording, with gradients enabled, and go backward over it once"
            )
        return [use for use, _ in pairs], [grad for _, grad in pairs], direct

    def _unrecorded(self, outputs: list[Tensor]) -> dict[Tensor, Tensor]:
        """Parameters that a path other than a recorded use leads to."""
        stops = self.record.attached
        leaves = [leaf for output in outputs for leaf in walk(output.grad_fn, stops)[1]]
        tracked = {id(p) for p in self.tape.params}
        return {leaf: leaf for leaf in leaves if id(leaf) in tracked}

    def _structures(
        self, uses: list[Use], grads: list[Tensor], of_uses: Mapping[Use, Layout | None]
    ) -> tuple[Parts, list[Use]]:
        """Structures by parameter, and the uses that their rules do not cover after all."""
        parts: Parts = defaultdict(list)
        uncovered = []
        for use, grad in zip(uses, grads, strict=True):
            layout = of_uses[use]
            try:
                if layout is None:
                    raise Uncovered(use.op)
                found = use.structures(grad, layout)
            except Uncovered:
                uncovered.append(use)
                continue
            missing = [str(name) for name in use.values if name not in found]
            if missing:
                raise CurvoptError(f"the rule of {use.op} gave nothing for {', '.join(missing)}")
            self._add(parts, use, found)
        return parts, uncovered

    def _add(self, parts: Parts, use: Use, found: Mapping[Any, Structure]) -> None:
        """Add a use's structures; derived values are pulled back to what they were made of."""
        for name, value in use.values.items():
            for root in value.roots:
                parameter, structure = self.tape.by_id[root], found[name]
                structure.use = use
                if value.tensor is not parameter:
                    structure = Pulled(
                        structure,
                        value.tensor,
                        parameter,
                        isometry=value.isometry,
                        create_graph=self.tape.create_graph,
                    )
                parts[parameter].append(structure)

    # -- the slow path ----------------------------------------------------------------------------

    def _go_slowly(
        self,
        uncovered: list[Use],
        direct: dict[Tensor, Tensor],
        outputs: list[Tensor],
        cotangents: list[Tensor],
        parts: Parts,
    ) -> None:
        """Exact rows of whatever no rule covers: one backward pass per sample and column."""
        for use in uncovered:
            own = self._own_parts(use, outputs, cotangents)
            if own is not None:
                self._add(parts, use, own)
                continue
            roots = {root for value in use.values.values() for root in value.roots}
            self._warn([self.tape.by_id[root] for root in roots], use.op)
            leaves = [use.arguments[name] for name in use.values]
            rows = self._sample_by_sample(outputs, cotangents, leaves)
            self._add(parts, use, dict(zip(use.values, map(Dense, rows), strict=True)))
        if direct:
            for p in direct:
                self._warn([p], self.record.unruled.get(id(p), "an op that was not recorded"))
                if self.tape.create_graph:  # the pass to the parameter holds all of its uses
                    parts.pop(p, None)
            rows = self._sample_by_sample(outputs, cotangents, list(direct))
            for p, row in zip(direct, rows, strict=True):
                parts[p].append(Dense(row))

    def _own_parts(
        self, use: Use, outputs: list[Tensor], cotangents: list[Tensor]
    ) -> dict[Any, Structure] | None:
        """Structures of derived values, if they turn out to hold a part for every sample."""
        leaves = [use.arguments[name] for name in use.values]
        if self.samples < 2 or any(id(v.tensor) in self.tape.by_id for v in use.values.values()):
            return None
        factors = draw_factors(self.samples)
        probed = [
            pull_back(outputs, column, leaves, batched=False)
            for column in probes(factors, outputs, self.term_layouts)
        ]
        rows = pull_back(
            outputs, cotangents, leaves, batched=False, create_graph=self.tape.create_graph
        )
        found: dict[Any, Structure] = {}
        for name, leaf, row, *parts in zip(use.values, leaves, rows, *probed, strict=True):
            grad = [part[0] for part in parts if part is not None]
            if row is None or not grad or not grad[0].any():
                return None
            options = layouts(leaf.shape, self.samples)
            marks = {option: [mark(part, option) for part in grad] for option in options}
            layout = next((o for o, found in marks.items() if scales(found, factors)), None)
            if layout is None:
                return None
            found[name] = Own(layout.split(row, 1), layout)
        return found

    def _warn(self, parameters: list[Tensor], op: str) -> None:
        if self.samples > 1:
            names = ", ".join(self.tape.name(p) for p in parameters)
            warnings.warn(
                f"no rule covers {op} with {names}: its per-sample gradients are exact but slow, "
                "one backward pass per sample; teach curvopt the op with curvopt.register_rule",
                SlowPathWarning,
                stacklevel=2,
            )

    def _sample_by_sample(
        self, outputs: list[Tensor], cotangents: list[Tensor], targets: list[Tensor]
    ) -> list[Tensor]:
        """Rows ``[V, N, *target.shape]`` from passes with one sample's cotangent each."""
        columns = len(cotangents[0])
        size = max(1, CHUNK_BYTES // (4 * columns * max(1, self._elements())))
        chunks = []
        for start in range(0, self.samples, size):
            stop = min(start + size, self.samples)
            one_hot = torch.eye(self.samples)[start:stop]
            masked = []
            for cotangent, layout in zip(cotangents, self.term_layouts, strict=True):
                split = layout.split(cotangent, 1)
                hot = one_hot.to(split).view(-1, 1, self.samples, *[1] * (split.ndim - 2))
                masked.append(layout.merge((hot * split).flatten(0, 1), 1))
            rows = pull_back(
                outputs,
                masked,
                targets,
                batched=True,
                create_graph=self.tape.create_graph,
            )
            chunks.append(
                [
                    target.new_zeros(()).expand(stop - start, columns, *target.shape)
                    if row is None
                    else row.unflatten(0, (stop - start, columns))
                    for row, target in zip(rows, targets, strict=True)
                ]
            )
        return [torch.cat(parts).transpose(0, 1) for parts in zip(*chunks, strict=True)]

    def _nothing(self, parameter: Tensor, columns: int) -> Structure:
        """The structure of a parameter that took no part."""
        return Dense(parameter.new_zeros(()).expand(columns, self.samples, *parameter.shape))


def check_loss(loss: Any, *, finite: bool = True) -> None:
    """Refuse what is no (finite) scalar loss with a graph."""
    if not isinstance(loss, Tensor):
        raise CurvoptError(
            f"the closure returned {type(loss).__name__}, not the loss as a tensor: "
            "end it with `return loss`"
        )
    if loss.numel() != 1:
        raise CurvoptError(f"the loss has shape {list(loss.shape)}; reduce it to a scalar")
    if not loss.requires_grad:
        raise CurvoptError(
            "the loss does not depend on any parameter that requires a gradient (was it "
            "computed under no_grad, or detached?)"
        )
    if finite and not math.isfinite(loss.detach().item()):
        raise CurvoptError(
            f"the loss is {loss.item()}, not finite; nothing was changed. Lower the learning "
            "rate, or look for inputs that are not finite"
        )


def _inverse(share: float | Tensor) -> float | Tensor:
    """1 / w_n; a sample without weight (all of its targets ignored) has no gradient either."""
    if isinstance(share, Tensor):
        return torch.where(share > 0, share.reciprocal(), 0)
    return 1 / share


def _enlarged(share: float | Tensor, chosen: tuple[int, ...] | None) -> float | Tensor:
    """What a sample's share grows by in the loss of some samples alone."""
    if chosen is None or (not isinstance(share, Tensor) and share == 1):
        return 1.0
    if isinstance(share, Tensor):
        return share[list(chosen)].sum().reciprocal().expand(len(share))
    return 1 / (share * len(chosen))


def quantities_of(quantities: Iterable[Quantity]) -> list[Quantity]:
    """Check what was asked for."""
    asked = list(quantities)
    for quantity in asked:
        if not isinstance(quantity, Quantity):
            hint = "()" if isinstance(quantity, type) else ""
            raise TypeError(f"{quantity!r} is no quantity; pass an instance{hint}")
    fields = [quantity.field for quantity in asked]
    twice = {field for field in fields if fields.count(field) > 1}
    if twice:
        raise CurvoptError(f"asked twice for {', '.join(sorted(twice))}; a result has one of each")
    return asked
