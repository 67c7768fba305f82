"""What a quantity is: a cotangent, and a reduction of the structures it leaves at the uses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Generator, Tensor

from curvopt.structures import Structure


class Hessian(Protocol):
    """Second derivatives of a loss, as the engine gives them to a quantity."""

    params: list[Tensor]
    chunk: int

    def diagonal(self, rows: bool) -> dict[Tensor, Tensor]:
        """Exact diagonal: ``[*p]``, or each sample's ``[N, *p]`` with ``rows``."""

    def product(self, vectors: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        """Product with vectors ``[V, *p]``, zero for parameters that are not given."""


@dataclass(frozen=True)
class Cotangent:
    """What is sent back from the model's output.

    Attributes:
        kind: ``"gradient"`` (of the loss), ``"hessian"`` (the same, to be differentiated),
            ``"root"`` (exact root of the loss Hessian), or ``"sketch"`` (random combinations of
            its columns).
        samples: number of random combinations of a sketch.
        estimator: ``"rademacher"`` signs, or ``"labels"`` drawn from the model.
        generator: of the sketch; torch's global one by default.
        subsample: indices of the samples to take; all by default.
    """

    kind: str
    samples: int = 1
    estimator: str = "rademacher"
    generator: Generator | None = None
    subsample: tuple[int, ...] | None = None


GRADIENT = Cotangent("gradient")
ROOT = Cotangent("root")
HESSIAN = Cotangent("hessian")


@dataclass(frozen=True)
class Pass:
    """One set of cotangent columns, as written or of the samples' own losses."""

    cotangent: Cotangent
    own: bool


@dataclass(frozen=True)
class Context:
    """What a reduction needs to know beside the structures.

    Attributes:
        samples: N.
        factor: number that the rows must be multiplied by.
        share: sample n's share w_n of the loss, a number or ``[N]``; None if its terms differ.
        first: these are the first columns of the pass.
        name: a parameter's name and shape, for messages.
        totals: sums over the samples that torch's own backward pass has left.
    """

    samples: int
    factor: float = 1.0
    share: float | Tensor | None = 1.0
    first: bool = True
    name: Callable[[Tensor], str] = str
    totals: Mapping[Tensor, Tensor] = field(default_factory=dict)


class Quantity:
    """One quantity. A subclass names its field, its cotangent and its reduction.

    Attributes:
        field: name of the result's field.
        cotangent: what is sent back.
        own: rows are those of each sample's own loss, not its part of the loss as written.
        reads_totals: it reads `Context.totals`, which are copies of gradients.
    """

    field: str
    cotangent: Cotangent = GRADIENT
    own: bool = False
    reads_totals: bool = False

    def reduce(self, structure: Structure, context: Context) -> Tensor:
        """Reduce one parameter's structure; the parts of a chunked backward pass are added."""
        raise NotImplementedError

    def reduce_all(
        self, structures: dict[Tensor, Structure], context: Context
    ) -> dict[Tensor, Any]:
        """Reduce all parameters' structures."""
        return {p: self.reduce(structure, context) for p, structure in structures.items()}

    def from_hessian(self, hessian: Hessian) -> dict[Tensor, Any]:
        """What a quantity of the Hessian takes from it, instead of reducing structures."""
        raise NotImplementedError

    def combine(self, before: Any, part: Any) -> Any:
        """Join the results of two chunks of columns."""
        if isinstance(before, Tensor) and not (before.requires_grad or part.requires_grad):
            return before.add_(part)
        return before + part

    def combine_all(self, before: Any, part: Any) -> Any:
        """Join the results of two chunks of columns, of all parameters."""
        return {p: self.combine(before[p], part[p]) for p in part}

    def finish(self, result: Any) -> Any:
        """Make the final value from the joined parts: values by parameter, or one for all."""
        return result

    def __repr__(self) -> str:
        settings = ", ".join(f"{k}={v!r}" for k, v in vars(self).items() if k != "cotangent")
        return f"{type(self).__name__}({settings})"
