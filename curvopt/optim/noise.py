"""How much the samples of a batch disagree: what is measured, and what it says."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curvopt.dtypes import at_least_float32
from curvopt.engine.computation import Computation
from curvopt.quantities.base import Context, Quantity
from curvopt.structures import Structure

Add = Callable[[Sequence[Tensor]], list[Tensor]]
Join = Callable[..., dict[Tensor, Tensor]]


class Moments(Quantity):
    """Sum and scatter, ``([*p], [*p])``, of the samples' parts of the gradient.

    Args:
        products: also compute the parts' inner products with the gradient.

    Attributes:
        products: the sum of their squares, over all parameters together; else None.
    """

    field = "moments"
    reads_totals = True

    def __init__(self, products: bool):
        self.asked = products
        self.products: Tensor | None = None

    def reduce_all(  # noqa: D102 (as in the base class)
        self, structures: dict[Tensor, Structure], context: Context
    ) -> dict[Tensor, tuple[Tensor, Tensor]]:
        result: dict[Tensor, tuple[Tensor, Tensor]] = {}
        for p, structure in structures.items():
            total = context.totals.get(p)
            if total is None:
                result[p] = structure.moments()
            else:
                result[p] = total, structure.scatter(total)
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

    @classmethod
    def of(cls, samples: int, averages: dict[str, Tensor]) -> Noise:
        """What averages of numerators and denominators say."""
        a = {name: value.item() for name, value in averages.items()}

        def ratio(top: str, bottom: str) -> float:
            return a[top] / a[bottom] if a[bottom] > 0 else math.inf

        return cls(
            batch_size=samples,
            trace=a["trace"] / a["weight"],
            signal=a["signal"] / a["weight"],
            scale=ratio("trace", "signal"),
            norm_test=ratio("variance", "gradient"),
            inner_product_test=ratio("along", "tested squared") if "along" in a else None,
            orthogonality_test=ratio("across", "tested") if "across" in a else None,
            cabs=ratio("cabs", "loss"),
        )


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
        spreads: the sum of each parameter's scatter, in order.
    """

    samples: int
    loss: Tensor
    sums: dict[Tensor, Tensor]
    scatter: dict[Tensor, Tensor]
    products: Tensor | None
    norms: Tensor
    spreads: Tensor

    @classmethod
    def of(
        cls, computation: Computation, moments: Any, values: Any, owner: Callable[[Tensor], Tensor]
    ) -> Batch:
        """The batch of one backward pass, by the parameters of the optimizer, `owner`."""
        n, loss = computation.samples, computation.loss.detach()
        sums = {owner(p): total for p, (total, _) in values.items()}
        scatter = {owner(p): part for p, (_, part) in values.items()}
        return cls.made(n, loss, sums, scatter, moments.products)

    @classmethod
    def made(
        cls,
        samples: int,
        loss: Tensor,
        sums: dict[Tensor, Tensor],
        scatter: dict[Tensor, Tensor],
        products: Tensor | None = None,
    ) -> Batch:
        """The batch of whole tensors."""
        spreads = torch.stack([part.sum() for part in scatter.values()] or [loss.new_zeros(())])
        return cls(samples, loss, sums, scatter, products, squared_norms(sums.values()), spreads)

    def scaled(self, factor: float) -> Batch:
        """The batch of a loss times a factor."""
        sums = {p: part * factor for p, part in self.sums.items()}
        scatter = {p: part * factor**2 for p, part in self.scatter.items()}
        products = None if self.products is None else self.products * factor**4
        return Batch.made(self.samples, self.loss * factor, sums, scatter, products)

    def joined(self, other: Batch) -> Batch:
        """Both batches as one; a parameter that one of them left out has zeros there."""
        n, m = self.samples, other.samples
        sums, scatter = dict(self.sums), dict(self.scatter)
        for p in {**self.sums, **other.sums}:
            if p not in self.sums:
                sums[p], scatter[p] = (torch.zeros_like(other.sums[p]) for _ in range(2))
            if p not in other.sums:
                apart, more = sums[p] / n, torch.zeros_like(scatter[p])
                total = sums[p]
            else:
                apart, more = sums[p] / n - other.sums[p] / m, other.scatter[p]
                total = sums[p] + other.sums[p]
            scatter[p] = scatter[p] + more + apart.square_().mul_(n * m / (n + m))
            sums[p] = total
        return Batch.made(n + m, self.loss + other.loss, sums, scatter)

    def over(self, count: int, add: Add, join: Join, *, keep: bool) -> Batch:
        """The batches of several processes as one; its loss is the mean of theirs.

        Args:
            count: the number of processes.
            add: gives sums of tensors over them.
            join: the same of what only some of them may have, by parameter; ``alike`` if all do.
            keep: `sums` are wanted; else the batch has none.
        """
        own = torch.stack([torch.full_like(self.loss, self.samples), self.loss]).double()
        samples, loss = add([own])[0]
        n = round(samples.item())
        parts = join(self.sums)  # count times the sums over all, overwritten below: they are large
        norms = squared_norms(parts.values()) / count**2
        sums = {p: part / count for p, part in parts.items()} if keep else {}
        for p, part in parts.items():
            if not self.samples:
                part.zero_()
                continue
            part.mul_(-self.samples / n)
            if p in self.sums:
                part.add_(self.sums[p])
            part.square_().mul_(1 / (self.samples * count**2))
            if p in self.sums:
                part.add_(self.scatter[p], alpha=1 / count**2)
        batch = Batch.made(n, (loss / count).to(self.loss), {}, join(parts, alike=True))
        batch.sums, batch.norms = sums, norms
        return batch


def observed(
    averages: Mapping[str, Tensor], batch: Batch, rates: Tensor, decay: float
) -> dict[str, Tensor]:
    """Averages of what `Noise` needs; numerators and denominators apart.

    Args:
        averages: of the steps before.
        batch: what was measured.
        rates: learning rates of the parameters that were measured, in order.
        decay: of the averages.
    """
    n, scatters = batch.samples, batch.spreads
    gradient, variance = batch.norms.sum(), n / (n - 1) * scatters.sum()
    seen = {
        "weight": torch.ones_like(gradient),
        "gradient": gradient,
        "variance": variance,
        "trace": n * variance,
        "signal": gradient - variance,
        "loss": batch.loss.to(gradient),
        "cabs": n * n / (n - 1) * (scatters @ rates),
    }
    if batch.products is not None:
        # With d_n = <z_n, g>: sum_n d_n = |g|^2, and sum_n |z_n|^2 is the scatter + |g|^2 / n.
        energy = scatters.sum() + gradient / n
        seen["tested"] = gradient
        seen["tested squared"] = gradient**2
        seen["along"] = n / (n - 1) * (batch.products - gradient**2 / n)
        least = torch.finfo(gradient.dtype).tiny  # without a gradient, none of it is along it
        seen["across"] = n / (n - 1) * (energy - batch.products / gradient.clamp(min=least))
    now, none = torch.stack([*seen.values()]), torch.zeros_like(gradient)
    before = torch.stack([averages.get(name, none) for name in seen]).to(now)
    means = before.lerp(now, 1 - decay).unbind()
    return {**averages, **dict(zip(seen, means, strict=True))}


def guessed(grad: Tensor, b: Tensor, t: int, mu: float) -> Tensor:
    """The variance of a single sample's gradient, from its distance to the mean of those before.

    The mean of t gradients is b over the sum of its weights. With a constant variance S its own is
    ``spread * S``, and the expected squared distance (1 + spread) S.
    """
    weight = (1 - mu**t) / (1 - mu)
    spread = (1 - mu ** (2 * t)) / (1 - mu**2) / weight**2
    return (grad - b / weight).square_().div_(1 + spread)


def squared_norms(tensors: Iterable[Tensor]) -> Tensor:
    """The squared norm of each tensor, in float32 at least."""
    wide = [t.to(at_least_float32(t.dtype)) for t in tensors]
    return torch.stack(torch._foreach_norm(wide)).square() if wide else torch.zeros(0, device="cpu")
