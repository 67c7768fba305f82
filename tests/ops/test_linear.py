"""Products with a parameter: any axes of it, on either side, batched, as an einsum."""

import torch

from tests.cases import Model, function
from tests.ops.rows import exact


def einsum(equation, *shape, flip=False):
    if flip:
        return function(lambda x, w: torch.einsum(equation, w, x).tanh(), w=shape)
    return function(lambda x, w: torch.einsum(equation, x, w).tanh(), w=shape)


def heads(x, w):
    """A matrix per head: the parameter's batch axis is no sample axis."""
    return (x.unflatten(-1, (2, -1)).transpose(1, 2) @ w).tanh()


def time_first(x, w):
    return (x.transpose(0, 1) @ w).transpose(0, 1).tanh()


ROWS = {
    "matmul-heads": Model((3, 4), function(heads, w=(2, 2, 3))),
    "matmul-heads-left": Model((2, 3, 4), function(lambda x, w: w @ x, w=(2, 5, 3))),
    "matmul-broadcast": Model((2, 3, 4), function(lambda x, w: x @ w, w=(1, 4, 2))),
    "matmul-tokens-mixed": Model((3, 4), function(lambda x, w: (w @ x).tanh(), w=(5, 3))),
    "matmul-time-first": Model((5, 3), function(time_first, w=(3, 2))),
    "matmul-as-many-as-samples": Model((4, 4), function(lambda x, w: (w @ x).tanh(), w=(4, 4))),
    "bmm": Model(
        (3, 4),
        function(lambda x, w: torch.bmm(x.transpose(0, 1), w).transpose(0, 1), w=(3, 4, 2)),
    ),
    "rmatmul": Model((3, 4), function(lambda x, w: w.__rmatmul__(x), w=(4, 2))),
    "einsum": Model((4,), einsum("nd,de->ne", 4, 3)),
    "einsum-transposed": Model((3, 4), einsum("ntd,ed->nte", 3, 4)),
    "einsum-flipped": Model((3, 4), einsum("ed, ntd -> net", 3, 4, flip=True)),
    "einsum-heads": Model((3, 4), einsum("ntd,hdk->nhtk", 2, 4, 3)),
    "einsum-heads-joined": Model((2, 3, 4), einsum("nhtk,hko->nto", 2, 4, 3)),
    "einsum-groups": Model((2, 4), einsum("ngd,gde->nge", 2, 4, 3)),
    "einsum-diagonal": Model((3, 4), einsum("ntd,d->ntd", 4)),
    "einsum-sum": Model((3, 4), einsum("ntd,d->n", 4)),
    "einsum-summed-data": Model((3, 4), einsum("ntd,de->ne", 4, 2)),
    "einsum-mixed-tokens": Model((3, 4), einsum("ntd,st->nsd", 5, 3)),
    "einsum-implicit": Model((4,), einsum("bd,de", 4, 3)),
    "einsum-ellipsis": Model((2, 3, 4), einsum("...d,ed->...e", 5, 4)),
    "einsum-ellipsis-both": Model((2, 3, 4), einsum("...td,...de->...te", 2, 4, 3)),
    "einsum-ellipsis-implicit": Model((3, 4), einsum("...d,de", 4, 2)),
    "einsum-time-first": Model(
        (5, 4),
        function(
            lambda x, w: torch.einsum("tnd,de->tne", x.transpose(0, 1), w).transpose(0, 1).tanh(),
            w=(4, 3),
        ),
    ),
}

test_exact = exact(ROWS)
