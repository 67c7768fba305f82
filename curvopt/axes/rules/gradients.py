"""Backward kernels, of gradients that are taken inside the pass."""

from __future__ import annotations

import torch
from torch import Tensor

from curvopt.axes.lattice import State, align, constant, join_all, merge, merge_all, squash
from curvopt.axes.rules.base import Call, Refuse, Result, ones, rule


def _asked(call: Call, states: list[State | None]) -> list[State | None]:
    """Outputs that were not asked for by `output_mask` are no outputs."""
    mask = call.arg("output_mask")
    return [state for state, asked in zip(states, mask, strict=True) if asked]


def _total(owners: Tensor | None, ndim: int) -> State | None:
    return None if owners is None else State(merge_all(owners, ndim))


@rule("nll_loss_backward")
def nll_backward(call: Call) -> Result:
    """Of a row's cotangent, or of that of the mean."""
    cotangent, x, target, weight = call.op.args[:4]
    if x.ndim != 2 or call.state(weight) is not None:
        raise Refuse
    columns = [call.owners(ref) for ref in (cotangent, target)]
    owners = join_all(*(None if o is None else o.reshape(-1, 1) for o in columns))
    if call.arg("reduction") == 1 and weight is not None:  # divided by the weights of all
        total = call.owners(call.arg("total_weight"))
        owners = join_all(owners, None if total is None else total.reshape(1, 1))
    return ones(owners)


@rule("native_layer_norm_backward")
def layer_norm_backward(call: Call) -> Result:
    """Rows for the input, a total for the parameters."""
    x, over = call.op.args[1], len(call.op.args[2])
    dims = range(x.ndim - over, x.ndim)
    rows = [merge(align(o, x.ndim), dims) for o in map(call.owners, call.inputs) if o is not None]
    owners = join_all(*rows)
    total = _total(owners, over)
    return _asked(call, [ones(owners), total, total])


@rule("native_group_norm_backward")
def group_norm_backward(call: Call) -> Result:
    """Entries of the batch for the input, a total for the parameters."""
    x = call.op.args[1]
    rows = []
    for ref in call.inputs:
        owners = call.owners(ref)
        if owners is not None:
            owners = merge(owners, range(ref.ndim if ref.ndim == 1 else 1, ref.ndim))
            rows.append(
                merge_all(owners, x.ndim)
                if ref.ndim == 1
                else owners.reshape(-1, *[1] * (x.ndim - 1))
            )
    owners = join_all(*rows)
    return _asked(call, [ones(owners), _total(owners, 1), _total(owners, 1)])


@rule("native_batch_norm_backward")
def batch_norm_backward(call: Call) -> Result:
    """Entries stay apart in evaluation mode only."""
    cotangent, x, weight = call.op.args[:3]
    owners = call.owners(cotangent)
    if call.arg("train"):
        raise Refuse
    scaled = call.owners(weight)
    if scaled is not None:
        owners = join_all(owners, scaled.reshape([1, -1] + [1] * (x.ndim - 2)))
    both = join_all(
        None if owners is None else merge_all(owners),
        *(merge_all(o) for o in map(call.owners, call.inputs) if o is not None),
    )
    return _asked(call, [ones(owners), _total(both, 1), _total(both, 1)])


@rule("convolution_backward")
def convolution_backward(call: Call) -> Result:
    """Entries of the batch for the input, a total for the parameters."""
    cotangent, x, weight = call.op.args[:3]
    kernel = call.merged(weight, range(weight.ndim))
    rows = join_all(call.merged(cotangent, range(1, cotangent.ndim)), kernel)
    both = join_all(
        None if rows is None else merge_all(rows, x.ndim), call.merged(x, range(x.ndim))
    )
    bias = call.merged(cotangent, range(cotangent.ndim))
    return _asked(call, [ones(rows), ones(both), _total(bias, 1)])


@rule("_scaled_dot_product_flash_attention_for_cpu_backward")
def attention_backward(call: Call) -> Result:
    """Everything in an entry and head depends on everything in it."""
    owners: Tensor | None = None
    if call.op.args[1].shape[1] != call.op.args[2].shape[1]:
        raise Refuse
    for ref in call.inputs:
        each = call.owners(ref)
        if each is not None:
            each = each.unsqueeze(-1) if ref.ndim == 3 else align(each, 4)
            owners = join_all(owners, merge(each, [2, 3]))
    return [ones(owners)] * len(call.outputs)


@rule("slice_backward select_backward diagonal_backward")
def placed(call: Call) -> Result:
    """The cotangent in the place of the view, zeros around it: the view itself says where."""
    owners = call.owners(call.x)
    if owners is None:
        return None
    shape = call.outputs[0].shape
    result = constant(len(shape)).expand(shape).clone()
    args = call.op.args[2:]
    view = getattr(torch.ops.aten, call.op.name.removesuffix("_backward"))
    view(result, *args).copy_(owners.expand(call.x.shape))
    return State(squash(result))


@rule("embedding_dense_backward")
def embedding_backward(call: Call) -> Result:
    """A total: rows of the table may serve several samples."""
    owners = join_all(*(merge_all(o) for o in map(call.owners, call.inputs) if o is not None))
    return _total(owners, 2)


@rule("unfold_backward")
def unfold_backward(call: Call) -> Result:
    """Windows are added up along their dim."""
    shape, dim = call.arg("input_sizes"), call.arg("dim") % len(call.arg("input_sizes"))
    owners = call.merged(call.x, [dim, call.x.ndim - 1])
    return (
        None
        if owners is None
        else State(
            owners.squeeze(-1).reshape(
                [1 if d == dim else n for d, n in enumerate(owners.shape[: len(shape)])]
            )
        )
    )
