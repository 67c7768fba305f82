"""Hooks in the graph of a forward pass: which there are, and which of them change gradients.

They are put on tensors, on nodes of the graph (`tensor.grad_fn`) or on modules. A backward pass of
the engine's calls them as torch's own does. So they can be watched in one, and left out of those
that carry no gradient.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from curvopt.axes.trace import Ref

Hook = Callable[..., Any]
Grads = tuple[Tensor | None, ...]

#: The nodes by which modules have their hooks called.
_MODULES = "BackwardHookFunctionBackward"


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


@dataclass(eq=False)
class HookedNode:
    """A node of the graph with hooks of its own.

    Attributes:
        hooks: by number; weakly, as those of a tensor.
        before: they are given what comes to the node; else also what goes on from it.
        module: they are a module's.
        changed: which of what goes on from the node they were seen to change.
    """

    hooks: weakref.ref[OrderedDict[int, Hook]]
    before: bool
    module: bool
    changed: set[int] = field(default_factory=set)


#: What was seen to change gradients.
Changing = Hooked | HookedNode


class Hooks:
    """The tensors of a forward pass that have hooks, and those that keep their gradients.

    Attributes:
        hooked: the tensors with hooks, those on leaves left out.
        nodes: the nodes with hooks, modules' and others, once they were looked for.
        retaining: tensors that keep their gradient.

    All are held weakly: a hook may hold the graph that it is in.
    """

    def __init__(self) -> None:
        self.hooked: list[Hooked] = []
        self.nodes: list[HookedNode] = []
        self.retaining: list[weakref.ref[Tensor]] = []

    def __bool__(self) -> bool:
        return bool(self.hooked or self.nodes)

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

    def look(self, tensor: Tensor) -> list[tuple[Any, HookedNode]]:
        """Look for nodes with hooks in the graph of a tensor; those on leaves are left out."""
        found = []
        known = {id(hooks): node for node in self.nodes if (hooks := node.hooks()) is not None}
        seen, stack = set(), [tensor.grad_fn]
        while stack:
            node = stack.pop()
            if node is None or node in seen or hasattr(node, "variable"):
                continue
            seen.add(node)
            stack += [following for following, _ in node.next_functions]
            for before, register in ((True, node.register_prehook), (False, node.register_hook)):
                handle = register(_nothing)
                hooks = handle.hooks_dict_ref()
                handle.remove()
                module = type(node).__name__ == _MODULES
                if hooks and (module or not all(map(_is_known, hooks.values()))):
                    made = HookedNode(weakref.ref(hooks), before, module)
                    found.append((node, known.setdefault(id(hooks), made)))
        self.nodes = list(known.values())
        return found

    @contextmanager
    def absent(self) -> Iterator[None]:
        """Without the hooks, but for torch's own on tensors and on nodes that are no module's."""

        def stays(hooked: Changing, hook: Hook) -> Hook | None:
            module = isinstance(hooked, HookedNode) and hooked.module
            return hook if not module and _is_known(hook) else None

        with self._exchanged(stays):
            yield

    @contextmanager
    def watched(self) -> Iterator[list[Changing]]:
        """Find out which hooks change gradients."""
        changing: list[Changing] = []

        def watch(hooked: Changing, hook: Hook) -> Hook:
            def call(*grads: Any) -> Any:
                given = _listed(grads[0])
                versions = [_version(g) for g in given]
                after = hook(*grads)
                made = given if after is None else _listed(after)
                changed = {
                    k
                    for k, (a, b, version) in enumerate(zip(made, given, versions, strict=False))
                    if _version(b) != version or (a is not b and not self._same(hooked, a, b))
                }
                if changed:
                    changing.append(hooked)
                    if isinstance(hooked, HookedNode):
                        hooked.changed |= changed
                return after

            return call

        with self._exchanged(watch):
            yield changing

    @staticmethod
    def _same(hooked: Changing, a: Tensor | None, b: Tensor | None) -> bool:
        """Whether what a module hands on is what it was given: it may make new tensors of it."""
        if a is None or b is None or isinstance(hooked, Hooked) or not hooked.module:
            return False
        with _disable_current_modes():  # a look of ours is no part of the pass
            return torch.equal(a, b)

    @contextmanager
    def _exchanged(self, other: Callable[[Changing, Hook], Hook | None]) -> Iterator[None]:
        kept = []
        every: list[Changing] = [*self.hooked, *self.nodes]
        for hooked in every:
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


def _is_known(hook: Any) -> bool:
    """Whether a hook is one by which torch, or this package, learns that a gradient has come by."""
    module = getattr(hook, "__module__", None)
    return isinstance(module, str) and module.startswith(("torch.", "curvopt."))


def _nothing(*_: Any) -> None:
    """A hook that tells where its like are kept."""


def _listed(grads: Any) -> Grads:
    return grads if isinstance(grads, tuple) else (grads,)


def _version(grad: Tensor | None) -> int:
    return -1 if grad is None else grad._version


@contextmanager
def random_kept(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Leave the global generators as they were: the CPU's and those of the tensors' devices."""
    kept = {t.device for t in tensors}
    devices = sorted(device.index for device in kept if device.type == "cuda")
    with torch.random.fork_rng(devices=devices, enabled=bool(kept)):
        yield
