"""The structures themselves, for directions and quantities of one's own."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from curvopt.quantities.base import Context, Quantity
from curvopt.structures import Structure
from curvopt.structures.guarded import guarded


class Structures(Quantity):
    """The per-sample gradients as the engine holds them, not formed: a `Structure` per parameter.

    Its rows are those of `BatchGrad`: ``structures[p].form()[0]`` is ``batch_grad[p]``. What more
    it knows is in its class: an `Outer` is made of the factors ``left`` and ``right``, a `Conv` of
    cotangent and input, a `Lookup` of values and indices. `Structure` has all reductions that the
    package's quantities are made of, and a quantity of one's own is a few lines of them; the
    classes are in `curvopt.structures`.

    Structures hold parts of the graph's memory, and those of derived values (weight norm) need the
    graph: use them while the loss is alive. They hold the inputs of the layers by reference, not as
    copies, and raise `CurvoptError` after one of them was changed in place.

    Example:
        >>> layer, x = torch.nn.Linear(4, 3), torch.randn(8, 4)
        >>> closure = lambda: layer(x).square().sum(1).mean()
        >>> result = curvopt.compute(
        ...     lambda: loss_fn(model(x), y), model.parameters(), curvopt.Structures()
        ... )
        >>> outer = result.structures[p]  # of a linear layer on [N, I]: [N, 1, 1, O], [N, 1, 1, I]
        >>> outer.left[0].shape, outer.right.shape
        (torch.Size([8, 1, 1, 5]), torch.Size([8, 1, 1, 4]))
    """

    field = "structures"
    own = True

    def reduce_all(
        self, structures: dict[Tensor, Structure], context: Context
    ) -> dict[Tensor, Any]:
        return {p: guarded(structure, context.name(p)) for p, structure in structures.items()}
