"""What an optimizer's step is inside a graph: what it measures, and how parameters move."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from curvopt.compiled.tracing import Proof
from curvopt.engine.computation import Computation
from curvopt.quantities import Quantity

Write = tuple[Tensor, Tensor]
Groups = Sequence[dict[str, Any]]

#: Settings of a group that are numbers of each step.
CHANGING = frozenset({"lr"})


@dataclass
class Traced:
    """What a graph is made of, while it is traced. P parameters take part.

    Attributes:
        params: the parameters.
        grads: their gradients.
        groups: their settings.
        values: what was measured, by field; empty where nothing was.
        quantities: what measured it.
        samples: N, where something was measured.
        loss: the loss.
        state: the tensors of `Update.tensors`.
        numbers: those of `Update.numbers`, ``[P]`` each.
        drawn: the tensors of `Update.draw`.
        mode: what the step does, see `Update.mode`.
    """

    params: list[Tensor]
    grads: list[Tensor]
    groups: Groups
    values: dict[str, Any]
    quantities: list[Quantity]
    samples: int
    loss: Tensor
    state: list[Tensor]
    numbers: Sequence[Tensor]
    drawn: list[Tensor]
    mode: Hashable


class Moved(NamedTuple):
    """What a step changes.

    Attributes:
        writes: what is to be written where.
        grads: what is left in ``p.grad``.
        seen: what else the optimizer wants to see.
        loss: in the place of the function's.
    """

    writes: list[Write]
    grads: list[Tensor]
    seen: Sequence[Tensor] = ()
    loss: Tensor | None = None


class Update(ABC):
    """The step of one optimizer, by tensors alone.

    Args:
        opt: the optimizer.
        function: of a batch, gives the loss.
    """

    #: A loss that is not finite fails the step.
    finite_loss = True
    #: A sum that is scaled by a number must be declared; buffers must not change.
    private = False
    #: The batch holds samples that do not count.
    filled = False

    def __init__(self, opt: Any, function: Callable[..., Any]):
        self.opt, self.function = opt, function

    def obstacle(self) -> str:
        """Why no step of this optimizer is compiled as it is; empty if it may be."""
        return ""

    @abstractmethod
    def mode(self, params: Sequence[Tensor]) -> Hashable | None:
        """What the coming step does; None where it is to be taken eagerly.

        Args:
            params: that take part.
        """

    def settings(self) -> Hashable:
        """What a graph holds as numbers: all settings but the learning rates.

        Whatever else somebody keeps in the groups is none of a step's business.
        """
        keys = [key for key in self.opt.defaults if key not in CHANGING]
        fixed = tuple(
            tuple((key, _fixed(group[key])) for key in keys if key in group)
            for group in self.opt.param_groups
        )
        return fixed, self.opt.reduction, self.opt.batch_size

    def quantities(self, mode: Hashable) -> list[Quantity]:
        """What is measured beside the gradient."""
        return []

    def begin(self, samples: int) -> None:  # noqa: B027 (there may be nothing to do)
        """Check and note what the coming step needs; of N samples where it measures, else 0."""

    def measure(
        self,
        computation: Computation,
        quantities: list[Quantity],
        numbers: Sequence[Tensor] | None = None,
        drawn: Sequence[Tensor] = (),
    ) -> tuple[list[Tensor | None], dict[str, Any]]:
        """Gradients of the parameters, and what is measured.

        Args:
            computation: of the loss.
            quantities: what to measure.
            numbers: those of `numbers`, while a graph is traced.
            drawn: those of `draw`, likewise.
        """
        computation.prepare()
        return computation.with_gradient(quantities)

    def facts(self, values: dict[str, Any]) -> Any:
        """What `done` has to know of what was measured, the same in every batch of these shapes.

        Args:
            values: what `measure` gave, of a pass with values.
        """
        return None

    @abstractmethod
    def tensors(self, mode: Hashable, params: Sequence[Tensor], groups: Groups) -> list[Tensor]:
        """The state that a step reads and may write to: no two share memory."""

    @abstractmethod
    def numbers(
        self, mode: Hashable, params: Sequence[Tensor], groups: Groups, samples: int
    ) -> Sequence[Sequence[float]]:
        """Numbers of the coming step, P in a row; of N samples where it measures, else 0."""

    def padded(self, batch: tuple[Any, ...]) -> tuple[Any, ...]:
        """The batch in one of few sizes, with samples that do not count."""
        return batch

    def draw(self, params: Sequence[Tensor]) -> list[Tensor]:
        """What is drawn for the coming step, outside of the graph."""
        return []

    def blanks(self, params: Sequence[Tensor]) -> list[Tensor]:
        """Tensors as `draw` gives them, without drawing any."""
        return []

    @abstractmethod
    def move(self, traced: Traced) -> Moved:
        """How everything moves."""

    @abstractmethod
    def done(
        self,
        mode: Hashable,
        params: Sequence[Tensor],
        groups: Groups,
        proof: Proof,
        seen: Sequence[Tensor],
    ) -> None:
        """Note a step that was taken.

        Args:
            mode: what it did.
            params: that took part.
            groups: their settings.
            proof: of the graph: with N where it measured, else 0, and the `facts`.
            seen: as in `Moved`.
        """

    def interrupted(self) -> None:  # noqa: B027 (likewise)
        """Note a step of which it is not known how far it got."""


def _fixed(value: Any) -> Hashable:
    """A setting as something to compare: betas may be a list, as of a file."""
    value = value.tolist() if isinstance(value, Tensor) else value
    return tuple(value) if isinstance(value, list) else value


def all_or_none(due: list[bool]) -> bool | None:
    """Whether all are due, or none; None where some are."""
    if all(due):
        return True
    return None if any(due) else False
