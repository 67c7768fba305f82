"""When curvature is measured: by tensor, by the number of gradients that it has had."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from curvopt.optim.base import EngineOptimizer


class Scheduled(EngineOptimizer):
    """Measures a tensor's curvature at its gradients 0, 1, 2, 4, 8, ... and at each `every`-th.

    A tensor's own count decides, so that tasks in turn and blocks that are left out are measured as
    often as all others. One that takes part for the first time while nothing is measured waits for
    its next gradient.

    Attributes:
        curvature_every: a tensor's own gradients from one measurement to the next.
        waiting: a tensor needs to be measured before its first step.
    """

    curvature_every: int
    waiting = True
    _unmeasured: frozenset[Tensor] | set[Tensor] = frozenset()

    def add_param_group(self, param_group: dict[str, Any]) -> None:  # noqa: D102 (as in torch)
        self.waiting = True
        super().add_param_group(param_group)

    def _due(self, p: Tensor) -> bool:
        """Whether a tensor's curvature is to be measured with its next gradient."""
        if p not in self.state:
            return False
        count = self.state[p].get("step")
        # A state of another optimizer: the step says what is wrong with it.
        return not isinstance(count, int) or is_due(count, self.curvature_every)

    def _still_unmeasured(self) -> set[Tensor]:
        """The tensors that had a gradient, wait, and may have another."""
        return {p for p in self._unmeasured if p.requires_grad}

    def _wait_for(self, unmeasured: set[Tensor]) -> None:
        self._unmeasured, self.waiting = unmeasured, bool(unmeasured)


def is_due(count: int, every: int) -> bool:
    """Whether curvature is due after so many gradients: at 0, 1, 2, 4, 8, ... and each `every`."""
    return count % every == 0 or (count < every and count & (count - 1) == 0)
