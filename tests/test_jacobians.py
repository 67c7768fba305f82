"""Jacobians and Hessians sample by sample, against the blocks that plain autograd gives."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import curvopt
from tests import oracles
from tests.cases import MODELS, Case
from tests.oracles import assert_close

FUNCTIONS = {  # f, shape of one sample
    "mlp": (lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), (3,)),
    "many-outputs": (lambda: nn.Sequential(nn.Linear(2, 6), nn.Sigmoid()), (2,)),
    "scalar": (lambda: nn.Sequential(nn.Linear(3, 4), nn.Softplus(), nn.Linear(4, 1)), (3,)),
    "scalar-squeezed": (lambda: lambda x: x.pow(3).sum((1, 2)), (2, 2)),
    "convolution": (lambda: nn.Sequential(nn.Conv2d(1, 2, 2), nn.Tanh()), (1, 3, 3)),
    "linear": (lambda: nn.Linear(3, 5), (3,)),
    "constant": (lambda: lambda x: torch.ones(len(x), 2, dtype=x.dtype), (3,)),
    "piecewise": (lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 6)), (3,)),
}


def build(name, n=3):
    make, shape = FUNCTIONS[name]
    f = make()
    return (f.double() if isinstance(f, nn.Module) else f), torch.randn(n, *shape).double()


def jacobian(f, x):
    """Each sample in a batch of its own."""
    one = torch.autograd.functional.jacobian
    return torch.stack([one(lambda a: f(a[None])[0], a, create_graph=True) for a in x])


def hessian(f, x):
    return jacobian(lambda a: jacobian(f, a), x)


def diagonal(f, x):
    H, size = hessian(f, x), x[0].numel()
    flat = H.reshape(*H.shape[: H.ndim - 2 * (x.ndim - 1)], size, size)
    return flat.diagonal(dim1=-2, dim2=-1).reshape(*flat.shape[:-2], *x.shape[1:])


PAIRS = {
    "jacobian": (curvopt.batch_jacobian, jacobian),
    "hessian": (curvopt.batch_hessian, hessian),
    "hessian-diag": (curvopt.batch_hessian_diag, diagonal),
}
every_pair = pytest.mark.parametrize("kind", PAIRS)


@every_pair
@pytest.mark.parametrize("name", FUNCTIONS)
def test_equals_single_samples(kind, name):
    f, x = build(name)
    ours, plain = PAIRS[kind]
    truth = plain(f, x)
    for options in ({}, {"max_columns": 1}, {"check": False}):
        value = ours(f, x, **options)
        assert not value.requires_grad
        assert_close(value, truth.detach())
        assert value.shape == truth.shape


@every_pair
@pytest.mark.parametrize("name", ["mlp", "many-outputs", "scalar"])
def test_trains_through(kind, name):
    """A loss made of them has the gradient in parameters and inputs that plain autograd gives."""
    f, x = build(name)
    x.requires_grad_()
    leaves = [x, *f.parameters()]
    ours, plain = PAIRS[kind]
    slopes = [
        torch.autograd.grad(value.square().sum(), leaves, materialize_grads=True)
        for value in (ours(f, x, create_graph=True), plain(f, x))
    ]
    for actual, expected in zip(*slopes, strict=True):
        assert_close(actual, expected)


@settings(max_examples=40)
@given(
    n=st.integers(0, 4),
    widths=st.lists(st.integers(1, 6), min_size=2, max_size=4),
    act=st.sampled_from([nn.Tanh, nn.Sigmoid, nn.GELU, nn.ReLU]),
)
def test_any_network(n, widths, act):
    pairs = itertools.pairwise(widths)
    f = nn.Sequential(*(layer for i, o in pairs for layer in (nn.Linear(i, o), act()))).double()
    x = torch.randn(n, widths[0]).double()
    for ours, plain in PAIRS.values() if n else ():
        assert_close(ours(f, x), plain(f, x).detach())
    assert curvopt.batch_jacobian(f, x).shape == (n, widths[-1], widths[0])
    assert curvopt.batch_hessian_diag(f, x).shape == (n, widths[-1], widths[0])
    assert curvopt.batch_hessian(f, x).shape == (n, widths[-1], widths[0], widths[0])


@every_pair
@pytest.mark.parametrize(
    "mixing",
    [
        nn.BatchNorm1d(3).double(),
        lambda x: x - x.mean(0),
        lambda x: x.flip(0).sin(),
        lambda x: x @ x.t(),
    ],
)
def test_refuses_outputs_that_mix_samples(kind, mixing):
    with pytest.raises(curvopt.CurvoptError, match="mix samples"):
        PAIRS[kind][0](mixing, torch.randn(4, 3).double())


class Untouched(torch.autograd.Function):
    """The identity, with a derivative by hand."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g.clone()


class Centred(Untouched):
    @staticmethod
    def backward(ctx, g):
        return g - g.mean(0)


def coupled(one, other, wrap=lambda x: x):
    """Every sample for itself, but that one of them reads another."""

    def f(x):
        x = wrap(x)
        more = torch.zeros_like(x).index_put((torch.tensor([one]),), x[other][None])
        return (x * (1 + more)).sum(1, keepdim=True)

    return f


@pytest.mark.parametrize("wrap", [lambda x: x, Untouched.apply], ids=["by-ops", "by-slopes"])
@pytest.mark.parametrize("n", [2, 3, 5, 8])
def test_refuses_one_sample_that_reads_one_other(n, wrap):
    x = torch.randn(n, 2).double()
    for one, other in itertools.permutations(range(n), 2):
        with pytest.raises(curvopt.CurvoptError, match="mix samples"):
            curvopt.batch_jacobian(coupled(one, other, wrap), x)
    alone = curvopt.batch_jacobian(lambda x: wrap(x).square(), x)
    assert_close(alone, jacobian(lambda x: x.square(), x).detach())


def hooked(x):
    x = 2 * x
    x.register_hook(lambda g: g.flip(0))
    return x


def hooked_module():
    layer = nn.Linear(3, 2).double()
    layer.register_full_backward_hook(lambda module, grads, outputs: (grads[0].flip(0),))
    return layer


def seen_elsewhere(x):
    mean = x.mean(0)
    return lambda x: x * mean


@pytest.mark.parametrize(
    "make",
    [
        lambda x: Centred.apply,
        lambda x: hooked,
        lambda x: hooked_module(),
        seen_elsewhere,
        lambda x: seen_elsewhere(x.square()),
    ],
    ids=["derivative-by-hand", "hook", "module-hook", "closure", "closure-of-more"],
)
def test_refuses_samples_that_mix_where_no_op_of_the_function_shows_it(make):
    x = torch.randn(4, 3).double().requires_grad_()
    with pytest.raises(curvopt.CurvoptError, match="mix samples"):
        curvopt.batch_jacobian(make(x), x)


@pytest.mark.parametrize("kind", ["hessian", "hessian-diag"])
@pytest.mark.parametrize("wrap", [lambda x: x, Untouched.apply], ids=["by-ops", "by-slopes"])
def test_refuses_samples_that_mix_in_second_derivatives_alone(kind, wrap):
    f = lambda x: x + wrap(x).roll(1, 0) ** 2  # noqa: E731 (its slope in the others is zero at 0)
    with pytest.raises(curvopt.CurvoptError, match="mix samples"):
        PAIRS[kind][0](f, torch.zeros(4, 2).double())


def test_refuses_samples_that_mix_in_gradients_of_parameters_alone():
    gate = nn.Parameter(torch.zeros(()).double())
    x = torch.randn(4, 2).double()
    with pytest.raises(curvopt.CurvoptError, match="mix samples"):
        curvopt.batch_jacobian(lambda x: x + gate * x.mean(0), x, create_graph=True)


@every_pair
@pytest.mark.parametrize("name", FUNCTIONS)
def test_ops_prove_it_without_a_column(kind, name, monkeypatch):
    f, x = build(name)
    monkeypatch.setattr("curvopt.jacobians.check_slopes", None)
    PAIRS[kind][0](f, x)
    PAIRS[kind][0](lambda x: torch.func.vmap(f)(x[:, None])[:, 0], x)


@every_pair
@pytest.mark.parametrize(
    ("f", "plain"),
    [
        (lambda x: x.sin() * x.detach().mean(), lambda m: lambda x: x.sin() * m),
        (lambda x: Untouched.apply(x.sin()), lambda m: lambda x: x.sin()),
        (lambda x: x.flip(0).sin().flip(0), lambda m: lambda x: x.sin()),
        (
            lambda x: x[x[:, 0].argsort()][x[:, 0].argsort().argsort()] ** 3,
            lambda m: lambda x: x**3,
        ),
    ],
    ids=["detached", "derivative-by-hand", "flipped-twice", "sorted-twice"],
)
def test_takes_samples_that_meet_and_part(kind, f, plain):
    x = torch.randn(5, 2).double()
    ours, truth = PAIRS[kind]
    for options in ({}, {"create_graph": True}):
        assert_close(ours(f, x, **options).detach(), truth(plain(x.mean()), x).detach())


def test_verdicts_are_of_the_values_that_chose():
    """The same code with other indices is another function."""
    x, places = torch.randn(3, 2).double(), torch.arange(3)
    f = lambda x: x[places].sin()  # noqa: E731 (one line says it)
    curvopt.batch_jacobian(f, x)
    places.copy_(torch.tensor([1, 0, 2]))
    with pytest.raises(curvopt.CurvoptError, match="mix samples"):
        curvopt.batch_jacobian(f, x)


@every_pair
@pytest.mark.parametrize(
    ("f", "x", "match"),
    [
        (lambda x: x.sum(), torch.randn(4, 3), r"\[4, \*out\], got \[\]"),
        (lambda x: x[:2], torch.randn(4, 3), r"got \[2, 3\]"),
        (lambda x: (x, x), torch.randn(4, 3), "got tuple"),
        (lambda x: x, torch.arange(4), "floating point"),
        (lambda x: x, torch.tensor(1.0), "floating point"),
    ],
)
def test_refuses(kind, f, x, match):
    with pytest.raises(curvopt.CurvoptError, match=match):
        PAIRS[kind][0](f, x)


# Parameters.

ONE_OUTPUT = [m for m in MODELS if m != "heads"]


@pytest.mark.parametrize("model", ONE_OUTPUT)
def test_param_jacobian(model):
    problem = Case(model, "mse").build(n=3)
    J = curvopt.param_jacobian(lambda: problem.model(problem.x), problem.params)
    assert_close(J, oracles.param_jacobian(problem.model, problem.x, problem.params))


@pytest.mark.parametrize("model", ["mlp-tanh", "convnet", "tokens-wide"])
@pytest.mark.parametrize("max_columns", [None, 1, 2])
def test_param_jacobian_in_chunks(model, max_columns):
    problem = Case(model, "mse").build(n=3)
    J = curvopt.param_jacobian(
        lambda: problem.model(problem.x), problem.params, max_columns=max_columns
    )
    assert_close(J, oracles.param_jacobian(problem.model, problem.x, problem.params))


PLACES = {  # where the outputs have the samples; all of 4 samples, and 4 outputs each
    "permuted": lambda net, x: net(x)[torch.tensor([3, 1, 0, 2])],
    "flipped": lambda net, x: net(x).flip(0),
    "permuted-data": lambda net, x: net(x[torch.tensor([3, 1, 0, 2])]),
    "twice-one-sample": lambda net, x: net(x[torch.tensor([1, 1, 0, 3])]),
    "transposed": lambda net, x: net(x).T,
    "transposed-flipped": lambda net, x: net(x).flip(0).T,
    "time-first": lambda net, x: net(x.expand(4, 4, 3) * torch.arange(1.0, 5)[:, None, None]),
    "diagonals": lambda net, x: torch.stack([net(x).roll(k, 0) for k in range(4)], 1),
}


@pytest.mark.parametrize("max_columns", [None, 3])
@pytest.mark.parametrize("place", PLACES)
def test_outputs_in_any_order(place, max_columns):
    """An element of the Jacobian is that of the output in its place, not of a sample's number."""
    net, x = nn.Linear(3, 4).double(), torch.randn(4, 3).double()
    params = list(net.parameters())

    def outputs(x=x):
        return PLACES[place](net, x)

    truth = oracles.param_jacobian(outputs, x, params)
    options = {"max_columns": max_columns}
    assert_close(curvopt.param_jacobian(outputs, params, **options), truth)
    rows = torch.cat([truth[p].reshape(outputs().numel(), -1) for p in params], 1)
    kernel = curvopt.empirical_ntk(outputs, params, **options)
    assert kernel.shape == 2 * outputs().shape
    assert_close(kernel.reshape(len(rows), -1), rows @ rows.T)


def test_time_first():
    net, x = nn.RNN(2, 3).double(), torch.randn(4, 4, 2).double()
    J = curvopt.param_jacobian(lambda: net(x)[0], net.parameters())
    assert_close(J, oracles.param_jacobian(lambda x: net(x)[0], x, [*net.parameters()]))
    x = torch.randn(5, 4, 2).double()
    with pytest.raises(curvopt.CurvoptError, match="taken for 5 samples.*on the first one"):
        curvopt.param_jacobian(lambda: net(x)[0], net.parameters())
    J = curvopt.param_jacobian(lambda: net(x)[0].transpose(0, 1), net.parameters())
    first = lambda x: net(x)[0].transpose(0, 1)  # noqa: E731 (one line says it)
    assert_close(J, oracles.param_jacobian(first, x, [*net.parameters()]))


@pytest.mark.filterwarnings("ignore:no rule covers")
@pytest.mark.parametrize(
    "place", [lambda z: z.T, lambda z: torch.cat([z, z]), torch.flatten, lambda z: z[1:]]
)
def test_outputs_on_an_axis_of_any_length(place):
    net, x = nn.Linear(3, 2).double(), torch.randn(4, 3).double()
    params = [*net.parameters()]
    J = curvopt.param_jacobian(lambda: place(net(x)), params)
    assert_close(J, oracles.param_jacobian(lambda x: place(net(x)), x, params))


def test_empty_batch():
    net, x = nn.Linear(3, 2), torch.randn(0, 3)
    J = curvopt.param_jacobian(lambda: net(x), net.parameters())
    assert [j.shape for j in J.values()] == [(0, 2, 2, 3), (0, 2, 2)]
    assert curvopt.empirical_ntk(lambda: net(x), net.parameters()).shape == (0, 2, 0, 2)


def test_root_of_the_summed_squares_is_the_jacobian():
    problem = Case("convnet", "mse-sum").build()
    roots = curvopt.compute(problem.loss, problem.params, curvopt.SqrtGGNExact()).sqrt_ggn_exact
    truth = oracles.param_jacobian(problem.model, problem.x, problem.params)
    for p, root in roots.items():
        assert_close(root.transpose(0, 1), 2**0.5 * truth[p])


def test_param_jacobian_is_differentiable():
    problem = Case("mlp-tanh", "mse").build(n=3)
    J = curvopt.param_jacobian(lambda: problem.model(problem.x), problem.params, create_graph=True)
    norm = sum(j.square().sum() for j in J.values())
    slopes = torch.autograd.grad(norm, problem.params, materialize_grads=True)
    f = torch.func.jacrev(lambda ps: torch.func.functional_call(problem.model, ps, problem.x))
    named = dict(problem.model.named_parameters())
    truth = sum(j.square().sum() for j in f(named).values())
    for slope, expected in zip(
        slopes, torch.autograd.grad(truth, problem.params, materialize_grads=True), strict=True
    ):
        assert_close(slope, expected)


def test_param_jacobian_refuses():
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    with pytest.raises(curvopt.CurvoptError, match="one tensor"):
        curvopt.param_jacobian(lambda: (model(x), 1), model.parameters())
    with pytest.raises(curvopt.CurvoptError, match="not separate"):
        curvopt.param_jacobian(lambda: F.softmax(model(x), 0), model.parameters())
    with pytest.raises(ValueError, match="max_columns"):
        curvopt.param_jacobian(lambda: model(x), model.parameters(), max_columns=0)
