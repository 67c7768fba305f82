"""Norms: all kinds, axes and layouts, with and without weight or bias; batch statistics refused."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import curvopt
from tests.cases import LOSSES, Model, build, function
from tests.ops.rows import exact
from tests.oracles import assert_close, grad
from tests.test_quantities import check


def trained(make, *shape):
    """A norm in eval mode whose running statistics have seen data."""

    def trained():
        layer = make()
        layer(torch.randn(8, *shape) * 2 + 1)
        return layer.eval()

    return trained


def after_linear(norm):
    """The norm's input is an activation."""
    return lambda: nn.Sequential(nn.Linear(4, 4), norm(), nn.Tanh())


class TimeFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(3, 4), nn.LayerNorm(4)

    def forward(self, x):
        return self.norm(self.linear(x.transpose(0, 1))).transpose(0, 1).tanh()


ROWS = {
    "layer": Model((4,), lambda: nn.LayerNorm(4)),
    "layer-axes": Model((2, 3, 4), lambda: nn.LayerNorm((3, 4))),
    "layer-tokens": Model((5, 4), after_linear(lambda: nn.LayerNorm(4))),
    "layer-no-bias": Model((5, 4), after_linear(lambda: nn.LayerNorm(4, bias=False))),
    "layer-no-weight": Model((4,), function(lambda x, b: F.layer_norm(x, (4,), bias=b), b=4)),
    "layer-fixed": Model((4,), after_linear(lambda: nn.LayerNorm(4, elementwise_affine=False))),
    "layer-time-first": Model((5, 3), TimeFirst),
    "layer-positional": Model(
        (4,), function(lambda x, w, b: torch.layer_norm(x, (4,), w, b, 0.1), w=4, b=4)
    ),
    "rms": Model((4,), lambda: nn.RMSNorm(4)),
    "rms-tokens": Model((2, 4), after_linear(lambda: nn.RMSNorm(4, eps=0.1))),
    "rms-axes": Model((3, 4), lambda: nn.RMSNorm((3, 4))),
    "group": Model((4, 3), lambda: nn.GroupNorm(2, 4)),
    "group-maps": Model((4, 3, 2), lambda: nn.Sequential(nn.Conv2d(4, 6, 1), nn.GroupNorm(3, 6))),
    "instance": Model((4, 3), lambda: nn.InstanceNorm1d(4, affine=True)),
    "instance-maps": Model((2, 3, 3), lambda: nn.InstanceNorm2d(2, affine=True)),
    "instance-volumes": Model((1, 2, 3, 2), lambda: nn.InstanceNorm3d(1, affine=True)),
    "instance-tracking": Model(
        (4, 3), lambda: nn.InstanceNorm1d(4, affine=True, track_running_stats=True)
    ),
    "instance-trained": Model(
        (2, 3),
        trained(lambda: nn.InstanceNorm1d(2, affine=True, track_running_stats=True), 2, 3),
    ),
    "batch": Model((4,), trained(lambda: nn.BatchNorm1d(4), 4)),
    "batch-maps": Model((2, 3, 3), trained(lambda: nn.BatchNorm2d(2), 2, 3, 3)),
    "batch-volumes": Model((2, 1, 3, 2), trained(lambda: nn.BatchNorm3d(2), 2, 1, 3, 2)),
    "batch-fixed": Model(
        (4,),
        lambda: nn.Sequential(
            nn.Linear(4, 3), trained(lambda: nn.BatchNorm1d(3, affine=False), 3)()
        ),
    ),
}

test_exact = exact(ROWS)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_batch_norm_in_training_mode(affine, frozen):
    def make():
        layers = nn.Linear(4, 3), nn.BatchNorm1d(3, affine=affine), nn.Linear(3, 2)
        for p in layers[0].parameters():
            p.requires_grad_(not frozen)
        return nn.Sequential(*layers)

    problem = build(make, (4,), LOSSES["mse"])
    named = list(problem.model.named_parameters())
    owner = r"1\.weight \[3\]" if affine else r"\[4, 3\]"
    with pytest.raises(curvopt.CurvoptError, match=rf"batch_norm.*{owner}.*eval mode.*GroupNorm"):
        curvopt.compute(problem.loss, named, curvopt.BatchL2Grad())
    assert_close(curvopt.compute(problem.loss, named).grad, grad(*problem))


def test_running_statistics_change_between_two_uses():
    make = ROWS["instance-tracking"].make

    def twice():
        layer = make()
        return nn.Sequential(layer, layer)

    check(build(twice, (4, 3), LOSSES["mse"]))
