"""What one forward pass is for the engine: samples, uses, terms, and where each has them."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from curvopt.axes.endings import Ending
from curvopt.axes.keys import key_of_ops
from curvopt.axes.layout import Layout
from curvopt.axes.trace import Trace
from curvopt.axes.wiring import steps_of
from curvopt.recording.tape import Tape
from curvopt.recording.uses import OwnUse, Use

Value = TypeVar("Value")


class Draw(NamedTuple):
    """Rows of a data set that an op draws by index.

    Attributes:
        storage: of the data set.
        op: the op's number.
        indices: their numbers among the op's inputs.
        sizes: the lengths of the dims that they index.
        owners: whose their elements are.
    """

    storage: int
    op: int
    indices: list[int]
    sizes: list[int]
    owners: list[Tensor]


@dataclass
class Plan:
    """Where the samples are in a pass; by numbers of calls and parameters, so that it can be kept.

    Attributes:
        n: number of samples.
        terms: numbers of the recorded losses that make up the loss.
        term_layouts: where the terms' outputs hold the samples; None where they mix.
        endings: how the terms go into the loss.
        partial: how many terms hold a part of the samples alone.
        sizes: numbers of elements of the samples' data, which a loss may be divided by.
        overlapping: whether other terms hold samples of theirs as well.
        weighed: the weight of the rows that depends on several samples, if there is one.
        loose: a part of the loss that no recorded loss accounts for, and that holds no samples.
        impure: why such a part is not of the parameters alone; empty if it is.
        uses: number of the call, names of the tracked arguments, layout of the output.
        own: number of the call, name of the argument, layout of the value that holds a part for
            every sample.
        derived: numbers of the calls that made values of parameters.
        slow: by number of the parameter, the op that no rule covers.
        updated: numbers of the buffers, in `Record.silent`, that the pass wrote samples to.
        shared: shapes of data that all samples share, and that is no parameter and no buffer.
        places: by storage of the data that goes through the model, where in it samples begin; from
            the first batch on, if that is cut out of it in the pass.
        draws: how rows of data sets are drawn for the model.
        value_dependent: whether it depends on index values of this very pass.
        reached: numbers of the calls that the loss leads to, values made of parameters left out.
        audited: passes that were audited or need not be, by what asked for them.
        known: audits of passes of this code, whatever their sizes, by what asked for them.
    """

    n: int
    terms: list[int]
    term_layouts: list[Layout | None]
    endings: list[Ending]
    partial: int = 0
    sizes: frozenset[int] = frozenset()
    overlapping: bool = False
    weighed: str = ""
    loose: bool = False
    impure: str = ""
    uses: list[tuple[int, tuple[Any, ...], Layout]] = field(default_factory=list)
    own: list[tuple[int, Any, Layout]] = field(default_factory=list)
    derived: list[int] = field(default_factory=list)
    slow: dict[int, str] = field(default_factory=dict)
    updated: list[int] = field(default_factory=list)
    shared: list[list[int]] = field(default_factory=list)
    places: dict[int, Tensor] = field(default_factory=dict)
    draws: list[Draw] = field(default_factory=list)
    value_dependent: bool = False
    reached: list[int] = field(default_factory=list)
    audited: Counter[str] = field(default_factory=Counter)
    known: Counter[str] = field(default_factory=Counter)


# Plans by the whole code of the pass: the key holds every op, its wiring and all arguments, so that
# an equal key is an equal pass, of whatever model. What values decided is made again.
_PLANS: OrderedDict[Any, Plan] = OrderedDict()
# How often the code of a pass was audited, whatever its sizes.
_AUDITS: OrderedDict[Any, Counter[str]] = OrderedDict()
KEPT = 256


def made_once(key: Any, make: Callable[[], Plan], code: Callable[[], Any]) -> Plan:
    """The plan of a pass, made once for equal passes.

    Args:
        key: of the pass.
        make: makes its plan.
        code: gives a key of the pass without the sizes of its data.
    """
    plan = _PLANS.get(key)
    if plan is not None and not plan.value_dependent:
        _PLANS.move_to_end(key)
        return plan
    before, plan = plan, make()
    if before is not None:
        plan.audited, plan.known = before.audited, before.known
    else:
        written = code()
        plan.known = _kept(_AUDITS, written, _AUDITS.get(written, plan.known))
    return _kept(_PLANS, key, plan)


def _kept(held: OrderedDict[Any, Value], key: Any, value: Value) -> Value:
    """Hold a value, and the last `KEPT` alone."""
    held[key] = value
    held.move_to_end(key)
    while len(held) > KEPT:
        held.popitem(last=False)
    return value


def code_of(tape: Tape) -> Any:
    """The ops of a pass, their wiring and the shapes of its parameters: no sizes of data."""
    steps = steps_of(tape.trace)
    ops = tuple(
        (step.op.func, *(r.storage for r in (*step.inputs, *step.outputs))) for step in steps
    )
    return ops, tuple(p.shape for p in tape.params)


def key_of(tape: Tape, loss: Tensor) -> Any:
    """What a plan depends on."""
    trace, record = tape.trace, tape.record
    position = {id(p): index for index, p in enumerate(tape.params)}
    calls = tuple(
        (
            call.op,
            call.mark,
            tuple((name, *(position[r] for r in e.roots)) for name, e in call.inputs.items()),
        )
        for call in record.calls
    )
    losses = tuple((loss.name, loss.reduction, loss.mark, loss.value_ref) for loss in record.losses)
    silent = tuple(trace.ref(t).storage for t in [*tape.names, *record.silent])
    settings = tape.batch_size, tape.views, tuple(trace.copies.items())
    return key_of_ops(trace), trace.ref(loss), settings, calls, losses, silent, len(trace.reads)


def uses_of(plan: Plan, tape: Tape) -> dict[Use, Layout]:
    """The uses of a pass, by its plan."""
    calls = tape.record.calls
    result: dict[Use, Layout] = {}
    for index, names, layout in plan.uses:
        call = calls[index]
        result[Use(call, {name: call.inputs[name] for name in names})] = layout
    for index, name, layout in plan.own:
        result[OwnUse(calls[index].inputs[name])] = layout
    return result


def drawn_by(draw: Draw, trace: Trace) -> Tensor | None:
    """The rows that a pass draws, by number; None if several samples draw the same one."""
    values = [trace.values[draw.op][number] for number in draw.indices]
    indices = torch.broadcast_tensors(*(v.cpu().long() for v in values if v is not None))
    rows = torch.zeros((), dtype=torch.int64, device="cpu")
    for index, size in zip(indices, draw.sizes, strict=True):
        rows = rows * size + index % size
    owners = torch.broadcast_tensors(*draw.owners, rows)[0]
    pairs = torch.stack([rows.flatten(), owners.flatten()]).unique(dim=1)
    return pairs[0] if pairs.shape[1] == len(pairs[0].unique()) else None
