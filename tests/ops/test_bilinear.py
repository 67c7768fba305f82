"""Bilinear layers."""

import torch.nn.functional as F

from tests.cases import Model, function
from tests.ops.rows import exact


def halves(x, w, b=None):
    return F.bilinear(x[..., :2], x[..., 2:].tanh(), w, b)


ROWS = {
    "bilinear": Model((5,), function(halves, w=(4, 2, 3), b=4)),
    "no-bias": Model((5,), function(halves, w=(4, 2, 3))),
    "tokens": Model((3, 5), function(halves, w=(4, 2, 3), b=4)),
    "tokens-axes": Model((2, 2, 5), function(halves, w=(2, 2, 3), b=2)),
}

test_exact = exact(ROWS)
