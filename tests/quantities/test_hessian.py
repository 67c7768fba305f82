"""The Hessian's diagonal, estimates and blocks, against dense Hessians of batches of one."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import curvopt
from curvopt.engine import hessian as engine
from tests import oracles
from tests.cases import LOSSES, MODELS, Case, build
from tests.oracles import assert_close

BOTH = (curvopt.DiagHessian(), curvopt.BatchDiagHessian())


def check(problem):
    result = curvopt.compute(problem.loss, problem.params, *BOTH)
    assert_close(result.diag_h, oracles.diag_hessian(*problem))
    assert_close(result.diag_h_batch, oracles.batch_diag_hessian(*problem))


def rows(*pairs):
    return pytest.mark.parametrize("case", [Case(*p) for p in pairs], ids=lambda c: c.id)


@rows(
    *((m, "mse-sum") for m in MODELS if m not in ("heads", "linear-squeezed", "matmul-vector")),
    *(("mlp-tanh", loss) for loss in LOSSES if loss not in ("tokens", "heads")),
    ("heads", "heads"),
    ("tokens-mlp", "tokens"),
    ("linear-squeezed", "bce"),
)
def test_diagonal(case):
    check(case.build(n=3))


def module(forward, **parts):
    class Module(nn.Module):
        def __init__(self):
            super().__init__()
            for name, part in parts.items():
                setattr(self, name, part)

        def forward(self, x):
            return forward(self, x)

    return Module()


class Relu(torch.autograd.Function):
    """A square, under the name of something piecewise linear."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx, g):
        return 2 * ctx.saved_tensors[0] * g


UNUSUAL = {
    "misnamed": (lambda: module(lambda m, x: Relu.apply(m.a(x)), a=nn.Linear(3, 3)), (3,)),
    "absolute": (
        lambda: module(lambda m, x: torch.maximum(m.a(x).abs(), x), a=nn.Linear(3, 3)),
        (3,),
    ),
    "tied": (lambda: module(lambda m, x: m.a(m.a(x).tanh()), a=nn.Linear(3, 3)), (3,)),
    "tied-relu": (lambda: module(lambda m, x: m.a(m.a(x).relu()), a=nn.Linear(3, 3)), (3,)),
    "transposed": (
        lambda: module(lambda m, x: (x @ m.w.t()).tanh(), w=nn.Parameter(torch.randn(4, 3))),
        (3,),
    ),
    "halves": (
        lambda: module(
            lambda m, x: F.linear(F.linear(x, m.w[:3]).tanh(), m.w[3:]),
            w=nn.Parameter(torch.randn(6, 3)),
        ),
        (3,),
    ),
    "weight-norm": (
        lambda: nn.Sequential(
            nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 3)
        ),
        (3,),
    ),
    "gated": (
        lambda: module(lambda m, x: m.a(x) * m.b(x), a=nn.Linear(3, 3), b=nn.Linear(3, 3)),
        (3,),
    ),
    "attention": (
        lambda: module(
            lambda m, x: (m.a(x) @ m.a(x).mT).softmax(-1) @ x, a=nn.Linear(2, 3, bias=False)
        ),
        (3, 2),
    ),
    "class-token": (
        lambda: module(
            lambda m, x: torch.cat([m.c.expand(len(x), 1, -1), m.a(x)], 1).tanh().sum(1),
            a=nn.Linear(2, 3),
            c=nn.Parameter(torch.randn(1, 1, 3)),
        ),
        (2, 2),
    ),
    "layer-norm": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 2)),
        (3,),
    ),
    "batch-norm-eval": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4).eval(), nn.Linear(4, 2)),
        (3,),
    ),
    "divisor": (
        lambda: module(lambda m, x: m.a(x / m.s), a=nn.Linear(3, 3), s=nn.Parameter(torch.rand(3))),
        (3,),
    ),
    "power": (
        lambda: module(lambda m, x: x.abs() ** m.s, s=nn.Parameter(torch.rand(3) + 2)),
        (3,),
    ),
    "lstm": (
        lambda: module(lambda m, x: m.r(x)[0][:, -1], r=nn.LSTM(2, 3, batch_first=True)),
        (2, 2),
    ),
    **{
        name: (lambda make=make: module(lambda m, x: m.r(x)[0].sum(1), r=make()), (steps, 2))
        for name, steps, make in [
            ("rnn", 4, lambda: nn.RNN(2, 3, batch_first=True)),
            ("rnn-relu", 4, lambda: nn.RNN(2, 3, nonlinearity="relu", batch_first=True)),
            ("rnn-long", 7, lambda: nn.RNN(2, 2, batch_first=True)),
            ("gru", 3, lambda: nn.GRU(2, 2, batch_first=True)),
            ("gru-long", 5, lambda: nn.GRU(2, 1, batch_first=True)),
            ("gru-one-step", 1, lambda: nn.GRU(2, 2, batch_first=True)),
            ("lstm-projected", 3, lambda: nn.LSTM(2, 3, batch_first=True, proj_size=2)),
            (
                "rnn-both-ways",
                3,
                lambda: nn.RNN(2, 2, num_layers=2, bidirectional=True, batch_first=True),
            ),
        ]
    },
    "cell": (lambda: module(lambda m, x: m.c(x, 0.5 * x), c=nn.GRUCell(2, 2)), (2,)),
    "temperature": (
        lambda: module(
            lambda m, x: m.a(x) * m.t.exp(), a=nn.Linear(3, 3), t=nn.Parameter(torch.tensor(0.3))
        ),
        (3,),
    ),
    "squared-scale": (
        lambda: module(
            lambda m, x: m.a(x) * m.t * m.t, a=nn.Linear(3, 3), t=nn.Parameter(torch.tensor(0.3))
        ),
        (3,),
    ),
    "empty": (
        lambda: module(
            lambda m, x: m.a(x) + F.linear(x[:, :0] * m.e, m.e.expand(3, 0)),
            a=nn.Linear(3, 3),
            e=nn.Parameter(torch.zeros(0)),
        ),
        (3,),
    ),
    "bilinear-in-tokens": (
        lambda: module(lambda m, x: m.a(x).square().sum(1), a=nn.Linear(2, 3)),
        (3, 2),
    ),
}


@pytest.mark.filterwarnings("ignore:no rule covers")
@pytest.mark.parametrize("name", UNUSUAL)
@pytest.mark.parametrize("loss", ["mse-sum", "ce"])
def test_unusual_uses(name, loss):
    make, shape = UNUSUAL[name]
    check(build(make, shape, LOSSES[loss], n=3))


@settings(max_examples=40)
@given(
    widths=st.lists(st.integers(1, 5), min_size=2, max_size=4),
    tokens=st.lists(st.integers(1, 3), max_size=1),
    act=st.sampled_from([nn.Tanh, nn.ReLU, nn.GELU, nn.Softplus, nn.LeakyReLU]),
    loss=st.sampled_from(["ce", "mse", "ce-everything-sum", "bce-weights"]),
    seed=st.integers(0, 10),
)
def test_any_network(widths, tokens, act, loss, seed):
    pairs = list(itertools.pairwise(widths))

    def make():
        return nn.Sequential(*(layer for i, o in pairs for layer in (nn.Linear(i, o), act())))

    if loss.startswith("ce") and tokens:
        loss = "mse"
    problem = build(make, (*tokens, widths[0]), LOSSES[loss], n=2, seed=seed)
    check(problem)


@rows(("mlp-relu", "ce"), ("convnet", "mse"), ("conv2d-groups", "ce"))
def test_piecewise_linear_models_take_the_root(case, monkeypatch):
    """The diagonal is that of the GGN, and no column of a larger Hessian is sent back."""
    problem = case.build()
    problem = problem._replace(
        model=nn.Sequential(
            *(nn.ReLU() if isinstance(m, (nn.Sigmoid, nn.Tanh)) else m for m in problem.model)
        )
    )
    monkeypatch.setattr(engine.Hessian, "_units", None)
    result = curvopt.compute(problem.loss, problem.params, *BOTH, curvopt.DiagGGNExact())
    assert_close(result.diag_h, dict(result.diag_ggn_exact))
    assert_close(result.diag_h, oracles.diag_hessian(*problem))


@rows(("convnet", "ce"), ("mlp-tanh", "mse"))
def test_in_chunks(case):
    problem = case.build(n=3)
    result = curvopt.compute(problem.loss, problem.params, *BOTH, max_columns=2)
    assert_close(result.diag_h, oracles.diag_hessian(*problem))
    assert_close(result.diag_h_batch, oracles.batch_diag_hessian(*problem))


def concave(z, y):
    return -F.mse_loss(z, y)


def by_hand(z, y):
    return (z - y).pow(4).sin().sum(1).mean()


@pytest.mark.parametrize("loss", [concave, by_hand])
@pytest.mark.parametrize("model", ["mlp-relu", "mlp-tanh"])
def test_losses_without_a_root(model, loss):
    problem = Case(model, "mse").build(n=3)._replace(loss_fn=loss)
    check(problem)


def test_frozen_and_unused_parameters():
    problem = Case("mlp-frozen-first", "mse").build(n=3)
    unused = nn.Parameter(torch.ones(2, dtype=torch.float64))
    result = curvopt.compute(problem.loss, [*problem.params, unused], *BOTH)
    assert_close(result.diag_h, oracles.diag_hessian(*problem))
    assert_close(result.diag_h[unused], torch.zeros(2))
    assert_close(result.diag_h_batch[unused], torch.zeros(3, 2))


@rows(("mlp-tanh", "ce"), ("conv1d-groups", "mse"))
def test_hutchinson_is_unbiased(case):
    problem = case.build(n=3)
    exact = oracles.flat(oracles.diag_hessian(*problem).values())
    estimate = [
        oracles.flat(
            curvopt.compute(
                problem.loss, problem.params, curvopt.DiagHessianMC(samples=50)
            ).diag_h_mc.values()
        )
        for _ in range(30)
    ]
    mean, error = torch.stack(estimate).mean(0), torch.stack(estimate).std(0) / 30**0.5
    assert ((mean - exact).abs() <= 4.5 * error + 1e-12).all()
    assert error.norm() < 0.2 * exact.norm()


@rows(("mlp-tanh", "ce"), ("convnet", "mse-sum"))
def test_blocks(case):
    problem = case.build(n=3)
    blocks = curvopt.compute(problem.loss, problem.params, curvopt.BlockHessian()).block_hessian
    H, start = oracles.hessian(*problem), 0
    for p in problem.params:
        block = H[start : start + p.numel(), start : start + p.numel()]
        start += p.numel()
        M = torch.randn(2, *p.shape, dtype=p.dtype)
        assert_close(blocks[p](M).flatten(1), M.flatten(1) @ block)
        assert_close(blocks[p](M[0]).flatten(), block @ M[0].flatten())


def test_many_products_are_announced(monkeypatch):
    monkeypatch.setattr(engine, "SLOW", 10)
    make, shape = UNUSUAL["tied"]
    problem = build(make, shape, LOSSES["mse"], n=3)
    with pytest.warns(curvopt.SlowPathWarning, match="12 backward passes .* used several times"):
        result = curvopt.compute(problem.loss, problem.params, curvopt.DiagHessian())
    assert_close(result.diag_h, oracles.diag_hessian(*problem))


@pytest.mark.parametrize("quantity", [curvopt.DiagHessian(), curvopt.DiagHessianMC()])
def test_op_without_second_derivative(quantity):
    layer, x = nn.Linear(4, 4), torch.randn(2, 3, 4)

    def loss():
        z = layer(x)[:, None]
        return F.scaled_dot_product_attention(z, z, z).square().sum()

    with pytest.raises(curvopt.CurvoptError, match="sdpa_kernel"):
        curvopt.compute(loss, layer.parameters(), quantity)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        curvopt.compute(loss, layer.parameters(), quantity)


def test_invalid_samples():
    with pytest.raises(ValueError, match="samples"):
        curvopt.DiagHessianMC(samples=0)


def test_diagonal_on_a_tape():
    problem = Case("mlp-tanh", "ce").build()
    with curvopt.record(problem.params) as tape:
        loss = problem.loss()
    result = tape.compute(loss, *BOTH, curvopt.Variance())
    assert_close(result.diag_h, oracles.diag_hessian(*problem))
    assert_close(result.variance, oracles.variance(*problem))
