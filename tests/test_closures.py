"""Closures: both habits and recorded loops give the same step, and run exactly once."""

import pytest
import torch

import curvopt
from tests import oracles
from tests.cases import Case
from tests.oracles import assert_close
from tests.test_quantities import rows


def returns_loss(problem, opt):
    return problem.loss()


def calls_backward(problem, opt):
    opt.zero_grad()
    loss = problem.loss()
    loss.backward()
    return loss


def zeroes_in_place(problem, opt):
    opt.zero_grad(set_to_none=False)
    loss = problem.loss()
    loss.backward()
    return loss


def backward_only(problem, opt):
    loss = problem.loss()
    loss.backward()
    return loss


def backward_without_return(problem, opt):
    opt.zero_grad()
    problem.loss().backward()


def zeroes_only(problem, opt):
    opt.zero_grad()
    return problem.loss()


HABITS = [calls_backward, zeroes_in_place, backward_without_return, zeroes_only]


def recorded(problem, opt):
    opt.zero_grad()
    with opt.record():
        loss = problem.loss()
        loss.backward()
    opt.step()
    return loss


def by_closure(habit):
    def step(problem, opt):
        return opt.step(lambda: habit(problem, opt))

    step.__name__ = habit.__name__  # the test's id
    return step


def train(step, case, steps=3):
    """Parameters, gradients and losses after some steps from one start and one random state."""
    problem = case.build()
    opt = curvopt.DiagGGNOptimizer(problem.model.parameters())
    torch.manual_seed(1)
    losses = [step(problem, opt) for _ in range(steps)]
    return [t for p in problem.params for t in (p.detach(), p.grad)], losses


@rows([Case("convnet", "ce"), Case("mlp-frozen-biases", "mse-sum")])
@pytest.mark.parametrize("step", [*map(by_closure, HABITS), recorded])
def test_all_habits_give_the_same_steps(case, step):
    tensors, losses = train(by_closure(returns_loss), case)
    others, returned = train(step, case)
    for mine, theirs in zip(tensors, others, strict=True):
        assert torch.equal(mine, theirs)
    for loss, other in zip(losses, returned, strict=True):
        assert other is None or torch.equal(loss, other)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("habit", [returns_loss, *HABITS])
@pytest.mark.parametrize("step", range(3))
def test_gradient_and_loss_are_those_of_the_batch(habit, step):
    """In every step, also between updates of the curvature."""
    problem = Case("mlp-tanh", "ce-weight").build()
    opt = curvopt.DiagGGNOptimizer(problem.model.parameters())
    for _ in range(step):
        opt.step(problem.loss)
    expected, loss = oracles.grad(*problem), problem.loss()
    returned = opt.step(lambda: habit(problem, opt))
    assert_close({p: p.grad for p in problem.params}, expected, 1e-12)
    assert returned is None or torch.equal(returned, loss)


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad])
def test_closure_runs_once_with_gradients(context):
    problem = Case("mlp-tanh", "ce").build()
    opt = curvopt.DiagGGNOptimizer(problem.model.parameters())
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        return problem.loss()

    for _ in range(3):
        with context():
            opt.step(closure)
    assert calls == [True] * 3


def micro_batches(problem, sizes):
    """A closure's body that accumulates the loss of the whole batch in parts."""
    total = 0
    for x, y in zip(problem.x.split(sizes), problem.y.split(sizes), strict=True):
        loss = problem.loss_fn(problem.model(x), y) * (len(x) / len(problem.x))
        loss.backward()
        total += loss.detach()
    return total


@pytest.mark.parametrize("sizes", [[2, 2, 2], [3, 2, 1]])
def test_micro_batches_accumulate_the_gradient(sizes):
    problem = Case("convnet", "ce").build(n=6)
    opt = curvopt.DiagGGNOptimizer(problem.model.parameters())
    expected, loss = oracles.grad(*problem), problem.loss()
    returned = opt.step(lambda: micro_batches(problem, sizes))
    assert_close({p: p.grad for p in problem.params}, expected, 1e-12)
    assert_close(returned, loss.detach(), 1e-12)


def test_micro_batches_accumulate_the_curvature():
    """One output: the sketch is exact, so the step is that of the whole batch."""

    def run(body):
        problem = Case("linear-one-output", "mse").build(n=6)
        opt = curvopt.DiagGGNOptimizer(problem.model.parameters())
        for _ in range(3):
            opt.zero_grad()
            opt.step(lambda: body(problem))
        return oracles.flat(problem.params)

    whole = run(lambda problem: problem.loss())
    assert_close(run(lambda problem: micro_batches(problem, [3, 2, 1])), whole, 1e-12)


def test_compute_takes_either_habit():
    def results(habit):
        problem = Case("mlp-tanh", "ce").build()
        opt = torch.optim.SGD(problem.params)
        result = curvopt.compute(
            lambda: habit(problem, opt), problem.params, curvopt.Variance(), curvopt.DiagGGNExact()
        )
        fields = (result.grad, result.variance, result.diag_ggn_exact)
        return [oracles.flat(field.values()) for field in fields]

    for habit in HABITS:
        for mine, theirs in zip(results(returns_loss), results(habit), strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("step", [by_closure(calls_backward), recorded])
@pytest.mark.parametrize("steps", [1, 2])
def test_everything_else_gets_its_gradient(step, steps):
    """Inputs, and the parameters of another optimizer: `backward()` reaches them as ever."""
    problem = Case("mlp-tanh", "ce").build()
    problem.x.requires_grad_()
    others = {problem.params[0], problem.params[3]}
    opt = curvopt.DiagGGNOptimizer(p for p in problem.params if p not in others)
    for _ in range(steps):
        for tensor in (problem.x, *others):
            tensor.grad = None
        expected = torch.autograd.grad(problem.loss(), [problem.x, *others])
        step(problem, opt)
    for tensor, gradient in zip([problem.x, *others], expected, strict=True):
        assert_close(tensor.grad, gradient, 1e-12)


def test_gradients_add_up_until_they_are_zeroed():
    problem = Case("mlp-tanh", "ce").build()
    opt = curvopt.DiagGGNOptimizer(problem.params)
    total = dict.fromkeys(problem.params, 0)
    for _ in range(3):
        gradient = oracles.grad(*problem)
        total = {p: total[p] + gradient[p] for p in total}
        opt.step(lambda: backward_only(problem, opt))
    assert_close({p: p.grad for p in problem.params}, total, 1e-12)


def test_step_without_closure_or_record_over_an_earlier_pass():
    problem = Case("mlp-tanh", "ce").build()
    loss = problem.loss()
    opt = curvopt.DiagGGNOptimizer(problem.model.parameters())
    loss.backward()
    with pytest.raises(curvopt.CurvoptError, match="closure"):
        opt.step()
