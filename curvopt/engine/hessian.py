"""Second derivatives of a recorded loss: diagonal, products."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from curvopt.axes.layout import Layout
from curvopt.engine.affine import affine_edges
from curvopt.engine.backward import BATCH_BELOW, pull_back, twice_differentiable
from curvopt.errors import CurvoptError, SlowPathWarning
from curvopt.losses import Loss
from curvopt.losses.base import per_sample
from curvopt.ops.registry import Rule
from curvopt.quantities.base import HESSIAN, ROOT, Pass
from curvopt.recording.tape import Tape
from curvopt.recording.uses import Use
from curvopt.structures import (
    Conv,
    Disjoint,
    Lookup,
    Outer,
    Permuted,
    Pulled,
    Shift,
    Structure,
    total,
)

# Products with the Hessian above which a warning names the parameters that take them.
SLOW = 10_000


class Computation(Protocol):
    """What is needed of a `curvopt.engine.computation.Computation` that is prepared."""

    tape: Tape
    samples: int
    terms: list[Loss]
    slow: dict[Tensor, str]
    use_layouts: dict[Use, Layout]

    def _chunk(self) -> int: ...
    def _elements(self) -> int: ...
    def _columns(self, one: Pass, /) -> Iterator[list[Tensor]]: ...
    def _known_layout(self, index: int, /) -> Layout: ...
    def _pull(
        self, outputs: list[Tensor], cotangents: list[Tensor], free: bool, /
    ) -> tuple[list[Use], list[Tensor], Any]: ...
    def _structures(
        self, uses: list[Use], cotangents: list[Tensor], /
    ) -> dict[Tensor, list[Structure]]: ...


class Hessian:
    """Second derivatives of the loss as written, or of the samples' own losses.

    Args:
        computation: the recorded forward pass, prepared.
        own: of each sample's own loss, summed, instead of the loss as written.
    """

    def __init__(self, computation: Computation, own: bool):
        self.computation, self.tape, self.own = computation, computation.tape, own
        self.samples, self.params = computation.samples, computation.tape.params
        self.create_graph = computation.tape.create_graph
        self.chunk = computation._chunk()
        self.outputs = [term.output for term in computation.terms]
        with torch.enable_grad():
            (chunk,) = computation._columns(Pass(HESSIAN, own))
            self.cotangents = [rows[0] for rows in chunk]
        self.batched = computation._elements() < BATCH_BELOW and not computation.tape.serial

    def _pull(self, outputs: list[Tensor], cotangents: list[Tensor], inputs: list[Any]) -> Any:
        return pull_back(
            outputs, cotangents, inputs, batched=self.batched, create_graph=self.create_graph
        )

    def _units(self, size: int, like: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Chunks of the unit vectors, ``[V, size]``."""
        for start in range(0, size, self.chunk):
            stop = min(start + self.chunk, size)
            unit = torch.zeros(stop - start, size, dtype=like.dtype, device=like.device)
            unit[
                torch.arange(stop - start, device="cpu"), torch.arange(start, stop, device="cpu")
            ] = 1
            yield slice(start, stop), unit

    # -- the diagonal -----------------------------------------------------------------------------

    @twice_differentiable()
    def diagonal(self, rows: bool) -> dict[Tensor, Tensor]:
        """Exact diagonal: ``[*p]``, or each sample's ``[N, *p]`` with ``rows``.

        A parameter whose every element has one use, by an op that is linear in it and of which
        nothing comes back to the parameter (as it does in a recurrence), has the diagonal
        of ``J^T H J`` with the op's J and the Hessian H of the loss in the op's output. Where the
        way from there to the model's output is piecewise linear, the root of the loss's Hessian
        gives it. Other parameters take a product with the Hessian per element.
        """
        c = self.computation
        uses, grads, _ = c._pull(self.outputs, [t.detach()[None] for t in self.cotangents], False)
        parts = c._structures(uses, grads)
        simple = self._simple(dict(zip(uses, grads, strict=True)), parts)
        result = self._by_root(simple, rows)
        general = {p: own for p, own in simple.items() if p not in result}
        result |= self._by_use(general, rows)
        slow = [p for p in self.params if (p in parts or p in c.slow) and p not in result]
        result |= self._by_element(slow, rows)
        lead = (self.samples,) if rows else ()
        return {
            p: result[p].to(p.dtype) if p in result else p.new_zeros(*lead, *p.shape)
            for p in self.params
        }

    def _simple(
        self,
        grads: dict[Use, Tensor],
        parts: dict[Tensor, list[Structure]],
    ) -> dict[Tensor, list[Use]]:
        """Parameters whose elements have one use each, by an op that is linear in them."""
        by_parameter: dict[Tensor, list[Use]] = defaultdict(list)
        barred = set(self.computation.slow)
        for use, grad in grads.items():
            plain = type(use.rule) is Rule
            again = set(use.rule.again(use.arguments)) if use.rule else ()
            for name, value in use.values.items():
                roots = [self.tape.by_id[root] for root in value.roots]
                linear = all(_is_bilinear(part) for p in roots for part in parts.get(p, ()))
                linear = linear or _is_linear(use, value.tensor, grad[0])
                if not (plain and value.isometry and linear) or name in again:
                    barred.update(roots)
                for p in roots:
                    by_parameter[p].append(use)
        return {
            p: own
            for p, own in by_parameter.items()
            if p not in barred and (len(own) == 1 or isinstance(total(parts[p]), Disjoint))
        }

    def _by_root(self, simple: dict[Tensor, list[Use]], rows: bool) -> dict[Tensor, Tensor]:
        """The GGN's diagonal, of parameters from which the model is piecewise linear."""
        c = self.computation
        wanted = {use for own in simple.values() for use in own}
        found = affine_edges(self.outputs, [use.edge.node for use in wanted])
        affine = {use for use in wanted if use.edge.node in found}
        ours = {p: own for p, own in simple.items() if affine.issuperset(own)}
        if not ours:
            return {}
        result: dict[Tensor, Tensor] = {}
        edges = list(affine)
        try:
            for chunk in c._columns(Pass(ROOT, self.own)):
                grads = self._pull(self.outputs, chunk, [use.edge for use in edges])
                parts = c._structures(edges, grads)
                for p in ours:
                    structure = total(parts[p])
                    value = structure.batch_sum_of_squares() if rows else structure.sum_of_squares()
                    result[p] = result[p] + value if p in result else value
        except CurvoptError:  # the loss has no root: the way through its own derivatives is open
            return {}
        return result

    def _by_use(self, simple: dict[Tensor, list[Use]], rows: bool) -> dict[Tensor, Tensor]:
        """Diagonals from the Hessian of the loss in the outputs of the parameters' uses."""
        uses = list({use: None for own in simple.values() for use in own})
        if not uses:
            return {}
        slopes = torch.autograd.grad(
            self.outputs, [use.edge for use in uses], self.cotangents, create_graph=True
        )
        result: dict[Tensor, Tensor] = {}
        for use, slope in zip(uses, slopes, strict=True):
            if not slope.requires_grad:  # the loss is linear in this output
                continue
            by_outputs = []
            outputs = slope.numel() // max(1, self.samples)
            for name, value in use.values.items():
                for p in (self.tape.by_id[root] for root in value.roots):
                    if p not in simple:
                        continue
                    if value.tensor.numel() >= outputs:
                        by_outputs.append(p)
                        continue
                    part = self._along_elements(use, name, slope, rows)
                    result[p] = result[p] + part if p in result else part
            for p, part in self._along_outputs(use, by_outputs, slope, rows):
                result[p] = result[p] + part if p in result else part
        for p in simple:
            if p not in result:
                lead = (self.samples,) if rows else ()
                result[p] = p.new_zeros(*lead, *p.shape)
        return result

    def _along_elements(self, use: Use, name: Any, slope: Tensor, rows: bool) -> Tensor:
        """One column per element e of the parameter: ``<J e, H J e>`` per sample."""
        layout, value = self.computation.use_layouts[use], use.values[name]
        dummy = torch.zeros_like(slope, requires_grad=True)
        (pulled,) = torch.autograd.grad([use.edge], [value.tensor], [dummy], create_graph=True)
        parts = []
        for _, unit in self._units(pulled.numel(), pulled):
            (tangents,) = self._pull([pulled], [unit.view(-1, *pulled.shape)], [dummy])
            (curved,) = self._pull([slope], [tangents], [use.edge])
            products = (tangents * curved).reshape(-1, *use.shape)
            products = layout.split(products, 1).flatten(2).sum(-1)
            parts.append(products if rows else products.sum(1))
        column = torch.cat(parts)
        result = column.T.reshape(-1, *pulled.shape) if rows else column.view(pulled.shape)
        (p,) = (self.tape.by_id[root] for root in value.roots)
        if value.tensor is p:
            return result
        (back,) = torch.autograd.grad(
            value.tensor, p, result, is_grads_batched=rows, retain_graph=True
        )
        return back

    def _along_outputs(
        self, use: Use, params: list[Tensor], slope: Tensor, rows: bool
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """One column per output element of a sample: rows of H's column times rows of the unit."""
        if not params:
            return
        layout = self.computation.use_layouts[use]
        inner = layout.split(slope.reshape(use.shape)).shape[1:]
        result: dict[Tensor, Tensor] = {}
        for _, unit in self._units(inner.numel(), slope):
            unit = unit.view(-1, 1, *inner).expand(-1, layout.n, *inner)
            unit = layout.merge(unit, 1, use.shape[: layout.axes])
            unit = unit.reshape(-1, *slope.shape)
            (curved,) = self._pull([slope], [unit], [use.edge])
            left, right = (
                self.computation._structures([use], [cotangent]) for cotangent in (unit, curved)
            )
            for p in params:
                part = left[p][0].cross(right[p][0], rows)
                result[p] = result[p] + part if p in result else part
        yield from result.items()

    def _by_element(self, params: list[Tensor], rows: bool) -> dict[Tensor, Tensor]:
        """One product with the Hessian per element (and sample)."""
        if not params:
            return {}
        columns = sum(p.numel() for p in params) * (self.samples if rows else 1)
        if columns > SLOW:
            names = ", ".join(self.tape.name(p) for p in params)
            warnings.warn(
                f"the diagonal of the Hessian takes {columns} backward passes for {names}, which "
                "are used several times (at several time steps), or by an op that is not linear in "
                "them; DiagHessianMC "
                "estimates it",
                SlowPathWarning,
                stacklevel=2,
            )
        if not rows:
            return self._diagonal_of(self._parameter_hessian(None), params)
        each = [self._diagonal_of(self._parameter_hessian(n), params) for n in range(self.samples)]
        return {p: torch.stack([one[p] for one in each]) for p in params}

    def _diagonal_of(self, hessian: ParameterHessian, params: list[Tensor]) -> dict[Tensor, Tensor]:
        result = {}
        for p in params:
            parts = []
            for part, unit in self._units(p.numel(), p):
                product = hessian.product({p: unit.view(-1, *p.shape)})[p]
                parts.append(product.reshape(unit.shape)[:, part].diagonal())
            result[p] = torch.cat(parts).view(p.shape) if parts else torch.zeros_like(p)
        return result

    # -- products ---------------------------------------------------------------------------------

    def _parameter_hessian(self, sample: int | None = None) -> ParameterHessian:
        cotangents = self.cotangents
        if sample is not None:
            hot = torch.zeros(self.samples, device="cpu")
            hot[sample] = 1
            with torch.enable_grad():
                cotangents = [
                    per_sample(cotangent, hot.to(cotangent), self.computation._known_layout(i))
                    for i, cotangent in enumerate(cotangents)
                ]
        return ParameterHessian(self, cotangents)

    @twice_differentiable()
    def product(self, vectors: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        """Product with vectors ``[V, *p]``, zero for parameters that are not given: ``[V, *p]``."""
        if not hasattr(self, "_whole"):
            self._whole = self._parameter_hessian()
        return self._whole.product(vectors)


class ParameterHessian:
    """Products with the Hessian in the parameters."""

    def __init__(self, hessian: Hessian, cotangents: list[Tensor]):
        self.params, self.pull = hessian.params, hessian._pull
        with torch.enable_grad():
            raw = torch.autograd.grad(
                hessian.outputs, self.params, cotangents, create_graph=True, allow_unused=True
            )
        self.slopes = {p: g for p, g in zip(self.params, raw, strict=True) if g is not None}

    def product(self, vectors: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        """As `Hessian.product`."""
        columns = len(next(iter(vectors.values())))
        pairs = [
            (self.slopes[p], v)
            for p, v in vectors.items()
            if p in self.slopes and self.slopes[p].requires_grad
        ]
        pulled: list[Tensor | None] = [None] * len(self.params)
        if pairs:
            slopes, rows = (list(part) for part in zip(*pairs, strict=True))
            pulled = self.pull(slopes, rows, self.params)
        return {
            p: p.new_zeros(columns, *p.shape) if product is None else product
            for p, product in zip(self.params, pulled, strict=True)
        }


def _is_bilinear(structure: Structure) -> bool:
    """Whether the rows say by their form that the op is linear in the parameter."""
    inner = structure.inner if isinstance(structure, (Pulled, Permuted)) else structure
    return type(inner) in (Conv, Lookup, Outer, Shift)


def _is_linear(use: Use, leaf: Tensor, grad: Tensor) -> bool:
    """Whether the op's output is linear in the parameter: a random second derivative is zero."""
    generator = torch.Generator().manual_seed(0)

    def random(like: Tensor) -> Tensor:
        return torch.rand(like.shape, generator=generator, device="cpu").to(like)

    with torch.enable_grad():
        cotangent = random(grad).requires_grad_()
        (slope,) = torch.autograd.grad([use.edge], [leaf], [cotangent], create_graph=True)
        if not slope.requires_grad:
            return True
        (second,) = torch.autograd.grad(
            slope, leaf, random(slope), allow_unused=True, retain_graph=True
        )
    return second is None or not second.any()
