"""Kronecker factors: by their definition, exact where theory says so, and next to BackPACK's."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import curvopt
from tests import oracles
from tests.cases import LOSSES, Case, build
from tests.oracles import assert_close

CHOICES = pytest.mark.parametrize("tokens", ["expand", "reduce"])


def kflr(problem, quantity=None, **options):
    result = curvopt.compute(problem.loss, problem.params, quantity or curvopt.KFLR(), **options)
    return result.kflr if quantity is None or type(quantity) is curvopt.KFLR else result.kfac


def blocks(problem):
    G, start, result = oracles.ggn(*problem), 0, {}
    for p in problem.params:
        result[p] = G[start : start + p.numel(), start : start + p.numel()]
        start += p.numel()
    return result


@pytest.mark.parametrize("loss", ["ce", "mse-sum", "ce-weight", "bce-weights"])
@pytest.mark.parametrize("max_columns", [None, 1])
def test_factors_of_linear_layers(loss, max_columns):
    """A = mean of x x^T, B = the GGN in the layer's output, which is the bias's block."""
    problem = Case("mlp-tanh", loss).build()
    result, exact = kflr(problem, max_columns=max_columns), blocks(problem)
    x = problem.x
    for layer in problem.model:
        if isinstance(layer, nn.Linear):
            B, A = result[layer.weight]
            assert_close(A, (x.T @ x).detach() / len(x))
            assert_close(B, exact[layer.bias])
            assert_close(result[layer.bias].dense(), exact[layer.bias])
        x = layer(x)


@pytest.mark.parametrize("model", ["mlp-tanh", "linear", "matmul-method", "addmm", "F.linear"])
@CHOICES
def test_one_sample_is_exact(model, tokens):
    problem = Case(model, "ce").build(n=1)
    result = kflr(problem, curvopt.KFLR(tokens=tokens))
    for p, block in blocks(problem).items():
        assert_close(result[p].dense(), block)


@pytest.mark.parametrize("case", ["convnet", "conv1d-groups", "conv2d-groups", "tokens", "conv3d"])
@CHOICES
def test_factors_are_positive_and_fit(case, tokens):
    problem = Case(case, "mse-sum").build(n=3)
    for p, factors in kflr(problem, curvopt.KFLR(tokens=tokens)).items():
        assert factors.dense().shape == (p.numel(), p.numel())
        assert all(torch.linalg.eigvalsh(factor).min() > -1e-9 for factor in factors)


def test_convolution_by_definition():
    problem = Case("conv2d-stride", "mse-sum").build(n=3)
    layer = problem.model[0]
    B, A = kflr(problem)[layer.weight]
    x = F.unfold(problem.x, 3, padding=(1, 0), stride=(2, 1))  # [N, I, T]
    assert_close(A, torch.einsum("nit,njt->ij", x, x) / len(x))
    z = layer(problem.x).detach()
    slope = (1 - z.tanh().square()).flatten(2)  # mse-sum through Tanh: J^T (2 I) J is diagonal
    assert_close(B, torch.diag(2 * slope.square().sum((0, 2)) / slope.shape[2]))


def test_one_position_is_a_linear_layer():
    x = torch.randn(3, 2, 3, 3, dtype=torch.float64)
    conv, linear = nn.Conv2d(2, 4, 3).double(), nn.Linear(18, 4).double()
    linear.weight.data, linear.bias.data = conv.weight.data.flatten(1), conv.bias.data
    y = torch.arange(3)

    def factors(module, x):
        def closure():
            return F.cross_entropy(module(x).flatten(1), y)

        return curvopt.compute(closure, module.parameters(), curvopt.KFLR()).kflr[module.weight]

    pairs = zip(factors(conv, x), factors(linear, x.flatten(1)), strict=True)
    for a, b in pairs:
        assert_close(a, b)


def test_reduce_is_exact_for_a_mean_over_tokens():
    def make():
        return nn.Sequential(nn.Linear(3, 2), nn.AdaptiveAvgPool2d((1, 2)), nn.Flatten())

    problem = build(make, (5, 3), LOSSES["mse"], n=1)
    weight, bias = problem.params
    result = kflr(problem, curvopt.KFLR(tokens="reduce"))
    exact = blocks(problem)
    assert_close(result[weight].dense(), exact[weight])
    assert_close(result[bias].dense(), exact[bias])


@pytest.mark.parametrize("model", ["mlp-tanh", "convnet"])
def test_bias_together(model):
    problem = Case(model, "ce").build()
    apart, joint = kflr(problem), kflr(problem, curvopt.KFLR(bias="together"))
    for layer in problem.model:
        if hasattr(layer, "weight"):
            (B, A), (B2, A2) = apart[layer.weight], joint[layer.weight]
            assert_close(B2, B)
            assert_close(A2[:-1, :-1], A)
            assert joint[layer.bias] == ()
    one = Case("linear", "ce").build(n=1)
    weight = one.params[0]
    G = oracles.ggn(*one)
    order = torch.cat([torch.arange(12).view(3, 4), torch.arange(12, 15).view(3, 1)], 1).flatten()
    assert_close(kflr(one, curvopt.KFLR(bias="together"))[weight].dense(), G[order][:, order])


def test_transposed_weight():
    weight = nn.Parameter(torch.randn(4, 3, dtype=torch.float64))
    x, y = torch.randn(1, 3).double(), torch.tensor([1])
    result = curvopt.compute(lambda: F.cross_entropy(x @ weight.t(), y), [weight], curvopt.KFLR())
    other = curvopt.compute(
        lambda: F.cross_entropy(F.linear(x, weight), y), [weight], curvopt.KFLR()
    )
    for a, b in zip(result.kflr[weight], other.kflr[weight], strict=True):
        assert_close(a, b)


def test_embedding():
    table = nn.Embedding(5, 3).double()
    x, y = torch.tensor([[1], [1], [4]]), torch.tensor([0, 1, 2])
    result = curvopt.compute(
        lambda: F.cross_entropy(table(x).squeeze(1), y), table.parameters(), curvopt.KFLR()
    ).kflr[table.weight]
    counts = torch.tensor([0, 2, 0, 0, 1], dtype=torch.float64) / 3
    assert_close(result[0], counts)
    one = F.one_hot(x.squeeze(1), 5).double()
    dense = curvopt.compute(
        lambda: F.cross_entropy(one @ table.weight, y), table.parameters(), curvopt.KFLR()
    ).kflr[table.weight]
    assert_close(result[1], dense[1])
    assert_close(result.dense(), dense.dense())


@pytest.mark.parametrize("options", [{}, {"samples": 3}, {"estimator": "labels"}], ids=str)
def test_kfac_is_unbiased(options):
    problem = Case("mlp-tanh", "ce").build()
    weight = problem.params[0]
    exact = kflr(problem)[weight]
    draws = torch.stack([kflr(problem, curvopt.KFAC(**options))[weight][0] for _ in range(300)])
    error = draws.std(0) / 300**0.5
    assert ((draws.mean(0) - exact[0]).abs() <= 4.5 * error + 1e-12).all()
    assert error.norm() < 0.2 * exact[0].norm()
    assert_close(kflr(problem, curvopt.KFAC())[weight][1], exact[1])


def test_next_to_backpack():
    """The same factors for linear layers; B of a convolution there is the bias's block."""
    backpack = pytest.importorskip("backpack")
    from backpack.extensions import KFLR

    def make():
        return nn.Sequential(nn.Conv2d(1, 2, 2), nn.Sigmoid(), nn.Flatten(), nn.Linear(8, 3))

    problem = build(make, (1, 3, 3), LOSSES["ce"])
    ours = kflr(problem)
    model, loss_fn = backpack.extend(problem.model), backpack.extend(nn.CrossEntropyLoss())
    x = problem.x.requires_grad_()
    with backpack.backpack(KFLR()):
        loss_fn(model(x), problem.y).backward()
    conv, linear = model[0], model[3]
    for p in (linear.weight, linear.bias, conv.bias):
        for factor, theirs in zip(ours[p], p.kflr, strict=True):
            assert_close(factor, theirs.detach())
    assert_close(ours[conv.weight][1], conv.weight.kflr[1])
    assert_close(ours[conv.bias][0], conv.weight.kflr[0].detach())


def test_refuses():
    for options in ({"bias": "no"}, {"tokens": "no"}):
        with pytest.raises(ValueError, match=next(iter(options))):
            curvopt.KFLR(**options)
    with pytest.raises(ValueError, match="samples"):
        curvopt.KFAC(samples=0)
    big = nn.Parameter(torch.randn(5000, dtype=torch.float64))
    x = torch.randn(2, 5000).double()
    with pytest.raises(curvopt.CurvoptError, match=r"big \[5000\].* no Kronecker factors"):
        curvopt.compute(lambda: F.mse_loss(x * big, x), [("big", big)], curvopt.KFLR())
