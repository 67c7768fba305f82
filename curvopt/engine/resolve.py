"""The calls of a pass: where each has the samples, and which of them use parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from curvopt.axes.endings import filled_with, source
from curvopt.axes.infer import infer
from curvopt.axes.lattice import DTYPE, NONE, filled
from curvopt.axes.layout import Layout, owned
from curvopt.axes.rules.packed import orderings
from curvopt.axes.samples import Samples
from curvopt.axes.trace import Ref
from curvopt.axes.views import grouped
from curvopt.errors import CurvoptError, Uncovered
from curvopt.recording.tape import Tape
from curvopt.recording.uses import Call, Mark, Shared, Use


class Resolver:
    """Tells uses of parameters from what is made of parameters.

    Args:
        tape: the recording.
        loss: the loss.
        output: the model's output, where all that is to be known of the loss is that it is made of
            its rows.
    """

    def __init__(self, tape: Tape, loss: Tensor, output: Tensor | None = None):
        self.tape, self.loss, self.record, self.trace = tape, loss, tape.record, tape.trace
        self.output = output
        self.loss_ref = self.trace.ref(loss if output is None else output)
        kept = [*tape.names, *self.record.silent]
        constants = {self.trace.ref(t).storage for t in kept if not t.requires_grad}
        silent = {self.trace.ref(t).storage for t in kept if t.requires_grad}
        constants, silent = constants - silent, silent | constants | orderings(self.trace)
        silent |= {copy for copy, leaf in self.trace.copies.items() if leaf in silent}
        views, order = tape.views
        size = tape.batch_size and tape.batch_size * views
        rows = infer(self.trace, self.loss_ref, silent=silent, constants=constants, batch_size=size)
        self.samples: Samples = grouped(rows, views, order)
        self.silent = self.samples.silent
        self.n = self.samples.n
        self.value_dependent = self.samples.value_dependent
        self.claims: dict[Mark, Tensor] = {}
        self.cut: dict[Shared, Mark] = {}
        self.tried: dict[Any, bool] = {}
        self.states: dict[Mark, Any] = {}
        # Calls that the loss leads to, marks to look at, and the loss's ops behind its terms.
        self.calls: list[Call] = []
        self.marks: list[Mark] = []
        self.arithmetic: set[int] = set()

    # -- owners -----------------------------------------------------------------------------------

    def _reached(self) -> list[Call]:
        """The calls that the loss leads to: others are another loss's."""
        seen, stack = set(), [self.loss.grad_fn]
        while stack:
            node = stack.pop()
            if node is not None and node not in seen:
                seen.add(node)
                stack += [following for following, _ in node.next_functions]
        return [
            call
            for call in self.record.calls
            if call.edge is None or call.edge.node in seen or not seen.isdisjoint(call.outputs)
        ]

    def _replay(self, claims: dict[Mark, Tensor] | None = None) -> bool:
        """Replay with the claims so far and more; whether samples stay apart."""
        asked = self.claims | (claims or {})
        try:
            replay = self.samples.recalled(self.marks, asked)
        except CurvoptError:
            if not asked:
                raise
            return False
        self.states = replay.marked
        self.value_dependent = self.value_dependent or replay.value_dependent
        return True

    def _owners(self, index: int, ref: Ref) -> Tensor | None:
        state = self.states.get((index, ref))
        if state is None or bool((state.owners == -1).all()):
            return None
        owners: Tensor = state.owners
        return owners

    def _ragged(self, index: int, ref: Ref) -> bool:
        state = self.states.get((index, ref))
        return state is not None and state.ragged is not None

    def _filled(self, index: int, ref: Ref) -> float | None:
        return filled_with(self.trace, index, ref)

    def _layout(self, mark: Mark | None) -> Layout | None:
        owners = None if mark is None else self._owners(*mark)
        return None if owners is None or mark is None else owned(owners, mark[1].shape, self.n)

    # -- calls ------------------------------------------------------------------------------------

    def _tracked(self, entry: Shared, derived: dict[Call, None]) -> bool:
        if entry in self.cut:
            return False
        return bool(entry.roots) if entry.call is None else entry.call in derived

    def _claim(self) -> None:
        """Find the values without owners that hold a copy for every sample, by trying."""
        if self.n < 2:
            return
        chosen = self._partial()
        candidates: list[tuple[Mark, int]] = []
        for call in self.calls:
            if call.rule is None or call.mark is None or self._owners(*call.mark) is not None:
                continue
            for dim in (0, 1):
                if call.shape[dim : dim + 1] == (self.n,) and _grew(call, dim):
                    candidates.append((call.mark, dim))
                    break
        chosen |= {mark: _along(mark, dim, self.n) for mark, dim in candidates}
        if chosen and self._replay(chosen):
            self.claims |= chosen
            return
        for mark, claim in chosen.items():
            if self._replay({mark: claim}):
                self.claims[mark] = claim
        if chosen:
            self._replay()

    def _partial(self) -> dict[Mark, Tensor]:
        """Tensors with elements that belong to nobody beside a sample's: they may be its own."""
        found = {}
        for mark in self.marks:
            owners = self._owners(*mark)
            if owners is not None and bool((owners == NONE).any()):
                more = filled(owners)
                if not bool((more == NONE).any()):
                    found[mark] = more
        return found

    def _claim_value(self, entry: Shared) -> bool:
        """Whether a value made of parameters turns out to hold a part for every sample."""
        if self.n < 2 or entry.call is None or entry.mark is None:
            return False
        shape = entry.mark[1].shape
        self.marks = [*self.marks, entry.mark]
        options = [_along(entry.mark, d, self.n) for d in (0, 1) if shape[d : d + 1] == (self.n,)]
        rows = shape[0] // self.n if shape and shape[0] % self.n == 0 else 1
        if rows > 1:  # a sample's rows together, or apart
            flat, ones = torch.arange(self.n, dtype=DTYPE, device="cpu"), [1] * (len(shape) - 1)
            options += [flat.repeat_interleave(rows).view(-1, *ones)]
            options += [flat.repeat(rows).view(-1, *ones)]
        for claim in options:
            if self._replay({entry.mark: claim}):
                self.claims[entry.mark] = claim
                self.cut[entry] = entry.mark
                return True
        self._replay()
        return False

    def _covered(self, call: Call, values: dict[Any, Shared], layout: Layout) -> bool:
        """Try the rule on a cotangent of zeros: whether it covers the call after all."""
        if call.edge is None:
            return False
        key = (call, *values)
        if key not in self.tried:
            like = next(iter(values.values())).tensor
            zeros = like.new_zeros(()).expand(1, *call.shape)
            try:
                Use(call, values).structures(zeros, layout)
                self.tried[key] = True
            except (Uncovered, IndexError):  # axes that a rule does not expect
                self.tried[key] = False
        return self.tried[key]

    def _resolve(self) -> Any:
        """Tell uses from values made of parameters; again, when a value turned out to be cut."""
        position = {id(p): index for index, p in enumerate(self.tape.params)}
        while True:
            cuts = len(self.cut)
            derived: dict[Call, None] = {}
            uses: list[tuple[Call, tuple[Any, ...], Layout]] = []
            consumers: dict[Shared, tuple[Call, Any]] = {}
            slow: dict[int, str] = {}

            def slowly(entry: Shared, op: str, slow: dict[int, str] = slow) -> None:
                for root in entry.roots:
                    slow.setdefault(position[root], op)

            for call in self.calls:
                values = {k: e for k, e in call.inputs.items() if self._tracked(e, derived)}
                for name, entry in call.inputs.items():
                    if entry in self.cut:
                        consumers.setdefault(entry, (call, name))
                if not values:
                    continue
                if call.value is not None and call.value in self.cut:
                    derived[call] = None  # the rest of its graph is its own
                    continue
                owned = call.mark is not None and self._owners(*call.mark) is not None
                if not owned and call.value is not None:
                    derived[call] = None
                    continue
                if call.mark is not None and made_by(self.trace, call.mark) in self.arithmetic:
                    continue  # of the loss, behind its terms
                layout = self._layout(call.mark)
                covers = call.rule is not None and call.rule.covers(values)
                covers = covers and not _complex(call, values)
                if covers and layout is not None and self._covered(call, values, layout):
                    uses.append((call, tuple(values), layout))
                    continue
                for name, entry in values.items():
                    if not self._claim_value(entry):
                        slowly(entry, call.op)
                    else:
                        consumers.setdefault(entry, (call, name))
            if len(self.cut) == cuts:
                break
        own = []
        for entry, mark in self.cut.items():
            layout = self._layout(mark)
            if layout is not None and entry in consumers:
                own.append((*consumers[entry], layout))
            elif entry in consumers:
                slowly(entry, consumers[entry][0].op)
        return list(derived), uses, own, slow


# Ops whose outputs have the data's axes in front, and parameters' behind.
LAYERS = frozenset("linear conv1d conv2d conv3d".split())


def made_by(trace: Any, at: Mark) -> int | None:
    """Number of the op that made what is at a mark, None for what no op made."""
    return source(trace, at[1], at[0])


def _grew(call: Call, dim: int) -> bool:
    """Whether an axis of the output is none that a tracked argument has."""
    weight = call.inputs.get("weight")
    if call.op in LAYERS and weight is not None:  # behind the axes that the data has in front
        return dim <= len(call.shape) - weight.tensor.ndim
    behind = len(call.shape) - dim
    return all(
        entry.tensor.ndim < behind or entry.tensor.shape[-behind] != call.shape[dim]
        for entry in call.inputs.values()
    )


def _complex(call: Call, values: dict[Any, Shared]) -> bool:
    """Whether cotangents are complex: autograd's are conjugated, and rules know nothing of that."""
    refs = [call.mark[1].dtype] if call.mark is not None else []
    return any(dtype.is_complex for dtype in [*refs, *(e.tensor.dtype for e in values.values())])


def _along(mark: Mark, dim: int, n: int) -> Tensor:
    sizes = [1] * len(mark[1].shape)
    sizes[dim] = n
    return torch.arange(n, dtype=DTYPE, device="cpu").view(sizes)
