"""Kernels of losses: the owners of their rows are noted before the rows are reduced."""

from __future__ import annotations

from curvopt.axes.lattice import MIXED, State, align, constant, drop, join_all, merge_all, mixed
from curvopt.axes.rules.base import Call, Refuse, Result, broadcast, rule

#: Losses of torch that reduce inside the kernel.
LOSSES = frozenset(
    "nll_loss_forward nll_loss2d_forward mse_loss binary_cross_entropy "
    "binary_cross_entropy_with_logits smooth_l1_loss huber_loss soft_margin_loss "
    "multi_margin_loss multilabel_margin_loss_forward".split()
)


@rule("nll_loss_forward nll_loss2d_forward", ragged=True)
def nll(call: Call) -> Result:
    """A row is a target; the total weight depends on all of them."""
    x, target, weight = call.op.args[:3]
    classes = 1 if x.ndim > 1 else 0
    rows = call.merged(x, [classes])
    rows = None if rows is None else drop(rows, [classes])
    if call.state(weight) is not None:
        rows = mixed(target.ndim).owners
    labels, ragged = call.owners(target), None
    if any(s is not None and s.ragged is not None for s in call.states):
        # Rows in the order of one mask; which are left out is seen in a sum of them only.
        axes = {
            None if s is None else s.ragged and s.ragged[1] for s in map(call.state, (x, target))
        }
        if x.ndim != 2 or len(axes) != 1 or weight is not None:
            raise Refuse
        ragged = -1, axes.pop()
        call.replay.counted.add(call.index)
    if labels is not None and rows is not None and labels.ndim != rows.ndim:
        raise Refuse
    rows = join_all(rows, labels)
    if rows is None:
        return None
    call.replay.rows[call.index] = rows
    total = merge_all(rows)
    if ragged is not None:
        total = constant(0, MIXED)
    value = State(rows, ragged) if call.outputs[0].ndim else State(total)
    return [value, State(total)]


@rule(
    "mse_loss binary_cross_entropy binary_cross_entropy_with_logits smooth_l1_loss huber_loss "
    "soft_margin_loss"
)
def of_elements(call: Call) -> Result:
    """A row is an element."""
    ndim = max(ref.ndim for ref in call.inputs)
    state = broadcast(call, call.inputs, ndim)
    if state is None:
        return None
    call.replay.rows[call.index] = state.owners
    if call.outputs[0].ndim == ndim and call.arg("reduction") == 0:
        return State(state.owners)
    return State(merge_all(state.owners))


@rule("multi_margin_loss multilabel_margin_loss_forward")
def of_rows(call: Call) -> Result:
    """A row is a row of scores."""
    x, target = call.op.args[:2]
    if x.ndim != 2 or any(call.state(ref) is not None for ref in call.inputs[2:]):
        raise Refuse
    scores, labels = call.merged(x, [1]), call.merged(target, range(1, target.ndim))
    rows = join_all(*(None if o is None else o.reshape(-1) for o in (scores, labels)))
    if rows is None:
        return None
    call.replay.rows[call.index] = rows
    value = rows if call.outputs[0].ndim else merge_all(rows)
    return [State(value), *(State(align(rows[:, None], r.ndim)) for r in call.outputs[1:])]


@rule("_ctc_loss")
def ctc(call: Call) -> Result:
    """A row is a sequence: [time, batch, classes] and its targets [batch, length]."""
    x, target = call.op.args[:2]
    if x.ndim != 3 or (call.state(target) is not None and target.ndim != 2):
        raise Refuse
    rows = call.merged(x, [0, 2])
    rows = None if rows is None else rows.reshape(-1)
    for ref in call.inputs[1:]:
        owners = call.merged(ref, range(1, ref.ndim))
        rows = join_all(rows, None if owners is None else owners.reshape(-1))
    if rows is None:
        return None
    return [State(rows), *(State(rows.reshape(-1, *[1] * (r.ndim - 1))) for r in call.outputs[1:])]
