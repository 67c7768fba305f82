"""From a loss to its rows: back through what is linear, to the first nonlinear tensors.

The loss is a sum of its rows times their coefficients. If no row and no coefficient depends on two
samples, every sample has a loss of its own. The walk is part of what the check of samples trusts.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple

import torch

from curvopt.axes.ops import Op, Ref
from curvopt.axes.rules import LOSSES, RULES, made, rule_for
from curvopt.axes.trace import Trace
from curvopt.axes.wiring import sources

_LINEAR = frozenset(
    "sum mean nansum add sub rsub neg mul div dot where index masked_select stack cat view "
    "_unsafe_view _reshape_alias unsqueeze squeeze select slice split split_with_sizes unbind "
    "expand permute transpose t diagonal clone alias detach _to_copy copy lift_fresh fill "
    "zero".split()
)
_PRODUCTS = frozenset("mul div dot where".split())
#: Choose elements by an index or a mask.
PICKS = frozenset(["index", "masked_select"])
_REDUCTIONS = frozenset("sum mean nansum dot".split())
# Paths that are told per row; more than one means that the row counts several times.
_PATHS = 4


class Passed(NamedTuple):
    """An op between the loss and a row, which changes what the row counts.

    Attributes:
        op, name: its number and name.
        shape: of the input on the way to the row.
        dims: of a sum or mean, what it went over.
        number: of a product or quotient, the Python number.
        data: positions, among the op's inputs, of the tensors that multiply, divide or choose.
    """

    op: int
    name: str
    shape: tuple[int, ...]
    dims: tuple[int, ...] | None = None
    number: Any = None
    data: tuple[int, ...] = ()

    @property
    def length(self) -> int:
        """Number of elements that a sum or mean went over."""
        return prod(self.shape[d] for d in self.dims or ())


@dataclass
class Row:
    """A tensor of rows of the loss.

    Attributes:
        kind: "input": the rows are the input `input` of op `op`; "loss": those of a loss kernel
            before its reduction; "output": the loss itself, the output of `op`.
        ref: the tensor; of a loss kernel its first input.
        shape: of the rows.
        paths: what was passed on the way, the loss's side first, once per way.
        more: there are more ways than these.
    """

    kind: str
    op: int
    input: int
    ref: Ref
    shape: tuple[int, ...]
    paths: list[tuple[Passed, ...]] = field(default_factory=list)
    more: bool = False

    @property
    def mark(self) -> tuple[int, Ref]:
        """Where a replay finds their owners."""
        return (self.op + (self.kind == "output"), self.ref)


class Coefficient(NamedTuple):
    """A tensor that multiplies, divides or chooses rows: input `input` of op `op`."""

    op: int
    input: int
    ref: Ref
    inside: bool  # below a sum or mean: it weighs the elements of a row

    @property
    def mark(self) -> tuple[int, Ref]:
        """Where a replay finds its owners."""
        return self.op, self.ref


@dataclass
class Frontier:
    """The rows of a loss, and what was met on the way.

    Attributes:
        loss: the loss.
        rows: its rows.
        coefficients: tensors that weigh them.
        means: (op, ref) of the inputs of the means that were passed.
        products: numbers of the products that weigh rows, and of the indices that choose among
            them: their factors are joined and checked.
    """

    loss: Ref
    rows: list[Row]
    coefficients: list[Coefficient]
    means: list[tuple[int, Ref]]
    products: list[int]

    @property
    def numbers(self) -> list[Any]:
        """Python numbers by which rows are multiplied or divided."""
        paths = (path for row in self.rows for path in row.paths)
        return list(dict.fromkeys(p.number for path in paths for p in path if p.number is not None))


def _is_linear(op: Op, inputs: list[Ref]) -> bool:
    """Linear in what requires a gradient."""
    through = [i for i, ref in enumerate(inputs) if ref.requires_grad]
    if not (op.grad and through and op.name in _LINEAR):
        return False
    if op.name in ("mul", "dot"):
        return len(through) == 1
    if op.name in ("div", "index", "masked_select"):
        return through == [0]
    return op.name != "where" or 0 not in through


def _passed(k: int, op: Op, ref: Ref, data: tuple[int, ...]) -> Passed | None:
    """What an op on the way does to the rows; None for what only moves or adds."""
    dims: tuple[int, ...] | None = None
    number = None
    if op.name in _REDUCTIONS:
        dim = op.argument("dim") if "dim" in op.facts.arguments else None
        every = tuple(range(ref.ndim))
        if dim is None or dim == ():
            dims = every
        else:
            given = dim if isinstance(dim, tuple) else (dim,)
            dims = tuple(d % max(ref.ndim, 1) for d in given)
    elif op.name in ("mul", "div"):
        found = [a for a in op.args if isinstance(a, int | float) and not isinstance(a, bool)]
        number = found[0] if found else None
        if number is None and not data:
            return None
    elif op.name not in ("where", "index", "masked_select", "dot"):
        return None
    return Passed(k, op.name, ref.shape, dims, number, data)


def _of_data(trace: Trace, silent: Set[int]) -> set[int]:
    """Storages that data from outside had a part in."""
    found = set(trace.outside) - silent
    for op in trace.ops:
        if rule_for(op.facts, RULES) is made:
            continue  # of a shape alone
        if any(ref.storage in found for ref in op.inputs):
            found.update(ref.storage for ref in (*op.outputs, *op.written))
    return found


def frontier(trace: Trace, loss: Ref, silent: Set[int] = frozenset()) -> Frontier | None:
    """Walk from the loss to its rows; None if the loss was not made in the trace.

    Args:
        trace: the pass.
        loss: the loss.
        silent: storages of parameters and buffers. Where data first meets what is made of them
            alone, the product is the row, not the parameter.
    """
    start = trace.producer(loss)
    if start is None:
        return None
    of_data = _of_data(trace, silent)

    def enters(op: Op, inputs: list[Ref]) -> bool:
        """Whether samples enter by this product."""
        through = any(ref.requires_grad and ref.storage in of_data for ref in inputs)
        return op.name in _PRODUCTS and not through and any(r.storage in of_data for r in inputs)

    source = sources(trace)
    rows: dict[tuple[str, int, int], Row] = {}
    found = Frontier(loss, [], [], [], [])
    visits: dict[Any, int] = {}
    stack: list[tuple[int | None, tuple[int, int] | None, tuple[Passed, ...], bool]] = [
        (start, None, (), False)
    ]

    def add(kind: str, op: int, at: int, ref: Ref, shape: tuple[int, ...], path: Any) -> None:
        row = rows.setdefault((kind, op, at), Row(kind, op, at, ref, shape))
        if len(row.paths) < _PATHS:
            row.paths.append(path)
        else:
            row.more = True

    while stack:
        k, at, path, inside = stack.pop()
        edge = (k, at, inside)
        visits[edge] = visits.get(edge, 0) + 1
        if visits[edge] > _PATHS:
            for row in rows.values():
                row.more = True
            continue
        op = None if k is None else trace.ops[k]
        inputs = [] if op is None else op.inputs
        if op is not None and k is not None and op.name in LOSSES and op.grad:
            add("loss", k, 0, inputs[0], _rows_shape(op, inputs), path)
        elif op is not None and k is not None and _is_linear(op, inputs) and not enters(op, inputs):
            data = tuple(i for i, ref in enumerate(inputs) if not ref.requires_grad)
            if data and op.name in (*_PRODUCTS, *PICKS):
                found.coefficients += [Coefficient(k, i, inputs[i], inside) for i in data]
                found.products.append(k)
            for i, ref in enumerate(inputs):
                if ref.requires_grad:
                    passed = _passed(k, op, ref, data)
                    if op.name == "mean":
                        found.means.append((k, ref))
                    below = inside or op.name in _REDUCTIONS
                    stack.append((source[k][i], (k, i), (*path, passed) if passed else path, below))
        elif at is not None:
            ref = trace.ops[at[0]].inputs[at[1]]
            add("input", *at, ref, ref.shape, path)
        elif op is not None and k is not None:
            add("output", k, 0, op.outputs[0], op.outputs[0].shape, path)
    found.rows = list(rows.values())
    found.coefficients = list(dict.fromkeys(found.coefficients))
    found.products = list(dict.fromkeys(found.products))
    found.means = list(dict.fromkeys(found.means))
    return found


def _rows_shape(op: Op, inputs: list[Ref]) -> tuple[int, ...]:
    if op.name.startswith("nll_loss"):
        return inputs[1].shape
    if op.name.startswith("multi"):
        return inputs[0].shape[:1]
    return torch.broadcast_shapes(*(ref.shape for ref in inputs[:2]))
