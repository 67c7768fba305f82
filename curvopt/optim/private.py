"""What private optimizers share: clipped per-sample gradients, summed, with noise, accounted."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from curvopt.engine.computation import Computation
from curvopt.engine.penalties import alone
from curvopt.errors import CurvoptError, NoSamples
from curvopt.optim.accounted import Accounted, check_noise
from curvopt.optim.base import Closure, wrapped_by
from curvopt.optim.clip import Clip, check_norm
from curvopt.optim.joined import Backward
from curvopt.optim.logical import LogicalBatch, zeros_for
from curvopt.optim.private_shards import privatized
from curvopt.optim.private_tape import (
    PrivateTape,
    detached,
    refuse_again,
    refuse_hooks,
    refuse_leaks,
)
from curvopt.optim.sizes import check_sizes
from curvopt.privacy.clipping import QuantileClipping
from curvopt.privacy.schedules import value_at
from curvopt.privacy.withheld import Withheld, release, withhold
from curvopt.quantities import Quantity
from curvopt.recording.tape import Tape

LEFT_OVER = (
    "a recorded pass was not followed by step(): record all micro-batches of a logical batch in "
    "one `with opt.record():`, or drop the pass by zero_grad(). Where a framework accumulates "
    "gradients, draw each logical batch in as many parts: DataLoader(data, "
    "batch_sampler=poisson_sampler.in_parts(k)), and give that loader as sampler="
)


class PrivateOptimizer(Accounted):
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

    restores_gradients = False  # they are the last step's, already used: the memory is better used
    takes_shards = True
    goes_backward = False  # a gradient without noise must not exist on a parameter
    finite_loss = False  # one sample may make it infinite; its gradient is left out then

    # Of the step under way.
    _spent = _stepping = _left_over = False
    _last_tape: Callable[[], Tape | None] = staticmethod(lambda: None)

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
        """Record the forward and backward passes of one logical batch, or of one part of it.

        All of its micro-batches go in one block: a pass that is left over, without a `step` or
        `zero_grad`, may have seen samples of the next one, which would then count twice. Where the
        sampler hands out each logical batch in parts (`PoissonBatchSampler.in_parts`), as a
        framework that accumulates gradients needs it, each part has a block of its own.

        Raises:
            CurvoptError: a pass is left over, or a parameter has a gradient that is not private.
        """
        wrapped: Any = wrapped_by(self)
        if wrapped is not None:
            return wrapped.record()
        if self.collected and not self._stepping and self._passes >= self.parts:
            raise CurvoptError(LEFT_OVER)
        self._begin_pass()
        if not self.collected:
            self.zero_grad()
        return super().record()

    @property
    def _passes(self) -> int:
        return self.collected[0].passes if self.collected else 0

    def _tape(self) -> Tape:
        tape = PrivateTape(self._tracked(), batch_size=self.batch_size)
        tape.views = self.views, self.view_order
        self._last_tape = ref(tape)
        return tape

    def _wanted(self) -> list[Quantity]:
        step = self.ledger.steps
        self._sigma = check_noise(value_at(self.noise_multiplier, step))
        norm = self.max_grad_norm
        norm = norm.max_grad_norm if isinstance(norm, QuantileClipping) else value_at(norm, step)
        self._clip = Clip(check_norm(norm, self.clipping), self.clipping)
        return [self._clip]

    def _accumulate(
        self, computation: Computation, quantities: list[Quantity], backward: Backward
    ) -> None:
        """Add a micro-batch to the clipped sum; torch's own backward pass never runs."""
        refuse_hooks(self._parameters(), self._name)
        try:
            computation.prepare()
        except NoSamples:  # an empty batch, and a penalty
            penalties = alone(computation.tape, computation.loss)
            self._losses.append(computation.loss)
            self._add({}, torch.zeros(0, device="cpu"), penalties)
            return
        refuse_leaks(computation)
        refuse_again(computation)
        self._losses.append(computation.loss)
        # Under autocast the sum would be rounded after the norms were taken.
        with torch.autocast(computation.loss.device.type, enabled=False):
            penalties = computation.penalty_gradients()
            self._penalized = self._penalized or bool(penalties)
            if not computation.samples:
                self._add(
                    {}, torch.zeros(0, device="cpu"), penalties
                )  # no samples: no sum, but a step
                return
            values = computation.run(quantities, free=True)[self._clip.field]
        self._add(dict(values), self._clip.norms, penalties)

    def _add(
        self, sums: dict[Tensor, Tensor], norms: Tensor, penalties: dict[Tensor, Tensor]
    ) -> None:
        if self._left_over:
            raise CurvoptError(LEFT_OVER)
        if not self.collected:
            self.collected.append(LogicalBatch())
        batch: LogicalBatch = self.collected[0]
        if batch.grads is not None:
            raise CurvoptError(
                "the private gradient of this step was looked at before the logical batch was "
                "complete, so its noise is drawn: clip or read gradients after the last backward()"
            )
        batch.add(sums, norms, penalties)
        for p in self._parameters():
            if p.requires_grad:
                withhold(p, self._release)

    def _made(self) -> LogicalBatch:
        """The logical batch with its private gradient; nobody has seen anything of it so far."""
        for group in self.param_groups:
            self._validate(group)  # before there is noise
        self._begin_pass()  # nothing else may have filled p.grad meanwhile
        if not self.collected:
            raise CurvoptError(
                "the gradients were set to None or to zero between backward() and step(), which "
                "drops the batch: call zero_grad() before backward()"
            )
        batch: LogicalBatch = self.collected[0]
        if batch.grads is not None:
            self._met = True
            return batch
        if self.parts > 1 and batch.passes != self.parts:
            raise CurvoptError(
                f"the sampler hands out each logical batch in {self.parts} parts, and "
                f"{batch.passes} were recorded: let the framework accumulate gradients over "
                f"{self.parts} batches (an empty one counts: empty_batch())"
            )
        sigma, norm = self._sigma, self._clip.max_norm
        batch.lengths = self._meet(batch.joined_norms(), batch.penalties)
        batch.sizes = check_sizes(
            len(batch.lengths),
            self._sizes,
            self.expected_batch_size,
            self.sampler,
            self.sample_rate,
        )
        quantile = self.max_grad_norm if isinstance(self.max_grad_norm, QuantileClipping) else None
        if quantile:
            sigma = quantile.gradient_noise_multiplier(sigma)
        self._std = sigma and sigma * norm
        groups = (group["params"] for group in self.param_groups)
        trained = [p for params in groups for p in params if p.requires_grad]
        grads = self._privatize(trained, batch)
        if quantile:
            moved = copy(quantile)
            moved.update(batch.lengths, self._noise)
            batch.following = self._ranks.value_of_first(moved.max_grad_norm)
        batch.grads = grads
        return batch

    def _account(self, batch: LogicalBatch) -> None:
        """Account a step before the first thing of it can be seen."""
        if batch.accounted:
            return
        norm, lost = self._clip.max_norm, int((~batch.lengths.isfinite()).sum())  # may fail
        self.ledger.log(self._sigma, self.sample_rate, sampler=self.sampler, max_grad_norm=norm)
        batch.accounted = True
        self.norms, self._sizes = batch.lengths, batch.sizes
        self.nonfinite_samples += lost
        if isinstance(self.max_grad_norm, QuantileClipping) and batch.following is not None:
            self.max_grad_norm.max_grad_norm = batch.following

    @torch.no_grad()
    def _release(self, p: Tensor) -> Tensor:
        """The private gradient of a parameter, for who looks at it between backward and step."""
        if not self.collected:
            raise CurvoptError(
                "this stood in for a private gradient until step() made it: look at p.grad itself"
            )
        made: LogicalBatch = self.collected[0]
        if made.grads is not None:
            return made.grads[p]
        tape = self._last_tape()
        self._met = self._spent = False
        with tape.trace.paused() if tape is not None and tape.depth else nullcontext():
            try:
                batch = self._made()
            except Exception:
                self._tell()
                if self._spent:  # it failed after noise went into the sums
                    self.zero_grad()
                raise
            self._account(batch)
        self._spent = False
        assert batch.grads is not None
        return batch.grads[p]

    def _update(self) -> None:
        batch = self._made()
        grads = batch.grads
        assert grads is not None
        groups = [[p for p in group["params"] if p.requires_grad] for group in self.param_groups]
        moves = [
            self._move(group, params, [grads[p] for p in params])
            for group, params in zip(self.param_groups, groups, strict=True)
        ]
        # So far nobody has seen anything of the samples, unless it was accounted then, so a step
        # that failed has cost nothing.
        self._account(batch)
        for p, grad in grads.items():
            p.grad = grad
        for move in moves:
            move()

    def empty_batch(self, penalty: Closure | None = None) -> None:
        """Note a logical batch, or a part of one, that has no samples, without the model.

        It takes the place of ``with opt.record():`` in loops that step by themselves.

        Args:
            penalty: returns the terms of the loss that are of the parameters alone, if it has any.

        Raises:
            CurvoptError: a recorded pass is left over; the loss has such terms and they are not
                given; what is given holds data.
        """
        wrapped: Any = wrapped_by(self)
        if wrapped is not None:
            return wrapped.empty_batch(penalty)
        if self._penalized and penalty is None:
            raise CurvoptError(
                "the loss has a term of the parameters alone, and a step without it would tell "
                "that the batch was empty: give it, empty_step(lambda: penalty(model))"
            )
        grads: dict[Tensor, Tensor] = {}
        tape: Any = self._tape() if self._stepping else self.record()  # for its checks
        if penalty is not None:
            with torch.enable_grad(), tape:
                loss = penalty()
            grads = alone(tape, loss)
        self._add({}, torch.zeros(0, device="cpu"), grads)
        self._note(recorded=True)

    def empty_step(self, penalty: Closure | None = None) -> None:
        """Take the step of an empty batch, as Poisson sampling draws some, without the model.

        It is noise alone, and accounted like any other.

        Args:
            penalty: as in `empty_batch`.

        Raises:
            CurvoptError: as `empty_batch`.
        """
        wrapped: Any = wrapped_by(self)
        if wrapped is not None:
            return wrapped.empty_step(penalty)
        self.empty_batch(penalty)
        self.step()

    def _run(self, closure: Closure) -> Any:
        """As in the base; a closure that ran nothing and returned None has an empty batch."""
        before = self._passes

        def run() -> Any:
            loss, tape = closure(), self._last_tape()
            untouched = tape is not None and not tape.trace.ops
            if loss is None and not before and not self._passes and untouched:
                self.empty_batch()
            return loss

        self._stepping, self._left_over = True, before >= self.parts
        try:
            return super()._run(run)
        finally:
            self._stepping = self._left_over = False

    def _begin_pass(self) -> None:
        try:
            super()._begin_pass()
        except CurvoptError as error:
            raise CurvoptError(
                f"{error}. Lightning's accumulate_grad_batches runs some outside: accumulate in "
                "manual optimization, over a sampler.in_parts(k), each part in its own "
                "`with opt.record():`"
            ) from error

    def _is_filled(self, p: Tensor) -> bool:
        return not isinstance(p.grad, Withheld) and super()._is_filled(p)

    def _unchanged(self) -> bool:
        """As in the base; nothing is added to a stand-in, whatever else acts on it."""
        with torch._C.DisableTorchFunctionSubclass():
            self._left = [
                (p, grad, grad._version if isinstance(grad, Withheld) else version)
                for p, grad, version in self._left
            ]
        return super()._unchanged()

    def __getstate__(self) -> dict[str, Any]:
        """As in the base, and without the tape, which belongs to a pass."""
        return {k: v for k, v in super().__getstate__().items() if k != "_last_tape"}

    def _forget(self) -> None:
        super()._forget()
        self._losses: list[Tensor] = []

    def _step(self, closure: Closure | None) -> Any:
        made = bool(self.collected and self.collected[0].grads is not None)
        self._met, self._spent = made, False
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

    def _privatize(self, params: list[Tensor], batch: LogicalBatch) -> dict[Tensor, Tensor]:
        """``(sum + N(0, std^2)) / B``, rounded to the parameter's dtype at the end."""
        self._spent, sums = True, batch.sums
        if self._wrappers.shards:
            owner, size = self._wrappers.shards.owner, self.expected_batch_size
            whole, more = (
                {owner(p): part for p, part in parts.items()} for parts in (sums, batch.penalties)
            )
            return privatized(params, whole, more, self._ranks, self._noise, self._std, size)
        totals = [sums[p].contiguous() if p in sums else zeros_for(p) for p in params]
        self._ranks.sum_on_first(totals)
        if self._std and self._ranks.first:
            self._noise.add_to(totals, self._std, self.expected_batch_size)
        else:
            torch._foreach_div_(totals, self.expected_batch_size)
        for p, total in zip(params, totals, strict=True):
            if p in batch.penalties:  # the same on all processes
                total.add_(batch.penalties[p])
        self._ranks.copy_from_first(totals)
        batch.sums = {}
        return {p: grad.to(p.dtype) for p, grad in zip(params, totals, strict=True)}
