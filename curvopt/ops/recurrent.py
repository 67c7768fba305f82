"""Recurrent layers and cells (LSTM, GRU, plain RNN) as compositions of recorded ops.

A weight that acts at every time step is recorded as *one* use: its output is what the products of
all steps are added to, ``[N, T, O]``, and each step adds its own ``h_{t-1} W^T`` later. The
cotangent of that output is the cotangent of all products, so that weight and bias get one structure
each, with the time steps as tokens, while the recurrence itself runs unrecorded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import handle_torch_function, has_torch_function

from curvopt.ops.of_samples import of_samples
from curvopt.ops.registry import composition, rule
from curvopt.ops.use import UseView
from curvopt.structures import Outer, Shift, Structure

# Attribute of a packed sequence's batch sizes: how its samples were sorted by length.
ORDER = "_curvopt_order"

State = tuple[Tensor, ...]  # the hidden state first, then an LSTM's cell state


class Steps:
    """The products of all time steps, ``base_t + b + x_t W^T``, one after the other.

    Args:
        weight: W.
        bias: b.
        base: what they are added to, for all steps.
        axis: the axis of time in the base.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, base: Tensor, axis: int):
        self.weight, self.axis = weight, axis
        self.inputs: list[Any] = [None] * base.shape[axis]
        #: The graph nodes of each product: its own, and that of the weight behind it.
        self.nodes: list[tuple[Any, Any]] = []
        self.bases = all_steps(weight, bias, base, self).unbind(axis)

    def __call__(self, t: int, input: Tensor) -> Tensor:
        """The product of step t."""
        self.inputs[t] = input
        turned = self.weight.t()
        product = torch.addmm(self.bases[t], input, turned)
        self.nodes += [(product.grad_fn, node) for node in _between(product, turned)]
        return product


def _between(product: Tensor, turned: Tensor) -> list[Any]:
    """Graph nodes from a product to its turned weight: its own, and autocast's copy."""
    for node, _ in product.grad_fn.next_functions if product.grad_fn else ():
        chain = [node]
        while chain[-1] is not None and chain[-1] is not turned.grad_fn and len(chain) < 4:
            chain.append(next((n for n, _ in chain[-1].next_functions), None))
        if chain[-1] is not None and chain[-1] is turned.grad_fn:
            return chain
    return [None]


def all_steps(weight: Tensor, bias: Tensor | None, base: Tensor, steps: Steps) -> Tensor:
    """``base + b``; the weight is left with `steps`, or the leaf that stands for it."""
    if has_torch_function((weight,)):
        return handle_torch_function(all_steps, (weight,), weight, bias, base, steps)
    steps.weight = weight
    base = base if bias is None else base + bias
    return base if base.requires_grad else base.requires_grad_()


def _fed_back(arguments: dict[str, Any]) -> list[str]:
    """From the second step on the weight meets what became of the steps before."""
    return ["weight"] if len(arguments["steps"].inputs) > 1 else []


@rule(
    all_steps,
    parameters="weight bias",
    nodes=lambda arguments: arguments["steps"].nodes,
    again=_fed_back,
)
def _all_steps(
    use: UseView, weight: Tensor, bias: Tensor | None, base: Tensor, steps: Steps
) -> dict[str, Structure]:
    inputs = use.rows(torch.stack(steps.inputs, steps.axis))
    left, right = use.cotangent.flatten(2, -2), inputs.flatten(1, -2)
    found: dict[str, Structure] = {
        "weight": Outer(left.unsqueeze(2), right.unsqueeze(1), weight.shape)
    }
    if bias is not None:
        found["bias"] = Shift(left, bias.shape, (1, len(bias)))
    return found


# Cells: the new state from ``gates = base + b_hh + h W_hh^T``, where base is the projected input
# ``x W_ih^T + b_ih``; a GRU leaves the part of its new gate out of that sum.

Step = Callable[[Tensor, Tensor, State], State]


def _lstm_step(gates: Tensor, projected: Tensor, state: State) -> State:
    i, f, g, o = gates.chunk(4, 1)
    c = torch.addcmul(f.sigmoid() * state[1], i.sigmoid(), g.tanh())
    return o.sigmoid() * c.tanh(), c


def _gru_step(gates: Tensor, projected: Tensor, state: State) -> State:
    size = state[0].shape[1]
    r, z = gates[:, : 2 * size].sigmoid().chunk(2, 1)
    n = torch.addcmul(projected[:, 2 * size :], r, gates[:, 2 * size :]).tanh()
    return (n + z * (state[0] - n),)


def _tanh_step(gates: Tensor, projected: Tensor, state: State) -> State:
    return (gates.tanh(),)


def _relu_step(gates: Tensor, projected: Tensor, state: State) -> State:
    return (gates.relu(),)


def _base(step: Step, projected: Tensor) -> Tensor:
    if step is not _gru_step:
        return projected
    size = projected.shape[-1] // 3
    return F.pad(projected[..., : 2 * size], (0, size))


def _states(hx: Tensor | State) -> State:
    return (hx,) if isinstance(hx, Tensor) else tuple(hx)


def _direction(
    input: Tensor, state: State, weights: list[Any], has_biases: bool, step: Step, axis: int,
    reverse: bool = False, mask: Tensor | None = None,
) -> tuple[Tensor, State]:  # fmt: skip
    """One layer in one direction: the hidden states of all time steps, and the last state."""
    w_ih, w_hh, *rest = weights
    b_ih, b_hh, *rest = rest if has_biases else (None, None, *rest)
    projected, times = F.linear(input, w_ih, b_ih), range(input.shape[axis])
    recurrence = Steps(w_hh, b_hh, _base(step, projected), axis)
    shape = input.shape[:2] + state[0].shape[1:]
    projection = Steps(rest[0], None, input.new_zeros(shape), axis) if rest else None
    outputs: list[Any] = [None] * len(times)
    with torch._C.DisableTorchFunction():  # everything in here was recorded above
        projections = projected.unbind(axis)
        for t in reversed(times) if reverse else times:
            new = step(recurrence(t, state[0]), projections[t], state)
            if projection is not None:
                new = (projection(t, new[0]), *new[1:])
            if mask is not None:  # a sample's last state stays when its sequence has ended
                pairs = zip(new, state, strict=True)
                new = tuple(torch.where(mask[t], after, before) for after, before in pairs)
            state = new
            outputs[t] = state[0]
        return torch.stack(outputs, axis), state


def _cell(step: Step) -> Callable[..., Any]:
    """An ``nn.LSTMCell`` or its like: a layer of one time step."""

    def cell(
        input: Tensor, hx: Any, w_ih: Tensor, w_hh: Tensor,
        b_ih: Tensor | None = None, b_hh: Tensor | None = None,
    ) -> Tensor | State:  # fmt: skip
        weights = [w_ih, w_hh, b_ih, b_hh]
        state = tuple(map(of_samples, _states(hx)))
        _, new = _direction(input.unsqueeze(1), state, weights, True, step, 1)
        return new[0] if isinstance(hx, Tensor) else new

    return cell


def _layers(
    input: Tensor, hx: State, weights: list[Tensor], has_biases: bool, num_layers: int,
    dropout: float, train: bool, bidirectional: bool, *, step: Step, axis: int,
    mask: Tensor | None = None,
) -> tuple[Tensor, State]:  # fmt: skip
    """All layers: the last layer's hidden states, and the last states ``[layers, N, H]``."""
    directions = 2 if bidirectional else 1
    size = len(weights) // (num_layers * directions)
    hx = tuple(of_samples(state.transpose(0, 1)) for state in hx)
    initial = list(zip(*(state.unbind(1) for state in hx), strict=True))
    last = []
    for layer in range(num_layers):
        outputs = []
        for k in range(layer * directions, (layer + 1) * directions):
            own = weights[k * size : (k + 1) * size]
            reverse = k % directions == 1
            output, state = _direction(
                input, initial[k], own, has_biases, step, axis, reverse, mask
            )
            outputs.append(output)
            last.append(state)
        input = torch.cat(outputs, -1) if bidirectional else outputs[0]
        if dropout and train and layer < num_layers - 1:
            input = F.dropout(input, dropout)
    return input, tuple(map(torch.stack, zip(*last, strict=True)))


def remember_order(module: nn.Module, args: tuple[Any, ...]) -> None:
    """Forward pre-hook: torch's recurrent functions are not told how a packed batch is sorted."""
    if args and isinstance(args[0], PackedSequence):
        setattr(args[0].batch_sizes, ORDER, args[0].sorted_indices)


def _network(step: Step) -> Callable[..., Any]:
    """An ``nn.LSTM`` or its like, in both forms: padded, or packed with batch sizes."""

    def network(*args: Any) -> tuple[Tensor, ...]:
        if isinstance(args[3], bool):  # padded
            input, hx, *rest, batch_first = args
            output, last = _layers(input, _states(hx), *rest, step=step, axis=int(batch_first))
            return output, *last
        data, sizes, hx, *rest = args
        # Samples in their own order, which packing has changed to that of their lengths.
        n, steps = int(sizes[0]), len(sizes)
        order = getattr(sizes, ORDER, None)
        order = torch.arange(n, device=data.device) if order is None else order
        mask = torch.arange(n, device="cpu")[:, None] < sizes  # [sorted samples, time]
        time, ranks = (axis.to(data.device) for axis in mask.T.nonzero(as_tuple=True))
        place = order[ranks], time
        mask = mask.to(data.device)[order.argsort()]
        padded = data.new_zeros(n, steps, data.shape[1]).index_put(place, data)
        states = tuple(state[:, order.argsort()] for state in _states(hx))
        mask = mask.T.unsqueeze(-1)
        output, last = _layers(padded, states, *rest, step=step, axis=1, mask=mask)
        return output[place], *(state[:, order] for state in last)

    return network


for _name, _step in {
    "lstm": _lstm_step,
    "gru": _gru_step,
    "rnn_tanh": _tanh_step,
    "rnn_relu": _relu_step,
}.items():
    composition(getattr(torch, _name))(_network(_step))
    composition(getattr(torch, f"{_name}_cell"))(_cell(_step))
