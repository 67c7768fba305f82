"""Recording that begins in a module's forward pass and waits for a backward pass to come.

Nobody says when it is over: the loss may go backward, or be dropped. So what was recorded belongs
to the graph. Each call and each loss is held by the nodes of its own outputs (in their metadata)
and holds nothing but what lies behind them, so that no cycle keeps it alive. The tape knows them
weakly. When the graph is dropped all of it goes, and when nothing is left recording ends.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.utils._pytree import tree_leaves

from curvopt.errors import CurvoptError
from curvopt.losses import Loss
from curvopt.recording.stacks import UNCOMPILED, push_below, take_out, take_out_ops
from curvopt.recording.tape import Tape
from curvopt.recording.uses import ACCUMULATE, Call, Record

EARLIER = (
    "part of the loss was computed before recording began, which is when a module with parameters "
    "of the optimizer is called: what happened to the samples there is not known. Call "
    "step(closure), or run the forward pass and backward() inside `with opt.record():`"
)
ELSEWHERE = (
    "a forward pass ran in another thread than the one before, and the two cannot be recorded as "
    "one: call step(closure), or run everything from the forward pass to backward() in one thread"
)
TWICE = (
    "a second backward pass over one recorded forward pass: add the losses and call backward once"
)


# Recordings that are over and whose modes could not be left so far.
_LEFT: weakref.WeakSet[WaitingTape] = weakref.WeakSet()


def settle() -> bool:
    """Leave the modes of recordings that are over; whether none is left."""
    UNCOMPILED.settle()
    for tape in list(_LEFT):
        tape.settle()
    return not _LEFT


class Kept:
    """A call or a loss without its own nodes, which hold it.

    Args:
        index: its number among all that was recorded.
        entry: the call, the loss, or the input of a log_softmax.

    Attributes:
        edge: which of its nodes is that of the edge, and the number of the edge's output.
        late: its nodes are still its own: it is held by what comes after it.
    """

    __slots__ = ("__weakref__", "edge", "entry", "index", "late", "value")

    def __init__(self, index: int, entry: Any):
        self.index, self.entry, self.late = index, entry, False
        self.edge: tuple[int, int] | None = None
        self.value: Any = None


class Softmaxes(dict[int, Any]):
    """Outputs of log_softmax by id, each with its input and version; weak once they are parked."""

    def get(self, key: int, default: Any = None) -> Any:
        """The output, its input, its version."""
        found = super().get(key, default)
        if found is None or isinstance(found[0], Tensor):
            return found
        output, kept = found[0](), found[1]()
        return default if output is None or kept is None else (output, kept.entry, found[2])


class WaitingTape(Tape):
    """A tape that nobody leaves.

    Args:
        params: as for `Tape`.
        batch_size: as for `Tape`.
        on_backward: as for `Tape`.

    Attributes:
        busy: it records.
        elsewhere: a module with tracked parameters ran in another thread meanwhile.
    """

    def __init__(self, params: Any, *, batch_size: int | None, on_backward: Callable[..., Any]):
        super().__init__(params, batch_size=batch_size, on_backward=on_backward)
        self.key = ("curvopt", id(self))
        self.thread, self.start = threading.get_ident(), torch._C._autograd._get_sequence_nr()
        self.entries: dict[int, weakref.ref[Kept]] = {}
        self.numbers: set[int] = set()
        self.count = self.level = self.nested = 0
        self.elsewhere = False
        self.root: nn.Module | None = None
        self.inside: ExitStack | None = None
        self.found: list[Any] = []
        self.log_softmaxes = Softmaxes()
        self.depth = 1  # as if it were entered for good
        self.busy = self.functions_on = self.ops_on = True
        push_below(self, self.trace)
        UNCOMPILED.begin()

    # -- the modules ------------------------------------------------------------------------------

    def enter_module(self, module: nn.Module, args: Any) -> None:
        """A module is about to run; the outermost one, where none runs so far."""
        if self.root is not None:
            self.level += module is self.root
            return
        self.root, self.level, self.inside = module, 1, ExitStack()
        self.inside.enter_context(self.watching_modules())
        self._note_module(module, args)
        self._before_module(module, args)

    def leave_module(self, module: nn.Module, args: Any, output: Any) -> None:
        """A module has run."""
        if module is not self.root:
            return
        self.level -= 1
        if self.level:
            return
        assert self.inside is not None
        inside, self.root, self.inside = self.inside, None, None
        with inside:
            self._after_module(module, args, output)
        try:
            if output is None and sys.exc_info()[0] is not None:  # it failed
                self.record = Record()
            else:
                self.park(output)
        finally:
            self._end_if_idle()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if not self.busy:
            return func(*args, **(kwargs or {}))
        self.nested += 1
        try:
            return super().__torch_function__(func, types, args, kwargs)
        finally:
            self.nested -= 1
            if self.root is None and not self.nested and self.busy:
                self.park()
                self._end_if_idle()

    # -- parking ----------------------------------------------------------------------------------

    def park(self, output: Any = None) -> None:
        """Leave to the graph what was recorded.

        Args:
            output: of the outermost module, where it has just run.
        """
        record = self.record
        softmaxes = [(k, v) for k, v in self.log_softmaxes.items() if isinstance(v[0], Tensor)]
        if not (record.calls or record.losses or softmaxes or output is not None):
            return
        with torch._C.DisableTorchFunction():
            heads = [t.grad_fn for t in tree_leaves(output) if isinstance(t, Tensor)]
            heads = [node for node in heads if node is not None]
            for call in record.calls:
                self._park_call(call, heads)
            for loss in record.losses:
                self._park_loss(loss)
            for key, (value, source, version) in softmaxes:
                kept = self._keep(source, [value.grad_fn])
                self.log_softmaxes[key] = (weakref.ref(value), weakref.ref(kept), version)
        record.calls, record.losses = [], []
        known = {id(t) for t in record.silent} | self.by_id.keys()
        self.shared = {key: entry for key, entry in self.shared.items() if key in known}

    def _keep(self, entry: Any, nodes: Iterable[Any]) -> Kept:
        kept = Kept(self.count, entry)
        self.count += 1
        ref = weakref.ref(self)
        index = kept.index

        def gone(_: Any) -> None:
            tape = ref()
            if tape is not None and tape.entries.pop(index, None) is not None:
                tape._end_if_idle()

        for slot, node in enumerate(nodes):
            here = node.metadata.setdefault(self.key, [])
            if here is not None:
                here.append((kept, slot))
            self.numbers.add(node._sequence_nr())
        self.entries[index] = weakref.ref(kept, gone)
        return kept

    def _park_call(self, call: Call, heads: list[Any]) -> None:
        late = bool(heads) and call.rule is not None and bool(call.rule.nodes(call.arguments))
        nodes = list(dict.fromkeys(call.outputs))
        edge: tuple[int, int] | None = None
        if call.edge is not None:
            if call.edge.node not in nodes:
                nodes.append(call.edge.node)
            edge = nodes.index(call.edge.node), call.edge.output_nr
        if late:  # what its own nodes lead to, it holds itself
            kept = self._keep(call, heads)
            kept.late = True
            return
        kept = self._keep(call, nodes)
        kept.edge, call.edge, call.outputs = edge, None, []
        tracked = {id(entry.tensor) for entry in call.inputs.values()}
        call.arguments = {k: _behind(v, tracked) for k, v in call.arguments.items()}
        call.kept = [(tensor.detach(), version) for tensor, version in call.kept]
        value = call.value
        if value is not None:
            kept.value = weakref.ref(value), replace(value, tensor=value.tensor.detach())
            call.value = None

    def _park_loss(self, loss: Loss) -> None:
        node = loss.end.node
        kept = self._keep(loss, [node])
        kept.edge = 0, loss.end.output_nr
        loss.release()

    # -- backward ---------------------------------------------------------------------------------

    def unpark(self, loss: Tensor) -> bool:
        """Take back what the loss leads to.

        Returns:
            Whether there is any.

        Raises:
            CurvoptError: it leads to what another backward pass has been over, or to what was
                computed before recording began.
        """
        if not isinstance(loss, Tensor) or loss.grad_fn is None:
            return False
        self.park()  # what a module has done so far that goes backward by itself
        node: Any
        nodes: dict[Kept, dict[int, Any]] = {}
        twice = earlier = False
        seen, stack = set(), [(loss.grad_fn, False)]
        with torch._C.DisableTorchFunction():
            while stack:
                node, old = stack.pop()
                if node in seen:
                    continue
                seen.add(node)
                number = node._sequence_nr()
                if number in self.numbers:
                    here = node.metadata.get(self.key, ())
                    twice = twice or here is None
                    self.found.append(node)
                    for kept, slot in here or ():
                        nodes.setdefault(kept, {})[slot] = node
                if type(node) is ACCUMULATE:
                    earlier = earlier or (old and id(node.variable) in self.by_id)
                    continue
                old = old or number < self.start
                stack += [(n, old) for n, _ in node.next_functions if n is not None]
        if not twice and not any(isinstance(kept.entry, Call) for kept in nodes):
            self.found = []  # losses of other models
            return False
        for kept in sorted(nodes, key=lambda kept: kept.index):
            self._restore(kept, nodes[kept])
        if twice or earlier or self.elsewhere:
            raise CurvoptError(ELSEWHERE if self.elsewhere else TWICE if twice else EARLIER)
        return True

    def _restore(self, kept: Kept, nodes: dict[int, Any]) -> None:
        entry = kept.entry
        edge = None
        if kept.edge is not None and kept.edge[0] in nodes:
            edge = GradientEdge(nodes[kept.edge[0]], kept.edge[1])
        if isinstance(entry, Call):
            if not kept.late:
                entry.edge, entry.outputs = edge, list(nodes.values())
            if kept.value is not None:
                entry.value = kept.value[0]() or kept.value[1]
            self.record.calls.append(entry)
        elif isinstance(entry, Loss) and edge is not None:
            entry.restore(edge)
            self.record.losses.append(entry)

    def forget_found(self) -> None:
        """Let go of what `unpark` gave: a backward pass has been over it."""
        for node in self.found:
            if type(node) is not ACCUMULATE:
                node.metadata[self.key] = None
            else:
                node.metadata.pop(self.key, None)
        self.found, self.went = [], 0
        self.record.calls, self.record.losses = [], []
        self._end_if_idle()

    def consume(self, calls: Iterable[Call]) -> None:
        """Nothing to do: see `forget_found`."""

    # -- the end ----------------------------------------------------------------------------------

    def _end_if_idle(self) -> None:
        if self.root is None and not self.nested and not self.found and not self.entries:
            self.end()

    def end(self) -> None:
        """Stop recording, and forget everything."""
        if self.busy:
            self.busy = False
            if self.inside is not None:
                self.inside.close()
            for ref in list(self.entries.values()):
                kept = ref()
                if kept is not None:
                    kept.entry = kept.value = None
            self.root, self.inside, self.found = None, None, []
            self.entries, self.numbers = {}, set()
            self.record = Record()
            self.shared, self.log_softmaxes = {}, Softmaxes()
            _LEFT.add(self)
            UNCOMPILED.end()
        self.settle()

    def settle(self) -> bool:
        """Leave the modes, where that is possible: not in another thread, nor where one works."""
        if self.busy or threading.get_ident() != self.thread:
            return not (self.ops_on or self.functions_on)
        if self.ops_on:
            self.ops_on = not take_out_ops(self.trace)
        if self.functions_on:
            self.functions_on = not take_out(self)
        if not self.ops_on:
            self.trace.ops.clear()
            self.trace.values.clear()
        if self.ops_on or self.functions_on:
            return False
        _LEFT.discard(self)
        return True


def _behind(value: Any, tracked: set[int]) -> Any:
    """An argument without its graph, which an op in place has made the call's own."""
    if isinstance(value, Tensor):
        return value if id(value) in tracked else value.detach()
    if type(value) in (list, tuple):
        return type(value)(_behind(item, tracked) for item in value)
    return value
