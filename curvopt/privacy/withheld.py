"""What stands in ``p.grad`` between a private backward pass and ``step``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from curvopt.errors import SCALED, CurvoptError


class Withheld(Tensor):
    """A gradient that is not there yet: every op on it is refused, so that none is a silent no-op.

    It takes no memory.

    Args:
        like: the parameter.
    """

    @staticmethod
    def __new__(cls, like: Tensor) -> Withheld:
        """Of the parameter's shape, dtype and device."""
        made: Withheld = Tensor._make_wrapper_subclass(
            cls, like.shape, dtype=like.dtype, device=like.device
        )
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Withheld({list(self.shape)})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Refuse."""
        if "_amp_" in str(func):
            raise CurvoptError(SCALED)
        raise CurvoptError(
            "the gradient of a private step is not there before step() has added the noise, so it "
            "cannot be clipped, scaled, added to or read. Every sample's gradient is clipped to "
            "max_grad_norm already: take out clip_grad_norm_ (max_grad_norm=0 in a Trainer, no "
            "gradient_clip_val in Lightning); to see or change the private gradient, do it after "
            "step(), or in register_step_post_hook"
        )


def withhold(p: Tensor) -> None:
    """Put the stand-in where the gradient will be."""
    if not isinstance(p.grad, Withheld):
        with torch.no_grad():
            p.grad = Withheld(p)


def release(p: Tensor) -> None:
    """Take the stand-in away."""
    if isinstance(p.grad, Withheld):
        p.grad = None
