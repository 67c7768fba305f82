"""Settings at which an optimizer is another one, or solves the problem, to the last digits."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import curvopt
from tests import oracles
from tests.cases import Case
from tests.oracles import assert_close

newton = {"damping": 0.0, "momentum": 0.0, "max_step": math.inf, "estimator": "exact"}


def diagonal_quadratic(n=6, inputs=3, outputs=2):
    """Rows that hold one input each, so that no two parameters interact; and its solution."""
    torch.manual_seed(0)
    model = nn.Linear(inputs, outputs, bias=False).double()
    x = torch.diag(torch.rand(inputs, dtype=torch.float64) + 0.5).repeat(n // inputs, 1)
    y = torch.randn(n, outputs, dtype=torch.float64)
    return model, x, y, torch.linalg.lstsq(x, y).solution.T


def test_one_exact_newton_step_solves_a_diagonal_quadratic():
    model, x, y, solution = diagonal_quadratic()
    opt = curvopt.DiagGGNOptimizer(model.parameters(), lr=1.0, **newton)
    opt.step(lambda: F.mse_loss(model(x), y))
    assert_close(model.weight, solution, 1e-12)


@pytest.mark.parametrize("lr", [0.25, 0.5])
def test_a_part_of_the_newton_step(lr):
    model, x, y, solution = diagonal_quadratic()
    expected = (1 - lr) * model.weight.detach() + lr * solution
    opt = curvopt.DiagGGNOptimizer(model.parameters(), lr=lr, **newton)
    opt.step(lambda: F.mse_loss(model(x), y))
    assert_close(model.weight, expected, 1e-12)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_without_curvature_diag_ggn_is_sgd(weight_decay):
    """A linear loss: D = 0, and damping 1 divides by one. The weight decay is decoupled."""
    runs = []
    for make, options in (
        (torch.optim.SGD, {}),
        (curvopt.DiagGGNOptimizer, newton | {"damping": 1.0}),
    ):
        problem = Case("mlp-tanh", "mse").build(n=5)
        # The same gradient: the decay of SGD without momentum is decoupled too.
        opt = make(problem.params, lr=0.1, weight_decay=weight_decay, **options)
        for _ in range(5):

            def closure(problem=problem, opt=opt):
                opt.zero_grad()
                loss = F.l1_loss(problem.model(problem.x), problem.y)
                loss.backward()
                return loss

            opt.step(closure)
        runs.append(oracles.flat(problem.params))
    assert_close(runs[1], runs[0], 1e-12)
