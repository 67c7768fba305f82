"""SGD on private gradients: clipped per sample, summed, with noise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor

from curvopt.axes.views import ViewOrder
from curvopt.errors import CurvoptError
from curvopt.optim.accounted import Sampler
from curvopt.optim.clip import Clipping
from curvopt.optim.private import PrivateOptimizer
from curvopt.optim.state import held
from curvopt.privacy.clipping import QuantileClipping
from curvopt.privacy.schedules import Schedule


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
            ``"shuffle"`` (each sample once an epoch) and ``"none"``, a sample once in a batch: each
            step is then accounted as if it had seen all samples. Only Poisson sampling is
            amplified. A loader that may draw a sample twice is refused. Of one that hands out
            logical batches in parts (`PoissonBatchSampler.in_parts`), all parts make one step.
        sample_rate: q, the probability of a sample to be in a batch; for ``"shuffle"``
            1 / (batches of an epoch). Default: ``expected_batch_size / num_samples``.
        num_samples: size of the data set, to check ``delta < 1 / num_samples``.
        generator: of the noise, to repeat a run; nothing else may draw from it. Default: the
            operating system's randomness, whose noise nobody can compute again.
        secure_noise: sums of four float64 draws, against attacks on floating point; slower.
        process_group: where ``torch.distributed`` is initialized, the processes whose batches make
            up one logical batch; all by default. See the note.
        batch_size: number of samples, where the data flow leaves two readings; checked against it.
        reduction: ``"mean"`` or ``"sum"``: what a sample's own loss is where a sum is scaled by
            something that may be a count: N times its part of the loss, or its part.
        views: K, where the data hold K rows per sample, such as augmented ones: the gradient of a
            sample is the mean over its K views, and is clipped as one (De et al. 2022). Views that
            are made inside the closure, or have an axis of their own in the data (``[N, K, *]``,
            flattened in the closure), belong to their sample anyway: then leave it out.
        view_order: ``"sample"``: a sample's views follow one another, row nK + k
            (``x.repeat_interleave(K, 0)``); ``"view"``: all first views, then all second ones, row
            kN + n (``torch.cat(views)``).
        foreach: accepted as in `torch.optim.SGD`; in place, moving together takes no more memory.

    Raises:
        CurvoptError: an argument is out of range; in `step`, whatever would break the guarantee:
            an op in which samples meet, detached or not; a buffer that the forward pass updates; a
            scaled sum that ``reduction`` does not declare; a hook on a parameter, or one that
            changes the gradient of what it is made into, or of the loss; a ``p.grad`` that
            something else has filled.

    Note:
        * The privacy unit is the sample, as the data flow keeps it apart. A logical batch may come
          in micro-batches (`curvopt.privacy.micro_batches`): each has its own ``backward()`` in one
          closure, none is rescaled, noise is added once. A sample belongs in one of them only;
          within a closure or block, what the passes see in the same memory is refused.
        * Between ``backward()`` and ``step()``, ``p.grad`` may be read, clipped and scaled: it is
          the private gradient, whose noise is drawn, and which is accounted, as it is looked at.
        * A term of the loss that holds no sample (a proximal term, a penalty) adds its own gradient
          after the noise. Parameters, buffers and numbers aside it may hold what has the shape of a
          parameter, such as what it is pulled to; nothing of that may be made of the samples.
        * An empty batch is a step: noise alone, accounted; `empty_step` takes it without the model.
        * Data parallel: every process builds the same model (`DistributedDataParallel` may wrap it)
          and the same optimizer, and steps on its own samples, such as those of a
          ``PoissonBatchSampler`` with its ``rank``; B is that of all processes together. Clipped
          sums are added up on the first process, which adds the noise, once, and hands the result
          to all. Under `fully_shard` each process adds the noise of its own shard.
        * A state that is loaded into an optimizer that has gone on since it was saved forgets none
          of the steps in between, and repeats none of the noise.
        * A sample whose gradient is not finite contributes nothing; see `nonfinite_samples`.
        * Not private: the loss that `step` returns, `norms`, `clip_fraction`, `nonfinite_samples`,
          and the state of the noise's generator in `state_dict`.
        * What a sample's gradient is must not depend on the others. What no program can see of that
          remains with you: mixing before the closure, numbers that go through Python or numpy,
          branches taken on values of the batch, kernels with hidden state, a sample that comes
          twice.

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
        Automatic clipping: Bu et al. 2022, arXiv 2206.07136. Views: De et al. 2022, arXiv
        2204.13650.
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
        views: int = 1,
        view_order: ViewOrder = "sample",
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
            views=views,
            view_order=view_order,
        )

    def _begun(self, p: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        # As the first step's buffer is the gradient, that of no step is zero.
        return {"momentum_buffer": torch.zeros_like(p)} if group["momentum"] else {}

    def _move(
        self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]
    ) -> Callable[[], None]:
        lr, mu, decay = float(group["lr"]), group["momentum"], group["weight_decay"]
        sign, shrink = -1 if group["maximize"] else 1, 1 - lr * decay
        buffers = []
        for p, grad in zip(params, grads, strict=True) if mu else ():
            state = self.state.get(p, {})
            if state.get("momentum_buffer") is None:
                buffer = grad * sign
            else:
                before = held(state, "momentum_buffer", p, self._name)
                buffer = torch.mul(before, mu).add_(grad, alpha=sign)
            buffers.append(buffer.add_(p, alpha=decay) if decay else buffer)
        # What p moves along, and how far: b alone, or Nesterov's g + mu b, whose sum takes memory.
        along = [(grads, -lr * sign)] if not mu or group["nesterov"] else []
        along += [(buffers, -lr * (mu if group["nesterov"] else 1))] if mu else []
        shrinks = decay and (not mu or group["nesterov"])

        def move() -> None:
            for p, buffer in zip(params, buffers, strict=bool(mu)):
                self.state[p]["momentum_buffer"] = buffer
            if shrinks and params:
                torch._foreach_mul_(params, shrink)
            for tensors, rate in along if params else ():
                torch._foreach_add_(params, tensors, alpha=rate)

        return move
