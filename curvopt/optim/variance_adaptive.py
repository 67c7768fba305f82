"""SGD with momentum, each coordinate slowed down where the samples of a batch disagree."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from curvopt.engine.compute import Computation
from curvopt.errors import CurvoptError
from curvopt.optim.base import EngineOptimizer
from curvopt.quantities.base import Context, Quantity
from curvopt.structures import Structure

# A parameter, its gradient, momentum buffer and S, and what is new in S, if anything.
Row = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]

# Elements of a block: 256 KiB of float32.
BLOCK = 1 << 16


class VarianceAdaptiveSGD(EngineOptimizer):
    r"""SVAG: SGD, with momentum, scaled by the signal-to-noise ratio of each gradient element.

    The samples' gradients :math:`g_n` tell the variance of their mean g from this very batch, in
    one backward pass with g itself. With N samples, all elementwise:

    .. math::
        S &\leftarrow \beta S + (1 - \beta) \tfrac{1}{N - 1} \textstyle\sum_n (g_n - g)^2 \\
        b &\leftarrow \mu b + g, \qquad r \leftarrow \mu^2 r + 1 / N \\
        \gamma &= b^2 / (b^2 + r S), \qquad
        \theta \leftarrow \theta - \mathrm{lr} \, (\gamma b + \lambda \theta)

    :math:`r S` is the variance of b, and :math:`\gamma` minimizes the expected squared error of
    :math:`\gamma b`. It is 1 for a noiseless gradient: the step is then that of
    ``torch.optim.SGD(lr, momentum)``, and `lr` means the same.

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
            one (the default on the CPU; it takes less memory).
        variance_every: steps from one measurement of S to the next; :math:`\beta = \mu` to this
            power. S changes slowly: on MNIST every 10 steps, the default, trains like every step,
            and a step that measures costs up to twice one that does not. N is read when S is.
        noise_decay: of the averages behind `noise`, per measurement. Default 0.9.
        noise_tests: measure what the inner-product and orthogonality tests in `noise` need: one
            more product per layer, with S.
        batch_size: number of samples, where the model's first op and the loss do not tell.
        reduction: ``"mean"`` or ``"sum"``: how a loss written by hand is reduced over samples.

    Raises:
        ValueError: a setting is out of range.
        CurvoptError: in `step`: the variance cannot be computed exactly; parameters, gradients and
            state are as before.

    Note:
        Backward passes over micro-batches in one step add up exactly. A gradient whose norm is
        clipped after `backward()` has its variance clipped alike. A summed loss works as well as
        a mean, but only a mean lets N change from step to step. For half-precision parameters
        b and S are float32.

    Example:
        >>> model = torch.nn.Linear(4, 3)
        >>> opt = curvopt.VarianceAdaptiveSGD(model.parameters())
        >>> x, y = torch.randn(8, 4), torch.randint(3, (8,))
        >>> loss = opt.step(lambda: torch.nn.functional.cross_entropy(model(x), y))
        >>> opt.noise.scale  # samples at which noise and signal are even

    References:
        Balles and Hennig 2018, "Dissecting Adam", arXiv 1705.07774.
    """

    saved: ClassVar[tuple[str, ...]] = ("steps", "samples", "averages")

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
        super().__init__(params, defaults, batch_size=batch_size, reduction=reduction)
        self.variance_every, self.noise_decay = variance_every, noise_decay
        self.noise_tests = noise_tests
        self.samples = 0
        self.averages: dict[str, Tensor] = {}

    def _validate(self, group: dict[str, Any]) -> None:
        super()._validate(group)
        if not group["momentum"] < 1:
            raise ValueError(f"Invalid momentum: {group['momentum']}")

    # -- backward passes --------------------------------------------------------------------------

    def _wanted(self) -> list[Quantity]:
        due = self.steps % self.variance_every == 0
        return [Moments(self.noise_tests)] if due else []

    def _accumulate(self, computation: Computation, quantities: list[Quantity]) -> None:
        (moments,) = quantities
        batch = Batch.of(computation, moments)
        self._add_gradients(computation, batch.sums)
        self.collected[:] = [self.collected[0].joined(batch) if self.collected else batch]

    # -- the step ---------------------------------------------------------------------------------

    def _update(self) -> None:
        batch = self.collected[0] or None  # {} after a plain backward pass
        n = self.samples = batch.samples if batch else self.samples
        scale = n * n / (n - 1) * self._shrunk(batch) if batch and n > 1 else 1.0
        for group in self.param_groups:
            alike: dict[Any, list[Row]] = defaultdict(list)  # all, unless some were frozen before
            for p in group["params"]:
                if p.grad is not None:
                    key, row = self._row(p, group["momentum"], batch)
                    alike[key].append(row)
            together = group["foreach"]
            for (spread, share, dtype), rows in alike.items():
                if together is None:
                    together = rows[0][0].device.type != "cpu"
                new = share * scale
                if together and dtype == rows[0][2].dtype:
                    _move_all(group, spread, share, new, *map(list, zip(*rows, strict=True)))
                    continue
                for row in rows:
                    for block in _blocks(row):
                        _move(group, spread, share, new, *block)
        if batch and n > 1:
            self._observe(batch)

    def _row(self, p: Tensor, mu: float, batch: Batch | None) -> tuple[Any, Row]:
        """What moving a parameter needs: r, the share of news in S, its dtype; and its tensors."""
        state = self.state[p]
        if not state:
            b = torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32))
            # S is positive: 0 / 0 must not happen.
            state.update(step=0, spread=0.0, measured=0, momentum_buffer=b)
            state["variance"] = torch.full_like(b, _floor(b.dtype))
        b, s = state["momentum_buffer"], state["variance"]
        grad = cast(Tensor, p.grad).to(b.dtype)
        decay, scatter = mu, None
        if self.samples > 1 and batch and p in batch.scatter:
            decay, scatter = mu**self.variance_every, batch.scatter[p]
        elif self.samples == 1 and state["step"]:
            scatter = _guess(grad, b, state["step"], mu)
        share = 0.0
        if scatter is not None:
            state["measured"] += 1
            share = max(1 / state["measured"], 1 - decay)  # a mean at first
        state["spread"] = mu**2 * state["spread"] + 1 / self.samples
        state["step"] += 1
        return (state["spread"], share, p.dtype), (p, grad, b, s, scatter)

    def _shrunk(self, batch: Batch) -> float:
        """Squared factor by which ``p.grad`` was clipped since the backward pass."""
        if self._unchanged():
            return 1.0
        now = _squared_norms([p.grad for p in batch.sums if p.grad is not None]).sum()
        return min(1.0, float(now / batch.norms.sum()))

    # -- noise ------------------------------------------------------------------------------------

    def _observe(self, batch: Batch) -> None:
        """Average what `noise` needs; numerators and denominators apart."""
        n = batch.samples
        rates = {p: float(group["lr"]) for group in self.param_groups for p in group["params"]}
        scatters = torch.stack([part.sum() for part in batch.scatter.values()])
        gradient, variance = batch.norms.sum(), n / (n - 1) * scatters.sum()
        weighted = scatters @ scatters.new_tensor([rates[p] for p in batch.scatter])
        seen = {
            "weight": torch.ones_like(gradient),
            "gradient": gradient,
            "variance": variance,
            "trace": n * variance,
            "signal": gradient - variance,
            "loss": batch.loss.to(gradient),
            "cabs": n * n / (n - 1) * weighted,
        }
        if batch.products is not None:
            # With d_n = <z_n, g>: sum_n d_n = |g|^2, and sum_n |z_n|^2 is the scatter + |g|^2 / n.
            energy = scatters.sum() + gradient / n
            seen["tested"] = gradient
            seen["tested squared"] = gradient**2
            seen["along"] = n / (n - 1) * (batch.products - gradient**2 / n)
            seen["across"] = n / (n - 1) * (energy - batch.products / gradient)
        for name, value in seen.items():
            before = self.averages.get(name, torch.zeros_like(value))
            self.averages[name] = before.lerp(value, 1 - self.noise_decay)

    @property
    def noise(self) -> Noise:
        """How noisy the gradient is: what batch size to choose, averaged over the last steps.

        Raises:
            CurvoptError: no step with two samples or more was taken so far.
        """
        if not self.averages:
            raise CurvoptError("the noise is known after a step with two samples or more")
        a = {name: value.item() for name, value in self.averages.items()}

        def ratio(top: str, bottom: str) -> float:
            return a[top] / a[bottom] if a[bottom] > 0 else math.inf

        return Noise(
            batch_size=self.samples,
            trace=a["trace"] / a["weight"],
            signal=a["signal"] / a["weight"],
            scale=ratio("trace", "signal"),
            norm_test=ratio("variance", "gradient"),
            inner_product_test=ratio("along", "tested squared") if "along" in a else None,
            orthogonality_test=ratio("across", "tested") if "across" in a else None,
            cabs=ratio("cabs", "loss"),
        )


class Moments(Quantity):
    """Sum and sum of squares, ``([*p], [*p])``, of the samples' parts of the gradient.

    Args:
        products: also compute the parts' inner products with the gradient.

    Attributes:
        products: the sum of their squares, over all parameters together; else None.
    """

    field = "moments"

    def __init__(self, products: bool):
        self.asked = products
        self.products: Tensor | None = None

    def reduce_all(  # noqa: D102 (as in the base class)
        self, structures: dict[Tensor, Structure], context: Context
    ) -> dict[Tensor, tuple[Tensor, Tensor]]:
        result = {p: structure.moments() for p, structure in structures.items()}
        if self.asked:
            dots = [structure.dots(result[p][0])[0] for p, structure in structures.items()]
            self.products = torch.stack(dots).sum(0).square().sum()
        return result


@dataclass(frozen=True)
class Noise:
    r"""How noisy the gradient is; S the covariance of per-sample gradients, G the true gradient.

    Tests are passed while their value is below a bound: theta^2 or nu^2. They fall as 1 / N.

    Attributes:
        batch_size: N of the last step.
        trace: tr S, unbiased.
        signal: :math:`|G|^2`, unbiased: :math:`|g|^2 - \operatorname{tr} S / N`; may be negative.
        scale: the gradient noise scale :math:`\operatorname{tr} S / |G|^2`, in samples. A batch
            much smaller is mostly noise, one much larger wastes samples (McCandlish et al. 2018,
            arXiv 1812.06162). Infinite where the signal is not above zero.
        norm_test: :math:`\operatorname{tr} S / (N |g|^2)`, to be below theta^2, theta in (0, 1)
            (Byrd et al. 2012, doi 10.1007/s10107-012-0572-5).
        inner_product_test: :math:`\operatorname{var}_n(g_n^T g) / (N |g|^4)`, to be below
            theta^2, theta = 0.9 (Bollapragada et al. 2018, arXiv 1802.05098). Weaker than the norm
            test, so that batches stay smaller. None unless `noise_tests` was set and the step
            was one backward pass.
        orthogonality_test: :math:`\operatorname{tr} S` across g, over :math:`N |g|^2`, to be
            below nu^2, nu = 5.84 (ibid.). None as above.
        cabs: the batch size that CABS asks for, :math:`\mathrm{lr} \operatorname{tr} S / L`, for a
            loss L whose minimum is about 0; lr is meant for SGD without momentum (Balles et al.
            2017, arXiv 1612.05086).
    """

    batch_size: int
    trace: float
    signal: float
    scale: float
    norm_test: float
    inner_product_test: float | None
    orthogonality_test: float | None
    cabs: float


@dataclass
class Batch:
    r"""What the recorded passes of one step left; z_n is sample n's part of the gradient.

    Attributes:
        samples: N.
        loss: their sum.
        sums: :math:`\sum_n z_n` per parameter.
        scatter: :math:`\sum_n (z_n - \bar z)^2` per parameter.
        products: :math:`\sum_n \langle z_n, g \rangle^2`, None unless measured, in one pass.
        norms: :math:`|\sum_n z_n|^2` of each parameter, in order.
    """

    samples: int
    loss: Tensor
    sums: dict[Tensor, Tensor]
    scatter: dict[Tensor, Tensor]
    products: Tensor | None
    norms: Tensor

    @classmethod
    def of(cls, computation: Computation, moments: Any) -> Batch:
        """The batch of one backward pass."""
        values = computation.run([moments], free=True)[moments.field]
        n, loss = computation.samples, computation.loss.detach()
        sums = {p: total for p, (total, _) in values.items()}
        scatter = {p: q.addcmul_(z, z, value=-1 / n) for p, (z, q) in values.items()}
        return cls(n, loss, sums, scatter, moments.products, _squared_norms(sums.values()))

    def joined(self, other: Batch) -> Batch:
        """Both batches as one."""
        n, m = self.samples, other.samples
        sums, scatter = dict(self.sums), dict(self.scatter)
        for p, total in other.sums.items():
            apart = sums[p] / n - total / m
            scatter[p] = scatter[p] + other.scatter[p] + apart.square_().mul_(n * m / (n + m))
            sums[p] = sums[p] + total
        norms = _squared_norms(sums.values())
        return Batch(n + m, self.loss + other.loss, sums, scatter, None, norms)


def _guess(grad: Tensor, b: Tensor, t: int, mu: float) -> Tensor:
    """The variance of a single sample's gradient, from its distance to the mean of those before.

    The mean of t gradients is b over the sum of its weights. With a constant variance S its own is
    ``spread * S``, and the expected squared distance (1 + spread) S.
    """
    weight = (1 - mu**t) / (1 - mu)
    spread = (1 - mu ** (2 * t)) / (1 - mu**2) / weight**2
    return (grad - b / weight).square_().div_(1 + spread)


def _move(
    group: dict[str, Any],
    spread: float,
    share: float,
    new: float,
    p: Tensor,
    grad: Tensor,
    b: Tensor,
    s: Tensor,
    scatter: Tensor | None,
) -> None:
    """Move one parameter, or a block of it: what `VarianceAdaptiveSGD` says, ``r = spread``."""
    lr, decay, floor = float(group["lr"]), group["weight_decay"], _floor(s.dtype)
    if scatter is not None:
        s.mul_(1 - share).add_(scatter, alpha=new).clamp_(min=floor)
    torch.add(grad, b, alpha=group["momentum"], out=b)
    squares = b * b
    # gamma = top / bottom
    if group["debiased"]:
        top, bottom = squares.sub(s, alpha=spread).clamp_(min=0), squares.clamp_(min=floor)
    else:
        top, bottom = squares, squares.add(s, alpha=spread)
    step = torch.div(b, bottom, out=bottom)
    if decay:
        p.mul_(1 - lr * decay)
    rate = lr if group["maximize"] else -lr
    if p.dtype == step.dtype:
        p.addcmul_(top, step, value=rate)
    else:
        p.add_(step.mul_(top), alpha=rate)


def _move_all(
    group: dict[str, Any],
    spread: float,
    share: float,
    new: float,
    params: list[Tensor],
    grads: list[Tensor],
    buffers: list[Tensor],
    variances: list[Tensor],
    scatters: list[Any],
) -> None:
    """As `_move`, many parameters by each call."""
    lr, decay, floor = float(group["lr"]), group["weight_decay"], _floor(variances[0].dtype)
    if scatters[0] is not None:
        torch._foreach_mul_(variances, 1 - share)
        torch._foreach_add_(variances, scatters, alpha=new)
        torch._foreach_clamp_min_(variances, floor)
    torch._foreach_mul_(buffers, group["momentum"])
    torch._foreach_add_(buffers, grads)
    top = bottom = torch._foreach_mul(buffers, buffers)
    if group["debiased"]:
        top = torch._foreach_add(bottom, variances, alpha=-spread)
        torch._foreach_clamp_min_(top, 0)
        torch._foreach_clamp_min_(bottom, floor)
    else:
        bottom = torch._foreach_add(top, variances, alpha=spread)
    steps = torch._foreach_div(buffers, bottom)
    if decay:
        torch._foreach_mul_(params, 1 - lr * decay)
    torch._foreach_addcmul_(params, top, steps, value=lr if group["maximize"] else -lr)


def _blocks(row: Row) -> Iterator[Row]:
    """A large parameter in blocks, which stay in a core's cache over the calls of `_move`."""
    given = [tensor for tensor in row if tensor is not None]
    if row[0].numel() <= BLOCK or not all(tensor.is_contiguous() for tensor in given):
        yield row
    else:
        yield from zip_longest(*([] if t is None else t.view(-1).split(BLOCK) for t in row))


def _floor(dtype: torch.dtype) -> float:
    """The smallest S: far below any square that matters, and still normal when it is divided."""
    info = torch.finfo(dtype)
    return info.tiny / info.eps


def _squared_norms(tensors: Iterable[Tensor]) -> Tensor:
    wide = [t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors]
    return torch.stack(torch._foreach_norm(wide)).square()
