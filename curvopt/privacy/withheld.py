"""What stands in ``p.grad`` between a private backward pass and ``step``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map

from curvopt.errors import SCALED, CurvoptError

# What reads the private gradient, or scales it. Nothing that adds: a backward pass that is not
# recorded adds to `p.grad` by the same op, and what it adds has no noise.
ALLOWED = frozenset(
    """
    linalg_vector_norm norm _foreach_norm abs _foreach_abs max amax amin min _foreach_max sum mean
    var std square pow mul mul_ _foreach_mul _foreach_mul_ div div_ _foreach_div _foreach_div_ neg
    clamp clamp_ clamp_min clamp_min_ clamp_max clamp_max_ _foreach_clamp_min _foreach_clamp_min_
    _foreach_clamp_max _foreach_clamp_max_ isfinite isnan isinf eq ne lt le gt ge any all
    detach clone _to_copy alias view _unsafe_view reshape flatten equal _local_scalar_dense
    """.split()
)


class Withheld(Tensor):
    """A private gradient that is made when it is first looked at: at the latest, in ``step``.

    It takes no memory before. Reading and scaling it acts on the private gradient, which costs no
    more privacy; every other op is refused.

    Args:
        like: the parameter.
        ask: makes the private gradient of a parameter; raises where the batch is not complete.
    """

    ask: Callable[[Tensor], Tensor]
    of: Tensor

    @staticmethod
    def __new__(cls, like: Tensor, ask: Callable[[Tensor], Tensor]) -> Withheld:
        """Of the parameter's shape, dtype and device."""
        made: Withheld = Tensor._make_wrapper_subclass(
            cls, like.shape, dtype=like.dtype, device=like.device
        )
        made.of, made.ask = like, ask
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Withheld({list(self.shape)})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the op unseen by a recording, for it is no part of the pass."""
        with _disable_current_modes(), torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run on the private gradient what only reads or scales it."""
        name = func.overloadpacket.__name__
        if "_amp_" in name:
            raise CurvoptError(SCALED)
        if name == "zeros_like":
            return func(*tree_map(_shape, args), **(kwargs or {}))
        if name not in ALLOWED:
            raise CurvoptError(
                f"{name} on the gradient of a private step, which step() has not taken yet: it may "
                "be read, clipped and scaled, but a gradient that is added to it, by hand or by a "
                "backward pass that was not recorded, would have no noise. Do it after step(), or "
                "in register_step_post_hook"
            )
        args, kwargs = tree_map(_private, (args, kwargs or {}))
        return func(*args, **kwargs)


def _private(value: Any) -> Any:
    return value.ask(value.of) if isinstance(value, Withheld) else value


def _shape(value: Any) -> Any:
    return value.of.detach() if isinstance(value, Withheld) else value


def withhold(p: Tensor, ask: Callable[[Tensor], Tensor]) -> None:
    """Put the stand-in where the gradient will be."""
    if not isinstance(p.grad, Withheld):
        with torch.no_grad():
            p.grad = Withheld(p, ask)


def release(p: Tensor) -> None:
    """Take the stand-in away."""
    if isinstance(p.grad, Withheld):
        p.grad = None
