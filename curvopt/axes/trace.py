"""Record the aten ops of a pass: their wiring, their arguments and the index values they used.

A `Trace` sees every op that torch runs, those of scripted code, of custom functions and of code
under `no_grad` too. It keeps no tensor alive but clones of index values: a tensor becomes a `Ref`,
which says in which storage it lies and how.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from curvopt.axes.ops import FACTS, Facts, Op, Packing, Read, Ref, facts_of, refs_in

__all__ = ["Facts", "Key", "Op", "Read", "Ref", "Trace", "facts_of"]

_INDEX_TYPES = frozenset({torch.int64, torch.int32, torch.bool, torch.uint8})


class Key:
    """The ops of a pass as a dictionary's key: equal keys mean equal code on equal shapes."""

    __slots__ = ("_hash", "_ops")

    def __init__(self, ops: tuple[Op, ...]):
        self._ops, self._hash = ops, hash(ops)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Key) and self._hash == other._hash and self._ops == other._ops


_PLAIN = frozenset({int, float, bool, type(None), str, torch.dtype, torch.device, torch.layout})
_COMPARED: Any = (*_PLAIN, complex, torch.memory_format, torch.Generator)
_PLAIN_KINDS = frozenset({Tensor, Parameter})
_new = tuple.__new__
_no_functions = torch._C.DisableTorchFunction
_function_modes = torch._C._len_torch_function_stack
_grad_enabled = torch.is_grad_enabled


def _wraps(kind: type) -> bool:
    """Whether tensors of this type wrap others, as those of tensor parallelism do."""
    plain: Any = Tensor.__torch_dispatch__
    return getattr(kind, "__torch_dispatch__", plain) is not plain


class Trace(TorchDispatchMode):
    """Records the ops that run while it is active.

    Attributes:
        ops: the ops, in order.
        outside: by number of storage, the `Ref` under which a storage first came from outside.
        values: by number of op, clones of its integer and boolean inputs (None for the others), in
            the order of `Op.inputs`, for ops whose owners can depend on them.
        reads: numbers that Python got to see.
        copies: by number of storage, that of the leaf that it is a copy of, made before the pass.
        packing: how packed sequences that it was given were packed.
        nbytes: by number of storage, its length.
        origins: by number of storage, the offset that counts as zero: of the view under which it
            came from outside, so that the batches that are cut from a data set have equal keys.
        unsupported: why the trace is not to be trusted, or None.

    Example:
        >>> from curvopt.axes.trace import Trace
        >>> with Trace() as trace:
        ...     loss = loss_fn(model(x), y)
        >>> trace.ops[trace.producer(trace.ref(loss))].name
        'nll_loss_forward'

    Tensors that are sparse, nested or otherwise not strided make it `unsupported`.
    """

    # torch hands operators that take functions to the mode too, instead of raising.
    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[Op] = []
        self.outside: dict[int, Ref] = {}
        self.values: dict[int, tuple[Tensor | None, ...]] = {}
        self.reads: list[Read] = []
        self.copies: dict[int, int] = {}
        self.packing = Packing()
        self.nbytes: list[int] = []
        self.origins: list[int] = []
        self.unsupported: str | None = None
        self._numbers: dict[int, int] = {}
        # Weak references: no memory is kept, but no address is used for a second storage either.
        self._weak: list[int] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No wrapper around `__torch_dispatch__`: it costs time at every op, and imports Dynamo."""
        return False

    def __del__(self) -> None:
        free = getattr(torch.UntypedStorage, "_free_weak_ref", None)
        while free is not None and self._weak:  # `free` is gone when the interpreter ends
            free(self._weak.pop())

    def _enter(self, storage: torch.UntypedStorage, origin: int = 0) -> int:
        number = self._numbers[storage._cdata] = len(self.nbytes)
        self._weak.append(storage._weak_ref())  # type: ignore[arg-type]  # torch says object
        self.nbytes.append(storage.nbytes())
        self.origins.append(origin)
        return number

    def ref(self, tensor: Tensor) -> Ref:
        """The `Ref` of a tensor; a storage that is not known yet is one from outside."""
        try:
            storage = tensor.untyped_storage()
            number = self._numbers.get(storage._cdata)
            if number is None:
                number = self._enter(storage, int(tensor.storage_offset()))
                made = self.outside[number] = self._ref(tensor, number)
                if made.requires_grad and not tensor.is_leaf:
                    self._note_copy(tensor, number)
                return made
            return self._ref(tensor, number)
        except (RuntimeError, NotImplementedError):
            return self._unlike(tensor)

    def _note_copy(self, tensor: Tensor, number: int) -> None:
        """Of a leaf, in another type: autocast made it in an earlier pass, and keeps it."""
        node: Any = tensor.grad_fn
        if node.name() == "ToCopyBackward0":
            leaf = getattr(node.next_functions[0][0], "variable", None)
            if leaf is not None:
                self.copies[number] = self.ref(leaf).storage

    def _unlike(self, tensor: Tensor) -> Ref:
        """Of a tensor that lies in no storage: the pass goes on, and is not to be trusted."""
        self.unsupported = self.unsupported or _not_strided(tensor)
        return Ref(-1, 0, torch.Size(), (), tensor.dtype, False)

    def _ref(self, tensor: Tensor, number: int) -> Ref:
        return _new(
            Ref,
            (
                number,
                tensor.storage_offset() - self.origins[number],
                tensor.shape,
                tensor.stride(),
                tensor.dtype,
                tensor.requires_grad,
            ),
        )

    def begin(self, ref: Ref) -> int:
        """Where in its storage a tensor begins."""
        return ref.offset + self.origins[ref.storage]

    def end(self, ref: Ref) -> int:
        """How far into its storage a tensor reaches."""
        steps = sum((n - 1) * s for n, s in zip(ref.shape, ref.stride, strict=True))
        return self.begin(ref) + 1 + steps if ref.numel else 0

    def _grow(self, ref: Ref) -> None:
        length = self.end(ref) * ref.dtype.itemsize
        self.nbytes[ref.storage] = max(self.nbytes[ref.storage], length)

    def _convert(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.ref(value)
        if isinstance(value, list | tuple):
            return tuple([self._convert(item) for item in value])
        # Opaque objects (process groups, records of a profiler) are new ones at every call.
        return value if isinstance(value, _COMPARED) else type(value).__name__

    def _made(self, value: Any, refs: list[Ref]) -> None:
        """Add the refs of an op's outputs, whose storages are new or known."""
        if isinstance(value, Tensor):
            try:
                storage = value.untyped_storage()
                number = self._numbers.get(storage._cdata)
                refs.append(self._ref(value, self._enter(storage) if number is None else number))
            except (RuntimeError, NotImplementedError):
                refs.append(self._unlike(value))
        elif isinstance(value, list | tuple):
            for item in value:
                self._made(item, refs)

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run the op and note it."""
        # This runs at every op of a pass: what `ref`, `_enter` and `_convert` do is written out.
        facts = FACTS.get(id(func))
        if facts is None:
            if not isinstance(func, torch._ops.OpOverload):
                return self._opaque(func, args, kwargs or {})
            facts = facts_of(func)
        known = not types or _PLAIN_KINDS.issuperset(types)
        if not known and any(map(_wraps, types)):
            return self._wrapped(func, args, kwargs or {})
        if facts.composite:  # in inference mode: the ops that it is made of come here one by one
            with self, _no_functions():
                return func.decompose(*args, **(kwargs or {}))
        numbers, origins = self._numbers, self.origins
        taken = []
        for arg in args:
            kind = type(arg)
            if kind is Tensor or kind is Parameter:
                try:
                    number = numbers.get(arg.untyped_storage()._cdata)
                    arg = (
                        self.ref(arg)
                        if number is None
                        else _new(
                            Ref,
                            (
                                number,
                                arg.storage_offset() - origins[number],
                                arg.shape,
                                arg.stride(),
                                arg.dtype,
                                arg.requires_grad,
                            ),
                        )
                    )
                except (RuntimeError, NotImplementedError):
                    arg = self._unlike(arg)
            elif kind not in _PLAIN:
                numeric = kind is list and _PLAIN.issuperset(map(type, arg))
                arg = tuple(arg) if numeric else self._convert(arg)
            taken.append(arg)
        named: tuple[tuple[str, Any], ...] = ()
        if kwargs:
            plain = _PLAIN.issuperset(map(type, kwargs.values()))
            items = kwargs.items()
            named = tuple(items if plain else [(k, self._convert(v)) for k, v in items])
        if facts.noted:
            if facts.indexed:
                self._keep_values(args, kwargs)
            if facts.reads and not isinstance(args[0], Tensor):  # scripted code's wrapped number
                return args[0]
        if known and not _function_modes():
            made = func._op(*args, **kwargs) if kwargs else func._op(*args)
        else:  # scripted code comes here with function modes active
            with _no_functions():
                made = func(*args, **kwargs) if kwargs else func(*args)
        outputs: tuple[Ref, ...]
        if type(made) is Tensor:
            try:
                storage = made.untyped_storage()
                number = numbers.get(storage._cdata)
                if number is None:
                    number = numbers[storage._cdata] = len(self.nbytes)
                    self._weak.append(storage._weak_ref())  # type: ignore[arg-type]  # as in `_enter`
                    self.nbytes.append(storage.nbytes())
                    origins.append(0)
                offset = made.storage_offset() - origins[number]
                view = (number, offset, made.shape, made.stride(), made.dtype, False)
                outputs = (_new(Ref, view),)
            except (RuntimeError, NotImplementedError):
                outputs = (self._unlike(made),)
        else:
            refs: list[Ref] = []
            self._made(made, refs)
            outputs = tuple(refs)
        if facts.writes:  # an empty tensor given as `out` has grown
            for ref in outputs:
                self._grow(ref)
        if facts.noted:
            if facts.foreach:  # whose writes torch does not count under a mode
                torch.autograd.graph.increment_version(list(_tensors(args[0])))
            if facts.reads:
                read = next(refs_in(tuple(taken)))
                self.reads.append(Read(len(self.ops), read, made))
        self.ops.append(_new(Op, (func, tuple(taken), named, outputs, _grad_enabled())))
        return made

    def _keep_values(self, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> None:
        with _no_functions():
            self.values[len(self.ops)] = tuple(
                tensor.clone() if tensor.dtype in _INDEX_TYPES else None
                for tensor in _tensors((args, kwargs or {}))
            )

    def _opaque(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """An operator that takes functions (flex_attention): run, and not understood."""
        self.unsupported = self.unsupported or (
            f"{func} takes functions as its arguments: how samples go through it cannot be seen. "
            "Use ops that take tensors alone (scaled_dot_product_attention)"
        )
        return func(*args, **kwargs)

    def _wrapped(self, func: torch._ops.OpOverload, args: Any, kwargs: dict[str, Any]) -> Any:
        """An op on tensors that wrap others: run, and not understood."""
        tensors = list(_tensors((args, kwargs)))
        names = sorted({type(tensor).__name__ for tensor in tensors if _wraps(type(tensor))})
        inplace = bool(facts_of(func).writes) and not any(
            tensor.requires_grad or not _wraps(type(tensor)) for tensor in tensors
        )
        if not inplace:  # gradients that are zeroed, weights that are averaged: no part of the pass
            self.unsupported = self.unsupported or (
                f"{func} ran on {', '.join(names)}, a tensor that wraps others: how samples go "
                "through it cannot be seen. Use plain tensors in the model and the loss; "
                "tensor-parallel layers are not supported, and parameters that fully_shard divides "
                "are plain inside the forward pass of their module: compute penalties there"
            )
        with _no_functions():
            return func(*args, **kwargs)

    def carries_gradient(self) -> None:
        """The last op, which ran without gradients, has them: a function around it sees to that."""
        if self.ops:
            self.ops[-1] = self.ops[-1]._replace(grad=True)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave what runs inside out of the trace."""
        length = torch._C._len_torch_dispatch_stack()
        modes = [torch._C._get_dispatch_stack_at(i) for i in range(length)]
        if not any(mode is self for mode in modes):
            yield
        else:
            with _disable_current_modes():
                yield

    def producer(self, ref: Ref) -> int | None:
        """The op that made these elements; None from outside, or where a part changed since."""
        place, storage = ref[:5], ref[0]
        for k in range(len(self.ops) - 1, -1, -1):
            op = self.ops[k]
            for output in op[3]:
                if output[0] == storage and output[:5] == place:
                    return k
            if facts_of(op[0]).writes and any(r.storage == storage for r in op.written):
                return None
        return None

    def producer_of(self, tensor: Tensor) -> int | None:
        """`producer` of a tensor."""
        return self.producer(self.ref(tensor))

    @property
    def key(self) -> Key:
        """Equal for passes with the same ops, wiring, arguments, shapes, strides, dtypes and modes.

        The values of tensors are no part of it: see `value_dependent`. Numbers that Python counts
        as equal (1, 1.0 and True) are equal here: what they change shows in an output's dtype.
        """
        return Key(tuple(self.ops))

    @property
    def value_dependent(self) -> bool:
        """Whether owners may depend on index values; a replay says whether they do."""
        return bool(self.values)

    @cached_property
    def fixed(self) -> frozenset[int]:
        """Storages whose values follow from the key alone: made of no tensor, drawn by nobody."""
        loose = set(self.outside)
        for op in self.ops:
            touched = {ref.storage for ref in (*op.outputs, *op.written)}
            if op.facts.random or any(ref.storage in loose for ref in op.inputs):
                loose |= touched
        return frozenset(range(len(self.nbytes))) - loose


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)


def _not_strided(tensor: Tensor) -> str:
    kind = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return (
            "the pass is recorded inside a function transform (vmap, grad or another of "
            "torch.func), whose tensors have a hidden axis. Record the outer call instead: a "
            "transform used inside the model is fine"
        )
    return (
        f"a {kind} tensor takes part in the pass: how samples go through it cannot be seen. "
        "Use strided tensors: pad a nested tensor and mask the padding, give a sparse matrix as "
        "its indices with index_select and index_add, or as a dense one"
    )
