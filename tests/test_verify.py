"""verify: agrees where the engine is right, and tells where it is not."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import curvopt
from curvopt.verify import LOOPS
from tests.cases import Case, mlp

EVERYTHING = [
    curvopt.Gradient(),
    curvopt.BatchGrad(),
    curvopt.BatchL2Grad(),
    curvopt.SumGradSquared(),
    curvopt.Variance(unbiased=True),
    curvopt.ClippedGradSum(0.1),
    curvopt.DiagGGNExact(),
    curvopt.BatchDiagGGNExact(),
    curvopt.SqrtGGNExact(),
    curvopt.GradGram(),
    curvopt.DiagHessian(),
    curvopt.BatchDiagHessian(),
]


@pytest.mark.parametrize("loss", ["ce-everything", "mse-sum", "bce-weights", "two-terms"])
@pytest.mark.parametrize("model", ["mlp-tanh", "convnet"])
def test_everything_agrees(model, loss):
    report = curvopt.verify(*Case(model, loss).build()[:4], *EVERYTHING)
    assert report.ok
    assert len(report.comparisons) == len(EVERYTHING) * 6
    assert max(comparison.error for comparison in report.comparisons) < 1e-10


def test_every_loop_is_tested():
    assert set(map(type, EVERYTHING)) == set(LOOPS)


def test_default_is_both_orders_in_float64():
    case = Case("mlp-tanh", "ce").build(dtype=torch.float32)
    report = curvopt.verify(*case[:4])
    assert {comparison.quantity for comparison in report.comparisons} == {
        "BatchGrad",
        "DiagGGNExact",
    }
    assert 0 < max(comparison.error for comparison in report.comparisons) < 1e-10


def test_as_it_is():
    case = Case("mlp-tanh", "ce").build(dtype=torch.float32)
    report = curvopt.verify(*case[:4], double=False)
    assert report.ok
    assert max(comparison.error for comparison in report.comparisons) > 1e-9
    assert not curvopt.verify(*case[:4], double=False, rtol=1e-12, atol=1e-15).ok


def test_nothing_is_changed():
    case = Case("convnet", "ce").build(dtype=torch.float32)
    before = {name: value.clone() for name, value in case.model.state_dict().items()}
    curvopt.verify(*case[:4])
    for name, value in case.model.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(p.grad is None for p in case.params)


def test_report_is_a_table():
    report = curvopt.verify(*Case("mlp-tanh", "ce").build()[:4], curvopt.BatchGrad())
    head, first, *rest = str(report).splitlines()
    assert head.split() == ["quantity", "parameter", "shape", "relative", "error"]
    assert first.startswith("BatchGrad  0.weight")
    assert first.endswith("ok")
    assert len(rest) == 5


@pytest.mark.parametrize(
    "quantity",
    [
        curvopt.DiagGGNMC(),
        curvopt.BatchDiagGGNMC(3),
        curvopt.SqrtGGNMC(),
        curvopt.DiagHessianMC(),
    ],
)
def test_random_quantity_by_the_exact_one(quantity):
    report = curvopt.verify(*Case("mlp-tanh", "ce").build()[:4], quantity)
    assert report.ok
    exact = type(quantity).__name__.removesuffix("MC")
    assert report.comparisons[0].quantity in (exact, f"{exact}Exact")


def test_outputs_and_inputs_in_containers():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(3, 2), nn.Linear(4, 2)])

        def forward(self, first, second):
            return {"a": self.layers[0](first).tanh(), "b": [self.layers[1](second)], "c": 1}

    def loss(z, y):
        return F.mse_loss(z["a"], y[0]) + F.cross_entropy(z["b"][0], y[1])

    x = {"first": torch.randn(4, 3), "second": torch.randn(4, 4)}
    y = torch.randn(4, 2), torch.randint(2, (4,))
    assert curvopt.verify(Model(), loss, x, y, *EVERYTHING).ok


def test_loss_module_is_cast_too():
    x, y = torch.randn(4, 4), torch.randint(3, (4,))
    assert curvopt.verify(mlp(), nn.CrossEntropyLoss(weight=torch.rand(3)), x, y).ok


def test_random_model():
    model = nn.Sequential(nn.Linear(4, 5), nn.Dropout(), nn.Linear(5, 3))
    x, y = torch.randn(4, 4), torch.randint(3, (4,))
    with pytest.raises(curvopt.CurvoptError, match=r"random.*eval\(\)"):
        curvopt.verify(model, F.cross_entropy, x, y)
    assert curvopt.verify(model.eval(), F.cross_entropy, x, y).ok


@pytest.mark.parametrize("quantity", [curvopt.KFAC(), curvopt.DiagGGNExact(subsample=[0])])
def test_quantity_without_a_loop(quantity):
    with pytest.raises(TypeError, match=f"no loop .*{type(quantity).__name__}"):
        curvopt.verify(*Case("mlp-tanh", "ce").build()[:4], quantity)
