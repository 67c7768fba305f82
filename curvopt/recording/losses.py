"""Losses: what a recorded forward pass leaves of them, and of means and sums that may be some."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from curvopt.axes.trace import Trace
from curvopt.losses import LOSSES
from curvopt.losses.handwritten import Reduction
from curvopt.recording import functions as known
from curvopt.recording.uses import Record

Function = Callable[..., Any]
Positional = tuple[Any, ...]
Keywords = dict[str, Any]


class Losses:
    """Notes the losses of a forward pass, in its record.

    Attributes:
        record: what was recorded.
        trace: the ops of the pass.
        log_softmaxes: outputs of log_softmax by id, each with its logits and its version.
    """

    record: Record
    trace: Trace
    log_softmaxes: dict[int, Any]

    def _loss(self, func: Function, args: Positional, kwargs: Keywords) -> Any:
        arguments = self._arguments(func, args, kwargs)
        if any(_wants_grad(v) for name, v in arguments.items() if name != "input"):
            return self._composed(func, args, kwargs)
        begin = len(self.trace.ops)
        value = func(*args, **kwargs)
        self._note_loss(func, arguments, value, begin)
        return value

    @staticmethod
    def _arguments(func: Function, args: Positional, kwargs: Keywords) -> Keywords:
        """A loss's arguments by name; its input is what needs a gradient, if one of two does."""
        arguments = dict(zip(LOSSES[func].names, args, strict=False)) | kwargs
        first, second = arguments["input"], arguments.get("target")
        if func in known.SYMMETRIC and _wants_grad(second) and not _wants_grad(first):
            arguments |= {"input": second, "target": first}
        return arguments

    def _note_loss(self, func: Function, arguments: Keywords, value: Any, begin: int) -> None:
        rule, arguments = LOSSES[func], dict(arguments)
        output = arguments.pop("input")
        if not (_wants_grad(value) and _wants_grad(output)):
            return
        if rule.wants_logits:
            pair = self.log_softmaxes.get(id(output))
            fits = pair is not None and pair[0] is output and pair[2] == output._version
            arguments["logits"] = pair[1] if pair is not None and fits else None
        if output.ndim > 1 or not rule.of_rows:  # else a single sample without a batch axis
            self._add_loss(rule.function(output, value, **arguments), begin)

    def _composed(self, func: Function, args: Positional, kwargs: Keywords) -> Any:
        """A loss of several outputs of the model: its rows, and the mean or sum of them."""
        given = known.signature(func).bind(*args, **kwargs).arguments
        old = given.get("size_average") is not None or given.get("reduce") is not None
        kind = given.get("reduction", "mean")
        if func in known.COMPOSED and not old and kind in ("mean", "sum"):
            rows: Tensor = func(**given | {"reduction": "none"})
            value = rows.mean() if kind == "mean" else rows.sum()
            if value.requires_grad and rows.ndim:
                self._add_loss(Reduction(rows, value, kind, known.op_name(func)))
            return value
        value = func(*args, **kwargs)
        if _wants_grad(value) and not value.ndim:
            place = len(self.trace.ops), self.trace.ref(value)
            self.record.unknown.append((known.op_name(func), place))
        return value

    def _add_loss(self, loss: Any, begin: int | None = None) -> None:
        loss.mark = len(self.trace.ops), self.trace.ref(loss.output)
        loss.value_at, loss.value_ref = loss.mark[0], self.trace.ref(loss.value)
        loss.begin = loss.value_at if begin is None else begin
        self.record.losses.append(loss)

    def _note_ending(
        self, func: Function, args: Positional, kwargs: Keywords, output: Any, begin: int
    ) -> None:
        """Note a loss, or a mean or sum, of values that may turn out to hold samples."""
        if func in LOSSES:
            arguments = self._arguments(func, args, kwargs)
            if not any(_wants_grad(v) for name, v in arguments.items() if name != "input"):
                self._note_loss(func, arguments, output, begin)
        elif known.SPECIAL.get(func) == "_reduction":
            self._note_reduction(func, args, kwargs, output)

    def _log_softmax(self, func: Function, args: Positional, kwargs: Keywords) -> Any:
        output = func(*args, **kwargs)
        if output.requires_grad:
            source = args[0] if args else kwargs["input"]
            dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
            if dim is not None and dim % output.ndim == min(1, output.ndim - 1):
                self.log_softmaxes[id(output)] = (output, source, output._version)
        return output

    def _reduction(self, func: Function, args: Positional, kwargs: Keywords) -> Any:
        output = func(*args, **kwargs)
        self._note_reduction(func, args, kwargs, output)
        return output

    def _note_reduction(
        self, func: Function, args: Positional, kwargs: Keywords, output: Any
    ) -> None:
        source = args[0] if args else kwargs["input"]
        if _wants_grad(output) and _wants_grad(source) and source.ndim:
            kind = "mean" if "mean" in known.op_name(func) else "sum"
            self._add_loss(Reduction(source, output, kind))


def _wants_grad(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad
