"""A run from its budget, the averages of its weights, and what both print."""

import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import TensorDataset

import curvopt
from curvopt.errors import CurvoptError
from curvopt.privacy import LinearSchedule, plan, weight_average
from tests.oracles import assert_close

DATA = TensorDataset(torch.randn(500, 4), torch.arange(500) % 3)
BUDGET = {
    "epsilon": 3.0, "delta": 1e-4, "epochs": 4, "expected_batch_size": 50, "max_grad_norm": 0.5,
}  # fmt: skip


@pytest.mark.parametrize("cls", [curvopt.DPSGD, curvopt.DPAdam])
@pytest.mark.parametrize("parts", [1, 2])
def test_the_parts_fit_and_the_budget_is_what_is_spent(cls, parts):
    torch.manual_seed(0)
    run = plan(DATA, **BUDGET, micro_batches=parts, generator=torch.Generator().manual_seed(0))
    model = nn.Linear(4, 3)
    opt = cls(model.parameters(), 0.1, **run.optimizer)
    for _ in range(run.epochs):
        for index, (x, y) in enumerate(run.loader):
            if len(x):
                with opt.record():
                    F.cross_entropy(model(x), y).backward()
            else:
                opt.empty_batch()
            if (index + 1) % parts == 0:
                opt.step()
                opt.zero_grad()
    assert opt.ledger.steps == run.steps == 40
    assert 2.99 < opt.privacy_spent(1e-4) <= 3.0
    assert opt.privacy_spent(1e-4) == run.report.epsilon
    assert (opt.sample_rate, opt.ledger.num_samples) == (0.1, 500)


def test_it_prints_what_holds():
    text = str(plan(DATA, **BUDGET, unit="one row"))
    assert text.startswith("4 epochs of 10 steps on 50 samples each in the mean; at their end:")
    for said in (
        "(3, 0.0001)-differential privacy", "one row of 500", "add or remove one sample",
        "Poisson, amplified by q", "40 steps, sigma = ", "q = 0.1, C = 0.5, poisson", "PLD",
    ):  # fmt: skip
        assert said in text


def test_a_schedule_keeps_its_shape(capsys):
    schedule = LinearSchedule(2.0, 1.0, steps=40, every=10)
    run = plan(DATA, **BUDGET, schedule=schedule, accountant="rdp", progress=True)
    noise = pickle.loads(pickle.dumps(run.noise_multiplier))
    assert noise(0) / noise(39) == pytest.approx(2.0 / 1.25)
    assert 2.95 < run.report.epsilon <= 3.0
    assert [phase.steps for phase in run.report.phases] == [10] * 4
    assert "noise for the budget" in capsys.readouterr().err
    plan(DATA, **BUDGET, accountant="rdp")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"delta": 0.01}, r"Invalid delta: 0.01 \(must be in \(0, 1/N = 0.002\)\)"),
        ({"epsilon": 0.0}, "Invalid target epsilon: 0.0"),
        ({"epochs": 0}, "Invalid number of epochs: 0"),
        ({"max_grad_norm": 0.0}, "Invalid max_grad_norm: 0.0"),
        ({"expected_batch_size": 501}, "Invalid sample rate: 1.002"),
        ({"micro_batches": 0}, "Invalid number of parts: 0"),
    ],
)
def test_bad_values_are_refused(options, message):
    with pytest.raises(CurvoptError, match=message):
        plan(DATA, **{**BUDGET, **options})


def test_the_average_starts_fast():
    torch.manual_seed(0)
    model = nn.Linear(3, 2, dtype=torch.float64)
    averaged = AveragedModel(model, multi_avg_fn=weight_average(0.6))
    expected = None
    for t in range(12):
        with torch.no_grad():
            model.weight.normal_()
        averaged.update_parameters(model)
        d = min(0.6, (1 + t) / (10 + t)) if t else 0.0
        now = model.weight.detach()
        expected = now.clone() if expected is None else d * expected + (1 - d) * now
    assert_close(averaged.module.weight.detach(), expected)
    with pytest.raises(CurvoptError, match=r"Invalid decay: 1.0 \(must be in \[0, 1\)\)"):
        weight_average(1.0)
