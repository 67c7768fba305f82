"""What private optimizers share: clipped per-sample gradients, summed, with noise, accounted."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from copy import copy
from typing import Any

import torch
from torch import Generator, Tensor
from torch.utils.data import DataLoader

from curvopt.engine.computation import Computation
from curvopt.errors import CurvoptError
from curvopt.optim.base import Closure, wrapped_by
from curvopt.optim.clip import Clip, Clipping, check_norm
from curvopt.optim.joined import Backward
from curvopt.optim.private_shards import privatized
from curvopt.optim.private_stats import PrivateStats
from curvopt.optim.private_tape import PrivateTape, detached
from curvopt.optim.sizes import check_sizes
from curvopt.parallel.shards import is_sharded
from curvopt.privacy.accounting import PrivacyLedger
from curvopt.privacy.checks import require
from curvopt.privacy.clipping import QuantileClipping
from curvopt.privacy.epsilon import Accountant
from curvopt.privacy.noise import GaussianNoise
from curvopt.privacy.report import PrivacyReport
from curvopt.privacy.sampling import PoissonBatchSampler, SamplerKind, check_ranks, sampling_of
from curvopt.privacy.schedules import Schedule, value_at
from curvopt.privacy.withheld import release, withhold
from curvopt.quantities import Quantity
from curvopt.recording.tape import Tape

Sampler = SamplerKind | DataLoader | PoissonBatchSampler


class PrivateOptimizer(PrivateStats):
    """What private optimizers share: `p.grad` is a noisy sum of clipped gradients, and accounted.

    A subclass says in `_move` how parameters move. The arguments are those of `DPSGD`.

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
    takes_shards = True
    goes_backward = False  # a gradient without noise must not exist on a parameter
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
            check_norm(max_grad_norm, clipping)
        size = expected_batch_size
        require(0 < size < math.inf, "expected batch size", size, "must be positive and finite")
        require(clipping in ("flat", "per_layer", "automatic"), "clipping", clipping, "is unknown")
        super().__init__(
            params,
            defaults,
            batch_size=batch_size,
            reduction=reduction,
            process_group=process_group,
        )
        self.noise_multiplier, self.max_grad_norm = noise_multiplier, max_grad_norm
        self.expected_batch_size, self.clipping = expected_batch_size, clipping
        self.sampler, self.sample_rate, num_samples = sampling_of(
            sampler, sample_rate, num_samples, expected_batch_size
        )
        self.ledger = PrivacyLedger(num_samples)
        self.norms: Tensor | None = None
        self.nonfinite_samples = 0
        self._noise = GaussianNoise(generator, secure=secure_noise)
        self._place = self._ranks.place
        check_ranks(sampler, *self._place)
        self._spent = False
        self._sizes = (-1, 0)  # of the last logical batch, and how often in a row

    def _move(
        self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]
    ) -> Callable[[], None]:
        """Compute how a group's parameters move along their private gradients.

        Nothing may change yet. What is returned makes the change, in place, without computing
        anything that could fail.
        """
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
        return PrivateTape(self._tracked(), batch_size=self.batch_size)

    def _wanted(self) -> list[Quantity]:
        step = self.ledger.steps
        self._sigma = _check_noise(value_at(self.noise_multiplier, step))
        norm = self.max_grad_norm
        norm = norm.max_grad_norm if isinstance(norm, QuantileClipping) else value_at(norm, step)
        self._clip = Clip(check_norm(norm, self.clipping), self.clipping)
        return [self._clip]

    def _accumulate(
        self, computation: Computation, quantities: list[Quantity], backward: Backward
    ) -> None:
        """Add a micro-batch to the clipped sum; torch's own backward pass never runs."""
        self._refuse_hooks()
        computation.prepare()
        for shape in computation.shared:
            raise CurvoptError(
                f"all samples share data of shape {shape} that is no parameter and no buffer: if "
                "it was made of the samples, nothing of that is private. Make a constant of the "
                "model a buffer (register_buffer)"
            )
        for buffer in computation.updated:
            raise CurvoptError(
                f"the forward pass updated a buffer {list(buffer.shape)} from the samples: nothing "
                "of that is private. Put the layer that has it in eval() mode, or use one without "
                "statistics of the batch, such as GroupNorm"
            )
        self._losses.append(computation.loss)
        if not computation.samples:
            self._add({}, torch.zeros(0))  # no samples: no sum, but a step
            return
        # Under autocast the sum would be rounded after the norms were taken.
        with torch.autocast(computation.loss.device.type, enabled=False):
            values = computation.run(quantities, free=True)[self._clip.field]
        self._add(dict(values), self._clip.norms)

    def _refuse_hooks(self) -> None:
        """They would have to be called with the gradient of the samples."""
        for p in self._parameters():
            if p._backward_hooks or p._post_accumulate_grad_hooks:
                raise CurvoptError(
                    f"{self._name(p)} has a gradient hook, which a private step cannot call: the "
                    "gradient without noise must not be seen. Remove the hook, and change the "
                    "private gradient in register_step_pre_hook or mask the parameter itself"
                )

    def _add(self, sums: dict[Tensor, Tensor], norms: Tensor) -> None:
        if not self.collected:
            self.collected.append({"sums": {}, "norms": []})
        before = self.collected[0]["sums"]
        for p, part in sums.items():
            before[p] = before[p].add_(part) if p in before else part
        self.collected[0]["norms"].append(norms)
        for p in self._parameters():
            if p.requires_grad:
                withhold(p)

    def _update(self) -> None:
        for group in self.param_groups:
            self._validate(group)  # before there is noise
        self._begin_pass()  # nothing else may have filled p.grad meanwhile
        if not self.collected:
            raise CurvoptError(
                "the gradients were set to None or to zero between backward() and step(), which "
                "drops the batch: call zero_grad() before backward()"
            )
        (batch,) = self.collected
        sums, norms = batch["sums"], batch["norms"]
        sigma, norm = self._sigma, self._clip.max_norm
        lengths = self._meet(torch.cat([part.to(norms[0].device) for part in norms]))
        sizes = check_sizes(
            len(lengths),
            self._sizes,
            self.expected_batch_size,
            self.sampler,
            self.sample_rate,
        )
        quantile = self.max_grad_norm if isinstance(self.max_grad_norm, QuantileClipping) else None
        if quantile:
            sigma = quantile.gradient_noise_multiplier(sigma)
        self._std = sigma and sigma * norm
        groups = [[p for p in group["params"] if p.requires_grad] for group in self.param_groups]
        grads = self._privatize([p for params in groups for p in params], sums)
        if quantile:
            moved = copy(quantile)
            moved.update(lengths, self._noise)
            following = self._ranks.value_of_first(moved.max_grad_norm)
        moves = [
            self._move(group, params, [grads[p] for p in params])
            for group, params in zip(self.param_groups, groups, strict=True)
        ]
        left_out = int((~lengths.isfinite()).sum())
        # So far nobody has seen anything of the samples, so a step that failed has cost nothing.
        # It is accounted before the first thing can be seen.
        self.ledger.log(self._sigma, self.sample_rate, sampler=self.sampler, max_grad_norm=norm)
        self.norms, self._sizes = lengths, sizes
        self.nonfinite_samples += left_out
        if quantile:
            quantile.max_grad_norm = following
        for p, grad in grads.items():
            p.grad = grad
        for move in moves:
            move()

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
                float(p.double().sum()) for p in self._parameters() if not is_sharded(p)
            )
        told = self._ranks.meet(settings, len(norms))
        self._agreed = True
        return self._ranks.concatenated(norms, [count for (count,) in told])

    def empty_step(self) -> None:
        """Take the step of an empty batch, as Poisson sampling draws some, without the model.

        It is noise alone, and accounted like any other.

        Raises:
            CurvoptError: a recorded pass is left over.
        """
        wrapped: Any = wrapped_by(self)
        if wrapped is not None:
            return wrapped.empty_step()
        self.record()  # for its checks
        self._add({}, torch.zeros(0))
        self._note(recorded=True)
        self.step()

    def _forget(self) -> None:
        super()._forget()
        self._losses: list[Tensor] = []

    def _step(self, closure: Closure | None) -> Any:
        self._met = self._spent = False
        try:
            result = super()._step(closure)
            self._spent = False
            # Torch's own backward pass frees the graph behind a loss that is kept.
            losses, self._losses = self._losses, []
            for loss in losses:
                detached(loss)
            if isinstance(result, tuple):
                return tuple(map(detached, result))
            return detached(result)
        except Exception:  # no interrupt: nobody may come to hear of that
            self._tell()  # the others are waiting
            raise
        finally:
            if self._spent:  # it failed after noise went into the sums
                self.zero_grad()
            if not self._recorded:
                for p in self._parameters():
                    release(p)

    def _privatize(self, params: list[Tensor], sums: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        """``(sum + N(0, std^2)) / B``, rounded to the parameter's dtype at the end."""
        self._spent = True
        if self._wrappers.shards:
            owner, size = self._wrappers.shards.owner, self.expected_batch_size
            whole = {owner(p): part for p, part in sums.items()}
            return privatized(params, whole, self._ranks, self._noise, self._std, size)
        totals = [sums[p].contiguous() if p in sums else _zeros(p) for p in params]
        self._ranks.sum_on_first(totals)
        if self._std and self._ranks.first:
            self._noise.add_to(totals, self._std, self.expected_batch_size)
        else:
            torch._foreach_div_(totals, self.expected_batch_size)
        self._ranks.copy_from_first(totals)
        return {p: grad.to(p.dtype) for p, grad in zip(params, totals, strict=True)}

    # -- what it costs, and what was seen ---------------------------------------------------------

    def privacy_spent(self, delta: float, accountant: Accountant = "pld") -> float:
        """The epsilon spent so far; see `curvopt.privacy.PrivacyLedger.epsilon`."""
        return self.ledger.epsilon(delta, accountant)

    def privacy_report(
        self, delta: float, accountant: Accountant = "pld", unit: str = "one sample"
    ) -> PrivacyReport:
        """All that makes the epsilon mean something; see `curvopt.privacy.PrivacyLedger.report`."""
        return self.ledger.report(delta, accountant, unit)

    # -- state ------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """As in the base, and ``"privacy"``: ledger, noise generators, adaptive clipping norm.

        It is as secret as the data, for the noise can be computed from it.
        """
        clip = self.max_grad_norm
        privacy = {
            "ledger": self.ledger.state_dict(),
            # Others than the first process draw none.
            "noise": self._noise.state_dict() if self._ranks.first else self._noise.shared(),
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


def _check_noise(sigma: float) -> float:
    require(0 <= sigma < math.inf, "noise multiplier", sigma, "must be finite and at least 0")
    return sigma


def _zeros(p: Tensor) -> Tensor:
    """The sum for a parameter that took no part."""
    dtype = torch.promote_types(p.dtype, torch.float32)
    return torch.zeros_like(p, dtype=dtype, memory_format=torch.contiguous_format)
