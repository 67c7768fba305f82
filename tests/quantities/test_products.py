"""Gram matrices, kernels, blocks, quadratic forms: against dense rows and matrices."""

import copy
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import curvopt
from curvopt.structures import Outer, Shift
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


def tied():
    table = nn.Embedding(7, 4)
    return lambda x: table(x).mean(1) @ table.weight.T, [table.weight]


def module(model):
    return model, [*model.parameters()]


# What holds its inputs, and how: a model with its parameters, and a batch for it.
HOLDING = {
    "linear": (
        lambda: module(nn.Sequential(nn.Linear(4, 3), nn.Tanh())),
        lambda: torch.randn(5, 4),
    ),
    "tokens": (
        lambda: module(nn.Sequential(nn.Linear(4, 3), nn.Flatten())),
        lambda: torch.randn(5, 2, 4),
    ),
    "conv": (
        lambda: module(nn.Sequential(nn.Conv1d(2, 3, 2), nn.Flatten())),
        lambda: torch.randn(5, 2, 4),
    ),
    "embedding": (
        lambda: module(nn.Sequential(nn.Embedding(7, 3), nn.Flatten())),
        lambda: torch.randint(7, (5, 2)),
    ),
    "tied": (tied, lambda: torch.randint(7, (5, 2))),
    "weight-norm": (
        lambda: module(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))),
        lambda: torch.randn(5, 4),
    ),
}


@pytest.mark.parametrize("name", HOLDING)
def test_what_outlives_the_pass_knows_of_changed_inputs(name):
    make, batch = HOLDING[name]
    torch.manual_seed(0)
    (model, params), buffer = make(), batch()
    result = curvopt.compute(
        lambda: F.mse_loss(z := model(buffer), torch.zeros_like(z)),
        params,
        curvopt.BlockGGN(),
        curvopt.Structures(),
        curvopt.BatchGrad(),
    )
    p = params[-1] if name == "weight-norm" else params[0]
    structure, block, d = result.structures[p], result.block_ggn[p], torch.randn_like(p)
    before = block(d)
    assert_close(structure.form()[0], result.batch_grad[p], 1e-5)
    assert_close(block(d), before)
    rows = structure.form()
    buffer.copy_(batch())  # the next batch
    if buffer.dtype is torch.int64:  # indices are copied
        assert_close(block(d), before)
        assert_close(structure.form(), rows)
        return
    match = r"rows of parameter \d .*changed in place.*x\.clone\(\)"
    for use in (
        lambda: block(d),
        lambda: structure.form(),
        lambda: structure.squared_norms(),
        lambda: result.structures[p].sum(),
        lambda: copy.copy(structure),
    ):
        with pytest.raises(curvopt.CurvoptError, match=match):
            use()


def test_what_outlives_the_pass_takes_a_step():
    """Rows of a linear layer hold its inputs and cotangents, not its weight."""
    model, x = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)), torch.randn(5, 4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    result = curvopt.compute(
        lambda: F.mse_loss(model(x), torch.zeros(5, 2)),
        model.parameters(),
        curvopt.BlockGGN(),
        curvopt.Structures(),
    )
    before = {
        p: (result.block_ggn[p](p.detach().clone()), p.detach().clone()) for p in model.parameters()
    }
    rows = {p: result.structures[p].form() for p in model.parameters()}
    for p, gradient in result.grad.items():
        p.grad = gradient
    optimizer.step()
    for p, (product, value) in before.items():
        assert_close(result.block_ggn[p](value), product)
        assert_close(result.structures[p].form(), rows[p])
        assert isinstance(result.structures[p], (Outer, Shift))
        assert_close(copy.copy(result.structures[p]).form(), rows[p])


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
