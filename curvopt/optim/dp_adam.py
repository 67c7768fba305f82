"""Adam on private gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor

from curvopt.axes.views import ViewOrder
from curvopt.optim.accounted import Sampler
from curvopt.optim.clip import Clipping
from curvopt.optim.private import PrivateOptimizer
from curvopt.optim.state import held
from curvopt.privacy.checks import require
from curvopt.privacy.clipping import QuantileClipping
from curvopt.privacy.schedules import Schedule


class DPAdam(PrivateOptimizer):
    r"""Differentially private Adam, the noise's variance taken off the second moment.

    With the private gradient g of `DPSGD`, whose noise has variance
    :math:`\Phi = (\sigma C / B)^2` per element,

    .. math::
        m \leftarrow \beta_1 m + (1 - \beta_1) g, \quad
        v \leftarrow \beta_2 v + (1 - \beta_2) (g^2 - \Phi), \quad
        \theta \leftarrow \theta - \mathrm{lr}\, \hat m / \sqrt{\max(\hat v, \epsilon^2)}

    with both moments bias-corrected. Without the correction :math:`\Phi` dominates v, and Adam is
    SGD with momentum.

    Args:
        params: parameters, (name, parameter) pairs, or parameter groups.
        lr: learning rate. Default 1e-3, Adam's.
        betas: decay of the moments.
        eps: the root of the smallest corrected second moment. It bounds the step where the
            correction leaves nothing, so it is much larger than Adam's. Default 1e-3; a good value
            is the noise's standard deviation :math:`\sigma C / B` or somewhat less.
        weight_decay: decoupled, as in `torch.optim.AdamW`.
        maximize: ascend instead of descend.
        noise_multiplier, max_grad_norm, expected_batch_size: sigma, C and B of `DPSGD`, which has
            more to say of these and all that follow.
        clipping: ``"flat"``, ``"per_layer"`` or ``"automatic"``.
        sampler: what draws the batches, or its kind.
        sample_rate: q, where the sampler does not say it.
        num_samples: size of the data set, where the sampler does not say it.
        generator: of the noise, to repeat a run.
        secure_noise: sums of four float64 draws.
        process_group: whose batches make up one logical batch.
        batch_size: number of samples, where the data flow leaves two readings.
        reduction: what a sample's own loss is, where the loss does not say it.
        views, view_order: rows per sample, and their order.

    Raises:
        CurvoptError: as `DPSGD`.

    Example:
        >>> model = torch.nn.Linear(4, 3)
        >>> opt = curvopt.DPAdam(
        ...     model.parameters(), noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=8
        ... )

    References:
        Tang et al. 2023, arXiv 2304.11208 and 2312.14334.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-3,
        weight_decay: float = 0.0,
        maximize: bool = False,
        noise_multiplier: float | Schedule,
        max_grad_norm: float | Schedule | QuantileClipping,
        expected_batch_size: float,
        clipping: Clipping = "flat",
        sampler: Sampler = "none",
        sample_rate: float | None = None,
        num_samples: int | None = None,
        generator: Generator | None = None,
        secure_noise: bool = False,
        process_group: Any = None,
        batch_size: int | None = None,
        reduction: str | None = None,
        views: int = 1,
        view_order: ViewOrder = "sample",
    ):
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, maximize=maximize)
        super().__init__(
            params,
            defaults,
            noise_multiplier=noise_multiplier,
            max_grad_norm=max_grad_norm,
            expected_batch_size=expected_batch_size,
            clipping=clipping,
            sampler=sampler,
            sample_rate=sample_rate,
            num_samples=num_samples,
            generator=generator,
            secure_noise=secure_noise,
            process_group=process_group,
            batch_size=batch_size,
            reduction=reduction,
            views=views,
            view_order=view_order,
        )

    def _validate(self, group: dict[str, Any]) -> None:
        super()._validate(group)
        require(all(0 <= b < 1 for b in group["betas"]), "betas", group["betas"], "in [0, 1)")
        require(group["eps"] > 0, "eps", group["eps"], "must be positive")

    def _begun(self, p: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        return dict(step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))

    def _move(
        self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]
    ) -> Callable[[], None]:
        lr, (beta1, beta2) = float(group["lr"]), group["betas"]
        shrink, sign = 1 - lr * group["weight_decay"], -1 if group["maximize"] else 1
        variance = (self._std / self.expected_batch_size) ** 2

        def average(m: Tensor, v: Tensor, grad: Tensor) -> None:
            """In place, without memory: once on copies, and once in earnest."""
            m.mul_(beta1).add_(grad, alpha=sign * (1 - beta1))
            v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2).sub_((1 - beta2) * variance)

        states, steps = [], []
        for p, grad in zip(params, grads, strict=True):
            state = dict(self.state[p]) if p in self.state else {}
            state = state or self._begun(p, group)
            state["step"] += 1
            m, v = (held(state, key, p, self._name).clone() for key in ("exp_avg", "exp_avg_sq"))
            average(m, v, grad)
            m.div_(1 - beta1 ** state["step"])
            v.div_(1 - beta2 ** state["step"]).clamp_(min=group["eps"] ** 2).sqrt_()
            states.append(state)
            steps.append(m.div_(v))

        def move() -> None:
            for p, grad, state, step in zip(params, grads, states, steps, strict=True):
                average(state["exp_avg"], state["exp_avg_sq"], grad)
                self.state[p].update(state)
                if shrink != 1:
                    p.mul_(shrink)
                p.sub_(step, alpha=lr)

        return move
