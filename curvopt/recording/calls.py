"""Calls: what a recorded forward pass leaves of them, and which values hold no samples."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from curvopt.axes.trace import Trace
from curvopt.ops.registry import Rule
from curvopt.recording.uses import Call, Mark, Record, Shared, output_edge, tensors_in


class Calls:
    """Notes calls and shared values of a forward pass.

    Attributes:
        record: what was recorded.
        trace: the ops of the pass.
        by_id: the tracked parameters.
        shared: values that hold no samples, by id.
    """

    record: Record
    trace: Trace
    by_id: dict[int, Tensor]
    shared: dict[int, Shared]

    def _share(
        self,
        output: Any,
        roots: frozenset[int],
        isometry: bool,
        call: Call | None = None,
        made: bool = False,
    ) -> None:
        if isinstance(output, Tensor):
            mark = (len(self.trace.ops), self.trace.ref(output)) if call is not None else None
            entry = Shared(output, output._version, roots, isometry, call, mark, made)
            self.shared[id(output)] = entry
            if call is not None and call.value is None:
                call.value = entry
        elif isinstance(output, (tuple, list)):
            for item in output:
                self._share(item, roots, isometry, call, made)

    def _inputs(self, named: dict[Any, Any]) -> dict[Any, Shared]:
        """Values that may be made of parameters, by argument name."""
        found: dict[Any, Shared] = {}
        for name, value in named.items():
            if isinstance(value, Tensor):
                entry = self._entry(value)
                if entry is not None:
                    found[name] = entry
            elif type(value) in (list, tuple):
                for index, item in enumerate(tensors_in(value)):
                    entry = self._entry(item)
                    if entry is not None:
                        found[name, index] = entry
        return found

    def _entry(self, value: Any) -> Shared | None:
        entry = self.shared.get(id(value))
        if entry is None or not entry.roots:
            return None
        return entry if id(value) in self.by_id or entry.fresh else None

    def is_tracked(self, value: Any) -> bool:
        """Whether a value may be a tracked parameter or made of some."""
        return isinstance(value, Tensor) and self._entry(value) is not None

    def _is_shared(self, tensor: Tensor) -> bool:
        return id(tensor) in self.shared

    def _append(
        self,
        op: str,
        rule: Rule | None,
        arguments: dict[Any, Any],
        inputs: dict[Any, Shared],
        output: Any,
        sources: list[Any],
        given: Any,
    ) -> Call:
        outputs = [t for t in tensors_in((output,)) if t.requires_grad]
        if rule is not None:
            arguments = dict(arguments)
            unread = [name for name in rule.unread(arguments) if name not in inputs]
            arguments.update(dict.fromkeys(unread))
        mark: Mark | None = None
        edge, shape, kept = None, torch.Size(), []
        first = next(tensors_in((output,)), None)
        if first is not None:
            mark = len(self.trace.ops), self.trace.ref(first)
        if isinstance(output, Tensor):
            shape = output.shape
            if output.requires_grad:
                edge = output_edge(output, list(tensors_in(given)))
            kept = [
                (value, value._version)
                for name, value in arguments.items()
                if isinstance(value, Tensor) and name not in inputs
            ]
        ends = [node for node in sources if node is not None]
        nodes = [edge.node] if edge is not None else []
        nodes += [node for t in outputs if (node := t.grad_fn) is not None and node not in ends]
        call = Call(op, rule, arguments, inputs, edge, shape, mark, kept, ends, nodes)
        self.record.calls.append(call)
        return call
