"""Products with the Hessian and the GGN, against the dense matrices."""

import pytest
import torch
from torch import nn

import curvopt
from tests import oracles
from tests.cases import Case
from tests.oracles import assert_close

CASES = [
    Case("mlp-tanh", "ce-everything"),
    Case("convnet", "mse"),
    Case("heads", "heads"),
    Case("linear", "two-terms"),
    Case("tokens-mlp", "bce-weights"),
]


def hessian_product(problem, v):
    return curvopt.hessian_vector_product(problem.loss(), problem.params, v)


def ggn_product(problem, v):
    outputs = problem.model(problem.x)
    return curvopt.ggn_vector_product(
        problem.loss_fn(outputs, problem.y), outputs, problem.params, v
    )


PRODUCTS = {"hessian": (hessian_product, oracles.hessian), "ggn": (ggn_product, oracles.ggn)}
every_product = pytest.mark.parametrize("kind", PRODUCTS)


@every_product
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_equals_dense_matrix(kind, case):
    problem = case.build()
    product, dense = PRODUCTS[kind]
    v = [torch.randn(2, *p.shape, dtype=p.dtype) for p in problem.params]
    matrix = dense(*problem)
    batch = product(problem, v)
    for i in range(2):
        truth = matrix @ oracles.flat(part[i] for part in v)
        one = product(problem, dict(zip(problem.params, (part[i] for part in v), strict=True)))
        assert_close(oracles.flat(part[i] for part in batch), truth)
        assert_close(oracles.flat(one.values()), truth)


@every_product
def test_parameter_without_influence_gets_zeros(kind):
    problem = Case("mlp-tanh", "mse").build()
    problem.params.append(nn.Parameter(torch.ones(2, dtype=torch.float64)))
    assert_close(PRODUCTS[kind][0](problem, problem.params)[-1], torch.zeros(2).double())


@every_product
def test_refuses(kind):
    problem = Case("linear", "mse").build()
    with pytest.raises(curvopt.CurvoptError, match="v has shapes"):
        PRODUCTS[kind][0](problem, [torch.ones(1)])
    vector = problem.model(problem.x)
    with pytest.raises(curvopt.CurvoptError, match="scalar"):
        curvopt.hessian_vector_product(vector, problem.params, problem.params)
