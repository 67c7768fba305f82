"""Every quantity on every case, against loops over batches of one."""

import copy
from inspect import getmembers, isclass

import pytest
import torch
import torch.nn.functional as F

import curvopt
from curvopt.quantities import first_order, ggn
from tests import oracles
from tests.cases import CASES, Case, Loss, build, function
from tests.oracles import assert_close

# field of the result: the quantity, its oracle and the oracle's options
QUANTITIES = {
    "batch_grad": (curvopt.BatchGrad(), oracles.batch_grad, {}),
    "batch_l2": (curvopt.BatchL2Grad(), oracles.batch_l2, {}),
    "sum_grad_squared": (curvopt.SumGradSquared(), oracles.sum_grad_squared, {}),
    "variance": (curvopt.Variance(), oracles.variance, {}),
    "diag_ggn_exact": (curvopt.DiagGGNExact(), oracles.diag_ggn, {}),
    "diag_ggn_exact_batch": (curvopt.BatchDiagGGNExact(), oracles.batch_diag_ggn, {}),
    "clipped_grad_sum": (curvopt.ClippedGradSum(1.0), oracles.clipped_grad_sum, {"max_norm": 1.0}),
}
SKETCHES = {
    "diag_ggn_mc": (curvopt.DiagGGNMC, oracles.diag_ggn),
    "diag_ggn_mc_batch": (curvopt.BatchDiagGGNMC, oracles.batch_diag_ggn),
}
ALL = tuple(QUANTITIES)
FEW = [  # one case of every kind
    Case("mlp-relu", "ce"),
    Case("mlp-frozen-biases", "mse-sum"),
    Case("tokens-wide", "ce"),
    Case("convnet", "ce"),
    Case("conv2d-groups", "mse-sum"),
    Case("conv3d-circular", "ce"),
    Case("matmul-plus-bias", "mse-sum"),
    Case("conv1d-groups", "ce-everything"),
    Case("mlp-tanh", "bce-sample-weights"),
]


def rows(cases):
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.id)


def compute(problem, fields=ALL, **options):
    quantities = [QUANTITIES[field][0] for field in fields]
    return curvopt.compute(problem.loss, problem.params, *quantities, **options)


def check(problem, exact=None, fields=ALL, rtol=1e-9):
    """Hold every field against its oracle, on the same problem or on `exact`, its float64 twin."""
    exact = exact or problem
    result = compute(problem, fields)
    assert_close(result.loss, exact.loss().detach(), rtol)
    truth = {field: QUANTITIES[field][1](*exact, **QUANTITIES[field][2]) for field in fields}
    # A variance is a difference of moments: in single precision it is as exact as they are.
    moments = oracles.sum_grad_squared(*exact) if rtol > 1e-9 else {}
    for field, value in {"grad": oracles.grad(*exact), **truth}.items():
        for p, twin in zip(problem.params, exact.params, strict=True):
            actual = getattr(result, field)[p]
            assert actual.dtype == p.dtype
            assert not actual.requires_grad
            scale = moments.get(twin) if field == "variance" else None
            assert_close(actual, value[twin], rtol, scale)


@rows(CASES)
def test_all_together(case):
    check(case.build())


@rows(FEW)
@pytest.mark.parametrize("field", ALL)
def test_each_alone(case, field):
    check(case.build(), fields=[field])


@rows(FEW)
def test_single_precision(case):
    check(case.build(dtype=torch.float32), case.build(), rtol=1e-4)


@rows(FEW)
def test_batch_of_one(case):
    check(case.build(n=1))


def picked(z, y):
    return z.log_softmax(1)[torch.arange(len(z)), y]


BY_HAND = {  # ends in a mean or sum over the samples
    "mean": lambda z, y: (z - y[:, None]).square().mean(),
    "torch-mean": lambda z, y: torch.mean(torch.abs(z - y[:, None])),
    "sum": lambda z, y: ((z - y[:, None]) ** 2).sum(),
    "sum-of-rows-mean": lambda z, y: ((z - y[:, None]) ** 2).sum(1).mean(),
    "mean-of-rows-sum": lambda z, y: (z - y[:, None]).abs().mean(dim=1).sum(dim=0),
    "logsumexp": lambda z, y: 0.5 * z.logsumexp(1).mean(),
    "norms": lambda z, y: torch.linalg.vector_norm(z - y[:, None], dim=1).mean(),
    "likelihood": lambda z, y: -picked(z, y).mean(),
    "focal": lambda z, y: -((1 - picked(z, y).exp()) ** 2 * picked(z, y)).mean(),
    "two-terms": lambda z, y: z.exp().mean() + F.cross_entropy(z, y, reduction="sum"),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_loss_written_by_hand(name):
    """Its rows are known; only its curvature is not."""
    problem = Case("mlp-tanh", "ce").build()._replace(loss_fn=BY_HAND[name])
    check(problem, fields=[field for field in ALL if "ggn" not in field])


def test_last_short_batch():
    problem = Case("convnet", "ce").build(n=7)
    for batch in (slice(0, 5), slice(5, 7)):
        check(problem._replace(x=problem.x[batch], y=problem.y[batch]))


def test_empty_batch():
    problem = Case("mlp-tanh", "ce-weight-sum").build(n=0)
    result = compute(problem)
    for p in problem.params:
        assert result.batch_grad[p].shape == result.diag_ggn_exact_batch[p].shape == (0, *p.shape)
        assert result.batch_l2[p].shape == (0,)
        for field in ("grad", "sum_grad_squared", "diag_ggn_exact", "clipped_grad_sum"):
            assert_close(getattr(result, field)[p], torch.zeros_like(p))


def test_unbiased_variance():
    problem = Case("convnet", "ce").build()
    result = curvopt.compute(problem.loss, problem.params, curvopt.Variance(unbiased=True))
    assert_close(result.variance, oracles.variance(*problem, unbiased=True))


@pytest.mark.parametrize("max_norm", [1e-3, 1.0, 1e3])
def test_clipping_is_of_the_whole_gradient(max_norm):
    problem = Case("mlp-tanh", "ce").build()
    result = curvopt.compute(problem.loss, problem.params, curvopt.ClippedGradSum(max_norm))
    assert_close(result.clipped_grad_sum, oracles.clipped_grad_sum(*problem, max_norm=max_norm))


@rows(CASES)
def test_root_of_the_ggn(case):
    """All of the matrix, across parameters too."""
    problem = case.build()
    result = curvopt.compute(problem.loss, problem.params, curvopt.SqrtGGNExact())
    roots = [v.flatten(0, 1) for v in result.sqrt_ggn_exact.values()]
    root = torch.cat([oracles.matrix(v) for v in roots], 1)
    assert_close(root.T @ root, oracles.ggn(*problem))


@rows(FEW)
def test_gradient_by_name(case):
    problem = case.build()
    result = curvopt.compute(
        problem.loss, problem.params, curvopt.Gradient(), curvopt.DiagGGNExact()
    )
    assert_close(result.grad, oracles.grad(*problem))


# Sketches: random, so their mean is what is exact.


@rows([Case("mlp-tanh", "ce-smooth"), Case("conv1d-groups", "mse"), Case("tokens", "bce-sum")])
@pytest.mark.parametrize("field", SKETCHES)
@pytest.mark.parametrize("options", [{}, {"samples": 3}, {"estimator": "labels"}], ids=str)
def test_sketches_are_unbiased(case, field, options):
    problem, (quantity, oracle) = case.build(), SKETCHES[field]
    if "estimator" in options and case.loss == "ce-smooth":
        problem = Case(case.model, "ce").build()
    draws = [
        getattr(curvopt.compute(problem.loss, problem.params, quantity(**options)), field)
        for _ in range(300)
    ]
    for p, exact in oracle(*problem).items():
        values = torch.stack([draw[p] for draw in draws])
        mean, error = values.mean(0), values.std(0) / len(draws) ** 0.5
        assert error.sum() < 0.1 * exact.sum()  # the test can tell
        assert ((mean - exact).abs() <= 4.5 * error + 1e-9).all()


@pytest.mark.parametrize("field", SKETCHES)
def test_more_samples_average_more(field):
    problem, (quantity, _) = Case("mlp-tanh", "ce").build(), SKETCHES[field]

    def spread(samples):
        draws = [
            oracles.flat(getattr(
                curvopt.compute(problem.loss, problem.params, quantity(samples=samples)), field,
            ).values())
            for _ in range(200)
        ]  # fmt: skip
        return torch.stack(draws).var(0).sum()

    assert float(spread(samples=1) / spread(samples=8)) == pytest.approx(8, rel=0.3)


@rows([Case("linear-one-output", "mse"), Case("linear-squeezed", "bce")])
@pytest.mark.parametrize("field", SKETCHES)
def test_sketch_of_one_output_is_exact(case, field):
    """The root has one column per sample, and a random sign squares to one."""
    problem, (quantity, oracle) = case.build(), SKETCHES[field]
    result = curvopt.compute(problem.loss, problem.params, quantity())
    assert_close(getattr(result, field), oracle(*problem))


def test_sketches_follow_the_seed():
    problem = Case("mlp-tanh", "ce").build()

    def draw(seed):
        torch.manual_seed(seed)
        result = curvopt.compute(problem.loss, problem.params, curvopt.DiagGGNMC())
        return oracles.flat(result.diag_ggn_mc.values())

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


def test_random_and_exact_in_one_call():
    problem = Case("linear-one-output", "mse").build()
    sketches = [quantity() for quantity, _ in SKETCHES.values()]
    exact = [quantity for quantity, *_ in QUANTITIES.values()]
    result = curvopt.compute(problem.loss, problem.params, *sketches, *exact)
    for field, (_, oracle, options) in QUANTITIES.items():
        assert_close(getattr(result, field), oracle(*problem, **options))
    for field, (_, oracle) in SKETCHES.items():
        assert_close(getattr(result, field), oracle(*problem))


# How to ask, and what comes back.


def test_batch_size_settles_the_sample_axis():
    """Tokens with the time first, in the model and in the loss, and nothing that couples them."""

    def loss_fn(z, y):
        return F.mse_loss(z.transpose(0, 1).flatten(0, 1), y.transpose(0, 1).flatten(0, 1))

    problem = build(
        function(lambda x, w: (x.transpose(0, 1) @ w).tanh().transpose(0, 1), w=(4, 3)),
        (5, 4),
        Loss(loss_fn, torch.randn_like),
    )
    result = curvopt.compute(problem.loss, problem.params, curvopt.BatchGrad(), batch_size=4)
    assert_close(result.batch_grad, oracles.batch_grad(*problem))


def test_no_quantity_gives_loss_and_gradient():
    problem = Case("mlp-tanh", "ce").build()
    result = curvopt.compute(problem.loss, problem.params)
    assert_close(result.grad, oracles.grad(*problem))
    assert torch.equal(result.loss, problem.loss())


def test_tape_equals_closure():
    problem = Case("convnet", "ce").build()
    with curvopt.record(problem.params) as tape:
        loss = problem.loss()
    for _ in range(2):  # as often as one likes
        result = tape.compute(loss, curvopt.Variance(), curvopt.DiagGGNExact())
        assert_close(result.variance, oracles.variance(*problem))
        assert_close(result.diag_ggn_exact, oracles.diag_ggn(*problem))


def test_some_parameters_only():
    """Quantities of those asked for, clipping by their norm; the others are as if frozen."""
    problem = Case("mlp-tanh", "ce").build()
    check(problem._replace(params=problem.params[1:4]))


@pytest.mark.parametrize("wrap", [list, iter, lambda model: dict(model).items()])
def test_parameters_with_names(wrap):
    problem = Case("mlp-tanh", "ce").build()
    names = wrap(problem.model.named_parameters())
    result = curvopt.compute(problem.loss, names, curvopt.BatchGrad())
    assert_close(result.batch_grad, oracles.batch_grad(*problem))


def test_result_is_a_mapping_over_the_parameters():
    problem = Case("mlp-frozen-biases", "ce").build()
    rows = curvopt.compute(problem.loss, problem.params, curvopt.BatchGrad()).batch_grad
    assert all(a is b for a, b in zip(rows, problem.params, strict=True))
    assert len(rows) == len(problem.params)
    assert problem.params[0] in rows
    frozen = problem.model.get_parameter("0.bias")
    assert frozen not in rows
    with pytest.raises(KeyError):
        rows[frozen]


def test_frozen_parameters_are_left_out():
    problem = Case("mlp-frozen-biases", "ce").build()
    everything = list(problem.model.parameters())
    rows = curvopt.compute(problem.loss, everything, curvopt.BatchGrad()).batch_grad
    assert list(map(id, rows)) == list(map(id, problem.params))


def test_field_that_was_not_asked_for():
    problem = Case("linear", "ce").build()
    result = curvopt.compute(problem.loss, problem.params, curvopt.BatchGrad())
    with pytest.raises(AttributeError, match="variance"):
        _ = result.variance


def test_gradient_of_the_variance():
    problem = Case("mlp-tanh", "ce").build()
    result = curvopt.compute(problem.loss, problem.params, curvopt.Variance(), create_graph=True)
    total = sum(v.sum() for v in result.variance.values())
    slopes = torch.autograd.grad(total, problem.params)
    truth = oracles.total_variance_grad(*problem)
    assert_close(dict(zip(problem.params, slopes, strict=True)), truth)


@rows([Case("mlp-tanh", "ce-weight"), Case("conv1d-circular", "mse"), Case("tokens-wide", "bce")])
@pytest.mark.parametrize("field", ["grad", *ALL])
def test_quantities_are_differentiable(case, field):
    """Against a central difference along a random direction."""
    problem = case.build()
    directions = [torch.randn_like(p) / 10 for p in problem.params]

    def total():
        fields = [] if field == "grad" else [field]
        values = getattr(compute(problem, fields, create_graph=True), field).values()
        return sum(value.sin().sum() for value in values)

    slopes = torch.autograd.grad(total(), problem.params)
    slope = sum((s * d).sum() for s, d in zip(slopes, directions, strict=True))
    ends = []
    for step in (1e-5, -2e-5):
        torch._foreach_add_([p.data for p in problem.params], directions, alpha=step)
        ends.append(total().detach())
    assert_close(slope, (ends[0] - ends[1]) / 2e-5, 1e-6)


@rows(FEW)
def test_nothing_is_left_behind(case):
    problem = case.build()
    before = copy.deepcopy(problem.model)
    compute(problem)
    for module, twin in zip(problem.model.modules(), before.modules(), strict=True):
        assert vars(module).keys() == vars(twin).keys()
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    for p, twin in zip(problem.model.parameters(), before.parameters(), strict=True):
        assert torch.equal(p, twin)
        assert p.is_leaf
        assert p.requires_grad == twin.requires_grad
        assert p.grad is None
        assert not vars(p)
        assert not p._backward_hooks


def test_every_quantity_has_a_row():
    """A quantity without an oracle would go untested; Kronecker factors have tests of their own."""
    known = {type(q) for q, *_ in QUANTITIES.values()} | {q for q, _ in SKETCHES.values()}
    known |= {curvopt.Gradient, curvopt.SqrtGGNExact, curvopt.SqrtGGNMC}
    classes = [c for module in (first_order, ggn) for _, c in getmembers(module, isclass)]
    public = {c for c in classes if issubclass(c, curvopt.Quantity) and c.__name__[0] != "_"}
    assert public == {curvopt.Quantity, *known}
