"""Differentially private training: clipped per-sample gradients, summed, with noise."""

from __future__ import annotations

import math
import warnings
from contextlib import AbstractContextManager
from typing import Any, Literal, cast

import torch
from torch import Generator, Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.optim.sgd import sgd
from torch.utils.data import DataLoader

from curvopt.engine.compute import Computation
from curvopt.engine.tape import Tape
from curvopt.errors import CurvoptError
from curvopt.optim.base import Closure, EngineOptimizer
from curvopt.privacy.accounting import Accountant, PrivacyLedger, PrivacyReport
from curvopt.privacy.checks import require
from curvopt.privacy.clipping import QuantileClipping
from curvopt.privacy.noise import GaussianNoise
from curvopt.privacy.ranks import Ranks
from curvopt.privacy.sampling import PoissonBatchSampler, SamplerKind, check_ranks, sampling_of
from curvopt.privacy.schedules import Schedule, value_at
from curvopt.quantities import ClippedGradSum, Quantity

Clipping = Literal["flat", "per_layer", "automatic"]
Sampler = SamplerKind | DataLoader | PoissonBatchSampler

# Logical batches of one size in a row that Poisson sampling would not give in a lifetime.
EQUAL_SIZES = 10


class PrivateOptimizer(EngineOptimizer):
    """What private optimizers share: `p.grad` is a noisy sum of clipped gradients, and accounted.

    A subclass moves parameters in `_move`, given ``p.grad``. The arguments are those of `DPSGD`.

    Attributes:
        ledger: the steps so far (`curvopt.privacy.PrivacyLedger`).
        noise_multiplier: sigma, a number or a schedule.
        max_grad_norm: C, a number, a schedule, or `curvopt.privacy.QuantileClipping`.
        expected_batch_size: B, the divisor.
        norms: ``[N]``, norms of the last logical batch's per-sample gradients before clipping. Not
            private.
        nonfinite_samples: how many samples were left out so far because their gradient was not
            finite. Not private.
    """

    saved = ("steps", "nonfinite_samples")
    restores_gradients = False  # they are the last step's, already used: the memory is better used
    serves_others = False  # their gradient would not be private
    finite_loss = False  # one sample may make it infinite; its gradient is left out then

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        *,
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
    ):
        if not callable(noise_multiplier):
            _check_noise(noise_multiplier)
        if not (callable(max_grad_norm) or isinstance(max_grad_norm, QuantileClipping)):
            _check_norm(max_grad_norm, clipping)
        size = expected_batch_size
        require(0 < size < math.inf, "expected batch size", size, "must be positive and finite")
        require(clipping in ("flat", "per_layer", "automatic"), "clipping", clipping, "is unknown")
        super().__init__(params, defaults, batch_size=batch_size, reduction=reduction)
        self.noise_multiplier, self.max_grad_norm = noise_multiplier, max_grad_norm
        self.expected_batch_size, self.clipping = expected_batch_size, clipping
        self.sampler, self.sample_rate, num_samples = sampling_of(
            sampler, sample_rate, num_samples, expected_batch_size
        )
        self.ledger = PrivacyLedger(num_samples)
        self.norms: Tensor | None = None
        self.nonfinite_samples = 0
        self._noise = GaussianNoise(generator, secure=secure_noise)
        self._ranks = Ranks(process_group)
        self._place = self._ranks.place
        check_ranks(sampler, *self._place)
        self._met = self._agreed = self._spent = False
        self._sizes = (-1, 0)  # of the last logical batch, and how often in a row

    def _move(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """Move a group's parameters along their private ``grad``."""
        raise NotImplementedError

    # -- one logical batch ------------------------------------------------------------------------

    def record(self) -> AbstractContextManager[Any]:
        """Record the forward and backward passes of one logical batch.

        All of its micro-batches go in one block: a pass that is left over, without a `step` or
        `zero_grad`, may have seen samples of the next one, which would then count twice.

        Raises:
            CurvoptError: a pass is left over, or a parameter has a gradient that is not private.
        """
        if self.collected:
            raise CurvoptError(
                "a recorded pass was not followed by step(): record all micro-batches of a logical "
                "batch in one `with opt.record():`, or drop the pass by zero_grad()"
            )
        self._begin_pass()
        self.zero_grad()
        return super().record()

    def _tape(self) -> Tape:
        return PrivateTape(self._named(), batch_size=self.batch_size)

    def _wanted(self) -> list[Quantity]:
        step = self.ledger.steps
        self._sigma = _check_noise(value_at(self.noise_multiplier, step))
        norm = self.max_grad_norm
        norm = norm.max_grad_norm if isinstance(norm, QuantileClipping) else value_at(norm, step)
        self._clip = Clip(_check_norm(norm, self.clipping), self.clipping)
        return [self._clip]

    def _accumulate(self, computation: Computation, quantities: list[Quantity]) -> None:
        """Add a micro-batch to the logical batch's clipped sum."""
        uses = computation.record.uses
        if uses and 0 in uses[0].shape[:2]:
            computation.reached = uses
            self._add({}, torch.zeros(0))  # no samples: no sum, but a step
            return
        # Under autocast the sum would be rounded after the norms were taken.
        with torch.autocast(computation.loss.device.type, enabled=False):
            values = computation.run(quantities, free=True)[self._clip.field]
        self._add(dict(values), self._clip.norms)

    def _add(self, sums: dict[Tensor, Tensor], norms: Tensor) -> None:
        if not self.collected:
            self.collected.append({"sums": {}, "norms": []})
        before = self.collected[0]["sums"]
        for p, part in sums.items():
            before[p] = before[p].add_(part) if p in before else part
        self.collected[0]["norms"].append(norms)

    def _update(self) -> None:
        self._begin_pass()  # nothing else may have filled p.grad meanwhile
        (batch,) = self.collected
        sums, norms = batch["sums"], batch["norms"]
        sigma, norm = self._sigma, self._clip.max_norm
        self.norms = self._meet(torch.cat([part.to(norms[0].device) for part in norms]))
        self._check_sizes(len(self.norms))
        quantile = self.max_grad_norm if isinstance(self.max_grad_norm, QuantileClipping) else None
        if quantile:
            sigma = quantile.gradient_noise_multiplier(sigma)
        self._std = sigma and sigma * norm
        groups = [[p for p in group["params"] if p.requires_grad] for group in self.param_groups]
        self._privatize([p for params in groups for p in params], sums)
        self.ledger.log(self._sigma, self.sample_rate, sampler=self.sampler, max_grad_norm=norm)
        self.nonfinite_samples += int((~self.norms.isfinite()).sum())
        if quantile:
            quantile.update(self.norms, self._noise)
            quantile.max_grad_norm = self._ranks.value_of_first(quantile.max_grad_norm)
        for group, params in zip(self.param_groups, groups, strict=True):
            self._move(group, params)

    def _meet(self, norms: Tensor) -> Tensor:
        """The norms of all processes, once they agree on the step."""
        if self._ranks.place != self._place:
            raise CurvoptError(
                "torch.distributed was initialized, or changed, after this optimizer was built, so "
                "its sampler was not checked: build it afterwards, and load its state_dict"
            )
        self._met = True
        if not self._ranks.many:
            return norms
        settings = {
            "steps taken": self.ledger.steps,
            "noise_multiplier": self._sigma,
            "max_grad_norm": self._clip.max_norm,
            "expected_batch_size": self.expected_batch_size,
            "clipping": self.clipping,
            "sampling": (self.sampler, self.sample_rate),
        }
        if not self._agreed:  # later steps are the same for all
            settings["the parameters' sum"] = sum(
                float(p.double().sum()) for p in self._parameters()
            )
        everybody = self._ranks.meet(settings, norms)
        self._agreed = True
        return everybody

    def step(self, closure: Closure | None = None) -> Any:  # noqa: D102 (as in the base)
        self._met = self._spent = False
        try:
            loss = super().step(closure)
            self._spent = False
            return loss
        except Exception:  # no interrupt: nobody may come to hear of that
            if not self._met:
                self._ranks.fail()  # the others are waiting
            raise
        finally:
            if self._spent:  # it failed after noise went into the sums
                self.zero_grad()

    def _privatize(self, params: list[Tensor], sums: dict[Tensor, Tensor]) -> None:
        """``p.grad = (sum + N(0, std^2)) / B``, rounded to the parameter's dtype at the end."""
        self._spent = True
        totals = [sums[p].contiguous() if p in sums else _zeros(p) for p in params]
        self._ranks.sum_on_first(totals)
        if self._std and self._ranks.first:
            self._noise.add_to(totals, self._std, self.expected_batch_size)
        else:
            torch._foreach_div_(totals, self.expected_batch_size)
        self._ranks.copy_from_first(totals)
        for p, grad in zip(params, totals, strict=True):
            p.grad = grad.to(p.dtype)

    def _check_sizes(self, size: int) -> None:
        """Warn of batch sizes that the expected size and the sampler do not explain."""
        last, count = self._sizes
        self._sizes = size, count + 1 if size == last else 1
        expected = self.expected_batch_size
        if size > expected + 10 * expected**0.5 + 10:
            warnings.warn(
                f"a batch has {size} samples where {expected:g} are expected. If the model treats "
                "the rows of a sample as samples of their own, give batch_size=: privacy is that "
                "of one sample",
                stacklevel=5,
            )
        # At a variance of 5 and more, two sizes agree with a probability below 1/7.
        varies = self.sampler == "poisson" and size * (1 - self.sample_rate) >= 5
        if varies and self._sizes[1] == EQUAL_SIZES:
            warnings.warn(
                f"{EQUAL_SIZES} batches in a row had {size} samples: this is not Poisson sampling, "
                "so the epsilon that is accounted does not hold. Draw batches with "
                "curvopt.privacy.PoissonBatchSampler, or say sampler='shuffle'",
                stacklevel=5,
            )

    # -- what it costs, and what was seen ---------------------------------------------------------

    def privacy_spent(self, delta: float, accountant: Accountant = "pld") -> float:
        """The epsilon spent so far; see `curvopt.privacy.PrivacyLedger.epsilon`."""
        return self.ledger.epsilon(delta, accountant)

    def privacy_report(
        self, delta: float, accountant: Accountant = "pld", unit: str = "one sample"
    ) -> PrivacyReport:
        """All that makes the epsilon mean something; see `curvopt.privacy.PrivacyLedger.report`."""
        return self.ledger.report(delta, accountant, unit)

    @property
    def clip_fraction(self) -> float:
        """Share of the last logical batch's samples that were longer than C. Not private."""
        if self.norms is None or not len(self.norms):
            return 0.0
        return float((self.norms > self._clip.max_norm).double().mean())

    # -- state ------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """As in the base, and ``"privacy"``: ledger, noise generators, adaptive clipping norm.

        It is as secret as the data, for the noise can be computed from it.
        """
        clip = self.max_grad_norm
        privacy = {
            "ledger": self.ledger.state_dict(),
            # Others than the first process draw none.
            "noise": self._noise.state_dict() if self._ranks.first else None,
            "clipping": clip.state_dict() if isinstance(clip, QuantileClipping) else {},
        }
        return super().state_dict() | {"privacy": privacy}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved state, with the noise that would have come next.

        Raises:
            CurvoptError: the state is that of an optimizer that was not private.
        """
        if "privacy" not in state_dict:
            raise CurvoptError(
                "the state has no privacy ledger, so what was spent before is unknown: load a "
                f"state of {type(self).__name__}"
            )
        privacy = state_dict["privacy"]
        if privacy["noise"] is None and self._ranks.first:
            raise CurvoptError(
                "the state is that of another process than the first, so the noise would start "
                "over: load the one that the first process saved"
            )
        super().load_state_dict(state_dict)
        self._agreed = False
        self.ledger.load_state_dict(privacy["ledger"])
        self._noise.load_state_dict(privacy["noise"] or {})
        if isinstance(self.max_grad_norm, QuantileClipping):
            self.max_grad_norm.load_state_dict(privacy["clipping"])


class DPSGD(PrivateOptimizer):
    r"""Differentially private SGD, on ordinary models, losses and loops.

    .. math::
        g = \frac1B \Bigl(\sum_n \min\bigl(1, \tfrac{C}{\|g_n\|}\bigr) g_n
            + N(0, \sigma^2 C^2 I)\Bigr),
        \qquad \theta \leftarrow \theta - \mathrm{lr} \cdot g

    with :math:`g_n` the gradient of sample n's own loss over all parameters together, whatever the
    loss's reduction; momentum and weight decay as in `torch.optim.SGD`. Afterwards ``p.grad`` holds
    g; a gradient without noise never exists on a parameter. One forward pass and one backward pass
    to the activations give the norms and the clipped sum alike, so that a step costs about as much
    as an ordinary one, and whatever an op recorded, no sample contributes more than C.

    Args:
        params: parameters, (name, parameter) pairs, or parameter groups. Every trainable one gets
            noise, used or not; frozen ones get none.
        lr: learning rate.
        noise_multiplier: sigma, the noise's standard deviation over C; 0 is not private. A number,
            or a function of the number of finished steps (`curvopt.privacy` has schedules); see
            `curvopt.privacy.calibrate_noise`.
        max_grad_norm: C; infinity does not clip. A number, a function of the number of finished
            steps, or `curvopt.privacy.QuantileClipping`.
        expected_batch_size: B, the mean number of samples of a logical batch: a number that is
            known beforehand, for the size of a batch is itself private.
        momentum: as in `torch.optim.SGD`; costs no privacy.
        weight_decay: factor of theta that is added to g; costs no privacy.
        nesterov: Nesterov's momentum.
        maximize: ascend instead of descend.
        clipping: ``"flat"``: one norm over all parameters. ``"per_layer"``: each parameter tensor
            is clipped to C / sqrt(number of them). ``"automatic"``: the factor is
            ``C / (|g_n| + 0.01)``, at most C as well; C then only scales the learning rate.
        sampler: what draws the batches: the `DataLoader` or `curvopt.privacy.PoissonBatchSampler`
            itself, from which rate and number of samples follow, or one of ``"poisson"``,
            ``"shuffle"`` (each sample once an epoch) and ``"none"``, nothing known: each step is
            then accounted as if it had seen all samples. Only Poisson sampling is amplified.
        sample_rate: q, the probability of a sample to be in a batch; for ``"shuffle"``
            1 / (batches of an epoch). Default: ``expected_batch_size / num_samples``.
        num_samples: size of the data set, to check ``delta < 1 / num_samples``.
        generator: of the noise, to repeat a run; nothing else may draw from it. Default: the
            operating system's randomness, whose noise nobody can compute again.
        secure_noise: sums of four float64 draws, against attacks on floating point; slower.
        process_group: where ``torch.distributed`` is initialized, the processes whose batches make
            up one logical batch; all by default. See the note.
        batch_size: number of samples, where the model's first op and the loss do not tell.
        reduction: ``"mean"`` or ``"sum"``: how a loss written by hand is reduced over samples.
        foreach: as in `torch.optim.SGD`.

    Raises:
        CurvoptError: an argument is out of range; in `step`, whatever would break the guarantee:
            batch norm in training mode or another buffer that the forward pass updates, samples
            that mix, a ``p.grad`` that something else has filled.

    Note:
        * The privacy unit is the sample, the leading axis of the batch. A logical batch may come in
          micro-batches (`curvopt.privacy.micro_batches`): each has its own ``backward()`` in one
          closure, none is rescaled, noise is added once. A sample belongs in one of them only.
        * An empty batch is a step: noise alone, accounted.
        * Data parallel: every process builds the same model, unwrapped, and the same optimizer, and
          steps on its own samples, such as those of a ``PoissonBatchSampler`` with its ``rank``;
          B is that of all processes together. Clipped sums are added up on the first process, which
          adds the noise, once, and hands the result to all.
        * A sample whose gradient is not finite contributes nothing; see `nonfinite_samples`.
        * Not private: the loss that `step` returns, `norms`, `clip_fraction`, `nonfinite_samples`,
          and the state of the noise's generator in `state_dict`.
        * What a sample's gradient is must not depend on the others. Mixing that leaves a trace in
          the backward pass is refused; statistics of the batch that are detached from it, and a
          loss divided by a count of the batch other than by its ``mean``, cannot be seen.

    Example:
        >>> model = torch.nn.Linear(4, 3)
        >>> opt = curvopt.DPSGD(
        ...     model.parameters(), lr=0.5, noise_multiplier=1.0, max_grad_norm=1.0,
        ...     expected_batch_size=8, sampler="poisson", num_samples=1000,
        ... )
        >>> x, y = torch.randn(7, 4), torch.randint(3, (7,))
        >>> loss = opt.step(lambda: torch.nn.functional.cross_entropy(model(x), y))
        >>> epsilon = opt.privacy_spent(delta=1e-5)

    References:
        Abadi et al. 2016, arXiv 1607.00133. One backward pass: Bu et al. 2022, arXiv 2210.00038.
        Automatic clipping: Bu et al. 2022, arXiv 2206.07136.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor,
        *,
        noise_multiplier: float | Schedule,
        max_grad_norm: float | Schedule | QuantileClipping,
        expected_batch_size: float,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        maximize: bool = False,
        clipping: Clipping = "flat",
        sampler: Sampler = "none",
        sample_rate: float | None = None,
        num_samples: int | None = None,
        generator: Generator | None = None,
        secure_noise: bool = False,
        process_group: Any = None,
        batch_size: int | None = None,
        reduction: str | None = None,
        foreach: bool | None = None,
    ):
        if nesterov and not momentum:
            raise CurvoptError("Invalid nesterov: True (Nesterov's momentum needs a momentum)")
        defaults = dict(
            lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov,
            maximize=maximize, foreach=foreach,
        )  # fmt: skip
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
        )

    def _move(self, group: dict[str, Any], params: list[Tensor]) -> None:
        buffers = [self.state[p].get("momentum_buffer") for p in params]
        settings = {name: group[name] for name in self.defaults if name != "differentiable"}
        grads = [cast(Tensor, p.grad) for p in params]
        sgd(params, grads, buffers, dampening=0.0, **settings)
        if group["momentum"]:
            for p, buffer in zip(params, buffers, strict=True):
                self.state[p]["momentum_buffer"] = buffer


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
        **privacy: as in `DPSGD`: ``noise_multiplier``, ``max_grad_norm``, ``expected_batch_size``
            and the rest.

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
        **privacy: Any,
    ):
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, maximize=maximize)
        super().__init__(params, defaults, **privacy)

    def _validate(self, group: dict[str, Any]) -> None:
        super()._validate(group)
        require(all(0 <= b < 1 for b in group["betas"]), "betas", group["betas"], "in [0, 1)")
        require(group["eps"] > 0, "eps", group["eps"], "must be positive")

    def _move(self, group: dict[str, Any], params: list[Tensor]) -> None:
        lr, (beta1, beta2) = group["lr"], group["betas"]
        variance = (self._std / self.expected_batch_size) ** 2
        for p in params:
            state = self.state[p]
            grad = cast(Tensor, p.grad).mul(-1 if group["maximize"] else 1)
            if not state:
                state["step"] = 0
                state["exp_avg"] = torch.zeros_like(p)
                state["exp_avg_sq"] = torch.zeros_like(p)
            state["step"] += 1
            m = state["exp_avg"].lerp_(grad, 1 - beta1)
            v = state["exp_avg_sq"].lerp_(grad.square().sub_(variance), 1 - beta2)
            m, v = m / (1 - beta1 ** state["step"]), v / (1 - beta2 ** state["step"])
            p.mul_(1 - lr * group["weight_decay"])
            p.sub_(lr * m.div_(v.clamp_(min=group["eps"] ** 2).sqrt_()))


class Clip(ClippedGradSum):
    """The clipped sum of a batch; it keeps the norms of the samples, `norms`.

    Args:
        max_norm: C.
        mode: ``"flat"``, ``"per_layer"`` or ``"automatic"``.
    """

    def __init__(self, max_norm: float, mode: Clipping):
        super().__init__(max_norm)
        self.mode = mode

    def weights(self, squares: Tensor) -> Tensor:
        """As in the base class, by mode."""
        self.norms = norms = squares.sum(0).sqrt()
        if self.mode == "automatic":
            factors = self.max_norm / (norms + 0.01)
        elif self.mode == "flat":
            factors = (self.max_norm / (norms + 1e-6)).clamp(max=1)
        else:
            share = self.max_norm / len(squares) ** 0.5
            factors = (share / (squares.sqrt() + 1e-6)).clamp(max=1)
        return torch.where(norms.isfinite(), factors, 0).expand_as(squares)


class PrivateTape(Tape):
    """Also refuses what would carry samples past the noise: statistics over the batch, buffers."""

    def __enter__(self) -> Any:
        if not self.depth:
            self.buffers: list[list[tuple[str, Tensor, int]]] = []
            self.watching = [
                register_module_forward_pre_hook(self._before),
                register_module_forward_hook(self._after, always_call=True),
            ]
        return super().__enter__()

    def __exit__(self, *error: Any) -> Any:
        result = super().__exit__(*error)
        if not self.depth:
            for handle in self.watching:
                handle.remove()
        return result

    def _before(self, module: nn.Module, args: Any) -> None:
        held = module._buffers.items()
        self.buffers.append([(name, b, b._version) for name, b in held if b is not None])

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        before = self.buffers.pop()
        if not before:
            return
        given = [value for value in args if isinstance(value, Tensor)]
        if given and all(self.is_shared(value) for value in given):
            return  # it saw parameters alone (spectral norm, say), and those are not secret
        for name, buffer, version in before:
            if getattr(module, name, None) is not buffer or buffer._version != version:
                kind = type(module).__name__
                raise CurvoptError(
                    f"the forward pass of {kind} updated its buffer {name} {list(buffer.shape)} "
                    "from the samples: nothing of that is private. Put the layer in eval() mode, "
                    "or use one without statistics over the batch, such as GroupNorm"
                )


def _check_noise(sigma: float) -> float:
    require(0 <= sigma < math.inf, "noise multiplier", sigma, "must be finite and at least 0")
    return sigma


def _check_norm(norm: float, clipping: str) -> float:
    require(norm > 0, "max_grad_norm", norm, "must be positive")
    finite = clipping != "automatic" or norm < math.inf
    require(finite, "max_grad_norm", norm, "automatic clipping needs a finite one")
    return norm


def _zeros(p: Tensor) -> Tensor:
    """The sum for a parameter that took no part."""
    dtype = torch.promote_types(p.dtype, torch.float32)
    return torch.zeros_like(p, dtype=dtype, memory_format=torch.contiguous_format)
