"""What an op of a trace is: tensors as references, arguments that can be compared."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch


class Ref(NamedTuple):
    """Where a tensor lies: the number of its storage, and its view of it."""

    storage: int
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool

    @property
    def ndim(self) -> int:
        """Number of dims."""
        return len(self.shape)

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def place(self) -> tuple[Any, ...]:
        """Equal for refs of the same elements; an output of an op never says `requires_grad`."""
        return self[:5]


class Op(NamedTuple):
    """One op of a pass: tensors are `Ref`s, lists are tuples. Equal if called in the same way."""

    func: torch._ops.OpOverload
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]
    outputs: tuple[Ref, ...]
    grad: bool

    @property
    def inputs(self) -> list[Ref]:
        """The tensors among the arguments, in their order."""
        return list(refs_in((self.args, self.kwargs)))

    @property
    def facts(self) -> Facts:
        """What holds for every call of this op."""
        return facts_of(self.func)

    @property
    def name(self) -> str:
        """The op's name without overload and without the underscore of the in-place form."""
        return facts_of(self.func).name

    def argument(self, name: str) -> Any:
        """The argument of that name in the op's schema, or its default."""
        at, default = facts_of(self.func).arguments[name]
        if at is not None and at < len(self.args):
            return self.args[at]
        return dict(self.kwargs).get(name, default)

    @property
    def written(self) -> list[Ref]:
        """The tensors that the op writes to in place."""
        facts = facts_of(self.func)
        return [ref for name in facts.writes for ref in refs_in(self.argument(name))]


class Read(NamedTuple):
    """A number of a tensor that Python got to see, by op number `op`."""

    op: int
    ref: Ref
    value: Any


@dataclass
class Packing:
    """How packed sequences were packed before the pass began that was given them.

    Attributes:
        rows: the sample of every row, of each.
        lengths: storages of how many samples have a row at each time step.
        orders: storages of how the samples were sorted.
    """

    rows: list[tuple[int, ...]] = field(default_factory=list)
    lengths: set[int] = field(default_factory=set)
    orders: set[int] = field(default_factory=set)


def refs_in(value: Any) -> Iterator[Ref]:
    """The refs in an argument, in their order."""
    if isinstance(value, Ref):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from refs_in(item)


# In-place forms that change the shape of a tensor, not its elements.
_SHAPE_ONLY = frozenset(
    "squeeze unsqueeze t transpose swapaxes swapdims as_strided detach resize".split()
)
# Ops whose owners can depend on which elements an index, a mask or an offset picks.
INDEXED = frozenset(
    "index _unsafe_index index_select gather scatter scatter_add scatter_reduce index_add "
    "index_copy index_put _index_put_impl _unsafe_index_put index_fill embedding masked_select "
    "nonzero take _embedding_bag _embedding_bag_forward_only "
    "_pack_padded_sequence".split()
)
_READS = frozenset("_local_scalar_dense equal".split())


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _is_composite(func: torch._ops.OpOverload) -> bool:
    try:
        key = "CompositeImplicitAutograd"
        return bool(torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key))
    except RuntimeError:  # an op without dispatcher entry
        return False


class Facts:
    """What is known of an op whatever its arguments.

    Attributes:
        name: without overload and without the underscore of the in-place form.
        writes: names of the arguments that it writes to.
        outs: those of them that are written to alone, as `out` is.
        arguments: by name, the position (None: by keyword only) and the default.
        pointwise: torch says that it works element by element.
        indexed, reads: whether index values, a number seen by Python are to be kept.
        random: draws random numbers, or does not set its output.
        foreach: changes lists of tensors in place.
        noted: any of those three.
        composite: is made of other ops, which are recorded in its place.
    """

    def __init__(self, func: torch._ops.OpOverload):
        schema = func._schema
        self.func = func
        name = schema.name.split("::")[1]
        if schema.is_mutable and name.endswith("_") and not name.startswith("__"):
            name = name[:-1]
        self.name = name
        self.writes = tuple(
            argument.name
            for argument in schema.arguments
            if argument.alias_info is not None
            and argument.alias_info.is_write
            and name not in _SHAPE_ONLY
        )
        self.outs = tuple(
            argument.name
            for argument in schema.arguments
            if argument.name in self.writes and argument.kwarg_only
        )
        self.arguments = {
            argument.name: (
                None if argument.kwarg_only else at,
                _hashable(argument.default_value) if argument.has_default_value() else None,
            )
            for at, argument in enumerate(schema.arguments)
        }
        self.pointwise = torch.Tag.pointwise in func.tags
        self.indexed = name in INDEXED
        self.foreach = name.startswith("_foreach_") and bool(self.writes)
        self.reads = name in _READS
        self.noted = self.indexed or self.reads or self.foreach
        self.composite = _is_composite(func)
        self.random = torch.Tag.nondeterministic_seeded in func.tags or name.startswith("empty")


# Keyed by `id`, since the hash of an op is computed in Python; the op itself is held beside it.
FACTS: dict[int, Facts] = {}


def facts_of(func: torch._ops.OpOverload) -> Facts:
    """The facts of an op, made once."""
    facts = FACTS.get(id(func))
    if facts is None or facts.func is not func:
        facts = FACTS[id(func)] = Facts(func)
    return facts
