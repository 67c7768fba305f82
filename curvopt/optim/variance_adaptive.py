"""SGD with momentum, each coordinate slowed down where the samples of a batch disagree."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from curvopt.engine.compute import Computation
from curvopt.errors import CurvoptError
from curvopt.optim.base import EngineOptimizer
from curvopt.quantities.base import Context, Quantity
from curvopt.structures import Structure


class VarianceAdaptiveSGD(EngineOptimizer):
    r"""SVAG: SGD, with momentum, scaled by the signal-to-noise ratio of each gradient element.

    With the samples' parts :math:`z_n` of the gradient :math:`g = \sum_n z_n` (a mean over N
    samples has :math:`z_n = g_n / N`), the variance of g is known from this very batch:

    .. math::
        s &= \tfrac{N}{N - 1} \bigl(\textstyle\sum_n z_n^2 - g^2 / N\bigr)
            \quad (= \operatorname{var}_n(g_n) / N) \\
        b &\leftarrow \mu b + g, \qquad q \leftarrow \mu^2 q + s \\
        \gamma &= b^2 / (b^2 + q), \qquad
        \theta \leftarrow \theta - \mathrm{lr} \, (\gamma b + \lambda \theta)

    all elementwise; :math:`\gamma` minimizes the expected squared error of :math:`\gamma b`. It is
    1 for a noiseless gradient: the step is then that of ``torch.optim.SGD(lr, momentum)``, and
    `lr` means the same. Two departures from the paper: q is the exact variance of the
    momentum buffer b, also while N changes, where the paper guesses the variance from moving
    averages and assumes it constant; b is torch's buffer, where the paper's is a bias-corrected
    mean, smaller by :math:`(1 - \mu) / (1 - \mu^t)`.

    One backward pass gives gradient and squares. Backward passes over micro-batches add up
    exactly: sums of parts, of squares, and of counts.

    When not to use it: one sample per batch (or one sequence) has no variance within. There s is
    guessed from how far g is from the mean of the gradients before, as a moving average would, and
    is noisy; `torch.optim.Adam` does that job. Also layers that couple the samples, as batch norm
    in training mode.

    Args:
        params: parameters, (name, parameter) pairs, or parameter groups.
        lr: learning rate, as in `torch.optim.SGD`, where noise does not slow it down: a rate two to
            four times that of SGD is safe. Default 0.1.
        momentum: :math:`\mu`. Default 0.9; 0 is SVAG without momentum.
        weight_decay: :math:`\lambda`, decoupled from gradient and factor. Default 0.
        debiased: :math:`\gamma = \max(0, 1 - q / b^2)`. The plug-in default averages 0.34 where
            there is nothing but noise, this one 0.16: elements without a signal stand still.
        maximize: ascend instead of descend.
        foreach: update all parameters of a group by one call each (the default, faster on a GPU),
            or one by one, with less memory.
        noise_decay: of the averages behind `noise`. Default 0.95: the last 20 steps.
        noise_tests: measure what the inner-product and orthogonality tests in `noise` need: one
            more product per layer.
        batch_size: number of samples, where the model's first op and the loss do not tell.
        reduction: ``"mean"`` or ``"sum"``: how a loss written by hand is reduced over samples.

    Raises:
        ValueError: a setting is out of range.
        CurvoptError: in `step`: the variance cannot be computed exactly; parameters, gradients and
            state are as before.

    Note:
        A gradient that is clipped by its norm after `backward()` has its variance clipped alike.
        For half-precision parameters b and q are float32.

    Example:
        >>> model = torch.nn.Linear(4, 3)
        >>> opt = curvopt.VarianceAdaptiveSGD(model.parameters())
        >>> x, y = torch.randn(8, 4), torch.randint(3, (8,))
        >>> loss = opt.step(lambda: torch.nn.functional.cross_entropy(model(x), y))
        >>> opt.noise.scale  # samples at which noise and signal are even

    References:
        Balles and Hennig 2018, "Dissecting Adam", arXiv 1705.07774.
    """

    saved: ClassVar[tuple[str, ...]] = ("steps", "averages", "samples")

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
        noise_decay: float = 0.95,
        noise_tests: bool = False,
        batch_size: int | None = None,
        reduction: str | None = None,
    ):
        defaults = dict(
            lr=lr, momentum=momentum, weight_decay=weight_decay, debiased=debiased,
            maximize=maximize, foreach=foreach,
        )  # fmt: skip
        if not 0 <= noise_decay < 1:
            raise ValueError(f"Invalid noise_decay: {noise_decay}")
        super().__init__(params, defaults, batch_size=batch_size, reduction=reduction)
        self.noise_decay, self.noise_tests = noise_decay, noise_tests
        self.averages: dict[str, Tensor] = {}
        self.samples = 0

    def _validate(self, group: dict[str, Any]) -> None:
        super()._validate(group)
        if not 0 <= group["momentum"] < 1:
            raise ValueError(f"Invalid momentum: {group['momentum']}")

    # -- backward passes --------------------------------------------------------------------------

    def _wanted(self) -> list[Quantity]:
        return [Moments(self.noise_tests)]

    def _accumulate(self, computation: Computation, quantities: list[Quantity]) -> None:
        moments = quantities[0]
        values = dict(computation.run([moments], free=True)[moments.field])
        self._add_gradients(computation, {p: total for p, (total, _) in values.items()})
        # Sums over all passes whose gradients are in p.grad.
        held = self._held or {"passes": 0, "samples": 0, "loss": 0.0, "squares": {}}
        squares = held["squares"]
        for p, (_, part) in values.items():
            squares[p] = squares[p].add_(part) if p in squares else part
        held["passes"] += 1
        held["samples"] += computation.samples
        held["loss"] = held["loss"] + computation.loss.detach()
        held["products"] = moments.products
        held["norms"] = _squared_norms(p.grad for p in squares if p.grad is not None)
        self._held = held
        self.collected.append({})

    # -- the step ---------------------------------------------------------------------------------

    def _update(self) -> None:
        held = self._held
        squares = held["squares"]
        for p in self._parameters():
            if p.grad is not None and p not in squares:
                raise CurvoptError(
                    f"{self._name(p)} has a gradient, but took no part in the recorded pass: call "
                    "zero_grad() after freezing parameters"
                )
        shrunk = 1.0
        if not self._unchanged():  # clipped by its norm, say
            now = _squared_norms(p.grad for p in squares if p.grad is not None).sum()
            shrunk = min(1.0, float(now / held["norms"].sum()))
        if held["samples"] > 1:
            self._observe()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            one_by_one = group["foreach"] is False
            for chunk in [[p] for p in params] if one_by_one else [params] if params else []:
                self._move(group, chunk, [squares[p] for p in chunk], held["samples"], shrunk)
        self.samples = held["samples"]

    def _move(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        squares: list[Tensor],
        n: int,
        shrunk: float,
    ) -> None:
        lr, mu, decay = float(group["lr"]), group["momentum"], group["weight_decay"]
        for p in params:
            if not self.state[p]:
                zeros = torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32))
                self.state[p].update(step=0, momentum_buffer=zeros, variance=zeros.clone())
        states = [self.state[p] for p in params]
        buffers = [state["momentum_buffer"] for state in states]
        variances = [state["variance"] for state in states]
        grads = [p.grad.to(b.dtype) for p, b in zip(params, buffers, strict=True)]

        torch._foreach_mul_(variances, mu**2)
        if n > 1:
            torch._foreach_add_(variances, squares, alpha=shrunk * n / (n - 1))
            torch._foreach_addcmul_(variances, grads, grads, value=-1 / (n - 1))
        else:
            _guess(states, grads, mu)
        # Rounding may go below zero; and 0 / 0 must not happen.
        torch._foreach_clamp_min_(variances, torch.finfo(variances[0].dtype).tiny)
        torch._foreach_mul_(buffers, mu)
        torch._foreach_add_(buffers, grads)

        steps = torch._foreach_mul(buffers, buffers)
        if group["debiased"]:
            steps = torch._foreach_div(variances, steps)
            torch._foreach_neg_(steps)
            torch._foreach_add_(steps, 1)
            torch._foreach_clamp_min_(steps, 0)
        else:
            torch._foreach_div_(steps, torch._foreach_add(steps, variances))
        torch._foreach_mul_(steps, buffers)
        if decay:
            torch._foreach_mul_(params, 1 - lr * decay)
        torch._foreach_add_(params, steps, alpha=lr if group["maximize"] else -lr)
        for state in states:
            state["step"] += 1

    # -- noise ------------------------------------------------------------------------------------

    def _observe(self) -> None:
        """Average what `noise` needs; numerators and denominators apart."""
        held = self._held
        n = held["samples"]
        rates = {p: float(group["lr"]) for group in self.param_groups for p in group["params"]}
        taking_part = [p for p in held["squares"] if p.grad is not None]
        squares = torch.stack([held["squares"][p].sum() for p in taking_part])
        norms = held["norms"]
        variances = (squares - norms / n) * (n / (n - 1))
        gradient, variance = norms.sum(), variances.sum()
        lr = torch.tensor([rates[p] for p in taking_part]).to(norms)
        seen = {
            "weight": torch.ones_like(gradient),
            "gradient": gradient,
            "variance": variance,
            "trace": n * variance,
            "signal": gradient - variance,
            "loss": held["loss"].to(gradient),
            "cabs": n * lr @ variances,
        }
        if held["products"] is not None and held["passes"] == 1:
            factor, products = n / (n - 1), held["products"]
            seen["tested"] = gradient
            seen["tested squared"] = gradient**2
            seen["inner"] = factor * (products - gradient**2 / n)
            seen["orthogonal"] = factor * (squares.sum() - products / gradient)
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

        def ratio(top: str, bottom: str) -> float | None:
            if top not in a:
                return None
            return a[top] / a[bottom] if a[bottom] > 0 else float("inf")

        return Noise(
            batch_size=self.samples,
            trace=a["trace"] / a["weight"],
            signal=a["signal"] / a["weight"],
            scale=ratio("trace", "signal"),
            norm_test=ratio("variance", "gradient"),
            inner_product_test=ratio("inner", "tested squared"),
            orthogonality_test=ratio("orthogonal", "tested"),
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
        self.asked, self.products = products, None

    def reduce_all(
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
            loss L whose minimum is about 0 (Balles et al. 2017, arXiv 1612.05086).
    """

    batch_size: int
    trace: float
    signal: float
    scale: float
    norm_test: float
    inner_product_test: float | None
    orthogonality_test: float | None
    cabs: float


def _guess(states: list[dict[str, Any]], grads: list[Tensor], mu: float) -> None:
    """Add the variance of a single sample, from its distance to the mean of those before.

    The mean is b over the sum of its weights; with constant variance s its own is ``spread * s``,
    and the squared distance (1 + spread) s. The first step guesses none.
    """
    for state, grad in zip(states, grads, strict=True):
        t, b = state["step"], state["momentum_buffer"]
        if t:
            weight = (1 - mu**t) / (1 - mu)
            spread = (1 - mu ** (2 * t)) / (1 - mu**2) / weight**2
            distance = grad - b / weight
            state["variance"].addcmul_(distance, distance, value=1 / (1 + spread))


def _squared_norms(tensors: Iterable[Tensor]) -> Tensor:
    norms = torch._foreach_norm(
        [t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors]
    )
    return torch.stack(norms).square()
