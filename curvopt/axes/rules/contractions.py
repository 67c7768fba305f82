"""Products that sum over a shared dim."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from curvopt.axes.lattice import State, align, drop, join_all, merge
from curvopt.axes.rules.base import Call, Refuse, Result, ones, rule, spreads


@rule("mm addmm bmm baddbmm", ragged=True)
def matmul(call: Call) -> Result:
    """Rows of the first, columns of the second; merged over what they share."""
    added = call.inputs[0] if call.op.name in ("addmm", "baddbmm") else None
    a, b = call.inputs[1:3] if added is not None else call.inputs[:2]
    ragged = None
    for ref, other, kept in ((a, b, -2), (b, a, -1)):
        state = call.state(ref)
        if state is not None and state.ragged is not None:
            if state.ragged[0] != kept or call.state(other) is not None or ref.ndim != 2:
                raise Refuse
            ragged = state.ragged
    owners = join_all(call.merged(a, [-1]), call.merged(b, [-2]))
    if added is not None and call.state(added) is not None:
        owners = join_all(owners, align(call.full(added, 0), call.outputs[0].ndim))
    if ragged and added and not spreads(call, added, ragged, call.outputs[0].shape[ragged[0]]):
        raise Refuse
    return None if owners is None else State(owners, ragged)


@rule("mv addmv")
def matrix_vector(call: Call) -> Result:
    """Rows of the matrix; merged over the vector."""
    a, b = call.inputs[-2:]
    row, column = call.merged(a, [1]), call.merged(b, [0])
    added = call.owners(call.inputs[0]) if call.op.name == "addmv" else None
    return ones(
        join_all(
            None if row is None else row[:, 0],
            column,
            None if added is None else align(added, 1),
        )
    )


@rule("dot vdot")
def dot(call: Call) -> Result:
    """One number of all elements."""
    merged = [call.merged(ref, [0]) for ref in call.inputs]
    return ones(join_all(*(None if o is None else o.reshape(()) for o in merged)))


@rule("_trilinear")
def trilinear(call: Call) -> Result:
    """Three factors, expanded and summed as the arguments say."""
    total: Tensor | None = None
    for ref, name in zip(call.op.args[:3], ("expand1", "expand2", "expand3"), strict=True):
        owners = call.owners(ref)
        if owners is not None:
            for d in sorted(call.arg(name)):
                owners = owners.unsqueeze(d)
            total = join_all(total, owners)
    if total is None:
        return None
    dims = call.arg("sumdim")
    return State(drop(merge(total, dims), dims))


@rule("_cdist_forward _euclidean_dist")
def distances(call: Call) -> Result:
    """All pairs of rows."""
    ndim = call.outputs[0].ndim
    a, b = (call.merged(ref, [-1]) for ref in call.inputs[:2])
    return ones(
        join_all(
            None if a is None else align(a, ndim),
            None if b is None else align(b.transpose(-1, -2), ndim),
        )
    )


@rule(
    "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_efficient_attention "
    "_scaled_dot_product_flash_attention _scaled_dot_product_cudnn_attention "
    "_scaled_dot_product_fused_attention_overrideable"
)
def attention(call: Call) -> Result:
    """A query sees all keys and values of its batch entry and head."""
    query, key, value = call.inputs[:3]
    mask: Any = call.inputs[3] if len(call.inputs) > 3 else None
    # A mask is merged over its keys; one of fewer dims broadcasts.
    masked = None if mask is None else call.merged(mask, [-1])
    keys = [call.merged(key, [-1, -2]), call.merged(value, [-1, -2])]
    if query.shape[1] != key.shape[1]:  # grouped: a key head serves several query heads
        keys = [None if o is None else merge(o, [1]) for o in keys]
    owners = join_all(call.merged(query, [-1]), *keys, None if masked is None else align(masked, 4))
    if owners is None:
        return None
    results: list[State | None] = []
    for ref in call.outputs:
        if ref.ndim == 4 and ref.shape[:-1] == query.shape[:-1]:
            results.append(State(owners))
        elif ref.shape == query.shape[:-1]:
            results.append(State(owners[..., 0]))
        else:
            results.append(State(merge(owners, range(4)).reshape((1,) * ref.ndim)))
    return results
