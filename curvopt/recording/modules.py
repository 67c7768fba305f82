"""Modules: their buffers, and those that a rule covers as a whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from curvopt.errors import CurvoptError
from curvopt.ops.recurrent import remember_order
from curvopt.ops.registry import MODULE_RULES
from curvopt.recording.calls import Calls
from curvopt.recording.uses import tensors_in


class Modules(Calls):
    """Hooks for the modules of a forward pass.

    Attributes:
        opaque: a module that a rule covers while its forward pass runs, and what is known of it.
        on_module: called with each module before its forward pass, and the recording.
        given: storages of what modules were called with: data, also where a buffer holds it.
    """

    opaque: list[Any]
    on_module: Callable[..., Any] | None
    given: set[int]

    def _note_module(self, module: nn.Module, args: Any) -> None:
        """Buffers (masks, positions) are the same for all samples; packed batches are sorted."""
        if self.on_module is not None:
            self.on_module(module, self)
        if isinstance(module, nn.RNNBase):
            remember_order(module, args)
        self.given.update(map(_storage, tensors_in(args)))
        # The layers of a scripted module do not call hooks.
        scripted = isinstance(module, torch.jit.ScriptModule)
        for buffer in module.buffers() if scripted else module._buffers.values():
            if buffer is None or buffer.requires_grad or id(buffer) in self.shared:
                continue
            if _storage(buffer) in self.given:  # the batch, kept in a buffer by its module
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
