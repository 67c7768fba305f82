"""Damped Newton steps with the diagonal of the generalized Gauss-Newton matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor

from curvopt.optim.base import EngineOptimizer
from curvopt.quantities import DiagGGNExact, DiagGGNMC, Quantity


class DiagGGNOptimizer(EngineOptimizer):
    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-2,
        damping: float = 1.0,
        *,
        momentum: float = 0.9,
        beta: float = 0.95,
        exponent: float = 0.5,
        max_step: float = 0.0,
        weight_decay: float = 0.0,
        curvature_every: int = 10,
        burn_in: int = 10,
        estimator: str = "sketch",
        samples: int = 1,
        generator: Generator | None = None,
        maximize: bool = False,
        batch_size: int | None = None,
        reduction: str | None = None,
    ):
        defaults = dict(
            lr=lr, damping=damping, momentum=momentum, beta=beta, exponent=exponent,
            max_step=max_step, weight_decay=weight_decay, maximize=maximize,
        )
        super().__init__(params, defaults, batch_size=batch_size, reduction=reduction)
        self.curvature_every, self.burn_in = curvature_every, burn_in
        self.steps = 0
        self.quantity: Quantity = (
            DiagGGNExact() if estimator == "exact" else DiagGGNMC(samples, generator=generator)
        )

    def _wanted(self) -> list[Quantity]:
        due = self.steps < self.burn_in or self.steps % self.curvature_every == 0
        return [self.quantity] if due else []

    def _update(self) -> None:
        field = self.quantity.field
        parts = [values[field] for values in self.collected if field in values]
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                    state["curvature"] = torch.zeros_like(p)
                    state["scale"] = 0.0
                    state["step"] = 0
                if parts:
                    h = sum(part[p] for part in parts)
                    state["curvature"].lerp_(h, 1 - group["beta"])
                    state["scale"] += (1 - group["beta"]) * (1 - state["scale"])
                state["step"] += 1
            self._move(group, params)
        self.steps += 1

    def _move(self, group: dict[str, Any], params: list[Tensor]) -> None:
        lr, momentum = group["lr"], group["momentum"]
        for p in params:
            s = self.state[p]
            m = s["momentum_buffer"].lerp_(p.grad, 1 - momentum)
            mhat = m / (1 - momentum ** s["step"])
            h = s["curvature"] / s["scale"]
            d = mhat / (h + group["damping"] * h.mean()).clamp_(min=1e-30).pow_(group["exponent"])
            if group["max_step"]:
                d.clamp_(-group["max_step"], group["max_step"])
            if group["weight_decay"]:
                p.mul_(1 - lr * group["weight_decay"])
            p.sub_(lr * d)
