"""From cotangents to the structures of parameters."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Generator, Tensor

from curvopt.engine import audit
from curvopt.engine.backward import BATCH_BELOW, pull_back
from curvopt.engine.cotangents import Cotangents
from curvopt.engine.hooks import after_hooks
from curvopt.engine.result import Values
from curvopt.engine.slow import rows_by_sample, warn
from curvopt.errors import CurvoptError
from curvopt.quantities.base import Context, Quantity
from curvopt.recording.hooks import random_kept
from curvopt.recording.uses import Use
from curvopt.structures import Dense, Pulled, Structure, total

Parts = dict[Tensor, list[Structure]]


class Reduction(Cotangents):
    """Structures of all parameters, for cotangents at the outputs of a loss's terms."""

    def _reduced(
        self, outputs: list[Tensor], cotangents: list[Tensor], free: bool, due: list[Tensor] | None
    ) -> dict[Tensor, Structure]:
        """Structures of all parameters, for cotangents at the terms' outputs.

        Args:
            outputs: of the terms.
            cotangents: at the outputs, ``[V, *output.shape]``.
            free: free the graph.
            due: parameters to audit, None in a pass of no gradient. Autograd has their gradients
                on the same way: one costs its last matrix product, and nobody else sees it.
        """
        # What is pulled back to a parameter later needs the graph that its gradient goes through.
        free = free and not any(self._derives(p) for p in due or ())
        with random_kept(self.tape.params if self.hooked and due is None else ()):
            uses, grads, sums = self._pull(outputs, cotangents, free, due or ())
        parts = self._structures(uses, grads)
        sent = dict(zip(uses, grads, strict=True)) if due else {}
        del grads  # a structure may let go of its factors
        slow = [] if self.covered_only else list(self.slow)
        for p, rows in zip(slow, self._rows(slow, outputs, cotangents), strict=True):
            parts[p] = [Dense(rows)]
        columns = len(cotangents[0])
        structures = {
            p: total(parts[p]) if p in parts else self._nothing(p, columns)
            for p in self.tape.params
        }
        if due is not None:
            self._audit(self._asker, structures, sums, sent)
        return structures

    def _pull(
        self,
        outputs: list[Tensor],
        cotangents: list[Tensor],
        free: bool,
        params: Sequence[Tensor] = (),
    ) -> tuple[list[Use], list[Tensor], dict[Tensor, Tensor | None]]:
        """Cotangents at the uses that were reached, and gradients of parameters."""
        if self.hooked:
            caught = after_hooks(
                outputs, cotangents, self.uses, self.tape.params, self.tape.create_graph
            )
            return list(caught), list(caught.values()), {}
        grads = pull_back(
            outputs,
            cotangents,
            [*(use.edge for use in self.uses), *params],
            batched=self._elements() < BATCH_BELOW and not self.tape.serial,
            retain_graph=not free,
            create_graph=self.tape.create_graph,
        )
        ends = len(self.uses)
        pairs = [(u, g) for u, g in zip(self.uses, grads[:ends], strict=True) if g is not None]
        sums = {p: None if g is None else g[0] for p, g in zip(params, grads[ends:], strict=True)}
        return [use for use, _ in pairs], [grad for _, grad in pairs], sums

    def _structures(self, uses: list[Use], grads: list[Tensor]) -> Parts:
        """Structures by parameter, of those that do not take the slow path."""
        parts: Parts = defaultdict(list)
        for use, grad in zip(uses, grads, strict=True):
            grad = grad if grad.shape[1:] == use.shape else grad.reshape(-1, *use.shape)
            if self._slowly(use):
                continue
            found = use.structures(grad, self.use_layouts[use])
            missing = [str(name) for name in use.values if name not in found]
            if missing:
                raise CurvoptError(f"the rule of {use.op} gave nothing for {', '.join(missing)}")
            self._add(parts, use, found)
        return parts

    def _slowly(self, use: Use) -> bool:
        """Whether all that a use is about takes the slow path."""
        return bool(self.slow) and all(
            self.tape.by_id[root] in self.slow
            for value in use.values.values()
            for root in value.roots
        )

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

    def _rows(
        self, params: list[Tensor], outputs: list[Tensor], cotangents: list[Tensor]
    ) -> list[Tensor]:
        """Exact rows of parameters that no rule covers."""
        if not params:
            return []
        if self.samples > 1:
            for p in params:
                warn([self.tape.name(p)], self.slow[p])
        return rows_by_sample(
            outputs,
            cotangents,
            self.term_layouts,
            params,
            samples=self.samples,
            elements=self._elements(),
            create_graph=self.tape.create_graph,
            name=self.tape.name,
            batched=not self.tape.serial,
        )

    def _nothing(self, parameter: Tensor, columns: int) -> Structure:
        """The structure of a parameter that took no part."""
        return Dense(parameter.new_zeros(()).expand(columns, self.samples, *parameter.shape))

    def _derives(self, p: Tensor) -> bool:
        """Whether rows of a value made of a parameter are pulled back to it."""
        return any(
            value.tensor is not p and id(p) in value.roots
            for use in self.uses
            for value in use.values.values()
        )

    def _tells(self, grad: Tensor, sent: dict[Use, Tensor]) -> bool:
        """Whether a gradient is the sum of the samples' parts, to the last digits."""
        # A coarser type on the way would show in a difference of large numbers.
        return _exact(grad) and all(c.dtype == self.loss.dtype for c in sent.values())

    def _of_gradient(
        self,
        quantities: Sequence[Quantity],
        structures: dict[Tensor, Structure],
        totals: dict[Tensor, Tensor],
    ) -> dict[str, Any]:
        """Quantities of the samples' parts of the gradient, as `Values`."""
        context = Context(self.samples, 1.0, 1.0, True, self.tape.name, totals)
        found = {}
        for quantity in quantities:
            result = quantity.finish(quantity.reduce_all(structures, context))
            found[quantity.field] = Values(quantity.field, result, self.tape.names)
        return found

    def with_gradient(
        self, quantities: Sequence[Quantity]
    ) -> tuple[list[Tensor | None], dict[str, Any]]:
        """Gradients of the parameters, and quantities of the samples' parts, in one backward pass.

        What `watching` does around torch's own, for passes in which all paths are uses, once
        they are prepared.
        """
        params, ends = self.tape.params, len(self.uses)
        wanted: list[Any] = [*(use.edge for use in self.uses), *params]
        found = torch.autograd.grad(self.loss, wanted, allow_unused=True, retain_graph=True)
        with torch.no_grad():
            pairs = zip(self.uses, found[:ends], strict=True)
            sent = {use: c.unsqueeze(0) for use, c in pairs if c is not None}
            parts = self._structures([*sent], [*sent.values()])
            structures = {p: total(parts[p]) for p in params if p in parts}
            grads = dict(zip(params, found[ends:], strict=True))
            totals = {
                p: g
                for p, g in grads.items()
                if not self._plan.loose and p in structures and g is not None
                if self._tells(g, sent)
            }
            values = self._of_gradient(quantities, structures, totals)
        return [*grads.values()], values

    # -- the audit --------------------------------------------------------------------------------

    @property
    def _asker(self) -> str:
        return "private" if self.declared else "compute"

    def _due(self, asker: str) -> list[Tensor]:
        """Parameters whose sum over samples is to be compared with their gradient in this pass.

        All of them in the first of equal passes. Later, where torch's own backward pass leaves the
        gradients, all at times. In private steps, where each costs its matrix product and a wrong
        sum costs no privacy, passes of other sizes are no new ones: after the first of a code it is
        one in turn, for every new size and every `audit.PRIVATE_EVERY` equal passes.

        Args:
            asker: ``"compute"``, ``"private"`` or ``"watch"``.
        """
        params = [p for p in self.tape.params if p not in self.slow and not p._backward_hooks]
        count, known = self._plan.audited[asker], self._plan.known[asker]
        if not params or not self.samples or self.hooked or self.tape.known is not None:
            return []
        if asker == "watch":
            return [] if count % audit.EVERY else self._undisturbed()
        if asker == "private" and known:
            return [] if count % audit.PRIVATE_EVERY else [params[known % len(params)]]
        return [] if count else params

    def _undisturbed(self) -> list[Tensor]:
        """Parameters on which torch's own backward pass will leave this loss's gradient alone."""
        if self._plan.loose or audit.averaged() or self.hooked or not self.samples:
            return []
        params = (p for p in self.tape.params if p not in self.slow)
        return [p for p in params if p.grad is None and not audit.hooked(p)]

    def _audit(
        self,
        asker: str,
        structures: Mapping[Tensor, Structure],
        sums: Mapping[Tensor, Tensor | None],
        sent: Mapping[Use, Tensor],
    ) -> None:
        """Compare the sums over samples with gradients; see `curvopt.engine.audit`.

        Args:
            asker: as in `_due`.
            structures: of the parameters.
            sums: the gradients.
            sent: the cotangents at the uses.
        """
        counts, known = self._plan.audited, self._plan.known

        def shuffled(
            p: Tensor, a: Tensor, b: Tensor, generator: Generator
        ) -> tuple[float, int, float]:
            parts: Parts = defaultdict(list)
            count, size = 0, 0.0
            for use, grad in sent.items():
                if any(id(p) in value.roots for value in use.values.values()):
                    signs = torch.empty_like(grad).bernoulli_(0.5, generator=generator)
                    size += float(grad.abs().sum())
                    grad, count = grad * signs.mul_(2).sub_(1), count + grad.numel()
                    for root, found in self._structures([use], [grad]).items():
                        parts[root] += found
            along = float(total(parts[p]).rank_one(a, b)) if parts[p] else 0.0
            return along, count, size

        if sums:
            device = self.loss.device.type
            with torch.no_grad(), torch.autocast(device, enabled=False):
                audit.audit(
                    {p: structures.get(p) or self._nothing(p, 1) for p in sums},
                    sums,
                    self.tape.name,
                    number=known[asker],
                    precision=audit.precision_of([*sums, *sent.values()]),
                    shuffled=shuffled,
                )
        # A pass that is due stays so until one can be compared.
        if sums or asker != "watch" or counts[asker] % audit.EVERY:
            counts[asker] += 1
        known[asker] += bool(sums)


def _exact(grad: Tensor) -> bool:
    return grad.layout is torch.strided and grad.dtype in (torch.float32, torch.float64)
