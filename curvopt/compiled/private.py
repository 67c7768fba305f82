"""`DPSGD` and `DPAdam` in a graph: noise and ledger stay outside of it."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from curvopt.compiled.padding import is_mean, loss_without
from curvopt.compiled.tracing import Proof, Unsuited
from curvopt.compiled.updates import Groups, Moved, Traced, Update, Write
from curvopt.engine.computation import Computation
from curvopt.optim.logical import zeros_for
from curvopt.optim.private_tape import refuse_hooks, refuse_leaks
from curvopt.optim.sizes import check_sizes
from curvopt.privacy.clipping import QuantileClipping
from curvopt.quantities import Quantity


class PrivateUpdate(Update):
    """Clipped sums with noise; a sample that is not finite or in doubt is left to an eager step."""

    finite_loss = False
    private = True
    #: Names of a parameter's tensors in the state.
    keys: tuple[str, ...] = ()
    _noise: Sequence[Tensor] = ()
    #: Whether the loss is a mean, that has no use for the number of samples; None: not known yet.
    _mean: bool | None = None
    #: The parameters that it is for.
    _kinds: Sequence[Any] = ()
    _sizes: tuple[int, int]
    #: Samples of the batch that count, and a mask of them; None where all do.
    _count: int | None = None
    _kept: Tensor | None = None

    @property
    def filled(self) -> bool:  # type: ignore[override]  # the batch decides
        """Whether batches are filled up."""
        return self._kept is not None

    def obstacle(self) -> str:
        """Logical batches in parts, and clipping that reads the norms, are none of a graph's."""
        opt = self.opt
        if opt.parts > 1:
            return "the sampler hands out logical batches in parts"
        if isinstance(opt.max_grad_norm, QuantileClipping):
            return "the clipping norm follows the norms of the batch"
        return ""

    def padded(self, batch: tuple[Any, ...]) -> tuple[Any, ...]:
        """Poisson batches, which have another size each time, in multiples of two deviations."""
        self._count = self._kept = None
        opt = self.opt
        alike = {len(value) if isinstance(value, Tensor) and value.ndim else 0 for value in batch}
        count = alike.pop() if len(alike) == 1 else 0
        if opt.sampler != "poisson" or opt.views > 1 or not count:
            return batch
        if self._mean is None:
            self._mean = is_mean(self.function, batch)
        if not self._mean:
            return batch
        step = max(1, math.ceil(2 * opt.expected_batch_size**0.5))
        size = -(-count // step) * step
        self._count = count
        self._kept = torch.arange(size, device=batch[0].device) < count
        if size == count:
            return batch
        # Copies of a sample: numbers of which a model makes no nonsense.
        return tuple(
            torch.cat([value, value[:1].expand(size - count, *value.shape[1:])]) for value in batch
        )

    def mode(self, params: Sequence[Tensor]) -> Hashable | None:
        """Steps are alike, once the state has begun."""
        if len(params) != sum(p.requires_grad for p in self.opt._parameters()):
            raise Unsuited("a parameter takes no part, and gets noise nevertheless")
        held = (self.opt.state.get(p, {}) for p in params)
        return "private" if all(key in state for state in held for key in self.keys) else None

    def settings(self) -> Hashable:
        """As in the base class."""
        opt = self.opt
        more = (
            opt.expected_batch_size, opt.clipping, opt.views, opt.view_order, self._kept is None,
        )  # fmt: skip
        return super().settings(), more

    def quantities(self, mode: Hashable) -> list[Quantity]:
        """The clipped sum."""
        wanted: list[Quantity] = self.opt._wanted()
        return wanted

    def begin(self, samples: int) -> None:
        """The checks of a step that is not compiled, while nothing is drawn yet."""
        opt = self.opt
        for group in opt.param_groups:
            opt._validate(group)
        refuse_hooks(opt._parameters(), opt._name)
        opt._begin_pass()  # what else has filled p.grad is not private
        count, size = self._count or samples, opt.expected_batch_size
        self._sizes = check_sizes(count, opt._sizes, size, opt.sampler, opt.sample_rate)
        opt._wanted()  # sigma and C of this step
        opt._std = opt._sigma and opt._sigma * opt._clip.max_norm

    def measure(
        self,
        computation: Computation,
        quantities: list[Quantity],
        numbers: Sequence[Tensor] | None = None,
        drawn: Sequence[Tensor] = (),
    ) -> tuple[list[Tensor | None], dict[str, Any]]:
        """Clipped sums in the place of gradients, norms, and gradients of penalties."""
        clip: Any = quantities[0]
        if numbers is not None:
            clip.max_norm = numbers[1][0]
        kept = drawn[-1] if drawn and self._kept is not None else self._kept
        clip.kept = kept
        computation.prepare()
        refuse_leaks(computation)
        with torch.autocast(computation.loss.device.type, enabled=False):
            penalties = computation.penalty_gradients()
            sums = computation.run([clip], free=True)[clip.field]
        params, values = computation.tape.params, {"norms": clip.norms, "penalties": penalties}
        if kept is not None:
            values["loss"] = loss_without(computation, kept)
        return [sums.get(p) for p in params], values

    def tensors(self, mode: Hashable, params: Sequence[Tensor], groups: Groups) -> list[Tensor]:
        """The moments, those of one name after the other."""
        return [self.opt.state[p][key] for key in self.keys for p in params]

    def numbers(
        self, mode: Hashable, params: Sequence[Tensor], groups: Groups, samples: int
    ) -> Sequence[Sequence[float]]:
        """Learning rates; C."""
        norm = float(self.opt._clip.max_norm)
        return [[float(group["lr"]) for group in groups], [norm] * len(params)]

    def blanks(self, params: Sequence[Tensor]) -> list[Tensor]:
        """Zeros, for the noise, and the mask."""
        mask = [] if self._kept is None else [self._kept]
        return [*map(zeros_for, params), *mask]

    def draw(self, params: Sequence[Tensor]) -> list[Tensor]:
        """The noise over B, by the optimizer's own generators and in its own order."""
        kinds = [(p.shape, p.dtype, p.device) for p in params]
        if kinds != self._kinds:
            self._kinds, self._noise = kinds, [*map(zeros_for, params)]
        torch._foreach_zero_([*self._noise])
        if self.opt._std:
            of = dict(zip(map(id, params), self._noise, strict=True))
            ordered = [of[id(p)] for p in self.opt._parameters() if p.requires_grad]
            self.opt._noise.add_to(ordered, self.opt._std, self.opt.expected_batch_size)
        return [*self._noise, *([] if self._kept is None else [self._kept])]

    def move(self, traced: Traced) -> Moved:
        """Sums become private gradients, along which parameters move."""
        size, penalties = self.opt.expected_batch_size, traced.values["penalties"]
        writes, grads = list[Write](), list[Tensor]()
        for k, (p, total, noise) in enumerate(
            zip(traced.params, traced.grads, traced.drawn, strict=False)
        ):
            grad = noise + total.to(noise.dtype) / size
            if p in penalties:
                grad = grad + penalties[p]
            grads.append(grad.to(p.dtype))
            writes += self.along(k, p, grads[-1], traced)
        return Moved(writes, grads, [traced.values["norms"]], traced.values.get("loss"))

    @abstractmethod
    def along(self, k: int, p: Tensor, grad: Tensor, traced: Traced) -> list[Write]:
        """How parameter k moves along its private gradient."""

    def done(
        self,
        mode: Hashable,
        params: Sequence[Tensor],
        groups: Groups,
        proof: Proof,
        seen: Sequence[Tensor],
    ) -> None:
        """Account the step."""
        self.interrupted()
        self.opt.norms, self.opt._sizes = seen[0][: self._count], self._sizes

    def interrupted(self) -> None:
        """Account what may have been seen."""
        opt = self.opt
        opt.ledger.log(
            opt._sigma, opt.sample_rate, sampler=opt.sampler, max_grad_norm=opt._clip.max_norm
        )


class PrivateSGD(PrivateUpdate):
    """`DPSGD`."""

    @property
    def keys(self) -> tuple[str, ...]:  # type: ignore[override]  # settings decide
        """The momentum, if there is any."""
        return ("momentum_buffer",) if self.opt.param_groups[0]["momentum"] else ()

    def obstacle(self) -> str:
        """As in the base class."""
        momenta = {bool(group["momentum"]) for group in self.opt.param_groups}
        return super().obstacle() or ("" if len(momenta) == 1 else "some groups have no momentum")

    def along(self, k: int, p: Tensor, grad: Tensor, traced: Traced) -> list[Write]:
        """As in `DPSGD`."""
        group, rate = traced.groups[k], traced.numbers[0][k].to(p)
        mu, decay = group["momentum"], group["weight_decay"]
        grad = -grad if group["maximize"] else grad
        shrunk = p * (1 - rate * decay) if decay else p
        if not mu:
            return [(p, shrunk - rate * grad)]
        buffer = mu * traced.state[k] + grad
        buffer = buffer + decay * p if decay else buffer
        if group["nesterov"]:
            return [(traced.state[k], buffer), (p, shrunk - rate * (grad + mu * buffer))]
        return [(traced.state[k], buffer), (p, p - rate * buffer)]


class PrivateAdam(PrivateUpdate):
    """`DPAdam`."""

    keys = ("exp_avg", "exp_avg_sq")

    def numbers(
        self, mode: Hashable, params: Sequence[Tensor], groups: Groups, samples: int
    ) -> Sequence[Sequence[float]]:
        """Also the noise's variance, and corrections of the bias."""
        rows = super().numbers(mode, params, groups, samples)
        variance = (self.opt._std / self.opt.expected_batch_size) ** 2
        steps = [self.opt.state[p]["step"] + 1 for p in params]
        corrections = [
            [1 / (1 - group["betas"][which] ** t) for t, group in zip(steps, groups, strict=True)]
            for which in (0, 1)
        ]
        return [*rows, [variance] * len(params), *corrections]

    def along(self, k: int, p: Tensor, grad: Tensor, traced: Traced) -> list[Write]:
        """As in `DPAdam`."""
        group, count = traced.groups[k], len(traced.params)
        m, v = traced.state[k], traced.state[count + k]
        rate, variance, first, second = (traced.numbers[i][k].to(m) for i in (0, 2, 3, 4))
        (beta1, beta2), sign = group["betas"], -1 if group["maximize"] else 1
        mean = m * beta1 + grad * (sign * (1 - beta1))
        square = v * beta2 + grad * grad * (1 - beta2) - (1 - beta2) * variance
        step = mean * first / (square * second).clamp(min=group["eps"] ** 2).sqrt()
        kept = p * (1 - rate * group["weight_decay"]) if group["weight_decay"] else p
        return [(m, mean), (v, square), (p, (kept - rate * step).to(p.dtype))]

    def done(
        self,
        mode: Hashable,
        params: Sequence[Tensor],
        groups: Groups,
        proof: Proof,
        seen: Sequence[Tensor],
    ) -> None:
        """Also count."""
        super().done(mode, params, groups, proof, seen)
        for p in params:
            self.opt.state[p]["step"] += 1
