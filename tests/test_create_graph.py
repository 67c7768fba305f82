"""Every quantity is differentiable: its gradient against central differences of itself."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import curvopt
from tests import oracles
from tests.cases import LOSSES, Case, build
from tests.oracles import assert_close

QUANTITIES = {
    "batch_grad": curvopt.BatchGrad,
    "batch_l2": curvopt.BatchL2Grad,
    "sum_grad_squared": curvopt.SumGradSquared,
    "variance": curvopt.Variance,
    "clipped_grad_sum": lambda: curvopt.ClippedGradSum(0.3),
    "diag_ggn_exact": curvopt.DiagGGNExact,
    "diag_ggn_exact_batch": curvopt.BatchDiagGGNExact,
    "diag_ggn_mc": curvopt.DiagGGNMC,
    "diag_ggn_mc_batch": curvopt.BatchDiagGGNMC,
    "sqrt_ggn_exact": curvopt.SqrtGGNExact,
    "sqrt_ggn_mc": curvopt.SqrtGGNMC,
    "kflr": curvopt.KFLR,
    "kfac": curvopt.KFAC,
    "diag_h": curvopt.DiagHessian,
    "diag_h_batch": curvopt.BatchDiagHessian,
    "diag_h_mc": curvopt.DiagHessianMC,
    "grad_gram": curvopt.GradGram,
    "ggn_gram": curvopt.GGNGram,
    "empirical_fisher": curvopt.EmpiricalFisher,
}
CASES = [
    Case("mlp-tanh", "ce"),
    Case("mlp-tanh", "ce-everything"),
    Case("convnet", "mse"),
    Case("tokens-mlp", "bce-weights"),
    Case("matmul-plus-bias", "ce-weight"),
]


def number(values):
    """One number that every element of a quantity enters."""
    parts = [part for v in values for part in (v if isinstance(v, tuple) else (v,))]
    flat = oracles.flat(parts)
    return flat @ torch.linspace(-1, 1, len(flat), dtype=flat.dtype)


def value(problem, field, create_graph=False):
    torch.manual_seed(3)  # the same signs every time
    quantity = QUANTITIES[field]()
    result = curvopt.compute(problem.loss, problem.params, quantity, create_graph=create_graph)
    return number(getattr(result, field).values())


def central(problem, field, leaves, direction, h=1e-5):
    """Derivative along a direction, to fourth order."""
    start = [leaf.detach().clone() for leaf in leaves]

    def at(t):
        for leaf, x, d in zip(leaves, start, direction, strict=True):
            leaf.data.copy_(x + t * d)
        return value(problem, field)

    slope = (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h)
    at(0)
    return slope


@pytest.mark.parametrize("field", QUANTITIES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_gradient(case, field):
    problem = case.build(n=3)
    x = problem.x.requires_grad_()
    leaves = [x, *problem.params]
    total = value(problem, field, create_graph=True)
    slopes = torch.autograd.grad(total, leaves, materialize_grads=True)
    direction = [torch.randn_like(leaf) for leaf in leaves]
    actual = sum((s * d).sum() for s, d in zip(slopes, direction, strict=True))
    expected = central(problem, field, leaves, direction)
    scale = max(1, *(s.abs().max() for s in slopes))
    assert abs(actual - expected) < 1e-6 * scale


@pytest.mark.parametrize("case", CASES[:3], ids=lambda case: case.id)
def test_second_gradient(case):
    """The variance, differentiated twice."""
    problem = case.build(n=3)
    result = curvopt.compute(problem.loss, problem.params, curvopt.Variance(), create_graph=True)
    ours = number(result.variance.values())
    plain = number(oracles.variance(*problem, create_graph=True).values())
    twice = []
    for total in (ours, plain):
        slopes = torch.autograd.grad(total, problem.params, create_graph=True)
        twice.append(torch.autograd.grad(sum(s.square().sum() for s in slopes), problem.params))
    for a, b in zip(*twice, strict=True):
        assert_close(a, b, 1e-8)


class Cubed(nn.Module):
    """A parametrization that is not linear."""

    def forward(self, w):
        return w**3 / w.norm()


@pytest.mark.filterwarnings("ignore:no rule covers")
@pytest.mark.parametrize("use", ["tied", "derived", "no-rule"])
@pytest.mark.parametrize("field", ["variance", "diag_ggn_exact", "diag_h", "grad_gram"])
def test_unusual_uses(use, field):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(3, 3)
            if use == "derived":
                nn.utils.parametrize.register_parametrization(self.a, "weight", Cubed())

        def forward(self, x):
            y = self.a(x).tanh()
            if use == "tied":
                y = self.a(y)
            return torch.atan2(y, self.a.bias) if use == "no-rule" else y

    problem = build(Model, (3,), LOSSES["mse"], n=3)
    total = value(problem, field, create_graph=True)
    slopes = torch.autograd.grad(total, problem.params)
    direction = [torch.randn_like(p) for p in problem.params]
    actual = sum((s * d).sum() for s, d in zip(slopes, direction, strict=True))
    expected = central(problem, field, problem.params, direction)
    assert abs(actual - expected) < 1e-6 * max(1, *(s.abs().max() for s in slopes))


def test_gradient_of_zero_rows_is_a_number():
    """Norms, roots and clipping at zero: a sample whose gradient vanishes."""
    model = nn.Linear(3, 2).double()
    x = torch.zeros(2, 3, dtype=torch.float64)
    model.bias.data.zero_()
    for field, make in QUANTITIES.items():
        result = curvopt.compute(
            lambda: F.mse_loss(model(x), torch.zeros(2, 2).double()),
            model.parameters(),
            make(),
            create_graph=True,
        )
        total = number(getattr(result, field).values())
        if total.requires_grad:
            slopes = torch.autograd.grad(total, [*model.parameters()], materialize_grads=True)
            assert all(slope.isfinite().all() for slope in slopes), field


@pytest.mark.parametrize("loss", [F.huber_loss, F.l1_loss, F.poisson_nll_loss])
def test_losses_by_autograd(loss):
    problem = Case("mlp-tanh", "mse").build()._replace(loss_fn=lambda z, y: loss(z, y.abs()))
    total = value(problem, "diag_ggn_exact", create_graph=True)
    if loss is F.l1_loss:
        assert total == 0
        return
    slopes = torch.autograd.grad(total, problem.params, materialize_grads=True)
    direction = [torch.randn_like(p) for p in problem.params]
    actual = sum((s * d).sum() for s, d in zip(slopes, direction, strict=True))
    assert abs(actual - central(problem, "diag_ggn_exact", problem.params, direction)) < 1e-6
