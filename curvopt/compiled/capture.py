"""Dynamo in front: it captures the user's function, and guards what it depends on."""

from __future__ import annotations

import itertools
import logging
import sys
import types
import warnings
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, cast

import torch

from curvopt.compiled.tracing import Unsuited

#: Makes a fast function of a graph of ops and its inputs.
Compiler = Callable[[Any, list[Any]], Callable[..., Any]]
# Of functions that were captured.
_NUMBERS = itertools.count()


def inductor(graph: Any, inputs: list[Any]) -> Callable[..., Any]:
    """Compile a graph of ops with Inductor."""
    from torch._guards import TracingContext, tracing
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    on_cpu = all(value.device.type == "cpu" for value in inputs)
    # Channels last costs more than it gains on small maps: a whole step is slower than eager.
    patches: dict[str, Any] = {"layout_optimization": False} if on_cpu else {}
    # Without an environment of shapes nothing would be found in the disk's cache.
    mode = FakeTensorMode(shape_env=ShapeEnv(), static_shapes=True)
    with config.patch(patches), tracing(TracingContext(mode)), warnings.catch_warnings():
        # What torch says of itself.
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
        compiled: Any = compile_fx(graph, inputs)
    made: Callable[..., Any] = compiled
    return made


class Capture:
    """The user's function of batches of some shapes, captured anew where a guard fails.

    Args:
        function: the user's, of a batch.
        made: makes what runs in the place of a captured graph.

    Attributes:
        graphs: what was made.
    """

    def __init__(self, function: Callable[..., Any], made: Callable[[Any], Callable[..., Any]]):
        self.made, self.graphs = made, list[Callable[..., Any]]()
        ref = weakref.ref(self)

        def backend(captured: Any, inputs: Any) -> Callable[..., Any]:
            return _held_by(cast(Capture, ref()), captured)

        self._front = torch.compile(_own(function), backend=backend, fullgraph=True, dynamic=False)
        self._patient = False

    def __call__(self, *batch: Any) -> Any:
        """Run it.

        Raises:
            Unsuited: it cannot be captured as one graph.
        """
        exceptions: Any = sys.modules["torch._dynamo"].exc
        try:
            with torch.enable_grad(), _settings(patient=self._patient):
                return self._front(*batch)
        except exceptions.TorchDynamoException as error:
            if not self._patient:  # once more, with what Dynamo leaves out by default
                self._patient = True
                return self(*batch)
            raise Unsuited(_said(error)) from error
        except exceptions.FailOnRecompileLimitHit as error:
            raise Unsuited(f"the function was captured in {len(self.graphs)} ways") from error


def _held_by(capture: Capture, captured: Any) -> Callable[..., Any]:
    """What runs in the place of a graph, for as long as its capture is there.

    Dynamo keeps backends, and what they gave, for good: optimizers and models would stay with them.
    """
    capture.graphs.append(capture.made(captured))
    ref = weakref.ref(capture.graphs[-1])

    def run(*given: Any) -> Any:
        return cast(Callable[..., Any], ref())(*given)

    return run


def _settings(*, patient: bool) -> AbstractContextManager[Any]:
    """Have Dynamo notice hooks that come later.

    Args:
        patient: also capture recurrent layers, and leave out messages for a log.
    """
    config: Any = sys.modules["torch._dynamo"].config
    options: dict[str, Any] = {"skip_nnmodule_hook_guards": False}
    if patient:
        kinds = (logging.Logger.debug, logging.Logger.info, logging.Logger.warning)
        ignored: set[Any] = {*kinds, logging.Logger.error, logging.Logger.log}
        of_transformers = sys.modules.get("transformers.utils.logging")
        if of_transformers is not None:
            ignored |= {of_transformers.warning_once, of_transformers.info_once}
        ignored |= config.ignore_logging_functions
        options |= {"allow_rnn": True, "ignore_logging_functions": ignored}
    patch: AbstractContextManager[Any] = config.patch(**options)
    return patch


def _said(error: Exception) -> str:
    """Why Dynamo gave up: what it says first, and the user's line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    where = next((line for line in lines if line.startswith('File "')), "")
    first = lines[0] if lines else type(error).__name__
    more = next((line for line in lines if line.startswith("Explanation:")), "")
    return ". ".join(part for part in (first, more, where) if part)


def source_of(node: Any) -> str:
    """Where Dynamo has an argument from, as Python would write it."""
    argument = node.meta.get("grapharg")
    source = getattr(argument, "source", None)
    name = getattr(source, "name", "")
    return str(name() if callable(name) else name)


def _own(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function behind a code object of its own: Dynamo keeps what it captured with the code."""

    def step(*batch: Any) -> Any:
        return function(*batch)

    code = step.__code__.replace(co_name=f"step_{next(_NUMBERS)}")
    made = types.FunctionType(code, step.__globals__, None, None, step.__closure__)
    return made
