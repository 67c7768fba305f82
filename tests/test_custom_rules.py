"""Rules for ops of one's own: one rule serves both orders, and a wrong one is found."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import curvopt
from curvopt.ops.registry import MODULE_RULES, RULES
from curvopt.structures import Outer
from tests.cases import Function, Problem
from tests.test_quantities import check


@pytest.fixture(autouse=True)
def rules():
    """Rules that a test registers end with it."""
    before = dict(RULES), dict(MODULE_RULES)
    yield
    for table, old in zip((RULES, MODULE_RULES), before, strict=True):
        table.clear()
        table.update(old)


class Cube(torch.autograd.Function):
    """``(x W)^3``, with a backward pass of its own; it cannot be vectorized."""

    @staticmethod
    def forward(ctx, x, weight):
        product = x @ weight
        ctx.save_for_backward(x, weight, product)
        return product**3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight, product = ctx.saved_tensors
        grad = 3 * grad * product**2
        return grad @ weight.T, x.T @ grad


class CubeLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3) / 2)

    def forward(self, x):
        return Cube.apply(x, self.weight)


def cube_rule(module, inputs, output, cotangent):
    slope = 3 * cotangent * (inputs[0] @ module.weight) ** 2
    return {"weight": torch.einsum("ni,vno->vnio", inputs[0], slope)}


class Nested(nn.Module):
    """Parameters of its own and of submodules; what happens inside is its own business."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(3, 3, bias=False))
        self.bias = nn.Parameter(torch.randn(3))

    def forward(self, x):
        with torch.no_grad():
            offset = x.mean(-1, keepdim=True)
        return self.inner(x - offset) + self.bias


def nested_rule(module, inputs, output, cotangent):
    x = inputs[0] - inputs[0].mean(-1, keepdim=True)
    left, right = cotangent[:, :, None, None], x[:, None, None]
    return {"inner.0.weight": Outer(left, right, torch.Size([3, 3])), "bias": cotangent}


def problem(model, n=5):
    model = model.double()
    x = torch.randn(n, 4, dtype=torch.float64)
    params = [p for p in model.parameters() if p.requires_grad]
    return Problem(model, F.cross_entropy, x, torch.randint(3, (n,)), params)


def test_custom_backward():
    curvopt.register_rule(CubeLayer)(cube_rule)
    check(problem(nn.Sequential(CubeLayer(), nn.Tanh(), nn.Linear(3, 3))))


def test_structures_and_submodules():
    curvopt.register_rule(Nested)(nested_rule)
    check(problem(nn.Sequential(nn.Linear(4, 3), Nested(), nn.Tanh(), Nested())))


def test_layer_that_is_used_twice():
    curvopt.register_rule(Nested)(nested_rule)
    layer = Nested()
    check(problem(nn.Sequential(nn.Linear(4, 3), layer, nn.Tanh(), layer)))


def test_parameter_that_other_ops_use_too():
    curvopt.register_rule(Nested)(nested_rule)
    model = nn.Sequential(nn.Linear(4, 3), Nested(), nn.Tanh(), nn.Linear(3, 3, bias=False))
    model[3].weight = model[1].inner[0].weight
    check(problem(model))


def test_frozen_parameter():
    curvopt.register_rule(Nested)(nested_rule)
    model = nn.Sequential(nn.Linear(4, 3), Nested())
    model[1].inner[0].weight.requires_grad_(False)
    check(problem(model))


def test_subclass_has_the_rule_of_its_base():
    curvopt.register_rule(CubeLayer)(cube_rule)
    check(problem(type("Subclass", (CubeLayer,), {})()))


def test_the_module_is_left_as_it_was():
    curvopt.register_rule(CubeLayer)(cube_rule)
    case = problem(CubeLayer())
    weight = case.model.weight
    check(case)
    assert case.model.weight is weight
    with pytest.raises(RuntimeError), curvopt.record(case.params):
        case.model(case.x[:, :2])
    assert case.model.weight is weight


def distances(x, w):
    return torch.cdist(x, w)


def test_torch_function():
    @curvopt.register_rule(torch.cdist)
    def cdist(cotangent, x1, x2, **options):
        direction = F.normalize(x2 - x1[:, None], dim=-1)
        return {1: cotangent[..., None] * direction}

    check(problem(Function(distances, w=(3, 4))))


def test_differentiable():
    curvopt.register_rule(Nested)(nested_rule)
    case = problem(nn.Sequential(nn.Linear(4, 3), nn.Tanh(), Nested()))
    result = curvopt.compute(case.loss, case.params, curvopt.Variance(), create_graph=True)
    slopes = torch.autograd.grad(sum(v.sum() for v in result.variance.values()), case.params)
    assert all(slope.isfinite().all() for slope in slopes)


def test_without_a_rule_the_warning_says_what_to_do():
    case = problem(CubeLayer())
    with pytest.warns(curvopt.SlowPathWarning, match=r"register_rule"):
        curvopt.compute(case.loss, case.model.named_parameters(), curvopt.BatchGrad())


# Wrong rules.


def wrong_factor(module, inputs, output, cotangent):
    return {"weight": cube_rule(module, inputs, output, cotangent)["weight"] * 1.001}


def wrong_for_many_columns(module, inputs, output, cotangent):
    rows = cube_rule(module, inputs, output, cotangent)["weight"]
    return {"weight": rows.flip(0)[:1].expand_as(rows)}


@pytest.mark.parametrize("rule", [wrong_factor, wrong_for_many_columns])
def test_wrong_rule_is_found(rule):
    curvopt.register_rule(CubeLayer)(rule)
    case = problem(nn.Sequential(nn.Linear(4, 4), CubeLayer()))
    report = curvopt.verify(*case[:4])
    failed = {comparison.parameter for comparison in report.comparisons if not comparison.ok}
    assert failed == {"1.weight"}
    with pytest.raises(curvopt.CurvoptError, match=r"1\.weight .*FAILED"):
        curvopt.verify(*case[:4], raises=True)


def refused(rule, match):
    curvopt.register_rule(CubeLayer)(rule)
    case = problem(nn.Sequential(CubeLayer(), nn.Linear(3, 3)))
    with pytest.raises(curvopt.CurvoptError, match=match):
        curvopt.compute(case.loss, case.params, curvopt.BatchGrad(), curvopt.DiagGGNExact())


def test_rows_of_another_shape():
    def rule(module, inputs, output, cotangent):
        return {"weight": cube_rule(module, inputs, output, cotangent)["weight"].mT}

    refused(rule, r"rule of CubeLayer .*\(1, 5, 3, 4\).*'weight'.*\[1, 5, 4, 3\]")


def test_structure_of_another_shape():
    def rule(module, inputs, output, cotangent):
        return {"weight": Outer(cotangent[:, :, None, None], inputs[0][:, None, None], (3, 4))}

    refused(rule, r"rule of CubeLayer .*'weight'.*\[1, 5, 4, 3\]")


def test_parameter_without_rows():
    refused(lambda *args: {}, "rule of CubeLayer .*weight")


def test_name_that_is_no_parameter():
    def rule(module, inputs, output, cotangent):
        rows = cube_rule(module, inputs, output, cotangent)["weight"]
        return {"weight": rows, "wieght": rows}

    refused(rule, "rule of CubeLayer .*wieght")


def test_rule_that_returns_no_dict():
    refused(lambda module, inputs, output, cotangent: cotangent, "rule of CubeLayer .*dict")


def test_module_that_returns_a_tuple():
    class Pair(CubeLayer):
        def forward(self, x):
            return super().forward(x), x

    curvopt.register_rule(Pair)(cube_rule)
    case = problem(CubeLayer())
    model = Pair().double()
    with pytest.raises(curvopt.CurvoptError, match=r"Pair .*one tensor"):
        curvopt.compute(
            lambda: F.cross_entropy(model(case.x)[0], case.y), model.parameters(),
            curvopt.BatchGrad(),
        )  # fmt: skip


@pytest.mark.parametrize("target", ["CubeLayer", 3, CubeLayer()])
def test_target_that_is_none(target):
    with pytest.raises(TypeError, match="module class or a torch function"):
        curvopt.register_rule(target)(cube_rule)
