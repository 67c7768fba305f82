"""Settings at which an optimizer is another one, or solves the problem, to the last digits."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import curvopt
from curvopt.optim.rate import adapt as _adapt
from tests import oracles
from tests.cases import Case
from tests.oracles import assert_close

newton = {"damping": 0.0, "momentum": 0.0, "max_step": math.inf, "estimator": "exact"}


def diagonal_quadratic(n=6, inputs=3, outputs=2):
    """Rows that hold one input each, so that no two parameters interact; and its solution."""
    torch.manual_seed(0)
    model = nn.Linear(inputs, outputs, bias=False).double()
    x = torch.diag(torch.rand(inputs, dtype=torch.float64) + 0.5).repeat(n // inputs, 1)
    y = torch.randn(n, outputs, dtype=torch.float64)
    return model, x, y, torch.linalg.lstsq(x, y).solution.T


def test_one_exact_newton_step_solves_a_diagonal_quadratic():
    model, x, y, solution = diagonal_quadratic()
    opt = curvopt.DiagGGNOptimizer(model.parameters(), lr=1.0, **newton)
    opt.step(lambda: F.mse_loss(model(x), y))
    assert_close(model.weight, solution, 1e-12)


@pytest.mark.parametrize("lr", [0.25, 0.5])
def test_a_part_of_the_newton_step(lr):
    model, x, y, solution = diagonal_quadratic()
    expected = (1 - lr) * model.weight.detach() + lr * solution
    opt = curvopt.DiagGGNOptimizer(model.parameters(), lr=lr, **newton)
    opt.step(lambda: F.mse_loss(model(x), y))
    assert_close(model.weight, expected, 1e-12)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_without_curvature_diag_ggn_is_sgd(weight_decay):
    """A linear loss: D = 0, and damping 1 divides by one. The weight decay is decoupled."""
    runs = []
    for make, options in (
        (torch.optim.SGD, {}),
        (curvopt.DiagGGNOptimizer, newton | {"damping": 1.0}),
    ):
        problem = Case("mlp-tanh", "mse").build(n=5)
        # The same gradient: the decay of SGD without momentum is decoupled too.
        opt = make(problem.params, lr=0.1, weight_decay=weight_decay, **options)
        for _ in range(5):

            def closure(problem=problem, opt=opt):
                opt.zero_grad()
                loss = F.l1_loss(problem.model(problem.x), problem.y)
                loss.backward()
                return loss

            opt.step(closure)
        runs.append(oracles.flat(problem.params))
    assert_close(runs[1], runs[0], 1e-12)


def test_diag_ggn_is_its_formula():
    """The update of the docstring, written out, for a dozen steps."""
    lr, c, mu, beta, kappa, decay = 0.01, 0.1, 0.9, 0.95, 0.3, 0.1
    mine, theirs = (Case("mlp-tanh", "ce").build(n=5) for _ in range(2))
    opt = curvopt.DiagGGNOptimizer(
        mine.params, lr, c, weight_decay=decay, estimator="exact", curvature_every=4
    )
    state = {p: {"m": 0.0, "h": 0.0, "e": 0.0, "gamma": 1.0} for p in theirs.params}
    weight = 0.0
    for t in range(1, 13):
        opt.step(lambda: mine.loss())
        measured = t in (1, 2, 3, 5, 9)  # at steps 0, 1, 2, then every fourth
        curvature = oracles.diag_ggn(*theirs) if measured else None
        weight = beta * weight + 1 - beta if measured else weight
        grads = torch.autograd.grad(theirs.loss(), theirs.params)
        for p, g in zip(theirs.params, grads, strict=True):
            s = state[p]
            if curvature is not None:
                s["h"] = beta * s["h"] + (1 - beta) * curvature[p]
                h = s["h"] / weight
                s["P"] = h + c * h.mean()
            s["m"] = mu * s["m"] + (1 - mu) * g
            s["e"] = mu * s["e"] + (1 - mu) * g.square().sum()
            m, e = s["m"] / (1 - mu**t), s["e"] / (1 - mu**t)
            rho = (1 - mu) * (1 + mu**t) / ((1 + mu) * (1 - mu**t))
            if t > 1:
                r = m.square().sum() / e
                s["gamma"] = s["gamma"] * torch.exp(kappa * (r - rho) / (1 - rho))
            u = m / s["P"]
            rms = u.square().mean().sqrt()
            p.data -= lr * (s["gamma"] * u * min(1, 1 / rms) + decay * p.data)
    assert_close(oracles.flat(mine.params), oracles.flat(theirs.params), 1e-10)


def log_rates(gradients, momentum=0.9, adaptation=0.3, lr=1.0):
    """The logarithm of the rate after each of some gradients."""
    state = {"step": 0}
    group = {"momentum": momentum, "adaptation": adaptation, "lr": lr}
    mean, found = torch.zeros_like(gradients[0]), []
    for g in gradients:
        state["step"] += 1
        mean = momentum * mean + (1 - momentum) * g
        corrected = mean / (1 - momentum ** state["step"])
        _adapt(state, group, float(g @ g), float(corrected @ corrected))
        found.append(state.get("log_rate", 0.0))
    return torch.tensor(found, dtype=torch.float64)


def test_the_rate_grows_while_gradients_agree():
    """By the factor exp(0.3) a step, from the second on: the first one agrees with nothing."""
    g = torch.randn(5, dtype=torch.float64)
    assert_close(log_rates(g.expand(15, 5)), 0.3 * torch.arange(15, dtype=torch.float64), 1e-12)
    assert log_rates(g.expand(200, 5))[-1] == math.log(100)  # up to a limit


def test_the_rate_stays_under_noise_and_shrinks_where_gradients_turn():
    torch.manual_seed(0)
    noise = torch.randn(300, 10_000, dtype=torch.float64)
    assert log_rates(noise).abs().max() < 0.05  # a random walk of standard deviation 0.01
    turning = noise[0] * (-1) ** torch.arange(300).view(-1, 1)
    assert log_rates(turning)[-1] < -4  # 0.3 * 0.053 a step


def test_what_keeps_the_rate():
    g = torch.ones(50, 3, dtype=torch.float64)
    assert log_rates(g, adaptation=0.0)[-1] == 0
    assert log_rates(g, momentum=0.0)[-1] == 0
    assert log_rates(g, lr=0.0)[-1] == 0
    assert log_rates(torch.zeros(50, 3))[-1] == 0


def test_adaptation_may_be_switched_on_and_off():
    """Off, the rate stays; on again, it moves by at most exp(0.3) a step."""
    problem = Case("mlp-tanh", "ce").build()
    opt = curvopt.DiagGGNOptimizer(problem.params)
    found = []
    for kappa in [0.0] * 30 + [0.3] * 10 + [0.0] * 5:
        opt.param_groups[0]["adaptation"] = kappa
        opt.step(problem.loss)
        found.append(opt.state[problem.params[0]].get("log_rate", 0.0))
    steps = [after - before for before, after in itertools.pairwise(found)]
    assert found[:30] == [0.0] * 30
    assert 0 < max(steps) <= 0.3
    assert found[-5:] == [found[-6]] * 5


def steps_with(gradient, curvature, count):
    """A parameter and its state after steps with such gradients and curvatures, all float32."""
    p = nn.Parameter(torch.ones(3))
    opt = curvopt.DiagGGNOptimizer([p], curvature_every=1)
    for t in range(count):
        p.grad = torch.full((3,), gradient(t))
        opt.collected = [{"curvature": {p: torch.full((3,), curvature(t))}}]
        with torch.no_grad():
            opt._update()
    return p.detach(), opt.state[p]


def test_nothing_left_to_learn_moves_nothing():
    """Gradient and curvature are exactly zero for long: their averages fade below all numbers."""
    early, _ = steps_with(lambda t: float(t < 5), lambda t: float(t < 5), 1000)
    late, state = steps_with(lambda t: float(t < 5), lambda t: float(t < 5), 2500)
    assert torch.equal(late, early)
    assert state["inverse"].isfinite().all()
    assert not state["momentum_buffer"].any()  # not even denormal numbers


def test_a_step_is_bounded_whatever_the_curvature():
    """Saturated and wrong: hardly any curvature, and a Newton step too long to be squared."""
    p, _ = steps_with(lambda t: 1.0, lambda t: 1e-25, 1)
    assert_close(p, torch.full((3,), 1 - 1e-3), 1e-6)


def test_a_gradient_too_large_to_be_squared_does_not_stop_adaptation():
    _, state = steps_with(lambda t: 1e25 if t == 2 else 1e-3, lambda t: 1.0, 400)
    assert math.isfinite(state["energy"])
    assert state["log_rate"] == math.log(100)
