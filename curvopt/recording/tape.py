"""Recording: every call that uses a tracked parameter, every loss, seen at two levels.

Torch functions are watched for what rules need: names of ops, their arguments. Below them the
trace (`curvopt.axes.trace`) sees every single op, from which it is inferred afterwards where the
samples are. The forward pass runs as written, on the parameters themselves: nothing is replaced.
"""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.overrides import TorchFunctionMode

import curvopt.ops  # noqa: F401 (the rules register themselves)
from curvopt.axes.trace import Trace
from curvopt.axes.views import ViewOrder
from curvopt.errors import CurvoptError
from curvopt.losses import LOSSES
from curvopt.ops.of_samples import of_samples
from curvopt.ops.registry import COMPOSITIONS, MODULE_RULES, RULES
from curvopt.recording import functions as known
from curvopt.recording.losses import Function, Keywords, Losses, Positional
from curvopt.recording.modules import Modules
from curvopt.recording.stacks import UNCOMPILED
from curvopt.recording.uses import Call, Record, Shared, tensors_in

_transform = torch._C._functorch.peek_interpreter_stack
_PASSIVE, _SPECIAL = known.PASSIVE, known.SPECIAL
_NUMBERS = frozenset({int, float, bool, str, type(None), slice, torch.dtype, torch.device})


class Tape(Modules, Losses, TorchFunctionMode):
    """Records the forward pass of any model while it is entered.

    Args:
        params: the parameters to track, or (name, parameter) pairs.
        batch_size: number of samples, where the data flow leaves two readings; checked against it.
        create_graph: keep everything differentiable, for gradients of the quantities.
        on_backward: called with the tape and the loss in place of ``Tensor.backward``.

    Attributes:
        record: what was recorded.
        trace: the ops of the pass.
        owner: the optimizer whose step is recorded, if it is one.
        went: whether torch's own backward pass has begun (1) or is over (2), in `on_backward`.
        around: makes a context manager, entered while recording.
        on_module: called with each module before its forward pass, and the tape.
        thread: the thread that is recorded.
        serial: columns go back one by one: code on the way is not to be vectorized.
        views: how many rows of the data are views of one sample, and in which order.
        known: the plan of the pass, where it was made before, of an equal pass.
    """

    views: tuple[int, ViewOrder] = 1, "sample"
    known: Any = None
    owner: Any = None
    around: Callable[[], AbstractContextManager[Any]] | None = None
    went = 0
    thread = 0

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
        self._tracked = {
            id(p): Shared(p, p._version, frozenset([id(p)]), True) for p in self.params
        }
        self.on_module: Function | None = None
        self.serial = False
        self.entered: ExitStack | None = None
        self.opaque = []
        self.depth = 0
        self.reset()

    def reset(self) -> None:
        """Forget what was recorded, keep what is tracked."""
        self.record, self.trace = Record(), Trace()
        self.shared = dict(self._tracked)
        self.log_softmaxes = {}
        self.given = set()
        self.spent: set[Any] = set()

    def exchange(self, before: Tensor, after: Tensor) -> bool:
        """Track a tensor in the place of a parameter of which no use was recorded so far.

        Returns:
            Whether the parameter was one of the tape's, tracked or not.
        """
        silent = self.record.silent
        if before not in self.names:
            places = [k for k, tensor in enumerate(silent) if tensor is before]
            for k in places:
                silent[k] = after
            return bool(places)
        self.names = {after if p is before else p: name for p, name in self.names.items()}
        self.params = [p for p in self.names if p.requires_grad]
        self.by_id = {id(p): p for p in self.params}
        self.shared.pop(id(before), None)
        if after.requires_grad:
            self.shared[id(after)] = Shared(after, after._version, frozenset([id(after)]), True)
        return True

    def consume(self, calls: Iterable[Call]) -> None:
        """Retire calls that a backward pass went over; a second pass over them is an error."""
        gone = set(calls)
        self.spent.update(node for call in gone for node in call.outputs)
        self.record.calls = [call for call in self.record.calls if call not in gone]

    def name(self, parameter: Tensor) -> str:
        """The parameter's name and shape, for messages."""
        return f"{self.names.get(parameter, 'parameter')} {list(parameter.shape)}"

    # -- the hook ---------------------------------------------------------------------------------

    def __torch_function__(
        self, func: Function, types: Any, args: Positional = (), kwargs: Keywords | None = None
    ) -> Any:
        if func in _PASSIVE:
            result = func(*args, **kwargs) if kwargs else func(*args)
            if func in known.HOOKING and not known.is_torchs(args):
                self._note_hooks(func, args[0])
            elif func is Tensor.retain_grad:
                self.record.hooks.note_retaining(args[0])
            return result
        kwargs = kwargs or {}
        if self.opaque or _transform() is not None:  # inside of vmap or grad: the trace sees it
            return func(*args, **kwargs)
        if func is F.batch_norm:
            self._note_batch_statistics(args, kwargs)
        tracked, all_shared, tensors, made = self._classify(args, kwargs)
        if tracked and not torch.is_grad_enabled():
            values = [t for t in tensors_in((*args, *kwargs.values())) if self.is_tracked(t)]
            self.record.reentrant = self.record.reentrant or known.reentrant(values)
        elif tracked:
            constant = all_shared and not made
            if func in LOSSES and not constant:
                return self._loss(func, args, kwargs)
            if func in COMPOSITIONS and not constant:
                with self:
                    return COMPOSITIONS[func](*args, **kwargs)
            begin = len(self.trace.ops)
            output = self._tracked_call(func, args, kwargs, all_shared, made)
            self._note_ending(func, args, kwargs, output, begin)
            return output
        special = _SPECIAL.get(func)
        if special is not None:
            return getattr(self, special)(func, args, kwargs)
        output = func(*args, **kwargs)
        if func is Tensor.clone and not torch.is_grad_enabled() and known.in_ddp_sink():
            self.trace.carries_gradient()
        if all_shared:
            if tensors or func not in known.RANDOM:
                self._share(output, frozenset(), False, made=made or not tensors)
        elif tensors and args and (output is args[0] or output is None):  # changed in place
            self.shared.pop(id(args[0]), None)
        return output

    def _note_hooks(self, func: Function, tensor: Tensor) -> None:
        self.record.hooked = True
        if func is Tensor.register_hook:
            entry = self._entry(tensor)
            roots = frozenset[int]() if entry is None else entry.roots
            self.record.hooks.note(tensor, self.trace.ref(tensor), roots)

    def _note_batch_statistics(self, args: Positional, kwargs: Keywords) -> None:
        arguments = RULES[F.batch_norm].bind(args, kwargs)
        if arguments["training"] and len(arguments["input"]) > 1:
            weight, shape = arguments["weight"], list(arguments["input"].shape)
            owner = f" of {self.name(weight)}" if self.is_tracked(weight) else ""
            what = f"batch_norm{owner} on an input {shape}"
            if arguments["running_mean"] is None:
                self.record.coupled = (
                    f"{what} has no running statistics (track_running_stats=False), so that it "
                    "takes those of the batch whatever its mode, and no sample has a gradient of "
                    "its own. Use"
                )
            else:
                self.record.coupled = (
                    f"{what} is in training mode: its statistics mix the samples, so that no "
                    "sample has a gradient of its own. Put the layer in eval mode (module.eval()), "
                    "or use"
                )

    def _classify(self, args: Any, kwargs: Keywords | None) -> tuple[bool, bool, bool, bool]:
        """Whether arguments are tracked; all tensors are shared; there are any; some were made."""
        shared = self.shared
        tracked = tensors = made = False
        all_shared = True
        values = (*args, *kwargs.values()) if kwargs else args
        for value in values:
            kind = type(value)
            if kind in _NUMBERS:
                continue
            if kind is Tensor or isinstance(value, Tensor):
                tensors = True
                entry = shared.get(id(value))
                if entry is not None and (id(value) in self.by_id or entry.fresh):
                    tracked = tracked or bool(entry.roots)
                    made = made or entry.made
                elif kind is nn.Parameter:  # of another optimizer, or frozen
                    shared[id(value)] = Shared(value, value._version, frozenset())
                    self.record.silent.append(value)
                else:
                    all_shared = False
            elif kind is list or kind is tuple:
                inner = self._classify(value, None)
                tracked, tensors = tracked or inner[0], tensors or inner[2]
                all_shared, made = all_shared and inner[1], made or inner[3]
        return tracked, all_shared, tensors, made

    # -- calls with tracked values ----------------------------------------------------------------

    def _tracked_call(
        self, func: Function, args: Positional, kwargs: Keywords, all_shared: bool, made: bool
    ) -> Any:
        rule = RULES.get(func)
        arguments: dict[Any, Any] = {}
        if rule is None:
            body = known.unwrapped(func)
            if body is not None and (made or not all_shared):
                with self:
                    return body(*args, **kwargs)
        else:
            arguments = rule.bind(args, kwargs)
            try:
                rule = rule if rule.fits(arguments) else None
            except CurvoptError as error:  # it fails the step, not the forward pass
                rule, self.trace.unsupported = None, self.trace.unsupported or str(error)
        named: dict[Any, Any] = {**dict(enumerate(args)), **kwargs} if rule is None else arguments
        inputs = self._inputs(named)
        # A value that is changed in place keeps its name, but not what was known of it.
        changed = args[0] if args and isinstance(args[0], Tensor) else None
        version = changed._version if changed is not None else None
        nodes = [t.grad_fn for t in tensors_in((*args, *kwargs.values()))]
        output = func(*args, **kwargs)
        if not any(t.requires_grad for t in tensors_in((output,))):  # a mask, zeros of its shape
            if all_shared:
                self._share(output, frozenset(), False)
            elif changed is not None and changed._version != version:
                self.shared.pop(id(changed), None)
            return output
        call = self._append(known.op_name(func), rule, arguments, inputs, output, nodes, args)
        may_derive = all_shared
        if not all_shared:
            if rule is not None:
                may_derive = rule.opens(arguments, self._is_shared)
            else:
                may_derive = self._carries_no_samples(args, kwargs)
        elif func is of_samples:
            may_derive = False
        if may_derive:
            one = next(iter(inputs.values()))
            isometry = len(inputs) == 1 and one.isometry and known.selects(func, args)
            roots = frozenset().union(*(entry.roots for entry in inputs.values()))
            self._share(output, roots, isometry, call, made)
        elif changed is not None and changed._version != version:
            self.shared.pop(id(changed), None)
        return output

    def _carries_no_samples(self, args: Any, kwargs: Keywords) -> bool:
        """No operand is an activation: the others are buffers, or data of unknown kind."""
        return not any(
            value.requires_grad and id(value) not in self.shared
            for value in tensors_in((*args, *kwargs.values()))
        )

    # -- backward ---------------------------------------------------------------------------------

    def _backward(self, func: Function, args: Positional, kwargs: Keywords) -> Any:
        return self.backward(*args, **kwargs)

    def backward(self, *args: Any, **kwargs: Any) -> Any:
        """What is done where ``Tensor.backward`` is called."""
        if self.on_backward is None:
            raise CurvoptError(
                "backward() was called inside curvopt.record(); call tape.compute(loss, ...) "
                "instead, or use an optimizer's record() or step(closure)"
            )
        # It is given the tape, and holds none: a cycle would keep the graph until collected.
        return self.on_backward(self, *args, **kwargs)

    # -- entering ---------------------------------------------------------------------------------

    @contextmanager
    def watching_modules(self) -> Iterator[None]:
        """Meet the modules that run."""
        with ExitStack() as stack:
            handles = [register_module_forward_pre_hook(self._note_module)]
            if MODULE_RULES:
                handles += [
                    register_module_forward_pre_hook(self._before_module),
                    register_module_forward_hook(self._after_module, always_call=True),
                ]
            for handle in handles:
                stack.callback(handle.remove)
            yield

    def __enter__(self) -> Tape:
        if not self.depth:
            self.thread = threading.get_ident()
            self.entered = ExitStack()
            self.entered.enter_context(self.watching_modules())
            self.entered.enter_context(_uncompiled())
            if self.around is not None:
                self.entered.enter_context(self.around())
            self.trace.__enter__()
        self.depth += 1
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.depth -= 1
        super().__exit__(*error)
        if not self.depth and self.entered is not None:
            self.trace.__exit__(None, None, None)
            self.entered.close()
            self.entered, self.opaque = None, []


@contextmanager
def _uncompiled() -> Iterator[None]:
    """Models under `torch.compile` run as they were written: fused ops cannot be recorded."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and importing it takes seconds
        yield
        return
    UNCOMPILED.begin()
    try:
        with warnings.catch_warnings():
            message = r"Using `torch.compile\(module\)` when there are global"
            warnings.filterwarnings("ignore", message)
            yield
    finally:
        UNCOMPILED.end()


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
