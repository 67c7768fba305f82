"""What private steps record, and what they leave of a graph."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)

from curvopt.axes.wiring import version as version_of
from curvopt.engine.computation import Computation
from curvopt.errors import CurvoptError
from curvopt.recording.tape import Tape


def detached(value: Any) -> Any:
    """The same tensor without its graph; another one where that cannot be."""
    if not isinstance(value, Tensor) or value.grad_fn is None:
        return value
    return value.detach() if value._is_view() else value.detach_()


def refuse_hooks(params: Iterable[Any], name: Callable[[Any], str]) -> None:
    """Refuse hooks on parameters, which would have to be called with the samples' gradient."""
    for p in params:
        if p._backward_hooks or p._post_accumulate_grad_hooks:
            raise CurvoptError(
                f"{name(p)} has a gradient hook, which a private step cannot call: the "
                "gradient without noise must not be seen. Remove the hook, and change the "
                "private gradient in register_step_pre_hook or mask the parameter itself"
            )


def refuse_leaks(computation: Computation) -> None:
    """Refuse what samples would go through beside their gradients."""
    for shape in computation.shared:
        raise CurvoptError(
            f"all samples share data of shape {shape} that is no parameter and no buffer: if "
            "it was made of the samples, nothing of that is private. Make a constant of the "
            "model a buffer (register_buffer)"
        )
    for buffer in computation.updated:
        raise CurvoptError(
            f"the forward pass updated a buffer {list(buffer.shape)} from the samples: nothing "
            "of that is private. Put the layer that has it in eval() mode, or use one without "
            "statistics of the batch, such as GroupNorm"
        )


def refuse_again(computation: Computation) -> None:
    """Refuse data that an earlier pass of the same block has seen, and nothing has changed since.

    One tensor of several may be the same for all passes, such as a column of ones; what is drawn
    from a data set may not.

    Raises:
        CurvoptError: a sample would count twice.
    """
    tape = computation.tape
    assert isinstance(tape, PrivateTape)
    trace, now = tape.trace, len(tape.trace.ops)
    given = {(storage, drawn): places for storage, drawn, places in computation.seen()}
    for before, earlier in tape.seen:
        again = [
            (storage, drawn) in earlier
            and version_of(trace, storage, before) == version_of(trace, storage, now)
            and bool(torch.isin(places, earlier[storage, drawn]).any())
            for (storage, drawn), places in given.items()
        ]
        if again and (all(again) or any(a and d for a, (_, d) in zip(again, given, strict=True))):
            raise CurvoptError(
                "a second backward() over samples that an earlier one of this logical batch went "
                "over: each is clipped by itself, so that a sample would contribute up to 2 C. Add "
                "the losses and go backward once; views of a sample go together too, see views="
            )
    tape.seen.append((now, given))


COMPILED = (
    "every private step is recorded, and runs a compiled model as it was written: "
    "torch.compile(model) gains nothing here, so take it out"
)

# Compiled models of which that was said.
_TOLD: weakref.WeakSet[nn.Module] = weakref.WeakSet()


class PrivateTape(Tape):
    """Also refuses what would carry samples past the noise: statistics over the batch, buffers."""

    def __enter__(self) -> Any:
        if not self.depth:
            self.buffers: list[list[tuple[str, Tensor, int]]] = []
            # Data of earlier passes: by storage and whether it is drawn from, which rows.
            self.seen: list[tuple[int, dict[tuple[int, bool], Tensor]]] = []
            self.watching = [
                register_module_forward_pre_hook(self._before),
                register_module_forward_hook(self._after, always_call=True),
            ]
        return super().__enter__()

    def __exit__(self, *error: Any) -> Any:
        result = super().__exit__(*error)
        if not self.depth:
            for handle in self.watching:
                handle.remove()
        return result

    def _before(self, module: nn.Module, args: Any) -> None:
        if threading.get_ident() != self.thread:  # hooks are those of the whole process
            return
        if type(module).__name__ == "OptimizedModule" and module not in _TOLD:
            _TOLD.add(module)
            warnings.warn(COMPILED, stacklevel=2)
        held = module.named_buffers(recurse=isinstance(module, torch.jit.ScriptModule))
        self.buffers.append([(name, b, b._version) for name, b in held if b is not None])

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        if threading.get_ident() != self.thread:
            return
        before = self.buffers.pop()
        if not before:
            return
        given = [value for value in args if isinstance(value, Tensor)]
        if given and all(self._is_shared(value) for value in given):
            return  # it saw parameters alone (spectral norm, say), and those are not secret
        after = dict(module.named_buffers())
        for name, buffer, version in before:
            if after.get(name) is not buffer or buffer._version != version:
                kind = type(module).__name__
                raise CurvoptError(
                    f"the forward pass of {kind} updated its buffer {name} {list(buffer.shape)} "
                    "from the samples: nothing of that is private. Put the layer in eval() mode, "
                    "or use one without statistics of the batch, such as GroupNorm"
                )
