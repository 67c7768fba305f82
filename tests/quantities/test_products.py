"""Gram matrices, kernels, blocks, quadratic forms: against dense rows and matrices."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import curvopt
from tests import oracles
from tests.cases import Case
from tests.oracles import assert_close
from tests.structures.test_laws import STRUCTURES

CASES = [
    Case(*pair)
    for pair in (
        ("mlp-tanh", "ce-everything"),
        ("mlp-relu", "mse"),
        ("convnet", "ce"),
        ("conv2d-groups", "mse-sum"),
        ("tokens", "bce-weights"),
        ("tokens-wide", "mse"),
        ("heads", "heads"),
        ("linear", "two-terms"),
        ("matmul-method", "ce"),
        ("mlp-tanh", "ce-ignore"),
    )
]
cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
chunks = pytest.mark.parametrize("max_columns", [None, 1])


def direction(problem):
    return {p: torch.randn_like(p) for p in problem.params}


@cases
@chunks
def test_all_on_one_problem(case, max_columns):
    problem = case.build(n=3)
    d = direction(problem)
    result = curvopt.compute(
        problem.loss,
        problem.params,
        curvopt.GradGram(),
        curvopt.GGNGram(),
        curvopt.BlockGGN(),
        curvopt.GGNQuadratic(d),
        max_columns=max_columns,
    )
    rows, G = oracles.batch_grad(*problem), oracles.ggn(*problem)
    flat = oracles.flat(d.values())
    assert_close(result.ggn_quadratic, flat @ G @ flat)
    start = 0
    for p, g in rows.items():
        g = g.flatten(1)
        assert_close(result.grad_gram[p], g @ g.T)
        block = G[start : start + p.numel(), start : start + p.numel()]
        start += p.numel()
        M = torch.randn(2, *p.shape, dtype=p.dtype)
        assert_close(result.block_ggn[p](M).flatten(1), M.flatten(1) @ block)
        assert_close(result.block_ggn[p](M[0]), (block @ M[0].flatten()).view(p.shape))
        gram = result.ggn_gram[p].flatten(2).flatten(0, 1)
        size = min(len(gram), len(block))
        spectra = [torch.linalg.eigvalsh(m).flip(0)[:size] for m in (gram, block)]
        assert_close(*spectra, 1e-8)


def shares(problem):
    """How much each sample's own loss counts in the loss as written, by solving for it."""
    own = torch.stack(
        [oracles.flat(oracles.grad(problem.model, problem.loss_fn, a, b, problem.params).values())
         for a, b in oracles.samples(problem.x, problem.y)]
    )  # fmt: skip
    whole = oracles.flat(oracles.grad(*problem).values())
    return torch.linalg.lstsq(own.T, whole[:, None]).solution[:, 0], own


@pytest.mark.parametrize("loss", ["ce", "ce-sum", "ce-weight", "mse", "scaled"])
def test_empirical_fisher(loss):
    problem = Case("mlp-tanh", loss).build(n=3)
    result = curvopt.compute(problem.loss, problem.params, curvopt.EmpiricalFisher())
    w, own = shares(problem)
    expected = torch.einsum("n,np->p", w, own.square())
    assert_close(oracles.flat(result.empirical_fisher.values()), expected)


def test_quadratic_form_of_a_sketch_is_unbiased():
    problem = Case("mlp-tanh", "ce").build()
    d = direction(problem)
    flat = oracles.flat(d.values())
    exact = flat @ oracles.ggn(*problem) @ flat
    draws = torch.stack(
        [
            curvopt.compute(
                problem.loss, problem.params, curvopt.GGNQuadratic(d, samples=2)
            ).ggn_quadratic
            for _ in range(300)
        ]
    )
    assert (draws.mean() - exact).abs() < 4.5 * draws.std() / 300**0.5
    assert draws.std() / 300**0.5 < 0.2 * exact


def test_quadratic_form_along_some_parameters():
    problem = Case("mlp-tanh", "ce").build()
    p = problem.params[0]
    part = {p: torch.ones_like(p)}
    whole = {q: torch.ones_like(q) if q is p else torch.zeros_like(q) for q in problem.params}
    values = [
        curvopt.compute(problem.loss, problem.params, curvopt.GGNQuadratic(d)).ggn_quadratic
        for d in (part, whole)
    ]
    assert_close(*values)
    with pytest.raises(curvopt.CurvoptError, match="direction has shape"):
        curvopt.compute(
            problem.loss, problem.params, curvopt.GGNQuadratic({p: torch.ones(1).double()})
        )


@chunks
@pytest.mark.parametrize("model", ["mlp-tanh", "convnet", "tokens-mlp", "linear-squeezed"])
def test_kernel(model, max_columns):
    problem = Case(model, "mse").build(n=3)
    K = curvopt.empirical_ntk(
        lambda: problem.model(problem.x), problem.params, max_columns=max_columns
    )
    J = oracles.param_jacobian(problem.model, problem.x, problem.params)
    out = problem.model(problem.x).shape
    flat = torch.cat([j.reshape(out.numel(), -1) for j in J.values()], 1)
    assert_close(K, (flat @ flat.T).view(*out, *out))


@settings(max_examples=25)
@given(
    n=st.integers(1, 4),
    widths=st.lists(st.integers(1, 5), min_size=2, max_size=4),
    tokens=st.lists(st.integers(1, 6), max_size=1),
)
def test_any_kernel(n, widths, tokens):
    layers = [layer for i, o in pairwise(widths) for layer in (nn.Linear(i, o), nn.Tanh())]
    model, x = nn.Sequential(*layers).double(), torch.randn(n, *tokens, widths[0]).double()
    params = list(model.parameters())
    K = curvopt.empirical_ntk(lambda: model(x), params)
    J = oracles.param_jacobian(model, x, params)
    flat = torch.cat([j.reshape(model(x).numel(), -1) for j in J.values()], 1)
    assert_close(K.reshape(len(flat), -1), flat @ flat.T)


# Laws of the structures: the fast way gives the numbers of the formed rows.

W = torch.tensor([[0.5, -2.0, 0.0], [1.0, 3.0, -1.0], [2.0, 0.1, 1.0]], dtype=torch.float64)


@pytest.mark.parametrize("name", STRUCTURES)
def test_weighted_rows(name):
    structure, rows = STRUCTURES[name]()
    expected = torch.einsum("vn,vn...->...", W[: len(rows)], rows)
    assert_close(structure.weighted(W[: len(rows)]), expected, 1e-12)


@pytest.mark.parametrize("name", STRUCTURES)
def test_some_samples(name):
    structure, rows = STRUCTURES[name]()
    taken = structure.take([2, 0])
    assert taken.samples == 2
    assert_close(taken.form(), rows[:, [2, 0]], 1e-12)
    assert_close(taken.sum_of_squares(), rows[:, [2, 0]].square().sum((0, 1)), 1e-12)


@pytest.mark.parametrize("name", STRUCTURES)
def test_products_of_rows(name):
    structure, rows = STRUCTURES[name]()
    flat = rows.reshape(*rows.shape[:2], -1)
    assert_close(structure.gram(structure), torch.einsum("vnp,ump->vnum", flat, flat), 1e-12)
    assert_close(structure.cross(structure), rows.square().sum((0, 1)), 1e-12)
    assert_close(structure.cross(structure, batch=True), rows.square().sum(0), 1e-12)
