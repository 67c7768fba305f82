"""Damped Newton steps with the diagonal of the generalized Gauss-Newton matrix."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from curvopt.optim.base import EngineOptimizer
from curvopt.quantities import DiagGGNExact, DiagGGNMC, Quantity

# Logarithm of the largest rate: on a plane, or in a long warm-up, gradients agree for ever.
LARGEST = math.log(100)

# Elements of a block: 256 KiB of float32.
BLOCK = 1 << 16


class DiagGGNOptimizer(EngineOptimizer):
    r"""Damped Newton steps with the GGN's diagonal, bounded, at a rate that finds itself.

    With the gradient g, D the diagonal of the generalized Gauss-Newton matrix of the loss, all
    elementwise, one tensor of parameters at a time:

    .. math::
        m &\leftarrow \mu m + (1 - \mu) g, \qquad
        h \leftarrow \beta h + (1 - \beta) D \quad \text{(when D is measured)} \\
        u &= \hat m / (\hat h + c \operatorname{mean}(\hat h)), \qquad
        e \leftarrow \mu e + (1 - \mu) \|g\|^2 \\
        \gamma &\leftarrow \gamma \exp \Bigl(\kappa \frac{r - \rho}{1 - \rho}\Bigr), \qquad
        r = \|\hat m\|^2 / \hat e, \qquad
        \rho = \frac{(1 - \mu)(1 + \mu^t)}{(1 + \mu)(1 - \mu^t)} \\
        \theta &\leftarrow \theta - \mathrm{lr} \,
            (\gamma u \min(1, \mathrm{max\_step} / \operatorname{rms}(u)) + \lambda \theta)

    where the hats are bias corrections and gamma starts at 1 and is 100 at most. Why each part
    is there:

    * D is a *sketch*: one more backward column gives an unbiased estimate, and every
      `curvature_every` steps is often enough, so that a step costs about as much as Adam's.
    * The damping is a share c of the tensor's mean curvature: under cross entropy curvature
      vanishes as the model learns, and a fixed damping would drift to gradient descent. Where h is
      zero throughout, the damping is c itself: plain gradient descent for ``damping=1``.
    * A diagonal ignores correlations, so a full step is far too long (``lr=1`` without a bound
      diverges on any network). The bound makes lr the largest root mean square of a step at
      gamma = 1. With ``max_step=float("inf")`` and ``adaptation=0`` it is the classic damped
      Newton step.
    * How long a step may be depends on the problem, and changes while it is solved. r tells: it is
      1 if the last gradients all agree, rho if they are independent noise. While they agree the
      rate grows; where they turn back and forth it shrinks, until signal and noise balance. Steps
      start as long as Adam's and end short, without a schedule; logistic regression finds ten
      times the rate of a deep network.

    When not to use it: with layers that couple the samples, such as batch norm in training mode
    (their GGN has no per-sample parts); where steps are cheap and the learning rate is tuned
    anyway, SGD with momentum gets as far.

    Args:
        params: parameters, (name, parameter) pairs, or parameter groups.
        lr: largest root mean square of a tensor's step before the rate adapts; of an unbounded
            step, the share of the Newton step. Default 1e-3, Adam's; half or twice as much makes
            little difference. A schedule multiplies the adapted rate.
        damping: c, in units of the tensor's mean curvature; 0 divides by h alone and leaves
            elements without curvature where they are. Default 0.1. Takes effect when the curvature
            is measured next.
        momentum: :math:`\mu`. Default 0.9. Without momentum the rate does not adapt.
        curvature_decay: :math:`\beta`, per measurement. Default 0.95.
        max_step: the largest root mean square of u. Default 1; infinite: no bound.
        adaptation: :math:`\kappa`, how fast the rate adapts: at most by the factor
            :math:`e^\kappa` a step. Default 0.3; 0 keeps the rate as it is.
        weight_decay: :math:`\lambda`, decoupled as in AdamW. Default 0.
        curvature_every: steps from one measurement of D to the next; more at the beginning, at
            steps 0, 1, 2, 4, 8 and so on. Default 10.
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
        Measured with the defaults on MNIST, batches of 128, medians of three seeds: after two
        epochs an MLP 784-1000-500-100-10 has 97.9 % of the test images right (Adam 97.2 %, SGD with
        momentum 97.1 %); logistic regression reaches 88.6 % in 63 steps (357, 105).

    References:
        Dangel, Kunstner and Hennig 2020, "BackPACK", arXiv 1912.10985 (the damped step); Liu et
        al. 2023, "Sophia", arXiv 2305.14342 (sketched, amortized, bounded); Pflug 1990,
        "Non-asymptotic confidence bounds for stochastic approximation algorithms with constant step
        size", and Baydin et al. 2018, arXiv 1703.04782 (the rate follows the products of successive
        gradients). Departures: the sketch has random signs in place of sampled labels, the bound is
        on the tensor's root mean square in place of each element, the damping is relative, and the
        rate is led by the signal in the momentum, whose level under noise is known.
    """

    saved: ClassVar[tuple[str, ...]] = ("steps", "waiting")
    #: A parameter needs its curvature before its first step.
    waiting = True

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        damping: float = 0.1,
        *,
        momentum: float = 0.9,
        curvature_decay: float = 0.95,
        max_step: float = 1.0,
        adaptation: float = 0.3,
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
            max_step=max_step, adaptation=adaptation, weight_decay=weight_decay, maximize=maximize,
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
        if not 0 <= group["adaptation"] < float("inf"):
            raise ValueError(f"Invalid adaptation: {group['adaptation']}")

    def add_param_group(self, param_group: dict[str, Any]) -> None:  # noqa: D102 (as in torch)
        super().add_param_group(param_group)
        self.waiting = True

    def _wanted(self) -> list[Quantity]:
        steps, every = self.steps, self.curvature_every
        early = steps < every and steps & (steps - 1) == 0
        if not (early or self.waiting or steps % every == 0):
            return []
        if self.estimator == "exact":
            return [DiagGGNExact()]
        return [DiagGGNMC(self.samples, generator=self.generator)]

    def _update(self) -> None:
        measured = [part for values in self.collected for part in values.values()]
        self.waiting = False
        for group in self.param_groups:
            moving = []
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
                moving.append((p, p.grad, state))
            _move(moving, group)


def _measure(state: dict[str, Any], group: dict[str, Any], parts: list[Tensor]) -> None:
    """Average the curvature, and invert it for the steps to come."""
    decay, damping = group["curvature_decay"], group["damping"]
    h, total = state["curvature"], parts[0]
    for part in parts[1:]:  # of several backward passes in one step
        total = total + part
    h.lerp_(total.to(h.dtype), 1 - decay)
    # What fades away without gradients ends as denormal numbers, which are slow, and stays so.
    m, info = state["momentum_buffer"], torch.finfo(h.dtype)
    nothing = info.tiny / info.eps
    torch.hardshrink(m, nothing, out=m)
    state["weight"] = 1 - decay * (1 - state["weight"])
    mean = h.mean() / state["weight"]
    shift = torch.where(mean > nothing, damping * mean, damping)  # whose inverse is a number
    if "inverse" not in state:
        state["inverse"] = torch.empty_like(h)
    inverse = state["inverse"]
    torch.add(shift, h, alpha=1 / state["weight"], out=inverse).reciprocal_()
    if not damping:  # an element without curvature has no Newton step: it stays
        inverse.nan_to_num_(posinf=0)


def _move(moving: list[tuple[Tensor, Tensor, dict[str, Any]]], group: dict[str, Any]) -> None:
    """Move tensors, given their gradients and state."""
    if not moving:
        return
    momentum, adapts = group["momentum"], group["momentum"] and group["adaptation"]
    means = [state["momentum_buffer"] for _, _, state in moving]
    grads = [grad.to(m.dtype) for (_, grad, _), m in zip(moving, means, strict=True)]
    torch._foreach_lerp_(means, grads, 1 - momentum)
    squares = [
        _product_square(state["momentum_buffer"], state["inverse"]) for _, _, state in moving
    ]
    if adapts:
        squares += [_square(x) for x in (*grads, *means)]
    # Fetched from their device at once.
    numbers = torch.stack([square.to(squares[0].device) for square in squares]).tolist()
    for index, (p, _, state) in enumerate(moving):
        state["step"] += 1
        correction = 1 / (1 - momentum ** state["step"])
        m, inverse = state["momentum_buffer"], state["inverse"]
        if math.isinf(numbers[index]):  # the square alone may be too large
            numbers[index] = float(_square(m.double() * inverse.double()))
        length = numbers[index] ** 0.5 * correction
        factor = float(group["lr"]) * correction
        if adapts:
            gradient, mean = numbers[index + len(means)], numbers[index + 2 * len(means)]
            _adapt(state, group, gradient, mean * correction**2)
        factor *= math.exp(state.get("log_rate", 0.0))
        bound = group["max_step"] * p.numel() ** 0.5
        if length > bound:
            factor *= bound / length
        if group["weight_decay"]:
            p.mul_(1 - float(group["lr"]) * group["weight_decay"])
        factor = factor if group["maximize"] else -factor
        if m.dtype == p.dtype:
            p.addcmul_(m, inverse, value=factor)
        else:
            p.add_((m * inverse).mul_(factor).to(p.dtype))


def _square(x: Tensor) -> Tensor:
    """Squared norm; a norm would form squares too small to be normal numbers, which are slow."""
    flat = x.reshape(-1)
    return torch.dot(flat, flat)


def _product_square(a: Tensor, b: Tensor) -> Tensor:
    """Squared norm of the elementwise product, which on a CPU costs less in blocks than whole."""
    plain = a.is_contiguous() and b.is_contiguous()
    if a.device.type != "cpu" or a.numel() <= BLOCK or not plain:
        return _square(a * b)
    scratch = a.new_empty(BLOCK)  # large fresh memory is slow: the system clears it page by page
    pairs = zip(a.view(-1).split(BLOCK), b.view(-1).split(BLOCK), strict=True)
    return torch.stack([_square(torch.mul(x, y, out=scratch[: len(x)])) for x, y in pairs]).sum()


def _adapt(state: dict[str, Any], group: dict[str, Any], gradient: float, mean: float) -> None:
    """Adapt the rate to the share of signal, given the squares of g and of its corrected mean."""
    mu, t = group["momentum"], state["step"]
    if not math.isfinite(gradient):  # it would stay in the average for ever
        return
    # Its own weight: adaptation may have been off for a while.
    state["energy"] = mu * state.get("energy", 0.0) + (1 - mu) * gradient
    state["energy_weight"] = mu * state.get("energy_weight", 0.0) + 1 - mu
    energy = state["energy"] / state["energy_weight"]
    noise = (1 - mu) * (1 + mu**t) / ((1 + mu) * (1 - mu**t))
    if energy > 0 and noise < 1 and group["lr"] > 0:  # what stands still agrees
        signal = min(1.0, mean / energy)
        grown = group["adaptation"] * (signal - noise) / (1 - noise)
        state["log_rate"] = min(state.get("log_rate", 0.0) + grown, LARGEST)
