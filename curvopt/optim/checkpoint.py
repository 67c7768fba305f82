"""State that `torch.distributed.checkpoint` carries, which knows of states and groups alone."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from curvopt.errors import CurvoptError
from curvopt.parallel.shards import is_sharded

#: Where the first group of a saved state keeps a copy of what stands beside states and groups.
PACKED, NOISE = "curvopt", "curvopt_noise"
PLACES = frozenset([PACKED, NOISE])


def pack(state: dict[str, Any]) -> dict[str, Any]:
    """Add to a state's first group what `torch.distributed.checkpoint` would drop.

    The same on all processes, and in a key of its own what the first one alone has: the noise.
    """
    more = {key: value for key, value in state.items() if key not in ("state", "param_groups")}
    privacy = dict(more.get("privacy") or {})
    noise = privacy.pop("noise", None)
    if privacy:
        more["privacy"] = privacy
    groups = [dict(group) for group in state["param_groups"]]
    if groups:
        groups[0][PACKED] = _text(more)
        groups[0].pop(NOISE, None)
        if noise is not None:
            groups[0][NOISE] = _text(noise)
    return {**state, "param_groups": groups}


def reserve(groups: list[dict[str, Any]], *, noise: bool) -> None:
    """Make places in the first group for what is packed into a state.

    A flattened state (``flatten_optimizer_state_dict``) is read by the keys of the groups.

    Args:
        groups: of an optimizer.
        noise: this process has it.
    """
    for group in groups[:1]:
        group.setdefault(PACKED, None)
        if noise:
            group.setdefault(NOISE, None)


def unpack(state: dict[str, Any]) -> dict[str, Any]:
    """The state that was packed; one that was saved by other means is left as it is."""
    groups = [dict(group) for group in state["param_groups"]]
    found: dict[str, Any] = {}
    for group in groups:
        text, noise = group.pop(PACKED, None), group.pop(NOISE, None)
        if text is not None:
            found = _value(text)
            if "privacy" in found:
                found["privacy"]["noise"] = None if noise is None else _value(noise)
    return {**found, **state, "param_groups": groups}


#: Entries of a state that have a shape of their own, and are whole.
PROJECTED = frozenset({"signal"})


def refuse_foreign(
    state: dict[str, Any], names: Iterable[str], params: Iterable[Tensor], kind: str
) -> None:
    """Refuse a state that is not this optimizer's.

    Args:
        state: to be loaded.
        names: of the optimizer's class and its bases.
        params: the optimizer's parameters, in order.
        kind: the optimizer's name.

    Raises:
        CurvoptError: it is another optimizer's, or of parameters of other shapes.
    """
    engine = state.get("engine")
    if engine is None or engine.get("optimizer", kind) not in names:
        found = "another optimizer" if engine is None else engine["optimizer"]
        raise CurvoptError(
            f"the state is one of {found}, not of {kind}: load what a {kind} has saved. (Of "
            "torch.distributed.checkpoint: by get_optimizer_state_dict and "
            "set_optimizer_state_dict, which keep the groups)"
        )
    indices = [index for group in state["param_groups"] for index in group["params"]]
    for number, (index, p) in enumerate(zip(indices, params, strict=False)):
        for key, value in state["state"].get(index, {}).items():
            if not isinstance(value, Tensor) or not value.ndim or key in PROJECTED:
                continue
            if value.shape != p.shape and value.ndim == p.ndim:
                raise CurvoptError(
                    f"{key!r} in the state of parameter {number} has shape {list(value.shape)}, "
                    f"and the parameter {list(p.shape)}: the state is one of another model"
                )
            if value.shape == p.shape and is_sharded(value) != is_sharded(p):
                what = "a shard" if is_sharded(value) else "whole"
                raise CurvoptError(
                    f"{key!r} in the state of parameter {number} is {what}, and the parameter is "
                    "not: load by torch.distributed.checkpoint.state_dict.set_optimizer_state_dict"
                )


def _text(value: Any) -> str:
    """A value as a string, which every way of saving takes."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return base64.b64encode(buffer.getvalue()).decode()


def _value(text: str) -> Any:
    return torch.load(io.BytesIO(base64.b64decode(text)), weights_only=True)
