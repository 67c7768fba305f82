"""Recording: every op that uses a tracked parameter, every loss, seen at the torch-function level.

A use of a parameter runs with the parameter replaced by a leaf of its own, so the autograd graph
holds only the data path. What is kept of the output is its *gradient edge*: it survives in-place
changes of the output, where a kept tensor would silently change its meaning.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

import curvopt.ops  # noqa: F401 (the rules register themselves)
from curvopt.engine import functions as known
from curvopt.engine.registry import COMPOSITIONS, MODULE_RULES, RULES, Rule
from curvopt.engine.samples import Layout
from curvopt.errors import CurvoptError, Uncovered
from curvopt.losses import LOSSES, Loss
from curvopt.losses.handwritten import Reduction
from curvopt.ops.of_samples import of_samples
from curvopt.ops.recurrent import remember_order
from curvopt.structures import Structure

# Whether the modules of a model, by its first parameter, hold anything that a hook must note: hooks
# make every module's call slower, and most models have neither buffers nor recurrent layers.
_notable: Any = WeakTensorKeyDictionary()

Function = Callable[..., Any]
Positional = tuple[Any, ...]
Keywords = dict[str, Any]


@dataclass(eq=False)
class Shared:
    """A value that is the same for all samples: a parameter, one made of parameters, a constant.

    Attributes:
        tensor: the value.
        version: its version when it was made; an in-place change afterwards may mix in data.
        roots: the tracked parameters it is made of, by id; none for a constant.
        isometry: it only selects and rearranges elements of one parameter, each at most once.
    """

    tensor: Tensor
    version: int
    roots: frozenset[int]
    isometry: bool = False

    @property
    def fresh(self) -> bool:
        """Whether the value is still the one that was made."""
        return self.tensor._version == self.version


@dataclass(eq=False)
class Use:
    """One use of tracked values by an op that a rule covers.

    Attributes:
        op: the op's name, for messages.
        rule: the rule that covers it.
        arguments: the call's arguments by name, parameters replaced by their leaves.
        values: the shared values by argument name.
        edge: the gradient edge of the output.
        shape: shape of the output.
        versions: versions of the kept tensors, checked before they are used.
    """

    op: str
    rule: Rule
    arguments: dict[Any, Any]
    values: dict[Any, Shared]
    edge: GradientEdge
    shape: torch.Size
    versions: list[tuple[Tensor, int]]

    def structures(self, cotangent: Tensor, layout: Layout) -> dict[Any, Structure]:
        """Structures by argument name, for a cotangent ``[V, *shape]``."""
        for tensor, version in self.versions:
            if tensor._version != version:
                raise CurvoptError(
                    f"an input of {self.op}, of shape {list(tensor.shape)}, was changed in place "
                    "after the op had used it; use the out-of-place form of that operation"
                )
        return self.rule.structures(UseView(self, cotangent, layout), self.arguments)


class UseView:
    """What a rule sees of a use: cotangent and data in the canonical layout.

    Attributes:
        op: the op's name.
        raw: the cotangent as it came, ``[V, *output.shape]``.
        cotangent: ``[V, N, K, *rest]``.
        parameters: the shared values by argument name.
    """

    def __init__(self, use: Use, cotangent: Tensor, layout: Layout):
        dtype = next(iter(use.values.values())).tensor.dtype
        # Half precision would lose squares and norms: they are accumulated in float32.
        self.dtype = torch.promote_types(dtype, torch.float32)
        self.op, self.layout = use.op, layout
        self.raw = cotangent if cotangent.dtype is self.dtype else cotangent.to(self.dtype)
        self.cotangent = layout.split(self.raw, 1)
        self.parameters = {name: shared.tensor for name, shared in use.values.items()}
        self.output_ndim = len(use.shape)

    def scaled(self, factor: float) -> UseView:
        """The same use with its cotangent multiplied by a number."""
        if factor == 1:
            return self
        view = copy(self)
        view.raw, view.cotangent = self.raw * factor, self.cotangent * factor
        return view

    def rows(self, tensor: Tensor) -> Tensor:
        """Data of the op in the canonical layout, ``[N, K, *rest]``."""
        split = self.layout.split(tensor)
        wrong = split.dtype is not self.dtype and split.is_floating_point()
        return split.to(self.dtype) if wrong else split

    def tokens(self, tensor: Tensor, lead: int = 0) -> Tensor:
        """Rows of a matrix product, ``[*lead axes, N, 1, tokens, features]``, in one view."""
        n, features = self.layout.n, tensor.shape[-1]
        if self.layout.kind != "batch" or not tensor.numel():
            return self.layout.split(tensor, lead).flatten(lead + 1, -2).unsqueeze(lead + 1)
        return tensor.reshape(*tensor.shape[:lead], n, 1, -1, features)

    @property
    def flat(self) -> Tensor:
        """The cotangent for a custom rule, samples first: ``[V, N (or N * K), ...]``."""
        return self.cotangent if self.layout.kind == "time" else self.raw

    def data(self, value: Any) -> Any:
        """Data for a custom rule: samples first where the tensor has them, else unchanged."""
        if self.layout.kind != "time" or not isinstance(value, Tensor) or value.ndim < 2:
            return value
        return value.transpose(0, 1) if value.shape[1] == self.layout.n else value

    def aligned(self, shape: torch.Size) -> tuple[int, ...]:
        """A broadcast shape as it stands in ``[K, *rest]``."""
        padded = [1] * (self.output_ndim - len(shape)) + list(shape)
        samples = padded.pop(1) if self.layout.kind == "time" else padded.pop(0)
        if samples != 1 and self.layout.n != 1:
            raise Uncovered(f"{self.op} has its samples on an axis of a parameter {list(shape)}")
        return tuple(padded) if self.layout.kind == "time" else (samples, *padded)


@dataclass
class Record:
    """What one forward pass left.

    Attributes:
        uses: uses of tracked values, in order.
        losses: loss calls, and means and sums to a scalar, in order.
        unruled: by parameter id, the name of an op that no rule covers.
        divisions: graph nodes of scalars divided by a tensor.
        across: graph nodes of means and sums over a first axis.
        leaves: stand-ins of the parameters; a gradient on one is a backward that went unseen.
        attached: graph nodes where parameters were attached, under ``create_graph``.
        signature: hash of the sequence of functions and shapes.
        coupled: an op that took statistics over the batch, for a message.
    """

    uses: list[Use] = field(default_factory=list)
    losses: list[Loss] = field(default_factory=list)
    unruled: dict[int, str] = field(default_factory=dict)
    divisions: set[Any] = field(default_factory=set)
    across: set[Any] = field(default_factory=set)
    leaves: list[Tensor] = field(default_factory=list)
    attached: set[Any] = field(default_factory=set)
    signature: int = 0
    coupled: str = ""


class Tape(TorchFunctionMode):
    """Records the forward pass of any model while it is entered.

    Args:
        params: the parameters to track, or (name, parameter) pairs.
        batch_size: number of samples, where it cannot be read from the model's first op and loss.
        create_graph: keep everything differentiable, for gradients of the quantities.
        on_backward: called with the tape and the loss in place of ``Tensor.backward``.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[tuple[str, Tensor]],
        *,
        batch_size: int | None = None,
        create_graph: bool = False,
        on_backward: Function | None = None,
    ):
        super().__init__()
        self.names = _named(params)
        self.params = [p for p in self.names if p.requires_grad]
        if not self.params:
            raise CurvoptError("no parameter requires a gradient, so there is nothing to compute")
        if batch_size is not None and (not isinstance(batch_size, int) or batch_size < 0):
            raise CurvoptError(f"Invalid batch_size: {batch_size} (a number of samples)")
        self.batch_size, self.create_graph, self.on_backward = batch_size, create_graph, on_backward
        self.by_id = {id(p): p for p in self.params}
        self.entered: ExitStack | None = None
        self.opaque: list[Any] = []
        self.depth = 0
        self.modules_seen = self.notable = False
        self.reset()

    def reset(self) -> None:
        """Forget what was recorded, keep what is tracked."""
        self.record = Record()
        self.hint = self.batch_size
        self.shared: dict[int, Shared] = {
            id(p): Shared(p, p._version, frozenset([id(p)]), True) for p in self.params
        }
        self.log_softmaxes: dict[int, tuple[Tensor, Tensor]] = {}
        self.spent: list[GradientEdge] = []

    def consume(self, uses: Iterable[Use]) -> None:
        """Retire uses that a backward pass went over; a second pass over them is an error."""
        gone = set(uses)
        self.spent += [use.edge for use in gone]
        self.record.uses = [use for use in self.record.uses if use not in gone]
        if not self.record.uses:
            self.record, self.hint = Record(), self.batch_size
            self.log_softmaxes = {}

    def name(self, parameter: Tensor) -> str:
        """The parameter's name and shape, for messages."""
        return f"{self.names.get(parameter, 'parameter')} {list(parameter.shape)}"

    # -- the hook ---------------------------------------------------------------------------------

    def __torch_function__(
        self, func: Function, types: Any, args: Positional = (), kwargs: Keywords | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in known.PASSIVE or self.opaque:
            return func(*args, **kwargs)
        record = self.record
        record.signature = hash((record.signature, func))
        if func is F.batch_norm:
            self._note_batch_statistics(args, kwargs)
        tracked, all_shared, tensors = self._classify(args, kwargs)
        if tracked and torch.is_grad_enabled():
            if func in LOSSES and not all_shared:
                return self._loss(func, args, kwargs)
            if func in COMPOSITIONS and not all_shared:
                with self:
                    return COMPOSITIONS[func](*args, **kwargs)
            return self._tracked_call(func, args, kwargs, all_shared)
        special = known.SPECIAL.get(func)
        if special is not None:
            return getattr(self, special)(func, args, kwargs)
        output = func(*args, **kwargs)
        if all_shared:
            if tensors or func not in known.RANDOM:
                self._share(output, frozenset(), False)
        elif tensors and self._is_inplace(output, args):
            self.shared.pop(id(args[0]), None)
        return output

    def _note_batch_statistics(self, args: Positional, kwargs: Keywords) -> None:
        arguments = RULES[F.batch_norm].bind(args, kwargs)
        if arguments["training"] and len(arguments["input"]) > 1:
            weight, shape = arguments["weight"], list(arguments["input"].shape)
            owner = f" of {self.name(weight)}" if self.is_tracked(weight) else ""
            self.record.coupled = f"batch_norm{owner} on an input {shape}"

    def _classify(self, args: Any, kwargs: Keywords | None) -> tuple[bool, bool, bool]:
        """Whether tracked values are among the arguments; whether all tensors are shared; any."""
        shared = self.shared
        tracked = tensors = False
        all_shared = True
        values = (*args, *kwargs.values()) if kwargs else args
        for value in values:
            if isinstance(value, Tensor):
                tensors = True
                entry = shared.get(id(value))
                if entry is not None and (id(value) in self.by_id or entry.fresh):
                    tracked = tracked or bool(entry.roots)
                else:
                    all_shared = False
                    if self.hint is None and value.ndim:  # the first data that the model meets
                        self.hint = value.shape[0]
            elif type(value) in (list, tuple):
                inner = self._classify(value, None)
                tracked, tensors = tracked or inner[0], tensors or inner[2]
                all_shared = all_shared and inner[1]
            elif isinstance(value, (int, str)):
                self.record.signature = hash((self.record.signature, value))
        return tracked, all_shared, tensors

    def _is_param(self, tensor: Tensor) -> bool:
        return id(tensor) in self.by_id

    @staticmethod
    def _is_inplace(output: Any, args: Positional) -> bool:
        return bool(args) and isinstance(args[0], Tensor) and (output is args[0] or output is None)

    def _share(self, output: Any, roots: frozenset[int], isometry: bool) -> None:
        if isinstance(output, Tensor):
            self.shared[id(output)] = Shared(output, output._version, roots, isometry)
        elif isinstance(output, (tuple, list)):
            for item in output:
                self._share(item, roots, isometry)

    # -- ops with tracked values ------------------------------------------------------------------

    def _tracked_call(
        self, func: Function, args: Positional, kwargs: Keywords, all_shared: bool
    ) -> Any:
        rule = RULES.get(func)
        if rule is None:
            body = known.unwrapped(func)
            if body is not None and not all_shared:
                with self:
                    return body(*args, **kwargs)
        else:
            arguments = rule.bind(args, kwargs)
            if self._covers(rule, arguments, all_shared):
                return self._use(func, rule, arguments, args, kwargs)
        derives = all_shared or self._carries_no_samples(args, kwargs)
        if not derives:
            args, kwargs = self._by_sample(func, args, kwargs)
        entries = [e for e in self._entries(args, kwargs) if e.roots]
        roots = frozenset().union(*(entry.roots for entry in entries))
        output = func(*args, **kwargs)
        if derives:
            isometry = len(entries) == 1 and entries[0].isometry and known.selects(func, args)
            self._share(output, roots, isometry)
        if not all_shared:
            for root in roots:
                self.record.unruled.setdefault(root, known.op_name(func))
        if self._is_inplace(output, args) and not all_shared:
            self.shared.pop(id(args[0]), None)
        return output

    def _by_sample(
        self, func: Function, args: Positional, kwargs: Keywords
    ) -> tuple[Positional, Keywords]:
        """Record derived values that meet activations as uses: they may hold a part per sample."""
        swaps: dict[int, Tensor] = {}
        for value in _tensors((*args, *kwargs.values())):
            changed = value is args[0]  # by an in-place op, perhaps
            if self.is_tracked(value) and not self._is_param(value) and not changed:
                with self:
                    swaps[id(value)] = of_samples(value)
                self.record.uses[-1].op = known.op_name(func)
        return tuple(_swap(args, swaps)), {k: _swap_one(v, swaps) for k, v in kwargs.items()}

    def _entries(self, args: Any, kwargs: Keywords) -> list[Shared]:
        tensors = _tensors((*args, *kwargs.values()))
        return [self.shared[id(value)] for value in tensors if id(value) in self.shared]

    def _carries_no_samples(self, args: Any, kwargs: Keywords) -> bool:
        """No operand is an activation: the others are buffers, or data of unknown kind.

        The result is then tracked like a value made of parameters alone. Should it hold samples
        after all, the op that uses it finds the sample axis inside a parameter and leaves it to
        the audit.
        """
        return not any(
            value.requires_grad and id(value) not in self.shared
            for value in _tensors((*args, *kwargs.values()))
        )

    def _covers(self, rule: Rule, arguments: dict[Any, Any], all_shared: bool) -> bool:
        for name, value in arguments.items():
            if isinstance(value, Tensor) and not rule.holds_parameter(name):
                entry = self.shared.get(id(value))
                if entry is not None and entry.roots:
                    return False
        return rule.applies(self, arguments, all_shared)

    def is_tracked(self, value: Any) -> bool:
        """Whether a value is a tracked parameter or made of some."""
        entry = self.shared.get(id(value)) if isinstance(value, Tensor) else None
        return entry is not None and bool(entry.roots)

    def is_shared(self, tensor: Tensor) -> bool:
        """Whether a tensor is known to be the same for all samples."""
        return id(tensor) in self.shared

    def _use(
        self,
        func: Function,
        rule: Rule,
        arguments: dict[Any, Any],
        args: Positional,
        kwargs: Keywords,
    ) -> Tensor:
        values, swaps = {}, {}
        for name, value in arguments.items():
            entry = self.shared.get(id(value)) if isinstance(value, Tensor) else None
            if entry is not None and entry.roots and id(value) not in swaps:
                swaps[id(value)] = self._leaf(value)
                arguments[name] = swaps[id(value)]
            if entry is not None and entry.roots:
                values[name] = entry
        output = func(*_swap(args, swaps), **{k: _swap_one(v, swaps) for k, v in kwargs.items()})
        output = _own(output)
        arguments.update(
            dict.fromkeys(name for name in rule.unread(arguments) if name not in values)
        )
        kept = [
            (value, value._version)
            for name, value in arguments.items()
            if isinstance(value, Tensor) and name not in values
        ]
        self._append(known.op_name(func), rule, arguments, values, output, kept)
        return output

    def _leaf(self, value: Tensor) -> Tensor:
        if not self.create_graph:
            leaf = value.detach().requires_grad_()
            self.record.leaves.append(leaf)
            return leaf
        leaf = value.view_as(value)
        self.record.attached.add(leaf.grad_fn)
        return leaf

    def _append(
        self,
        op: str,
        rule: Rule,
        arguments: dict[Any, Any],
        values: dict[Any, Shared],
        output: Tensor,
        kept: list[tuple[Tensor, int]],
    ) -> None:
        edge = get_gradient_edge(output)
        use = Use(op, rule, arguments, values, edge, output.shape, kept)
        self.record.uses.append(use)
        self.record.signature = hash((self.record.signature, output.shape))
        if self.hint is None and output.ndim:
            self.hint = output.shape[0]

    # -- losses and backward ----------------------------------------------------------------------

    def _loss(self, func: Function, args: Positional, kwargs: Keywords) -> Any:
        value = func(*args, **kwargs)
        rule = LOSSES[func]
        arguments = dict(zip(rule.names, args, strict=False)) | kwargs
        output = arguments.pop("input")
        if not (isinstance(value, Tensor) and value.requires_grad and output.requires_grad):
            return value
        if any(isinstance(v, Tensor) and v.requires_grad for v in arguments.values()):
            return value  # the model enters through the target too: no loss of one output
        if rule.wants_logits:
            pair = self.log_softmaxes.get(id(output))
            logits = pair[1] if pair is not None and pair[0] is output else None
            arguments["logits"] = logits
        self.record.losses.append(rule.function(output, value, **arguments))
        self.record.signature = hash((self.record.signature, output.shape))
        return value

    def _log_softmax(self, func: Function, args: Positional, kwargs: Keywords) -> Any:
        output = func(*args, **kwargs)
        if output.requires_grad:
            source = args[0] if args else kwargs["input"]
            dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
            if dim is not None and dim % output.ndim == min(1, output.ndim - 1):
                self.log_softmaxes[id(output)] = (output, source)
        return output

    def _reduction(self, func: Function, args: Positional, kwargs: Keywords) -> Any:
        output = func(*args, **kwargs)
        source = args[0] if args else kwargs["input"]
        if output.ndim == 0 and output.requires_grad and source.ndim:
            kind = "mean" if "mean" in known.op_name(func) else "sum"
            self.record.losses.append(Reduction(source, output, kind))
        elif isinstance(output, Tensor) and output.requires_grad:
            dims = args[1] if len(args) > 1 else kwargs.get("dim")
            dims = [dims] if isinstance(dims, int) else dims or ()
            if any(dim % source.ndim == 0 for dim in dims):
                self.record.across.add(output.grad_fn)
        return output

    def _division(self, func: Function, args: Positional, kwargs: Keywords) -> Any:
        output = func(*args, **kwargs)
        if output.ndim == 0 and output.requires_grad and isinstance(args[-1], Tensor):
            self.record.divisions.add(output.grad_fn)
        return output

    def _backward(self, func: Function, args: Positional, kwargs: Keywords) -> Any:
        return self.backward(*args, **kwargs)

    def backward(self, *args: Any, **kwargs: Any) -> Any:
        """What takes the place of ``Tensor.backward``."""
        if self.on_backward is None:
            raise CurvoptError(
                "backward() was called inside curvopt.record(); call tape.compute(loss, ...) "
                "instead, or use an optimizer's record() or step(closure)"
            )
        # It is given the tape, and holds none: a cycle would keep the graph until collected.
        return self.on_backward(self, *args, **kwargs)

    # -- custom module rules ----------------------------------------------------------------------

    def __enter__(self) -> Tape:
        if not self.depth:
            self.entered = ExitStack()
            handles = []
            if _notable.get(self.params[0], True):
                handles.append(register_module_forward_pre_hook(self._note_module))
            if MODULE_RULES:
                handles += [
                    register_module_forward_pre_hook(self._before_module),
                    register_module_forward_hook(self._after_module, always_call=True),
                ]
            for handle in handles:
                self.entered.callback(handle.remove)
            self.entered.enter_context(_uncompiled())
        self.depth += 1
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.depth -= 1
        if not self.depth and self.entered is not None:
            self.entered.close()
            self.entered, self.opaque = None, []
            if self.modules_seen and not any(error):
                _notable[self.params[0]] = self.notable
        super().__exit__(*error)

    def _note_module(self, module: nn.Module, args: Any) -> None:
        """Buffers (masks, positions) are the same for all samples; packed batches are sorted."""
        self.modules_seen = True
        if isinstance(module, nn.RNNBase):
            self.notable = True
            remember_order(module, args)
        for buffer in module._buffers.values():
            self.notable = True
            if buffer is not None and not buffer.requires_grad:
                self._share(buffer, frozenset(), False)

    def _before_module(self, module: nn.Module, args: Any) -> None:
        rule = next((MODULE_RULES[t] for t in type(module).__mro__ if t in MODULE_RULES), None)
        if self.opaque or rule is None or not torch.is_grad_enabled():
            return
        values, leaves, restore = {}, {}, []
        for name, parameter in module.named_parameters():
            if id(parameter) in self.by_id:
                owner = module.get_submodule(name.rpartition(".")[0])
                restore.append((owner, name.rpartition(".")[2], parameter))
                values[name] = self.shared[id(parameter)]
                leaves[name] = self._leaf(parameter)
        if values:
            for (owner, key, _), leaf in zip(restore, leaves.values(), strict=True):
                # setattr would insist on a Parameter
                vars(owner)["_parameters"][key] = leaf
            self.opaque = [module, rule, values, leaves, restore]

    def _after_module(self, module: nn.Module, args: Any, output: Any) -> Any:
        if not self.opaque or self.opaque[0] is not module:
            return None
        _, rule, values, leaves, restore = self.opaque
        self.opaque = []
        for owner, key, parameter in restore:
            owner._parameters[key] = parameter
        if output is None:  # the forward pass raised
            return None
        if not isinstance(output, Tensor):
            raise CurvoptError(
                f"the rule of {type(module).__name__} needs a module that returns one tensor, "
                f"not {type(output).__name__}"
            )
        output = _own(output)
        result = output if self.create_graph else output.detach()
        # Numbers as keys: names are the parameters'.
        arguments = {0: module, 1: args, 2: result, **leaves}
        kept = [(value, value._version) for value in (*args, result) if isinstance(value, Tensor)]
        self._append(type(module).__name__, rule, arguments, values, output, kept)
        return output


@contextmanager
def _uncompiled() -> Iterator[None]:
    """Models under `torch.compile` run as they were written: fused ops cannot be recorded."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and importing it takes seconds
        yield
        return
    with warnings.catch_warnings(), torch.compiler.set_stance("force_eager"):
        warnings.filterwarnings("ignore", r"Using `torch.compile\(module\)` when there are global")
        yield


def _own(output: Tensor) -> Tensor:
    """The output as no view: in-place changes of a view rewrite its base's history."""
    return torch.ops.aten._unsafe_view(output, output.shape) if output._is_view() else output


def _named(params: Iterable[Any]) -> dict[Tensor, str]:
    """Names by parameter; tensors hash by identity."""
    if isinstance(params, Tensor):
        raise CurvoptError("params must be an iterable of parameters, not one tensor")
    names: dict[Tensor, str] = {}
    for index, item in enumerate(params):
        name, parameter = item if isinstance(item, tuple) else (f"parameter {index}", item)
        if not isinstance(parameter, Tensor):
            raise CurvoptError(f"params must hold tensors, got {type(parameter).__name__}")
        if parameter in names:
            raise CurvoptError(f"{name} is given twice (it is also {names[parameter]})")
        if parameter.requires_grad and not parameter.is_leaf:
            raise CurvoptError(f"{name} is no leaf: give the tensors that it was made of")
        if parameter.requires_grad and parameter.is_complex():
            raise CurvoptError(f"{name} is complex; only real parameters are supported")
        names[parameter] = name
    if not names:
        raise CurvoptError("no parameters were given")
    return names


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among the arguments of a call, those in lists too."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif type(value) in (list, tuple):
            yield from _tensors(value)


def _swap_one(value: Any, swaps: dict[int, Tensor]) -> Any:
    if isinstance(value, Tensor):
        return swaps.get(id(value), value)
    if type(value) in (list, tuple):
        return type(value)(_swap_one(item, swaps) for item in value)
    return value


def _swap(args: Iterable[Any], swaps: dict[int, Tensor]) -> list[Any]:
    return [_swap_one(value, swaps) for value in args]
