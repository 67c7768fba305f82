"""`curvopt.compile`: which steps are compiled, and which are taken as ever."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Hashable, Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from itertools import chain
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.modules.module import _has_any_global_hook
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._pytree import tree_map

from curvopt.compiled.capture import Capture, Compiler, inductor
from curvopt.compiled.graph import Graph
from curvopt.compiled.newton import NewtonUpdate
from curvopt.compiled.polar import PolarUpdate
from curvopt.compiled.private import PrivateAdam, PrivateSGD
from curvopt.compiled.tracing import CHANGES, Failed, Unsuited
from curvopt.compiled.updates import Update
from curvopt.compiled.variance import VarianceUpdate
from curvopt.optim.automatic import without_hooks
from curvopt.optim.base import EngineOptimizer
from curvopt.optim.diag_ggn import DiagGGNOptimizer
from curvopt.optim.dp_adam import DPAdam
from curvopt.optim.dp_sgd import DPSGD
from curvopt.optim.polar import PolarOptimizer
from curvopt.optim.variance_adaptive import VarianceAdaptiveSGD
from curvopt.recording.parked import settle

UPDATES: dict[type, type[Update]] = {
    VarianceAdaptiveSGD: VarianceUpdate,
    DiagGGNOptimizer: NewtonUpdate,
    PolarOptimizer: PolarUpdate,
    DPSGD: PrivateSGD,
    DPAdam: PrivateAdam,
}
# Steps of each kind that are taken both ways in turn, to see which is the faster one.
TRIALS = 4
# A compiled step may take so many eager ones.
SLOWER = 1.05
FAILS = (
    "compiled steps fail their checks one after the other, where eager ones do not: the norm of a "
    "sample is in doubt or not finite, or rows are not the gradient's"
)
OFTEN = (
    "the function was captured {} times for batches of one shape, as something that it depends on "
    "changes (a counter of a module, a weight that is annealed, a list that grows): give numbers "
    "that change from step to step as tensors, among its arguments"
)


class Trial(NamedTuple):
    """How long steps of one kind took, in seconds."""

    compiled: list[float]
    eager: list[float]


class CompiledStep:
    """A step of an optimizer, compiled to one graph where that can be; see `compile`.

    Attributes:
        opt: the optimizer.
        function: of a batch.
        taken: how many steps were ``"compiled"`` and ``"eager"``.
        reason: why steps are taken eagerly; empty if they are not.
    """

    def __init__(
        self,
        opt: EngineOptimizer,
        function: Callable[..., Any],
        *,
        max_graphs: int = 4,
        compare: bool = True,
        compiler: Compiler = inductor,
    ):
        self.opt, self.function, self.max_graphs = opt, function, max_graphs
        device = next(iter(opt._parameters())).device
        self.compare = compare and device.type == "cpu"  # elsewhere the host's clock tells nothing
        self.taken = {"compiled": 0, "eager": 0}
        self.reason = ""
        self._shapes: dict[Hashable, bool] = {}  # whether they are compiled
        self._trials: dict[Hashable, Trial] = {}
        self._slower: set[Hashable] = set()
        self._settled: set[Hashable] = set()
        self._key: Hashable = None
        self._graph: Graph | None = None
        self._mode: Hashable = None
        self._taken = False
        kind = UPDATES.get(type(opt))
        self._update = kind(opt, function) if kind is not None else None
        self._compiler = compiler
        self._captures: dict[Hashable, Capture] = {}
        self._another: Graph | None = None
        self._others = 0
        self._failures: dict[Hashable, int] = {}
        if self._update is None:
            self._say(f"{type(opt).__name__} has no step for a graph")

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "a compiled step is of its model and optimizer, and cannot be copied: copy these, and "
            "call curvopt.compile again"
        )

    def _capture(self, key: Hashable) -> Capture:
        """What captures the function of batches of these shapes."""
        if key not in self._captures:
            self._captures[key] = Capture(self.function, partial(self._make, key))
        return self._captures[key]

    def _make(self, key: Hashable, captured: Any) -> Graph:
        made = Graph(captured, cast(Update, self._update), self._compiler, self._note)
        if self._captures[key].graphs:
            self._another = made
        return made

    def _note(self, graph: Graph, mode: Hashable) -> None:
        """A graph is about to take a step.

        Raises:
            Unsuited: it stands beside others of the same shapes, and is used for the first time.
        """
        self._graph, self._mode, self._taken = graph, mode, True
        if graph is not self._another:
            self._others = 0
            return
        self._another = None
        self._others += 1
        graphs = len(self._captures[self._key].graphs)
        often = self._others > CHANGES or graphs > self.max_graphs
        raise Unsuited(OFTEN.format(graphs) if often else "")

    # -- a step -----------------------------------------------------------------------------------

    def __call__(self, *batch: Any) -> Any:
        """Take a step.

        Args:
            *batch: what the function is called with.

        Returns:
            What the function returned, without its graph.

        Raises:
            CurvoptError: as `step` of the optimizer; nothing was changed.
        """
        given = batch
        if self._update is not None:
            given = self._update.padded(batch)
        key = tuple(map(_kind, given))
        if not self._is_compiled(key):
            return self._eagerly(batch)
        times = self._eager_times(key) if self._trials or self._slower else None
        if times is not None:
            return self._timed(times, batch)
        self._key = key
        try:
            result, took = self._compiled(key, given)
        except Unsuited as unsuited:
            self._shapes[key] = not unsuited.lasting
            if not unsuited.asked:
                self._say(str(unsuited))
            result = self._eagerly(batch)
            self._say(str(unsuited))  # unless the eager step has refused it as well
            if isinstance(unsuited, Failed):
                self._fails(key)
            return result
        self._failures.pop(key, None)
        if self.compare:
            self._compare((key, self._mode), took)
        return result

    def _fails(self, key: Hashable) -> None:
        """Give up shapes whose compiled steps fail one after the other, where eager ones do not."""
        self._failures[key] = self._failures.get(key, 0) + 1
        if self._failures[key] > CHANGES:
            self._shapes[key] = False
            self._say(FAILS)

    def _is_compiled(self, key: Hashable) -> bool:
        """Whether batches of these shapes are compiled: not when they come for the first time."""
        if self._update is None:
            return False
        if key not in self._shapes:
            self._shapes[key] = sum(self._shapes.values()) < self.max_graphs
            if not self._shapes[key]:
                self._say(f"batches come in more than {self.max_graphs} shapes (max_graphs)")
            return False
        if not self._shapes[key]:
            return False
        why = self._update.obstacle() or _obstacle(self.opt)
        self._say(why)
        return not why and not self.opt.collected

    def _eagerly(self, batch: tuple[Any, ...]) -> Any:
        self.taken["eager"] += 1
        return tree_map(_detached, self.opt.step(lambda: self.function(*batch)))

    def _compiled(self, key: Hashable, batch: tuple[Any, ...]) -> tuple[Any, float]:
        opt: Any = self.opt
        if opt._watch is not None:  # the function is captured without hooks on its modules
            opt._watch.rest()
            opt._watch.aside = True
        settle()
        modes = [m for m in _get_current_function_mode_stack() if not isinstance(m, DeviceContext)]
        if modes or torch._C._len_torch_dispatch_stack():
            raise Unsuited(
                "a mode of torch's is active, or another optimizer records a pass", asked=True
            )
        begun, self._taken = time.perf_counter(), False
        with without_hooks():  # of other optimizers
            if _has_any_global_hook():
                raise Unsuited("hooks run in all modules", asked=True)
            result = self._capture(key)(*batch)
        if not self._taken:
            raise Unsuited("Dynamo is disabled, or ran the function as it was written", asked=True)
        took = time.perf_counter() - begun
        opt.steps += 1
        opt._opt_called = True  # schedulers ask
        opt._note(recorded=False)
        self.taken["compiled"] += 1
        for hook in chain(
            _global_optimizer_post_hooks.values(), opt._optimizer_step_post_hooks.values()
        ):
            hook(opt, (), {})
        return result, took

    # -- which way is faster ----------------------------------------------------------------------

    def _eager_times(self, key: Hashable) -> list[float] | None:
        """The times of eager steps like the coming one, if it is to be taken eagerly."""
        params = [] if self._graph is None else self._graph.moving
        try:
            place = key, self._update.mode(params) if self._update else None
        except Unsuited:
            return None
        if place in self._slower:
            return []
        trial = self._trials.get(place)
        return trial.eager if trial and len(trial.eager) < len(trial.compiled) else None

    def _timed(self, times: list[float], batch: tuple[Any, ...]) -> Any:
        begun = time.perf_counter()
        result = self._eagerly(batch)
        times.append(time.perf_counter() - begun)
        return result

    def _compare(self, place: Hashable, took: float) -> None:
        """Note how long a compiled step took; after some by turns, settle which way is faster."""
        if place in self._settled:
            return
        trial = self._trials.setdefault(place, Trial([], []))
        trial.compiled.append(took)
        if len(trial.compiled) <= TRIALS:
            return
        del self._trials[place]
        self._settled.add(place)
        # The first one of each was made ready, too.
        if min(trial.compiled[1:]) > SLOWER * min(trial.eager):
            self._slower.add(place)
            self._say("they would be slower (compare=False compiles them nevertheless)")

    def _say(self, reason: str) -> None:
        """Warn, once, that steps are taken eagerly."""
        if reason and not self.reason:
            self.reason = reason
            warnings.warn(f"steps are taken eagerly: {reason}", UserWarning, stacklevel=4)


def compile(
    opt: EngineOptimizer,
    function: Callable[..., Any],
    *,
    max_graphs: int = 4,
    compare: bool = True,
) -> CompiledStep:
    """One graph per step: forward pass, loss, backward pass, what is measured, and the update.

    A step on a small net is mostly Python and small ops. Compiled it costs about what a compiled
    step of SGD costs, with the same numbers as `step`, to rounding.

    Dynamo captures the function and guards what it depends on; the engine proves every captured
    graph with the values of a batch, then traces the whole step with tensor-only updates, and
    Inductor compiles that. Batches of new shapes take their first step eagerly and are compiled at
    their second, and so does whatever else a graph depends on: modes, numbers in Python. A step
    that cannot be compiled is taken eagerly, with one warning that says why; so is one in which
    something unusual comes up, such as a loss that is not finite: whatever a step says, it says
    here too.

    When not to use it: for a few hundred steps, as compiling a graph takes some ten seconds, a
    minute for a transformer (less when its code is in the disk's cache), and an optimizer that
    measures every so many steps has two graphs; where shapes change from batch to batch.

    Args:
        opt: the optimizer: `VarianceAdaptiveSGD`, `DiagGGNOptimizer`, `PolarOptimizer`, `DPSGD` or
            `DPAdam`; others step eagerly.
        function: of a batch, returns the loss, or ``(loss, output)``. It must be capturable as one
            graph (``torch.compile(..., fullgraph=True)``), and goes neither backward nor steps.
        max_graphs: how many shapes of batches are compiled, and how often the function is captured
            for one of them; others step eagerly.
        compare: take the first steps of each kind by turns compiled and eagerly, and go on eagerly
            where compiled ones take more than 1.05 times as long. On a CPU alone.

    Returns:
        ``step``: ``loss = step(*batch)`` takes one step. The loss has no graph. Its ``taken``
        tells how many steps were compiled, its ``reason`` why others were not.

    Raises:
        TypeError: ``opt`` is no optimizer of the package.
        ValueError: ``max_graphs`` is below one.

    Note:
        Schedulers, `state_dict`, `zero_grad` and `stats` work as ever, and a checkpoint goes on
        either way. Afterwards ``p.grad`` holds the gradient. Buffers that the model changes are
        written by the graph. Learning rates are inputs; a changed setting makes a new graph when it
        comes twice in a row (with ``OneCycleLR`` use ``cycle_momentum=False``).
        Parameters must stay the same tensors. Batches of a Poisson sampler are filled up to few
        sizes, with samples that do not count. Dropout draws from torch's global generator, random
        signs and private noise from the optimizer's own.

    Example:
        >>> model = torch.nn.Linear(4, 3)
        >>> opt = curvopt.VarianceAdaptiveSGD(model.parameters())
        >>> step = curvopt.compile(
        ...     opt, lambda x, y: torch.nn.functional.cross_entropy(model(x), y)
        ... )
        >>> x, y = torch.randn(8, 4), torch.randint(3, (8,))
        >>> loss = step(x, y)
    """
    if not isinstance(opt, EngineOptimizer):
        raise TypeError(f"curvopt.compile: {type(opt).__name__} is no optimizer of curvopt")
    if max_graphs < 1:
        raise ValueError(f"Invalid max_graphs: {max_graphs} (at least 1)")
    return CompiledStep(opt, function, max_graphs=max_graphs, compare=compare)


def _kind(value: Any) -> Hashable:
    """What a graph is made for: shapes and types of tensors."""
    if isinstance(value, Tensor):
        return value.shape, value.dtype, value.device, value.requires_grad
    if isinstance(value, list | tuple):
        return (type(value), *map(_kind, value))
    if isinstance(value, Mapping):
        return (type(value), *((key, _kind(item)) for key, item in value.items()))
    if is_dataclass(value):
        return (type(value), *(_kind(getattr(value, field.name)) for field in fields(value)))
    return type(value).__name__


def _obstacle(opt: Any) -> str:
    """What a graph would leave out."""
    if opt._ranks.many:
        return "several processes take the step together"
    if opt._optimizer_step_pre_hooks or _global_optimizer_pre_hooks:
        return "hooks run before each step of the optimizer"
    for p in opt._parameters():
        if p._backward_hooks or p._post_accumulate_grad_hooks:
            return "a parameter has a gradient hook"
    return ""


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value
