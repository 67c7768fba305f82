"""Backward passes with code of the user's in them: hooks, and custom autograd functions.

The forward pass does not show what they do to cotangents. So the ops of one backward pass are
recorded too, and replayed on owners: a use's cotangent must belong to the samples that its output
belongs to, and what was summed over samples must meet none of them again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from curvopt.axes.lattice import MIXED, State
from curvopt.axes.owners import Meeting, Replay
from curvopt.axes.wiring import Step
from curvopt.engine.paths import REENTRANT, behind_custom
from curvopt.engine.planner import Planner
from curvopt.errors import CurvoptError
from curvopt.losses import Loss
from curvopt.recording.hooks import Changing
from curvopt.recording.tape import Tape
from curvopt.recording.uses import OwnUse, Use

_KEPT = 64
_CHECKED: OrderedDict[Any, None] = OrderedDict()


class _Backward(Replay):
    """Also notes where a sum over samples, made in the backward pass, meets samples again."""

    def __init__(self, start: int, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.start = start
        self.rejoined: list[Meeting] = []

    def _watch(self, step: Step, states: list[State | None], results: list[State | None]) -> None:
        super()._watch(step, states, results)
        if step.index >= self.start:
            owners = [state.owners for state in states if state is not None]
            summed = any(bool((o == MIXED).any()) for o in owners)
            if summed and any(bool(((o >= 0) & (o != MIXED)).any()) for o in owners):
                self.rejoined.append(self._meeting(step, step.outputs[0]))


def check_backward(
    tape: Tape,
    loss: Tensor,
    terms: Sequence[Loss],
    uses: Sequence[Use],
    grads: Sequence[Tensor],
    *,
    samples: int,
) -> list[Changing]:
    """Prove that samples stay apart in the backward pass.

    Args:
        tape: the recording.
        loss: the loss.
        terms: the losses that it is made of.
        uses: the uses.
        grads: gradients at the terms' outputs, before any hook.
        samples: how many there are.

    Returns:
        What is changed by hooks on the way, from the terms' outputs on; None for a module's.

    Raises:
        CurvoptError: they do not, as far as can be seen; or the backward of a custom function goes
            backward itself, to parameters that it was not given.
    """
    trace, start = tape.trace, len(tape.trace.ops)
    planner = Planner(tape, loss)
    begun = [(start, trace.ref(grad)) for grad in grads]
    marks: dict[Use, Any] = {}

    def note(use: Use, grad: Tensor) -> None:
        marks[use] = len(trace.ops), trace.ref(grad)

    outputs = [term.output for term in terms]
    ends = [*map(get_gradient_edge, tape.params), *behind_custom(outputs)]
    with _inner(outputs, tape.params) as inner, tape.record.hooks.watched() as changed, trace:
        _caught(outputs, grads, uses, ends, False, note)
    if inner:
        names = ", ".join(tape.name(p) for p in inner)
        raise CurvoptError(f"{names}: {REENTRANT}")
    if samples == 1:
        return changed
    key = (
        trace.key,
        start,
        tuple(marks.values()),
        tuple(term.mark for term in terms),
        tuple(_mark(use) for use in marks),
        tuple(trace.ref(p).storage for p in tape.names),
        tape.batch_size,
    )
    if key in _CHECKED:
        return changed
    planner.make()
    forward = [_mark(use) for use in marks]
    first = planner.samples.replay(
        [*forward, *(term.mark for term in terms)], planner.claims, until=start
    )
    claims = {
        mark: state.owners
        for mark, term in zip(begun, terms, strict=True)
        if (state := first.marked[term.mark]) is not None
    }
    made = planner.samples.replay(
        [*forward, *marks.values()], {**planner.claims, **claims}, kind=partial(_Backward, start)
    )
    assert isinstance(made, _Backward)
    if made.rejoined:
        raise _mixes(made.rejoined[0])
    for use, mark in marks.items():
        before, after = first.marked[_mark(use)], made.marked[mark]
        if after is None:
            continue
        if bool((after.owners == MIXED).any()):
            raise _mixes(next((m for m in made.meetings if m.op >= start), None))
        if before is None or not _same(before.owners, after.owners, use, mark[1].shape):
            raise _mixes(None)
    if not made.value_dependent:
        _CHECKED[key] = None
        while len(_CHECKED) > _KEPT:
            _CHECKED.popitem(last=False)
    return changed


@contextmanager
def _inner(outputs: Sequence[Tensor], params: Sequence[Tensor]) -> Iterator[dict[Tensor, None]]:
    """Find parameters that a backward pass inside of another goes to; nothing stays on them."""
    found: dict[Tensor, None] = {}
    task, outer = torch._C._current_graph_task_id, set[int]()

    def note(p: Tensor, grad: Tensor) -> Tensor | None:
        if not outer or task() in outer:
            return None
        found[p] = None
        return torch.zeros_like(grad)

    kept = [(p, p.grad) for p in params]
    nodes = [node for output in outputs if (node := output.grad_fn) is not None]
    handles = [node.register_prehook(lambda _: outer.add(task())) for node in nodes]
    handles += [p.register_hook(partial(note, p)) for p in params]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
        for p, grad in kept:
            if p.grad is not grad:
                p.grad = grad


def _mark(use: Use) -> Any:
    value = next(iter(use.values.values()))
    return value.mark if isinstance(use, OwnUse) else use.call.mark


def _same(before: Tensor, after: Tensor, use: Use, shape: tuple[int, ...]) -> bool:
    """Whether all owned elements of a cotangent belong to the owner of the output there."""
    after = after.expand(shape).reshape(use.shape)
    return bool(((after < 0) | (after == before.expand(use.shape))).all())


def _mixes(meeting: Meeting | None) -> CurvoptError:
    where = f": they meet in {meeting}" if meeting is not None else ""
    return CurvoptError(
        f"samples are not separate in the backward pass{where}. A hook on an activation, or the "
        "backward of a custom autograd.Function, sends a sample's gradient to others (by a mean or "
        "norm over the batch, say), or by an op that is not understood: take it out, or let it "
        "work sample by sample"
    )


def before_hooks(value: GradientEdge, output: Tensor, up: Tensor, **options: Any) -> Tensor:
    """Gradient of a loss in its input, before the hooks on that, which are called on the way down.

    Args:
        value: the gradient edge of the loss.
        output: its input.
        up: the gradient of the value.
        **options: as `torch.autograd.grad` takes them.
    """
    end, caught, handles = get_gradient_edge(output), [], []

    def keep(index: int, grads: Sequence[Tensor | None], _: Any) -> None:
        grad = grads[index]
        if grad is not None:
            caught.append(grad.sum_to_size(output.shape).to(output.dtype))

    seen, stack = {value.node, end.node}, [value.node]
    while stack:
        node = stack.pop()
        assert node is not None
        for index, (following, number) in enumerate(node.next_functions):
            if following is end.node and number == end.output_nr:
                handles.append(node.register_hook(partial(keep, index)))
            if following is not None and following not in seen:
                seen.add(following)
                stack.append(following)
    try:
        (grad,) = torch.autograd.grad(value, output, up, **options)
    finally:
        for handle in handles:
            handle.remove()
    if not caught:
        return grad
    return sum(caught[1:], caught[0])


def after_hooks(
    outputs: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    uses: Sequence[Use],
    params: Sequence[Tensor],
    create_graph: bool,
) -> dict[Use, Tensor]:
    """Cotangents ``[V, *shape]`` at the uses, after all hooks on them, column by column.

    Args:
        outputs: of the terms.
        cotangents: one per output, ``[V, *output.shape]``.
        uses: the uses.
        params: what the graph is followed to, so that the nodes of the uses run.
        create_graph: keep the result differentiable.
    """
    columns = [
        _caught(outputs, [c[column] for c in cotangents], uses, params, create_graph)
        for column in range(len(cotangents[0]))
    ]
    reached = {use: grad for caught in columns for use, grad in caught.items()}
    return {
        use: torch.stack([caught.get(use, torch.zeros_like(grad)) for caught in columns])
        for use, grad in reached.items()
    }


def _caught(
    outputs: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    uses: Sequence[Use],
    params: Sequence[Tensor] | Sequence[GradientEdge],
    create_graph: bool,
    note: Callable[[Use, Tensor], None] | None = None,
) -> dict[Use, Tensor]:
    caught: dict[Use, Tensor] = {}
    handles = [catch(use, caught, note) for use in uses]
    try:
        torch.autograd.grad(
            outputs,
            params,
            cotangents,
            allow_unused=True,
            retain_graph=True,
            create_graph=create_graph,
        )
    finally:
        for handle in handles:
            handle.remove()
    return caught


@contextmanager
def passing(uses: Sequence[Use], params: Sequence[Tensor]) -> Iterator[dict[Use, Tensor]]:
    """Catch the cotangents of uses in the backward pass that accumulates gradients.

    Others may go by before and after it, from another optimizer that measures on the same loss.

    Args:
        uses: the uses.
        params: what the pass accumulates to.

    Yields:
        The cotangents, once the pass is over.
    """
    by_pass: dict[int, dict[Use, Tensor]] = {}
    ended: list[int] = []
    result: dict[Use, Tensor] = {}
    task = torch._C._current_graph_task_id

    def end(*_: Any) -> None:
        ended.append(task())

    def watch(use: Use) -> Any:
        number = use.edge.output_nr

        def hook(_: Any, grads: tuple[Tensor | None, ...]) -> None:
            caught, grad = by_pass.setdefault(task(), {}), grads[number]
            if grad is not None:
                caught[use] = caught[use] + grad if use in caught else grad

        return use.edge.node.register_hook(hook)

    handles = [watch(use) for use in uses]
    nodes: list[Any] = [get_gradient_edge(p).node for p in params]
    handles += [node.register_hook(end) for node in nodes]
    try:
        yield result
    finally:
        for handle in handles:
            handle.remove()
    number = next((n for n in ended if n in by_pass), next(reversed(by_pass), None))
    if number is not None:
        result.update(by_pass[number])


def catch(
    use: Use, caught: dict[Use, Tensor], note: Callable[[Use, Tensor], None] | None = None
) -> Any:
    """Keep the cotangent of a use, after all hooks on it, when a backward pass comes by."""
    number = use.edge.output_nr

    def hook(_: Any, grads: tuple[Tensor | None, ...]) -> None:
        grad = grads[number]
        if grad is not None:
            caught[use] = caught[use] + grad if use in caught else grad
            if note is not None:
                note(use, grad)

    return use.edge.node.register_hook(hook)
