"""Every rule has a row in one of the ops' tests, so that none goes untested."""

import importlib
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import curvopt
from curvopt.ops.registry import RULES, FunctionRule
from tests import cases
from tests.cases import Model, function

ROWS = {"recurrent": Model((4, 3), lambda: nn.LSTM(3, 2, batch_first=True))}


def models():
    """The rows of the models' table and of every test file in this folder."""
    files = sorted(Path(__file__).parent.glob("test_*.py"))
    modules = [cases, *(importlib.import_module(f"tests.ops.{file.stem}") for file in files)]
    for module in modules:
        for table in vars(module).values():
            if isinstance(table, dict):
                yield from (row for row in table.values() if isinstance(row, Model))


def test_every_rule_has_a_row():
    used = set()
    for row in models():
        model = row.make().double()
        with curvopt.record(model.parameters()) as tape:
            model(torch.randn(3, *row.shape, dtype=torch.float64))
        used |= {call.rule for call in tape.record.calls}
    own = {rule for rule in RULES.values() if not isinstance(rule, FunctionRule)}
    assert {rule.function.__name__ for rule in own - used} == set()


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda params: curvopt.DiagGGNOptimizer(params, lr=0.1),
        lambda params: curvopt.VarianceAdaptiveSGD(params, lr=0.1),
        lambda params: curvopt.DPSGD(
            params, 0.1, noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=4
        ),
    ],
)
@pytest.mark.filterwarnings("ignore::curvopt.SlowPathWarning")
def test_optimizers_take_the_slow_path_too(optimizer):
    model = function(lambda x, w, v: (x.square() + 1) ** w @ v, w=3, v=(3, 2))()
    params, x = list(model.parameters()), torch.randn(4, 3)
    optimizer = optimizer(params)
    for _ in range(3):
        before = [p.detach().clone() for p in params]
        optimizer.step(lambda: F.mse_loss(model(x), x[:, :2]))
        assert not any(map(torch.equal, before, params))
