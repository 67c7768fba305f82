"""What wraps a model over processes: met in its forward pass, and kept out of passes of ours."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from curvopt.errors import CurvoptError
from curvopt.parallel.groups import Ranks
from curvopt.parallel.shards import Shards, is_sharded, tensor_parallel
from curvopt.recording.tape import Tape


class Wrappers:
    """The wrappers that the forward passes of an optimizer's model have shown.

    Args:
        syncs: gradients are the wrappers'; else they are kept from reducing any.

    Attributes:
        shards: the parameters that `fully_shard` divides.
    """

    def __init__(self, syncs: bool = True) -> None:
        self.syncs = syncs
        self.shards = Shards()
        self._replicas: dict[Any, bool] = {}  # whether it has parameters of the optimizer
        self._delayed: list[Any] = []  # of `replicate`, which wraps when first called

    def __deepcopy__(self, memo: Any) -> Wrappers:
        return Wrappers(self.syncs)

    def __reduce__(self) -> Any:
        """They belong to their process."""
        return Wrappers, (self.syncs,)

    # -- meeting them -----------------------------------------------------------------------------

    def meet(self, module: nn.Module, tape: Tape) -> None:
        """Look at a module whose forward pass is about to run.

        Raises:
            CurvoptError: it is a wrapper that cannot be served.
        """
        if isinstance(module, DataParallel) and len(module.device_ids) > 1:
            raise CurvoptError(
                "DataParallel runs copies of the model in threads, which cannot be recorded: use "
                "DistributedDataParallel, one process per device"
            )
        if not (dist.is_available() and dist.is_initialized()):
            return
        if isinstance(module, DistributedDataParallel):
            self._replica(module, tape)
        fsdp: Any = sys.modules.get("torch.distributed.fsdp")
        if fsdp is not None:
            if isinstance(module, fsdp.FullyShardedDataParallel):
                raise CurvoptError(
                    "FullyShardedDataParallel (FSDP1) flattens parameters, of which nothing can be "
                    "measured: use torch.distributed.fsdp.fully_shard (FSDP2), or "
                    "DistributedDataParallel"
                )
            if isinstance(module, fsdp.FSDPModule):
                self.shards.meet(module, tape)
        self._delayed += [s for s in _states(module) if type(s).__name__ == "_ReplicateState"]

    def _replica(self, module: DistributedDataParallel, tape: Tape) -> None:
        if module._join_config.enable:
            raise CurvoptError(
                "DistributedDataParallel.join() serves the gradients of processes that ran out of "
                "batches, but nothing that is measured: give every process as many batches, by "
                "DistributedSampler(drop_last=True), say"
            )
        if module not in self._replicas:
            self._replicas[module] = any(id(p) in tape.by_id for p in module.parameters())
        if not self.syncs and tape.entered is not None:
            before = module.require_backward_grad_sync
            module.require_backward_grad_sync = False
            tape.entered.callback(setattr, module, "require_backward_grad_sync", before)

    def settle(self, tape: Tape, ranks: Ranks) -> None:
        """See who belongs together, once the forward pass has run.

        Args:
            tape: the recording.
            ranks: the processes, whose group is set where the user has given none.
        """
        for state in self._delayed:
            if (made := vars(state).get("_ddp")) is not None and made not in self._replicas:
                self._replica(made, tape)
        self._delayed.clear()
        for p in tape.params:
            if is_sharded(p) and p not in self.shards.whole:
                raise CurvoptError(tensor_parallel(tape.name(p)))
        tape.serial = self.wrapped
        if ranks.given:
            return
        groups = {
            id(d.process_group): d.process_group for d, ours in self._replicas.items() if ours
        }
        mesh = self.shards.mesh
        if mesh is not None:
            group = _group_of(mesh)
            groups[id(group)] = group
        if len(groups) > 1:
            raise CurvoptError(
                "the optimizer's parameters are in several wrappers with different process "
                "groups: give process_group="
            )
        for group in groups.values():
            ranks.group = group

    @property
    def wrapped(self) -> bool:
        """Whether something combines gradients as they arrive."""
        return bool(self.shards) or any(self._replicas.values())

    # -- passes of ours ---------------------------------------------------------------------------

    def aside(self, tape: Tape) -> Aside:
        """Go backward over the graph without waking the wrappers; sharded parameters stay whole."""
        return Aside(self, tape)

    def _switches(self) -> list[tuple[Any, str, Any]]:
        """What keeps the wrappers asleep: attributes and their values."""
        # A static graph starts reducing when the first pass comes by.
        started = "_static_graph_delay_allreduce_enqueued"
        found: list[tuple[Any, str, Any]] = [
            (replica, started, True) for replica in self._replicas if replica.static_graph
        ]
        return found + [(group, "reduce_grads", False) for group in self.shards.groups]


class Aside:
    """Keeps wrappers asleep while it is entered.

    Args:
        wrappers: the wrappers.
        tape: the recording, of which what gathers parameters is no part.
    """

    def __init__(self, wrappers: Wrappers, tape: Tape):
        self.wrappers, self.tape = wrappers, tape
        self.entered = False
        self.theirs: list[Any] = []

    def __enter__(self) -> Aside:
        shards = self.wrappers.shards
        with self.tape.trace.paused():
            for module in shards.modules:
                module.unshard()  # type: ignore[operator]  # of FSDPModule
        self.reshards = [(group, group.reshard_after_backward) for group in shards.groups]
        for group, _ in self.reshards:
            group.reshard_after_backward = False
        self.switches = self.wrappers._switches()
        self._put_to_sleep()
        self.entered = True
        return self

    def __exit__(self, *error: Any) -> None:
        self._wake()
        self.entered = False
        with self.tape.trace.paused():
            for group, reshards in self.reshards:
                group.reshard_after_backward = reshards
                if reshards:
                    group.reshard()

    @contextmanager
    def lifted(self) -> Iterator[None]:
        """The pass that the wrappers wait for."""
        if not self.entered:
            yield
            return
        self._wake()
        try:
            yield
        finally:
            self._put_to_sleep()

    def _put_to_sleep(self) -> None:
        self.theirs = [getattr(owner, name) for owner, name, _ in self.switches]
        for owner, name, value in self.switches:
            setattr(owner, name, value)

    def _wake(self) -> None:
        for (owner, name, _), value in zip(self.switches, self.theirs, strict=True):
            setattr(owner, name, value)


def _group_of(mesh: Any) -> Any:
    """The processes of a device mesh, None for all."""
    if mesh.ndim == 1:
        return mesh.get_group()
    return None if mesh.size() == dist.get_world_size() else mesh._flatten().get_group()


def _states(module: nn.Module) -> Any:
    """What torch's composable wrappers keep with a module."""
    contract: Any = sys.modules.get("torch.distributed._composable.contract")
    return () if contract is None else vars(module).get(contract.STATE_KEY, {}).values()
