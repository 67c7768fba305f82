"""Losses that take their curvature from autograd, and losses that the closure hands over."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import curvopt
from tests import oracles
from tests.cases import Loss, Problem, build, mlp
from tests.oracles import assert_close

positive = torch.rand_like


def sign(z):
    return torch.randint_like(z, 0, 2) * 2 - 1


def label(z):
    return torch.randint(z.shape[1], z.shape[:1])


def multilabel(z):
    return torch.randint(2, z.shape).to(z.dtype)


def probabilities(z):
    return torch.rand_like(z).softmax(1)


def with_variance(z, y, **options):
    return F.gaussian_nll_loss(z, y, torch.full_like(y[:, :1], 0.7), **options)


def kl(z, y, **options):
    return F.kl_div(F.log_softmax(z, 1), y, **options)


LOSSES = {  # loss of (output, target), how to make a target
    "l1": (F.l1_loss, torch.randn_like),
    "smooth-l1": (F.smooth_l1_loss, torch.randn_like),
    "huber": (lambda z, y, **o: F.huber_loss(z, y, delta=0.5, **o), torch.randn_like),
    "bce": (F.binary_cross_entropy, positive),
    "poisson": (F.poisson_nll_loss, positive),
    "poisson-rate": (
        lambda z, y, **o: F.poisson_nll_loss(z, y, log_input=False, **o),
        positive,
    ),
    "gaussian": (with_variance, torch.randn_like),
    "soft-margin": (F.soft_margin_loss, sign),
    "hinge-embedding": (F.hinge_embedding_loss, sign),
    "multilabel-soft-margin": (F.multilabel_soft_margin_loss, multilabel),
    "kl": (kl, probabilities),
    "kl-log": (lambda z, y, **o: kl(z, y.log(), log_target=True, **o), probabilities),
}
RATES = ("bce", "poisson-rate")  # of outputs above zero
QUANTITIES = (
    curvopt.BatchGrad(),
    curvopt.Variance(),
    curvopt.DiagGGNExact(),
    curvopt.BatchDiagGGNExact(),
    curvopt.BatchDiagHessian(),
)


def check(problem, compute=None):
    compute = compute or curvopt.compute
    result = compute(problem.loss, problem.params, *QUANTITIES)
    fn = problem.loss_fn  # with a graph of second order, for losses that are piecewise linear
    problem = problem._replace(loss_fn=lambda z, y: fn(z, y) + 0 * z.square().sum())
    assert_close(result.grad, oracles.grad(*problem))
    assert_close(result.batch_grad, oracles.batch_grad(*problem))
    assert_close(result.variance, oracles.variance(*problem))
    assert_close(result.diag_ggn_exact, oracles.diag_ggn(*problem), 1e-8)
    assert_close(result.diag_ggn_exact_batch, oracles.batch_diag_ggn(*problem), 1e-8)
    assert_close(result.diag_h_batch, oracles.batch_diag_hessian(*problem), 1e-8)


def make(name, reduction="mean", n=4, seed=0):
    fn, target = LOSSES[name]
    if reduction == "batchmean" and not name.startswith("kl"):
        reduction = "mean"
    loss = Loss(lambda z, y: fn(z, y, reduction=reduction), target)

    def model():
        return nn.Sequential(mlp(nn.Tanh), nn.Sigmoid()) if name in RATES else mlp(nn.Tanh)

    return build(model, (4,), loss, n, seed=seed)


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides the total loss by both:UserWarning")
@pytest.mark.parametrize("reduction", ["mean", "sum", "batchmean"])
@pytest.mark.parametrize("name", LOSSES)
def test_curvature_from_autograd(name, reduction):
    check(make(name, reduction))


@pytest.mark.parametrize("name", LOSSES)
def test_rows_reduced_by_hand(name):
    problem = make(name, "none")
    mean = problem._replace(loss_fn=lambda z, y: problem.loss_fn(z, y).mean())
    check(mean)


@settings(max_examples=12)
@given(name=st.sampled_from(list(LOSSES)), n=st.integers(1, 5), seed=st.integers(0, 100))
def test_any_batch(name, n, seed):
    check(make(name, "sum", n, seed))


@pytest.mark.parametrize("name", ["huber", "poisson", "multilabel-soft-margin"])
def test_sketch_is_unbiased(name):
    problem = make(name)
    exact = oracles.flat(oracles.diag_ggn(*problem).values())
    draws = torch.stack(
        [
            oracles.flat(
                curvopt.compute(
                    problem.loss, problem.params, curvopt.DiagGGNMC(samples=20)
                ).diag_ggn_mc.values()
            )
            for _ in range(30)
        ]
    )
    error = draws.std(0) / len(draws) ** 0.5
    assert ((draws.mean(0) - exact).abs() <= 4.5 * error + 1e-9).all()


# A loss written by hand, with the output beside it.


def quartic(z, y):
    return (z - y).pow(4).sum(1)


def focal(z, y):
    logp = z.log_softmax(1).gather(1, y[:, None]).squeeze(1)
    return -logp + logp.exp().log1p()


BY_HAND = {
    "quartic-mean": (lambda z, y: quartic(z, y).mean(), torch.randn_like, None),
    "quartic-sum": (lambda z, y: quartic(z, y).sum(), torch.randn_like, None),
    "quartic-scaled": (lambda z, y: 0.5 * quartic(z, y).mean() + 1, torch.randn_like, None),
    "divided": (lambda z, y: quartic(z, y).sum() / len(z), torch.randn_like, "mean"),
    "dot": (lambda z, y: torch.einsum("nc,nc->", (z - y).exp(), y**2), torch.randn_like, "sum"),
    "cross-entropy": (F.cross_entropy, label, None),
    "log-sum-exp": (
        lambda z, y: (z.logsumexp(1) - z.gather(1, y[:, None])[:, 0]).mean(),
        label,
        None,
    ),
}


def with_output(problem):
    def closure():
        output = problem.model(problem.x)
        return problem.loss_fn(output, problem.y), output

    return closure


@pytest.mark.parametrize("name", BY_HAND)
def test_loss_and_output(name):
    fn, target, reduction = BY_HAND[name]
    problem = build(lambda: mlp(nn.Tanh), (4,), Loss(fn, target))
    check(
        problem,
        lambda _, *args: curvopt.compute(with_output(problem), *args, reduction=reduction),
    )


def test_loss_and_output_on_a_tape():
    problem = build(lambda: mlp(nn.Tanh), (4,), Loss(*BY_HAND["quartic-mean"][:2]))
    with curvopt.record(problem.params) as tape:
        loss, output = with_output(problem)()
    result = tape.compute(loss, curvopt.DiagGGNExact(), output=output)
    assert_close(result.diag_ggn_exact, oracles.diag_ggn(*problem), 1e-8)


@pytest.mark.parametrize("name", ["quartic-mean", "cross-entropy"])
def test_optimizers_take_the_output(name):
    """The step of a loss written by hand is that of its curvature, to the last digit."""
    fn, target, _ = BY_HAND[name]
    problem = build(lambda: mlp(nn.Tanh), (4,), Loss(fn, target))
    exact = curvopt.compute(with_output(problem), problem.params, curvopt.DiagGGNExact())
    seen = []

    class Optimizer(curvopt.DiagGGNOptimizer):
        def _wanted(self):
            return [curvopt.DiagGGNExact()]

        def _update(self):
            seen.extend(self.collected)

    Optimizer(problem.params).step(with_output(problem))
    assert_close(seen[0]["diag_ggn_exact"], dict(exact.diag_ggn_exact))


def test_known_losses_are_known_better_than_by_their_output():
    """Ignored targets change the shares of the samples, which a bare output does not tell."""
    loss = Loss(lambda z, y: F.cross_entropy(z, y, ignore_index=0), label)
    problem = build(lambda: mlp(nn.Tanh), (4,), loss, n=6)
    check(problem, lambda _, *args: curvopt.compute(with_output(problem), *args))


# Refusals.


def refuses(loss_fn, match, target=torch.randn_like, closure=with_output, **options):
    problem = build(lambda: mlp(nn.Tanh), (4,), Loss(loss_fn, lambda z: z))
    problem = Problem(*problem[:3], target(problem.model(problem.x).detach()), problem.params)
    with pytest.raises(curvopt.CurvoptError, match=match):
        curvopt.compute(closure(problem), problem.params, curvopt.DiagGGNExact(), **options)


def test_negative_curvature():
    refuses(lambda z, y: (z - y).pow(3).mean(), "curves downwards")
    refuses(
        F.mse_loss,
        "curves downwards",
        closure=lambda problem: (
            lambda: F.poisson_nll_loss(
                problem.model(problem.x).exp(), -problem.y.abs(), log_input=False
            )
        ),
    )


def test_unknown_reduction():
    refuses(lambda z, y: quartic(z, y).norm(), "reduction='mean'")
    refuses(lambda z, y: torch.einsum("nc,nc->", z**2, y), "reduction='mean'")


def test_rows_that_are_coupled():
    refuses(lambda z, y: (z - y).square().sum().exp().log1p(), "couples", reduction="sum")


def test_output_that_the_loss_does_not_use():
    refuses(
        quartic,
        "through the output",
        closure=lambda problem: lambda: (problem.loss().mean(), problem.model(problem.x)),
    )
    refuses(
        quartic,
        "must be the model's output",
        closure=lambda problem: lambda: (problem.loss().mean(), 3),
    )


def test_target_that_the_model_made():
    refuses(
        F.mse_loss,
        "part of the loss",
        closure=lambda problem: (
            lambda: F.mse_loss(problem.model(problem.x), problem.model(problem.x + 1))
        ),
    )


def test_linear_divergence():
    refuses(
        F.mse_loss,
        "linear in its input",
        closure=lambda problem: (
            lambda: F.kl_div(problem.model(problem.x), problem.y.softmax(1), reduction="sum")
        ),
    )


def test_loss_without_second_derivative():
    refuses(F.multi_margin_loss, "no second derivative", target=label)
    problem = build(lambda: mlp(nn.Tanh), (4,), Loss(F.multi_margin_loss, label))
    result = curvopt.compute(problem.loss, problem.params, curvopt.BatchGrad())
    assert_close(result.batch_grad, oracles.batch_grad(*problem))


def test_graph_through_a_root_of_rows():
    refuses(
        F.multilabel_soft_margin_loss, "not differentiable", target=multilabel, create_graph=True
    )
