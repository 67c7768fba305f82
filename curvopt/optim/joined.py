"""A step of several processes: they agree on it, measure as one, or fail together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from typing import Any

import torch
from torch import Generator, Tensor

from curvopt.dtypes import at_least_float32
from curvopt.engine.checks import check_loss
from curvopt.engine.computation import Computation
from curvopt.errors import CurvoptError
from curvopt.looks import Conditions, not_looking, waits
from curvopt.optim.checkpoint import PLACES
from curvopt.optim.contract import Contract
from curvopt.parallel.groups import Ranks, token_of
from curvopt.parallel.reduce import fingerprint
from curvopt.parallel.shards import cut, is_sharded
from curvopt.parallel.wrappers import Wrappers
from curvopt.quantities import Quantity
from curvopt.recording.parked import WaitingTape
from curvopt.recording.tape import Tape

Backward = Callable[..., None]

ALONE = (
    "several processes run, and nothing has combined their gradients, so that their parameters "
    "would drift apart: wrap the model in DistributedDataParallel (and step outside of no_sync), "
    "or give the optimizer process_group=torch.distributed.group.WORLD, which combines them"
)
DIVIDED = (
    "the processes' optimizers hold different parameters, as ZeroRedundancyOptimizer divides them: "
    "what is measured could not be combined. Give each process an optimizer of all parameters; to "
    "divide the state use torch.distributed.fsdp.fully_shard"
)


class Joined(Contract):
    """What an optimizer does as one of several processes.

    Gradients are combined by what wraps the model, which the forward pass shows; or here, where a
    process group was given and nothing wraps it. What is measured beside them is combined here.

    Attributes:
        collected: what the backward passes since the last step left.
        steps: number of steps taken.
    """

    steps: int
    #: Torch's own backward pass runs.
    goes_backward = True
    #: Parameters may be divided among the processes by `fully_shard`.
    takes_shards = False
    #: A step needs no value on the host, but to see whether it failed.
    looks_away = False
    #: Passes are joined one by one, so that all processes must have as many.
    joins_passes = False

    def _among(self, process_group: Any) -> None:
        """Belong to the processes of a group."""
        self._ranks = Ranks(process_group)
        self._wrappers = Wrappers(self.goes_backward)
        self._agreed = self._met = self._told = False

    def _setting(self, name: str) -> Any:
        return self._ranks.group if name == "process_group" else super()._setting(name)

    def _join(self) -> None:
        """Combine `collected` over the processes `_ranks`, in place of it."""
        raise NotImplementedError

    def _accumulate(
        self, computation: Computation, quantities: list[Quantity], backward: Backward
    ) -> None:
        raise NotImplementedError

    def _begin_pass(self) -> None:
        raise NotImplementedError

    def _unchanged(self) -> bool:
        raise NotImplementedError

    def _note(self, *, recorded: bool) -> None:
        raise NotImplementedError

    # -- recording --------------------------------------------------------------------------------

    def _tracked(self) -> list[tuple[str, Tensor]]:
        """Names and parameters, as the forward pass sees them."""
        return [(name, self._wrappers.shards.of(p)) for name, p in self._named()]

    def _measure(
        self,
        tape: Tape,
        make: Callable[[], Computation],
        wanted: list[Quantity],
        backward: Backward,
    ) -> Computation:
        """Take what a backward pass gives, wrappers asleep but for torch's own pass.

        Where this process fails, the others are in the wrapper's collectives, or wait for it to
        meet them: it takes part in the former, and says so in the latter.
        """
        went = False
        grads = [(p, p.grad) for p in self._parameters()]
        aside = self._wrappers.aside(tape)

        def on(retain: bool = False) -> None:
            nonlocal went
            went = True
            with aside.lifted():
                backward(retain)

        try:
            self._wrappers.settle(tape, self._ranks)
            if self._wrappers.shards and not self.takes_shards:
                raise CurvoptError(
                    f"{type(self).__name__} needs whole parameters, which fully_shard divides: use "
                    "DistributedDataParallel"
                )
            with aside:
                try:
                    with torch.enable_grad():
                        computation = make()
                    self._begin_pass()
                    self._accumulate(computation, wanted, on)
                except Exception:  # whatever it is, it is raised again
                    alone = not (self._ranks.many and self._wrappers.wrapped)
                    if not (alone or went) and self.goes_backward:
                        with suppress(Exception):
                            on()
                    raise
            return computation
        except Exception:  # as above; the other processes must hear of it
            if self._ranks.many:
                # In an ordinary loop `backward()` does not fail, and leaves what it always does.
                if self.goes_backward and not isinstance(tape, WaitingTape):
                    for p, grad in grads:
                        p.grad = grad
                self._tell()
            raise

    def _plain(self, loss: Tensor, backward: Callable[[], None]) -> None:
        """Go backward for the gradient alone, and have the others hear of a loss that is refused.

        They are in the wrapper's collectives, so that this process takes part in them.
        """
        try:
            with self._without_looks() as conditions:
                check_loss(loss)
        except CurvoptError:
            if self._ranks.many:
                grads = [(p, p.grad) for p in self._parameters()]
                if self._wrappers.wrapped:
                    with suppress(Exception):
                        backward()
                for p, grad in grads:
                    p.grad = grad
                self._tell()
            raise
        conditions.send()
        backward()
        conditions.check()

    def _without_looks(self) -> AbstractContextManager[Conditions]:
        """Let the device go on, where a look at a value would wait for it.

        One of several processes looks at once, so that the others hear of a failure.
        """
        away = self.looks_away and waits(self._parameters())
        return not_looking(away and not self._ranks.many)

    # -- meeting ----------------------------------------------------------------------------------

    def _tell(self) -> None:
        """Say once that this process cannot take the step that the others are about to take."""
        if not (self._met or self._told):
            self._told = True
            with suppress(RuntimeError):  # of torch's: the others are gone, which was the failure
                self._ranks.fail()

    def _tell_of_step(self) -> None:
        """The same for a step that failed outside of a backward pass.

        Where something wraps the model, the others may be in its collectives, so that nothing can
        be said: they hear of it when this process ends.
        """
        if self._ranks.many and not self._wrappers.wrapped:
            self._tell()

    def _meet_others(self) -> None:
        """See that all processes are about to take the same step, and combine what they have.

        Raises:
            CurvoptError: on all of them: they differ, or nothing combines their gradients.
        """
        if self._ranks.many:
            combines = self._ranks.given and not self._wrappers.wrapped
            measured = any(self.collected)
            settings: dict[str, Any] = {
                "steps taken": self.steps,
                "whether they have measured": measured,
            }
            if measured and self.joins_passes:
                settings["backward passes in a step"] = len(self.collected)
            params = list(self._parameters())
            seen = 0
            if measured and not combines:
                whole = (None if p.grad is None or is_sharded(p) else p.grad for p in params)
                seen = token_of(fingerprint(whole))
            if not self._agreed:
                settings |= self._alike()
                if combines:
                    settings["the parameters (sums of their bits)"] = fingerprint(params)
            shapes = 0 if self._agreed else token_of([list(p.shape) for p in params])
            self._met = True  # whatever comes of it
            told = self._ranks.meet(settings, seen, shapes)
            self._agreed = True
            if len({one[1] for one in told}) > 1:
                raise CurvoptError(DIVIDED)
            if len({one[0] for one in told}) > 1:
                raise CurvoptError(ALONE)
            if combines:
                self._average(params)
        if any(self.collected) and (self._ranks.many or self._wrappers.shards):
            self._join()

    def _alike(self) -> dict[str, Any]:
        """The settings that all processes must share."""
        own = {
            name: value
            for name, value in vars(self).items()
            if isinstance(value, int | float | str) and not name.startswith("_")
        }
        own.pop("batch_size", None)
        groups = [
            {
                k: float(v) if isinstance(v, Tensor) else v
                for k, v in group.items()
                if k not in ("params", *PLACES)
            }
            for group in self.param_groups
        ]
        return {"the optimizer": type(self).__name__, "settings": own, "parameter groups": groups}

    def _average(self, params: list[Tensor]) -> None:
        """Put the mean of all processes' gradients in place of this one's."""
        mine = [index for index, p in enumerate(params) if p.grad is not None]
        owners = [params[index] for index in self._ranks.union(mine, len(params))]
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in owners]
        unchanged, count = self._unchanged(), self._ranks.place[1]
        for p, total in zip(owners, self._ranks.sums(grads), strict=True):
            p.grad = total / count
        if unchanged:
            self._note(recorded=True)

    # -- joining ----------------------------------------------------------------------------------

    def _sums(
        self, values: Mapping[Tensor, Tensor], *, alike: bool = False
    ) -> dict[Tensor, Tensor]:
        """Sums over the processes of what some of them have, in whole, to be overwritten.

        Args:
            values: by parameter, as the forward pass saw it.
            alike: they are what was returned here before, overwritten: of the same parameters on
                all processes, and to be overwritten again.

        Returns:
            By parameter of the optimizer; one that a process lacks counts as zero there.
        """
        owner = self._wrappers.shards.owner
        mine = {owner(p): value for p, value in values.items()}
        owners = list(mine)
        if not alike:
            params = list(self._parameters())
            place = {p: index for index, p in enumerate(params)}
            order = self._ranks.union([place[p] for p in mine], len(params))
            owners = [params[index] for index in order]
        wide = [at_least_float32(p.dtype) for p in owners]
        given = [
            mine[p].to(dtype) if p in mine else torch.zeros(p.shape, dtype=dtype, device=p.device)
            for p, dtype in zip(owners, wide, strict=True)
        ]
        return dict(zip(owners, self._ranks.sums(given, spare=alike), strict=True))

    def _shards(self, values: Mapping[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        """Whole tensors cut as their parameters are."""
        return {p: cut(value, p) for p, value in values.items()}

    def _own_draws(self, generator: Generator | None) -> Generator | None:
        """Draws of this process's own: processes that start from one seed must not share them."""
        if not self._ranks.many:
            return generator
        p = next(iter(self._parameters()))
        device = p.device if generator is None else generator.device
        seed = torch.randint(1 << 62, (), generator=generator, device=device)
        return Generator(p.device).manual_seed(int(seed) + self._ranks.place[0])
