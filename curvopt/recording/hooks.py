"""Hooks on tensors of a forward pass: which there are, and which of them change gradients.

A backward pass of the engine's calls them as torch's own does. So they can be watched in one, and
left out of those that carry no gradient.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from curvopt.axes.trace import Ref

Hook = Callable[[Tensor], Tensor | None]


@dataclass(eq=False)
class Hooked:
    """A tensor with hooks.

    Attributes:
        place: of the tensor in the trace.
        hooks: by number; weakly, the dictionary that torch reads them from.
        roots: ids of the parameters that it is made of; empty for an activation.
    """

    place: Ref
    hooks: weakref.ref[OrderedDict[int, Hook]]
    roots: frozenset[int]


class Hooks:
    """The tensors of a forward pass that have hooks, and those that keep their gradients.

    Attributes:
        hooked: the tensors with hooks, those on leaves left out.
        modules: nodes at which hooks of modules are called, whose gradient they pass on.
        retaining: tensors that keep their gradient.

    All are held weakly: a hook may hold the graph that it is in.
    """

    def __init__(self) -> None:
        self.hooked: list[Hooked] = []
        self.modules: list[weakref.ref[Any]] = []
        self.retaining: list[weakref.ref[Tensor]] = []

    def __bool__(self) -> bool:
        return bool(self.hooked or self.modules)

    def note(self, tensor: Tensor, place: Ref, roots: frozenset[int]) -> None:
        """Remember a tensor that a hook was just put on."""
        hooks: Any = tensor._backward_hooks
        self.hooked = [hooked for hooked in self.hooked if hooked.hooks() is not None]
        if hooks and not tensor.is_leaf and all(h.hooks() is not hooks for h in self.hooked):
            self.hooked.append(Hooked(place, weakref.ref(hooks), roots))

    def note_retaining(self, tensor: Tensor) -> None:
        """Remember a tensor that keeps its gradient."""
        self.retaining = [one for one in self.retaining if one() is not None]
        self.retaining.append(weakref.ref(tensor))

    def note_node(self, node: Any) -> None:
        """Remember a node that is asked for, if it is one that calls a module's hooks."""
        if type(node).__name__ == "BackwardHookFunctionBackward":
            self.modules = [one for one in self.modules if one() not in (None, node)]
            self.modules.append(weakref.ref(node))

    @contextmanager
    def absent(self) -> Iterator[None]:
        """Without the hooks on tensors, but for torch's own."""
        with self._exchanged(lambda _, hook: hook if is_torchs(hook) else None):
            yield

    @contextmanager
    def watched(self) -> Iterator[list[Hooked | None]]:
        """Find out which tensors' hooks change gradients; None stands for those of a module."""
        changing: list[Hooked | None] = []

        def watch(hooked: Hooked, hook: Hook) -> Hook:
            def call(grad: Tensor) -> Tensor | None:
                version = grad._version
                result = hook(grad)
                if (result is not None and result is not grad) or grad._version != version:
                    changing.append(hooked)
                return result

            return call

        def compare(after: tuple[Tensor | None, ...], before: tuple[Tensor | None, ...]) -> None:
            with _disable_current_modes():  # a look of ours is no part of the pass
                for a, b in zip(after, before, strict=True):
                    if a is not b and (a is None or b is None or not torch.equal(a, b)):
                        changing.append(None)

        nodes = [node for one in self.modules if (node := one()) is not None]
        handles = [node.register_hook(compare) for node in nodes]
        try:
            with self._exchanged(watch):
                yield changing
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def _exchanged(self, other: Callable[[Hooked, Hook], Hook | None]) -> Iterator[None]:
        kept = []
        for hooked in self.hooked:
            hooks = hooked.hooks()
            if hooks is not None:
                kept.append((hooks, dict(hooks)))
                for key, hook in kept[-1][1].items():
                    exchanged = other(hooked, hook)
                    if exchanged is None:
                        del hooks[key]
                    else:
                        hooks[key] = exchanged
        try:
            yield
        finally:  # also what took itself out: the pass that it is meant for is still to come
            for hooks, before in kept:
                hooks.clear()
                hooks.update(before)

    @contextmanager
    def unseen(self) -> Iterator[None]:
        """Give tensors that keep their gradient back what they had before."""
        tensors = [tensor for one in self.retaining if (tensor := one()) is not None]
        kept = [(tensor, tensor.grad) for tensor in tensors]
        try:
            yield
        finally:
            for tensor, grad in kept:
                tensor.grad = grad


def is_torchs(hook: Any) -> bool:
    """Whether a hook is one by which torch's own code learns that a gradient has come by."""
    module = getattr(hook, "__module__", None)
    return isinstance(module, str) and module.startswith("torch.")


@contextmanager
def random_kept(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Leave the global generators as they were: the CPU's and those of the tensors' devices."""
    kept = {t.device for t in tensors}
    devices = sorted(device.index for device in kept if device.type == "cuda")
    with torch.random.fork_rng(devices=devices, enabled=bool(kept)):
        yield
