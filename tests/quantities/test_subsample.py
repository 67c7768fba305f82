"""Second-order quantities of a part of the batch: those of the loss on that part alone."""

import pytest
import torch

import curvopt
from tests.cases import Case
from tests.oracles import assert_close, one

QUANTITIES = {
    "diag_ggn_exact": curvopt.DiagGGNExact,
    "diag_ggn_exact_batch": curvopt.BatchDiagGGNExact,
    "sqrt_ggn_exact": curvopt.SqrtGGNExact,
    "kflr": curvopt.KFLR,
}
CHOSEN = [3, 0]


def part(problem):
    def of(t):
        if isinstance(t, tuple):
            return tuple(map(of, t))
        return t[CHOSEN]

    return problem._replace(x=of(problem.x), y=of(problem.y))


@pytest.mark.parametrize(
    "case",
    [
        Case("mlp-tanh", "ce"),
        Case("convnet", "mse"),
        Case("mlp-tanh", "ce-weight"),
        Case("conv2d-groups", "ce-everything"),
        Case("tokens-mlp", "mse-sum"),
        Case("linear", "two-terms"),
        Case("conv1d-groups", "scaled"),
    ],
    ids=lambda case: case.id,
)
def test_equals_the_part_alone(case):
    problem = case.build()
    exact = curvopt.compute(
        part(problem).loss, problem.params, *(make() for make in QUANTITIES.values())
    )
    whole = curvopt.compute(
        problem.loss, problem.params, *(make(subsample=CHOSEN) for make in QUANTITIES.values())
    )
    for field in QUANTITIES:
        for p in problem.params:
            actual, expected = (getattr(result, field)[p] for result in (whole, exact))
            pairs = zip(actual, expected, strict=True) if field == "kflr" else [(actual, expected)]
            for a, b in pairs:
                assert_close(a, b)


@pytest.mark.parametrize("model", ["matmul-left", "F.conv2d", "mlp-frozen-weights"])
def test_other_structures(model):
    problem = Case(model, "mse").build()
    options = {"subsample": torch.tensor(CHOSEN)}
    a = curvopt.compute(problem.loss, problem.params, curvopt.SqrtGGNExact(**options))
    b = curvopt.compute(part(problem).loss, problem.params, curvopt.SqrtGGNExact())
    assert_close(a.sqrt_ggn_exact, dict(b.sqrt_ggn_exact))


def test_sketches_and_the_rest_together():
    problem = Case("mlp-tanh", "ce").build()
    result = curvopt.compute(
        problem.loss,
        problem.params,
        curvopt.SqrtGGNMC(samples=2, subsample=CHOSEN),
        curvopt.KFAC(subsample=CHOSEN, bias="together"),
        curvopt.BatchGrad(),
        curvopt.DiagGGNExact(),
    )
    for p in problem.params:
        assert result.sqrt_ggn_mc[p].shape == (2, 2, *p.shape)
        assert len(result.batch_grad[p]) == 4
    first, second, *_ = problem.params
    assert result.kfac[first][1].shape == (5, 5)
    assert result.kfac[second] == ()


@pytest.mark.parametrize("subsample", [[], [0, 0], [-1], [4]])
def test_refuses(subsample):
    problem = Case("mlp-tanh", "ce").build()
    with pytest.raises((ValueError, curvopt.CurvoptError), match="subsample"):
        curvopt.compute(problem.loss, problem.params, curvopt.DiagGGNExact(subsample=subsample))


def test_one_is_a_batch_of_one():
    problem = Case("mlp-tanh", "ce").build()
    alone = problem._replace(x=one(problem.x, 2), y=one(problem.y, 2))
    a = curvopt.compute(problem.loss, problem.params, curvopt.DiagGGNExact(subsample=[2]))
    b = curvopt.compute(alone.loss, problem.params, curvopt.DiagGGNExact())
    assert_close(a.diag_ggn_exact, dict(b.diag_ggn_exact))


def test_terms_with_other_shares_have_no_empirical_fisher():
    problem = Case("linear", "two-terms").build()
    with pytest.raises(curvopt.CurvoptError, match="reduced differently"):
        curvopt.compute(problem.loss, problem.params, curvopt.EmpiricalFisher())
