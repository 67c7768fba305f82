"""Recording a pass of which the plan is known, on tensors without values."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from curvopt.axes.trace import Ref, Trace
from curvopt.engine.computation import Computation
from curvopt.recording.tape import Tape
from curvopt.recording.uses import Shared

# Steps in a row with something new in each, after which that is said.
CHANGES = 3
FILLED = (
    "the function gives more than the loss, which would hold samples that fill up a Poisson batch: "
    "leave the output out, or compute it apart"
)
_NOWHERE = Ref(-1, 0, torch.Size(), (), torch.float32, False)


class Unsuited(Exception):
    """Why a step is taken eagerly.

    Args:
        reason: what is said of it; empty where it is about this one step.
        asked: whether later steps are to be tried again: an eager step refuses it, too.
    """

    def __init__(self, reason: str = "", *, asked: bool = False):
        super().__init__(reason)
        self.lasting, self.asked = bool(reason) and not asked, asked


class Failed(Unsuited):
    """A compiled step has failed its checks, and changed nothing."""


class Sign(NamedTuple):
    """Random signs that a pass draws: their shape, and what they are drawn like."""

    shape: tuple[int, ...]
    like: Tensor


class Proof(NamedTuple):
    """What a pass with values has shown.

    Attributes:
        plan: where the samples are; None where nothing was measured.
        outline: what was recorded.
        signs: the random signs that it drew.
        samples: N.
        changed: numbers of the arguments that it changed in place.
        facts: of what was measured, see `Update.facts`.
    """

    plan: Any
    outline: list[Any]
    signs: list[Sign]
    samples: int
    changed: frozenset[int]
    facts: Any


class Program(NamedTuple):
    """A compiled step.

    Attributes:
        run: the graph.
        proof: what is known of its pass.
        outputs: how many outputs of the function there are.
    """

    run: Any
    proof: Proof
    outputs: int


class Blind(Trace):
    """Stands in for a trace: what it would tell is known."""

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *error: Any) -> None:
        pass

    def ref(self, tensor: Tensor) -> Ref:
        """Nothing is asked of it."""
        return _NOWHERE

    def paused(self) -> Any:
        """It never runs."""
        return nullcontext()


class KnownTape(Tape):
    """Records a pass whose plan is known.

    Args:
        params: as in the base class.
        plan: of the pass.
    """

    def __init__(self, params: Iterable[tuple[str, Tensor]], plan: Any):
        super().__init__(params)
        self.known = plan

    def reset(self) -> None:
        """As in the base class; nothing is traced."""
        super().reset()
        self.trace = Blind()


def share(tape: Tape, tensors: Iterable[Tensor]) -> None:
    """Tell a recording of tensors that are the same for all samples: buffers, other parameters."""
    for tensor in tensors:
        tape.shared[id(tensor)] = Shared(tensor, tensor._version, frozenset())
        tape.record.silent.append(tensor)


def outline(tape: Tape) -> list[Any]:
    """What two recordings of one pass must agree on, for the plan of one to serve the other."""
    calls = [(call.op, tuple(call.shape), *call.inputs) for call in tape.record.calls]
    return [*calls, *((loss.name, tuple(loss.output.shape)) for loss in tape.record.losses)]


def check_plan(computation: Computation) -> None:
    """See that a plan holds for every batch of these shapes, and needs nothing but tensors.

    Raises:
        Unsuited: it does not.
    """
    plan = computation.plan
    assert plan is not None
    if plan.value_dependent:
        raise Unsuited("which sample a row belongs to depends on values (experts, ragged rows)")
    if computation.slow:
        op = next(iter(computation.slow.values()))
        raise Unsuited(f"a parameter takes the slow path, sample by sample (by {op})")
    if computation.hooked:
        raise Unsuited("hooks or a custom autograd.Function are part of the backward pass")
    layouts = [*plan.term_layouts, *(layout for *_, layout in [*plan.uses, *plan.own])]
    if any(layout is None or layout.kind == "gather" for layout in layouts):
        raise Unsuited("samples have rows in no regular order")
    if computation.output is not None:
        raise Unsuited("the loss was written by hand: (loss, output)")


@contextmanager
def without_onednn() -> Iterator[None]:
    """Have recurrent layers as the ops that they are made of."""
    before = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(before)


# A compiled step may differ from what was traced by this part of what it writes, in its norm, or by
# so many times as much as it does for inputs that differ in their last bits.
APART, TIMES = 1e-3, 10.0


def check_compiled(graph: Any, run: Callable[..., Any], inputs: Sequence[Tensor]) -> None:
    """Run a compiled graph on copies, and see that it does what the graph says.

    Rounding may decide: a bias before a normalization has gradients of nothing else.

    Raises:
        Unsuited: it does not.
    """
    if run is graph:
        return
    mine, others = ([value.clone() for value in inputs] for _ in range(2))
    found = [*mine, *run(*mine)]
    tags = (getattr(node.target, "tags", ()) for node in graph.graph.nodes)
    if any(torch.Tag.nondeterministic_seeded in held for held in tags):
        return  # it may draw in another order
    wanted = [*others, *graph(*others)]
    if all(_apart(a, b) <= APART for a, b in zip(found, wanted, strict=True)):
        return
    shaken = [_shaken(value) for value in inputs]
    rounded = [*shaken, *graph(*shaken)]
    for a, b, c in zip(found, wanted, rounded, strict=True):
        if _apart(a, b) > max(APART, TIMES * _apart(c, b)):
            raise Unsuited("the compiled graph computes other numbers than the graph it is of")


def _apart(a: Tensor, b: Tensor) -> float:
    """The norm of the difference over that of b, if they are numbers that could differ."""
    if not b.is_floating_point() or not (size := b.double().norm()).isfinite():
        return 0.0
    apart = float((a - b).double().norm())
    if not apart < math.inf:
        return math.inf
    return apart / float(size.clamp(min=sys.float_info.min)) if apart else 0.0


def _shaken(value: Tensor) -> Tensor:
    """Other last bits."""
    if not value.is_floating_point():
        return value.clone()
    return value * (1 + (torch.rand_like(value) - 0.5) * 8 * torch.finfo(value.dtype).eps)


@contextmanager
def kept_randomness(device: torch.device) -> Iterator[None]:
    """Leave the random state as it was."""
    devices: Sequence[Any] = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield


def loss_of(outputs: Sequence[Any]) -> Tensor:
    """The loss among the outputs of a captured graph.

    Raises:
        Unsuited: it is not the first one.
    """
    loss = outputs[0] if outputs else None
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        raise Unsuited("the function returns no loss with a graph")
    return loss


def said(error: Exception) -> str:
    """What an error says, in short."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no more is known'}"


def storage_of(tensor: Tensor) -> int:
    """The memory that a tensor is in, as a number."""
    return tensor.untyped_storage()._cdata
