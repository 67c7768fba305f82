"""Modules: their buffers, and those that a rule covers as a whole."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._python_dispatch import _disable_current_modes

from curvopt.axes.rules.packed import note_packed
from curvopt.errors import CurvoptError
from curvopt.ops.recurrent import remember_order
from curvopt.ops.registry import MODULE_RULES
from curvopt.recording.calls import Calls
from curvopt.recording.uses import tensors_in

_TORCHS = torch.nn.modules.module.__file__
# From a hook of ours to the call of the module.
_FRAMES = 8


class Modules(Calls):
    """Hooks for the modules of a forward pass.

    Attributes:
        opaque: a module that a rule covers while its forward pass runs, and what is known of it.
        on_module: called with each module before its forward pass, and the recording.
        given: storages of what modules were called with: data, also where a buffer holds it.
        outermost: the module that was called last outside of any other.
        within: the modules of it, by id.
        held: storages of the buffers that they had when it was called.
    """

    opaque: list[Any]
    on_module: Callable[..., Any] | None
    given: set[int]
    outermost: nn.Module | None = None
    within: Set[int] = frozenset()
    held: Set[int] = frozenset()
    thread: int

    def _note_module(self, module: nn.Module, args: Any) -> None:
        """Buffers (masks, positions) are the same for all samples; packed batches are sorted."""
        if threading.get_ident() != self.thread:  # hooks are those of the whole process
            return
        if self.on_module is not None:
            self.on_module(module, self)
        if isinstance(module, nn.RNNBase):
            remember_order(module, args)
            if args and isinstance(args[0], PackedSequence):
                with _disable_current_modes(), torch._C.DisableTorchFunction():
                    note_packed(self.trace, *args[0][1:])
        given = (*args, *_keywords().values())
        self.given.update(map(_storage, _within(given)))
        if module is self.outermost or id(module) not in self.within:
            self.outermost, self.within = module, {id(m) for m in module.modules()}
            self.held = {_storage(buffer) for buffer in module.buffers()}
            if not given and not any(isinstance(v, Tensor) for v in vars(module).values()):
                # It has its batch already, and in its own buffers: nowhere else.
                self.given.update(_storage(b) for b in module._buffers.values() if b is not None)
        # The layers of a scripted module do not call hooks.
        scripted = isinstance(module, torch.jit.ScriptModule)
        for buffer in module.buffers() if scripted else module._buffers.values():
            if buffer is None or buffer.requires_grad or id(buffer) in self.shared:
                continue
            storage = _storage(buffer)
            # The batch, kept in a buffer: by its module, or by one around it in this very pass.
            if storage in self.given or storage not in self.held:
                continue
            self._share(buffer, frozenset(), False)
            self.record.silent.append(buffer)

    def _before_module(self, module: nn.Module, args: Any) -> None:
        rule = next((MODULE_RULES[t] for t in type(module).__mro__ if t in MODULE_RULES), None)
        if self.opaque or rule is None or not torch.is_grad_enabled():
            return
        values = {
            name: self.shared[id(parameter)]
            for name, parameter in module.named_parameters()
            if id(parameter) in self.by_id
        }
        if values:
            with torch._C.DisableTorchFunction():  # the tape itself looks at the graph here
                self.opaque = [module, rule, values, [t.grad_fn for t in tensors_in(args)]]

    def _after_module(self, module: nn.Module, args: Any, output: Any) -> Any:
        if not self.opaque or self.opaque[0] is not module:
            return None
        _, rule, values, nodes = self.opaque
        self.opaque = []
        if output is None:  # the forward pass raised
            return None
        if not isinstance(output, Tensor):
            raise CurvoptError(
                f"the rule of {type(module).__name__} needs a module that returns one tensor, "
                f"not {type(output).__name__}"
            )
        # Numbers as keys: names are the parameters'.
        arguments = {0: module, 1: args, 2: output}
        with torch._C.DisableTorchFunction():
            call = self._append(type(module).__name__, rule, arguments, values, output, nodes, args)
        call.kept += [(value, value._version) for value in tensors_in(args)]
        return None


def _storage(tensor: Tensor) -> int:
    """Equal for tensors that share memory; of a tensor without strides, its own number."""
    try:
        return tensor.untyped_storage()._cdata
    except (RuntimeError, NotImplementedError):
        return id(tensor)


def _within(values: Iterable[Any], depth: int = 4) -> Iterator[Tensor]:
    """The tensors of arguments: in lists, dicts and objects that hold data, too."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif depth and isinstance(value, list | tuple):
            yield from _within(value, depth - 1)
        elif depth and isinstance(value, Mapping):
            yield from _within(value.values(), depth - 1)
        elif depth and is_dataclass(value):
            yield from _within(vars(value).values(), depth - 1)


def _keywords() -> dict[str, Any]:
    """The keyword arguments of the module that is being called: global hooks are not told them."""
    frame = sys._getframe(1)
    for _ in range(_FRAMES):
        if frame.f_code.co_name in ("inner", "_call_impl") and frame.f_code.co_filename == _TORCHS:
            found: dict[str, Any] = frame.f_locals.get("kwargs") or {}
            return found
        if frame.f_back is None:
            break
        frame = frame.f_back
    return {}
