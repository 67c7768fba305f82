"""Parameters that `torch.distributed.fsdp.fully_shard` divides among the processes.

The optimizer holds shards, `DTensor`; the forward pass sees whole parameters, which are gathered
for it. What is measured of those is summed over the processes and cut like the shards.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from curvopt.errors import CurvoptError
from curvopt.parallel.reduce import fingerprint
from curvopt.recording.tape import Tape

_PLAIN = (Tensor, nn.Parameter)


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a `DTensor`."""
    if type(tensor) in _PLAIN:  # asked at every turn
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Any) -> Any:
    """This process's part of a tensor, in the same memory; a tensor that is whole is its own."""
    if type(tensor) not in _PLAIN and isinstance(tensor, Tensor) and is_sharded(tensor):
        shard: Any = tensor
        return shard._local_tensor
    return tensor


def stamps(tensors: Sequence[Tensor]) -> list[int]:
    """Numbers that change with the tensors: versions; of shards, which count none, sums of bits."""
    if not any(map(is_sharded, tensors)):
        with torch._C.DisableTorchFunctionSubclass():
            return [t._version for t in tensors]
    divided = fingerprint(local(t) if is_sharded(t) else None for t in tensors)
    return [t._version if bits is None else bits for t, bits in zip(tensors, divided, strict=True)]


def like(part: Tensor, p: Any) -> Tensor:
    """A tensor divided as `p` is, of which this process has `part`."""
    if not is_sharded(p):
        return part
    return type(p.data).from_local(
        part, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
    )


def cut(whole: Tensor, p: Any) -> Tensor:
    """A tensor that all processes have, divided as `p` is."""
    if not is_sharded(p):
        return whole
    from torch.distributed.tensor import DTensor, Replicate

    everywhere = [Replicate()] * p.device_mesh.ndim
    made = DTensor.from_local(whole, p.device_mesh, everywhere, run_check=False)
    return made.redistribute(placements=p.placements)


def whole(tensor: Any) -> Any:
    """All of a tensor, gathered from the processes that have parts of it."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def over_shards(rows: Tensor, params: Sequence[Any]) -> Tensor:
    """Sums of this process's parts, made those of whole tensors, in place.

    Args:
        rows: ``[P, ...]``, one row per parameter.
        params: the P parameters; those that are whole keep their rows.
    """
    meshes: dict[Any, list[int]] = {}
    for index, p in enumerate(params):
        if is_sharded(p):
            for dim, placement in enumerate(p.placements):
                if placement.is_shard():
                    meshes.setdefault((p.device_mesh, dim), []).append(index)
    for (mesh, dim), indices in meshes.items():
        if mesh.size(dim) > 1:
            part = rows[indices].contiguous()
            dist.all_reduce(part, group=mesh.get_group(dim))
            rows[indices] = part
    return rows


class Shards:
    """The whole parameters that belong to shards, as the forward pass shows them.

    Attributes:
        whole: the whole parameter of each shard.
        shard: the shard of each whole parameter.
        modules: the modules on which `fully_shard` was called.
    """

    def __init__(self) -> None:
        self.whole: dict[Tensor, Tensor] = {}
        self.shard: dict[Tensor, Tensor] = {}
        self.modules: dict[nn.Module, None] = {}

    def __bool__(self) -> bool:
        return bool(self.modules)

    def meet(self, module: Any, tape: Tape) -> None:
        """Gather the parameters of a module, before its forward pass does, and track those.

        What gathers is no part of the pass. The module's own call finds it done.
        """
        with torch._C.DisableTorchFunction(), tape.trace.paused(), torch.no_grad():
            module.unshard()
            self.modules[module] = None
            for param in params_of(module):
                p, seen = param.sharded_param, param.unsharded_param
                if p in self.whole or not tape.exchange(p, seen):
                    continue
                if is_sharded(seen):
                    raise CurvoptError(tensor_parallel(tape.name(seen)))
                self.whole[p], self.shard[seen] = seen, p

    def of(self, p: Tensor) -> Tensor:
        """What the forward pass sees of a parameter, as far as is known."""
        seen = self.whole.get(p, p)
        if seen.requires_grad != p.requires_grad:  # which the forward pass sees to later
            seen.requires_grad_(p.requires_grad)
        return seen

    def owner(self, tensor: Tensor) -> Tensor:
        """The optimizer's parameter behind what a forward pass saw."""
        return self.shard.get(tensor, tensor)

    @property
    def groups(self) -> list[Any]:
        """What gathers and reduces together, torch's ``FSDPParamGroup``."""
        return [group for module in self.modules for group in groups_of(module)]

    @property
    def mesh(self) -> Any:
        """The mesh of the shards."""
        # Equal ones are one: slicing a mesh makes a new object each time.
        meshes = {p.device_mesh: None for p in self.whole}  # type: ignore[attr-defined]  # DTensors
        if len(meshes) > 1:
            raise CurvoptError(
                "the parameters are sharded over several meshes, so the processes of a step are "
                "not known: give process_group="
            )
        return next(iter(meshes), None)


def groups_of(module: Any) -> Iterable[Any]:
    """What a module gathers and reduces together; their place differs between torch's releases."""
    state = module._get_fsdp_state()
    if hasattr(state, "_fsdp_param_groups"):
        return state._fsdp_param_groups
    return [state._fsdp_param_group] if state._fsdp_param_group is not None else []


def params_of(module: Any) -> Iterable[Any]:
    """What a module has divided, torch's ``FSDPParam``."""
    return [param for group in groups_of(module) for param in group.fsdp_params]


def parameters_of(module: nn.Module) -> Iterator[Tensor]:
    """A module's parameters, those that are divided also while it shows whole ones."""
    yield from module.parameters()
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    for part in module.modules() if fsdp is not None else ():
        if isinstance(part, fsdp.FSDPModule):
            yield from (param.sharded_param for param in params_of(part))


def tensor_parallel(name: str) -> str:
    """What is said of a parameter whose ops run on parts of it."""
    return (
        f"{name} is a DTensor that no fully_shard gathers for the forward pass, as in tensor "
        "parallel layers: a process then sees a part of each op, and per-sample quantities are "
        "not computed from parts. Use fully_shard or DistributedDataParallel alone"
    )
