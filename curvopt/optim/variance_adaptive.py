"""SGD with momentum, each coordinate slowed down where the samples of a batch disagree."""

from __future__ import annotations

from collections import defaultdict
from typing import Any, ClassVar

import torch
from torch import Tensor

from curvopt.dtypes import at_least_float32
from curvopt.engine.computation import Computation
from curvopt.errors import CurvoptError
from curvopt.optim import stats
from curvopt.optim.base import EngineOptimizer
from curvopt.optim.joined import Backward
from curvopt.optim.lead import put
from curvopt.optim.noise import Batch, Moments, Noise, guessed, observed
from curvopt.optim.squares import square
from curvopt.optim.state import held
from curvopt.optim.variance_plan import Plan, Row, floor
from curvopt.parallel.shards import local, over_shards
from curvopt.quantities import Quantity

# Squared cosine from which a gradient counts as scaled: rounding alone leaves it far closer to 1.
ALIKE = 0.999


class VarianceAdaptiveSGD(EngineOptimizer):
    r"""SVAG: SGD, with momentum, scaled by the signal-to-noise ratio of each gradient element.

    The samples' gradients :math:`g_n` tell the variance of their mean g from this very batch, in
    one backward pass with g itself. With N samples, all elementwise:

    .. math::
        S &\leftarrow \beta S + (1 - \beta) \tfrac{1}{N - 1} \sum_n (g_n - g)^2 \\
        b &\leftarrow \mu b + g, \qquad r \leftarrow \mu^2 r + 1 / N \\
        \gamma &= b^2 / (b^2 + r S), \qquad
        \theta \leftarrow \theta - \mathrm{lr} \, (\gamma b + \lambda \theta)

    :math:`r S` is the variance of b, and :math:`\gamma` minimizes the expected squared error of
    :math:`\gamma b`. It is 1 for a noiseless gradient: the step is then that of
    ``torch.optim.SGD(lr, momentum)``, and `lr` means the same.

    g is `p.grad`; a hook on a parameter changes it, and its :math:`g_n` stay what they were.

    Departures from the paper: it guesses S from moving averages over steps, where this is
    measured; its :math:`\rho` is r for constant N; its momentum is a bias-corrected mean, smaller
    than torch's buffer b by :math:`(1 - \mu) / (1 - \mu^t)`.

    When not to use it: one sample per batch (or one sequence) has no variance within. S is then
    guessed from how far g is from the mean of the gradients before, and is noisy;
    `torch.optim.Adam` does that job. Also with layers that couple the samples, as batch norm in
    training mode.

    Args:
        params: parameters, (name, parameter) pairs, or parameter groups.
        lr: learning rate, as in `torch.optim.SGD`, up to twice as large, for noise slows it down.
            Default 0.1: within a few percent of SGD's best loss on three networks on MNIST.
        momentum: :math:`\mu`. Default 0.9; 0 is SVAG without momentum.
        weight_decay: :math:`\lambda`, decoupled from gradient and factor. Default 0.
        debiased: :math:`\gamma = \max(0, 1 - r S / b^2)`. Where there is nothing but noise, the
            plug-in default averages 0.34 and this one 0.15.
        maximize: ascend instead of descend.
        foreach: update the parameters of a group together (the default on accelerators), or one by
            one (it takes less memory). On a CPU small ones go together by default.
        variance_every: a tensor's own gradients from one measurement of its S to the next;
            :math:`\beta = \mu` to this power. S changes slowly: on MNIST every 10 steps, the
            default, trains like every step, and a step that measures costs up to three times one
            that does not. N is read when S is.
        noise_decay: of the averages behind `noise`, per measurement. Default 0.9.
        noise_tests: measure what the inner-product and orthogonality tests in `noise` need: one
            more product per layer, with S; not over several processes.
        process_group: the processes of a step, where nothing wraps the model: their gradients are
            averaged in `step`. Default: those of the wrapper (``DistributedDataParallel``,
            ``fully_shard``).
        batch_size: number of samples, where the data flow leaves two readings; checked against it.
        reduction: ``"mean"`` or ``"sum"``: what a sample's own loss is where a sum is scaled by
            something that may be a count: N times its part of the loss, or its part.

    Raises:
        ValueError: a setting is out of range.
        CurvoptError: in `step`: the variance cannot be computed exactly; parameters, gradients and
            state are as before.

    Note:
        `stats` tells ``gain``, what :math:`\gamma` leaves of the step's norm; ``step_rms``, its
        root mean square without weight decay; ``variance``, the mean of S; and what is in `noise`
        as ``noise/scale`` and so on.

        Backward passes over micro-batches in one step add up exactly. A gradient that is
        scaled after `backward()`, as by clipping norms, has its variance scaled alike, tensor by
        tensor; one that is changed otherwise keeps it. A summed loss works as well as a mean, but
        only a mean lets N change from step to step. For half-precision parameters b and S are
        float32.

    Example:
        >>> model = torch.nn.Linear(4, 3)
        >>> opt = curvopt.VarianceAdaptiveSGD(model.parameters())
        >>> x, y = torch.randn(8, 4), torch.randint(3, (8,))
        >>> loss = opt.step(lambda: torch.nn.functional.cross_entropy(model(x), y))
        >>> opt.noise.scale > 0  # samples at which noise and signal are even
        True

    References:
        Balles and Hennig 2018, "Dissecting Adam", arXiv 1705.07774.
    """

    saved: ClassVar[tuple[str, ...]] = ("steps", "samples", "averages")
    takes_shards = looks_away = True

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.1,
        momentum: float = 0.9,
        *,
        weight_decay: float = 0.0,
        debiased: bool = False,
        maximize: bool = False,
        foreach: bool | None = None,
        variance_every: int = 10,
        noise_decay: float = 0.9,
        noise_tests: bool = False,
        process_group: Any = None,
        batch_size: int | None = None,
        reduction: str | None = None,
    ):
        if variance_every < 1:
            raise ValueError(f"Invalid variance_every: {variance_every}")
        if not 0 <= noise_decay < 1:
            raise ValueError(f"Invalid noise_decay: {noise_decay}")
        defaults = dict(
            lr=lr, momentum=momentum, weight_decay=weight_decay, debiased=debiased,
            maximize=maximize, foreach=foreach,
        )  # fmt: skip
        super().__init__(
            params,
            defaults,
            batch_size=batch_size,
            reduction=reduction,
            process_group=process_group,
        )
        self.variance_every, self.noise_decay = variance_every, noise_decay
        self.noise_tests = noise_tests
        self.samples = 0
        self.averages: dict[str, Tensor] = {}

    def _validate(self, group: dict[str, Any]) -> None:
        super()._validate(group)
        if not group["momentum"] < 1:
            raise ValueError(f"Invalid momentum: {group['momentum']}")

    # -- backward passes --------------------------------------------------------------------------

    def _due(self, p: Tensor) -> bool:
        """Whether the variance of a parameter is to be measured with its next gradient."""
        if p not in self.state:
            return False
        count = self.state[p].get("step")
        # A state of another optimizer: the step says what is wrong with it.
        known = isinstance(count, int) and self.state[p].get("measured")
        return not known or count % self.variance_every == 0

    def _measures(self) -> bool:
        params = [p for p in self._parameters() if p.requires_grad]
        return not self.state or any(map(self._due, params))

    def _wanted(self) -> list[Quantity]:
        return [Moments(self.noise_tests)] if self._measures() else []

    def _accumulate(
        self, computation: Computation, quantities: list[Quantity], backward: Backward
    ) -> None:
        (moments,) = quantities
        values: dict[str, Any] = {}
        owner = self._wrappers.shards.owner
        computation.prepare()
        reached = {owner(p) for p in computation.reached_parameters}
        if not self._ranks.many and not any(p not in self.state or self._due(p) for p in reached):
            backward()
            self._add(Batch.made(computation.samples, computation.loss.detach(), {}, {}))
            return
        with computation.watching([moments], values):
            backward(computation.derives)
        self._add(Batch.of(computation, moments, values[moments.field], owner))

    def _add(self, batch: Batch) -> None:
        self.collected[:] = [self.collected[0].joined(batch) if self.collected else batch]

    def _rescale(self, inverse: float) -> None:
        self.collected[:] = [batch and batch.scaled(inverse) for batch in self.collected]

    def _join(self) -> None:
        (batch,) = self.collected
        count, add = self._ranks.place[1], self._ranks.sums
        if count > 1:
            batch = batch.over(count, add, self._sums, keep=not self._unchanged())
        batch.sums, batch.scatter = self._shards(batch.sums), self._shards(batch.scatter)
        self.collected[:] = [batch]

    # -- the step ---------------------------------------------------------------------------------

    def _update(self) -> None:
        batch = self.collected[0] or None  # {} after a plain backward pass
        if batch and not batch.scatter:  # nothing was due
            batch = None
        n = batch.samples if batch else self.samples
        scale = n * n / (n - 1) if batch and n > 1 else 1.0
        if batch and n > 1 and not self._unchanged():
            batch.scatter = self._rescaled(batch)
        plans = [
            plan for group in self.param_groups for plan in self._plans(group, batch, n, scale)
        ]
        averages = self._observed(batch) if batch and n > 1 else self.averages
        # Nothing has changed so far.
        self.samples, self.averages = n, averages
        for plan in plans:
            plan.carry_out(self.state)

    def _plans(
        self, group: dict[str, Any], batch: Batch | None, n: int, scale: float
    ) -> list[Plan]:
        """What the step does to a group, parameters that are treated alike together."""
        alike: dict[Any, list[Row]] = defaultdict(list)  # all, unless some were frozen before
        for p in group["params"]:
            if p.grad is not None:
                key, row = self._row(p, group["momentum"], batch, n)
                alike[key].append(row)
        return [
            Plan(group, spread, share, share * scale, rows)
            for (spread, share, _), rows in alike.items()
        ]

    def _begun(self, p: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        b = torch.zeros_like(p, dtype=at_least_float32(p.dtype))
        # S is positive: 0 / 0 must not happen.
        variance = torch.full_like(b, floor(b.dtype))
        return dict(step=0, spread=0.0, measured=0, momentum_buffer=b, variance=variance)

    def _row(self, p: Tensor, mu: float, batch: Batch | None, n: int) -> tuple[Any, Row]:
        """What moving a parameter needs: r, the share of news in S, its dtype; and the rest."""
        state = dict(self.state[p]) if p in self.state else {}
        state = state or self._begun(p, {})
        b, s = (local(held(state, key, p, self._name)) for key in ("momentum_buffer", "variance"))
        grad = local(p.grad).to(b.dtype)
        decay, scatter = mu, None
        due = p not in self.state or self._due(p)
        if n > 1 and batch and p in batch.scatter and due:
            decay, scatter = mu**self.variance_every, local(batch.scatter[p])
        elif n == 1 and state["step"]:
            scatter = guessed(grad, b, state["step"], mu)
        share = 0.0
        if scatter is not None:
            state["measured"] += 1
            share = max(1 / state["measured"], 1 - decay)  # a mean at first
        state["spread"] = mu**2 * state["spread"] + 1 / n
        state["step"] += 1
        return (state["spread"], share, p.dtype), Row(local(p), grad, b, s, scatter, state, p)

    def _rescaled(self, batch: Batch) -> dict[Tensor, Tensor]:
        """The scatters of gradients that were changed after the backward pass.

        One that was scaled, as by clipping norms, has its samples' gradients scaled alike; one that
        was changed in another way keeps them.
        """
        params = [p for p in batch.sums if p.grad is not None]
        sums = [local(batch.sums[p]) for p in params]
        pairs = [(local(p.grad).to(was), was) for p, was in zip(params, sums, strict=True)]
        products = [(square(now), _dot(now, was), square(was)) for now, was in pairs]
        parts = torch.stack([torch.stack(row) for row in products])
        after, along, before = over_shards(parts, params).unbind(1)
        is_scaled = along.square() >= ALIKE * after * before
        factors = torch.where(is_scaled & (before > 0), along / before, 1.0).square()
        of = dict(zip(params, factors, strict=True))
        return {p: part * of[p] if p in of else part for p, part in batch.scatter.items()}

    # -- noise ------------------------------------------------------------------------------------

    def _observed(self, batch: Batch) -> dict[str, Tensor]:
        """Averages of what `noise` needs; numerators and denominators apart."""
        rates = {p: float(group["lr"]) for group in self.param_groups for p in group["params"]}
        (row,) = put([[rates[p] for p in batch.scatter]], batch.spreads)
        return observed(self.averages, batch, row, self.noise_decay)

    def _stats(self) -> stats.Stats:
        noise = self.noise if self.averages else None
        return stats.variance_adaptive(self.param_groups, self.state, noise)

    @property
    def noise(self) -> Noise:
        """How noisy the gradient is: what batch size to choose, averaged over the last steps.

        Raises:
            CurvoptError: no step with two samples or more was taken so far.
        """
        if not self.averages:
            raise CurvoptError("the noise is known after a step with two samples or more")
        return Noise.of(self.samples, self.averages)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.dot(a.reshape(-1), b.reshape(-1))
