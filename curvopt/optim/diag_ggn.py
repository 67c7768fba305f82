"""Damped Newton steps with the diagonal of the generalized Gauss-Newton matrix."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from curvopt.optim.base import EngineOptimizer
from curvopt.quantities import DiagGGNExact, DiagGGNMC, Quantity


class DiagGGNOptimizer(EngineOptimizer):
    r"""Damped Newton steps with the GGN's diagonal, bounded in length: no tuning needed.

    With the gradient g, D the diagonal of the generalized Gauss-Newton matrix of the loss, all
    elementwise, one tensor of parameters at a time:

    .. math::
        m &\leftarrow \mu m + (1 - \mu) g, \qquad
        h \leftarrow \beta h + (1 - \beta) D \quad \text{(when D is measured)} \\
        u &= \hat m / (\hat h + c \operatorname{mean}(\hat h)), \qquad
        \theta \leftarrow \theta - \mathrm{lr} \, (u \min(1, \rho / \operatorname{rms}(u))
            + \lambda \theta)

    where the hats are bias corrections. Why each part is there:

    * D is a *sketch*: one more backward column gives an unbiased estimate, and every
      `curvature_every` steps is often enough, so that a step costs about as much as Adam's.
    * The damping is a share c of the tensor's mean curvature: under cross entropy curvature
      vanishes as the model learns, and a fixed damping would drift to gradient descent. Where h is
      zero throughout, the damping is c itself: plain gradient descent for ``damping=1``.
    * A diagonal ignores correlations, so a full step is far too long (``lr=1`` without a bound
      diverges on any network). The bound makes lr the largest root mean square of a step. With
      ``max_step=float("inf")`` it is the classic damped Newton step.

    When not to use it: with layers that couple the samples, such as batch norm in training mode
    (their GGN has no per-sample parts); where steps are cheap and the learning rate is tuned
    anyway, SGD with momentum gets as far.

    Args:
        params: parameters, (name, parameter) pairs, or parameter groups.
        lr: largest root mean square of a tensor's step; of an unbounded step, the share of the
            Newton step. Default 5e-4: a bounded step keeps its length where Adam's is shortened by
            gradient noise, so that half of Adam's rate suits.
        damping: c, in units of the tensor's mean curvature; 0 divides by h alone and leaves
            elements without curvature where they are. Default 0.1. Takes effect when the curvature
            is measured next.
        momentum: :math:`\mu`. Default 0.9.
        curvature_decay: :math:`\beta`, per measurement. Default 0.95.
        max_step: :math:`\rho`, the largest root mean square of u. Default 1; infinite: no bound.
        weight_decay: :math:`\lambda`, decoupled as in AdamW. Default 0.
        curvature_every: steps from one measurement of D to the next, but each of the first
            `curvature_every` steps measures it. Default 10.
        estimator: ``"sketch"`` (default), or ``"exact"``: one backward column per class, for small
            problems.
        samples: number of sketches to average. Default 1.
        generator: source of the sketch's signs, on the parameters' device; torch's global one by
            default.
        maximize: ascend instead of descend.
        batch_size: number of samples, where the model's first op and the loss do not tell.
        reduction: ``"mean"`` or ``"sum"``: how a loss written by hand is reduced over samples.

    Raises:
        ValueError: a setting is out of range.
        CurvoptError: in `step`: the curvature cannot be computed exactly; parameters, gradients
            and state are as before.

    Example:
        >>> model = torch.nn.Linear(4, 3)
        >>> opt = curvopt.DiagGGNOptimizer(model.parameters())
        >>> x, y = torch.randn(8, 4), torch.randint(3, (8,))
        >>> loss = opt.step(lambda: torch.nn.functional.cross_entropy(model(x), y))

    Note:
        Measured on MNIST, batches of 128, an MLP 784-512-256-10, 4 epochs, seeds 0 to 2: test
        accuracy 97.9, 98.0 and 97.7 %, training loss of the last epoch 0.037 to 0.039 (Adam 1e-3,
        seed 0: 0.048). With lr=1e-3: one epoch of a net with two convolutions 98.6, 98.7 and
        98.8 % (Adam 98.3, 98.0, 98.1), 4 epochs of logistic regression 92.3, 92.4 and 92.5 %
        (Adam 92.1 each), but the MLP ends between 96.8 and 97.7 %, for its steps stay too long.

    References:
        Dangel, Kunstner and Hennig 2020, "BackPACK", arXiv 1912.10985 (the damped step); Liu et
        al. 2023, "Sophia", arXiv 2305.14342 (sketched, amortized, bounded). Departures: the sketch
        has random signs in place of sampled labels, the bound is on the tensor's root mean square
        in place of each element, and the damping is relative.
    """

    saved: ClassVar[tuple[str, ...]] = ("steps", "waiting")
    #: A parameter needs its curvature before its first step.
    waiting = True

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 5e-4,
        damping: float = 0.1,
        *,
        momentum: float = 0.9,
        curvature_decay: float = 0.95,
        max_step: float = 1.0,
        weight_decay: float = 0.0,
        curvature_every: int = 10,
        estimator: str = "sketch",
        samples: int = 1,
        generator: Generator | None = None,
        maximize: bool = False,
        batch_size: int | None = None,
        reduction: str | None = None,
    ):
        if curvature_every < 1:
            raise ValueError(f"Invalid curvature_every: {curvature_every}")
        if estimator not in ("sketch", "exact"):
            raise ValueError(f"Invalid estimator: {estimator!r} (use 'sketch' or 'exact')")
        defaults = dict(
            lr=lr, damping=damping, momentum=momentum, curvature_decay=curvature_decay,
            max_step=max_step, weight_decay=weight_decay, maximize=maximize,
        )  # fmt: skip
        super().__init__(
            params, defaults, batch_size=batch_size, reduction=reduction, generator=generator
        )
        self.curvature_every, self.estimator, self.samples = curvature_every, estimator, samples
        self._wanted()  # refuses a wrong number of samples now

    def _validate(self, group: dict[str, Any]) -> None:
        super()._validate(group)
        for key in ("momentum", "curvature_decay"):
            if not 0 <= group[key] < 1:
                raise ValueError(f"Invalid {key}: {group[key]}")
        if not 0 <= group["damping"] < float("inf"):
            raise ValueError(f"Invalid damping: {group['damping']}")
        if not group["max_step"] > 0:
            raise ValueError(f"Invalid max_step: {group['max_step']}")

    def add_param_group(self, param_group: dict[str, Any]) -> None:  # noqa: D102 (as in torch)
        super().add_param_group(param_group)
        self.waiting = True

    def _wanted(self) -> list[Quantity]:
        early = self.steps < self.curvature_every
        if not (early or self.waiting or self.steps % self.curvature_every == 0):
            return []
        if self.estimator == "exact":
            return [DiagGGNExact()]
        return [DiagGGNMC(self.samples, generator=self.generator)]

    def _update(self) -> None:
        measured = [part for values in self.collected for part in values.values()]
        self.waiting = False
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p not in self.state and not any(p in part for part in measured):
                    self.waiting = True  # it takes part for the first time: measured next
                    continue
                state = self.state[p]
                if not state:
                    buffer = torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32))
                    state.update(step=0, weight=0.0, momentum_buffer=buffer)
                    state["curvature"] = torch.zeros_like(buffer)
                parts = [part[p] for part in measured if p in part]
                if parts:
                    _measure(state, group, parts)
                _move(p, p.grad, state, group)


def _measure(state: dict[str, Any], group: dict[str, Any], parts: list[Tensor]) -> None:
    """Average the curvature, and invert it for the steps to come."""
    decay, damping = group["curvature_decay"], group["damping"]
    h, total = state["curvature"], parts[0]
    for part in parts[1:]:  # of several backward passes in one step
        total = total + part
    h.lerp_(total.to(h.dtype), 1 - decay)
    state["weight"] = 1 - decay * (1 - state["weight"])
    mean = h.mean() / state["weight"]
    shift = torch.where(mean > 0, damping * mean, damping)
    inverse = torch.add(shift, h, alpha=1 / state["weight"]).reciprocal_()
    # Without damping, an element without curvature has no Newton step: it stays.
    state["inverse"] = inverse if damping else inverse.nan_to_num_(posinf=0)


def _move(p: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    lr, momentum = group["lr"], group["momentum"]
    state["step"] += 1
    m = state["momentum_buffer"]
    m.lerp_(grad.to(m.dtype), 1 - momentum)
    u = m * state["inverse"]
    correction = 1 / (1 - momentum ** state["step"])
    factor = torch.as_tensor(correction, dtype=m.dtype, device=m.device)
    if group["max_step"] < float("inf"):
        rms = torch.linalg.vector_norm(u) / max(1, u.numel()) ** 0.5
        factor = torch.minimum(factor, group["max_step"] / rms)  # minimum(1, inf) where u is 0
    if group["weight_decay"]:
        p.mul_(1 - lr * group["weight_decay"])
    factor = factor * (lr if group["maximize"] else -lr)
    if u.dtype == p.dtype:
        p.addcmul_(u, factor)
    else:
        p.add_(u.mul_(factor).to(p.dtype))
