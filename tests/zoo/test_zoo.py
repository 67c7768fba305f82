"""Whole models as they are: exact in float64, and nothing takes the slow path (warnings fail)."""

import pytest
import torch
import torch.nn.functional as F

import curvopt
from tests import oracles
from tests.cases import Problem
from tests.oracles import assert_close
from tests.test_quantities import check
from tests.zoo import hugging_face, plain

FIELDS = ["batch_grad", "batch_l2", "clipped_grad_sum", "diag_ggn_exact"]
# These cast to float32 on the way, whatever their parameters are: the logits, or in their norms.
SINGLE_LOSS, SINGLE_NORM = ["gpt2", "llama", "opt"], ["llama", "t5"]


def cross_entropy(z, y):
    """Of logits on axis 1, or on the last of a language model's ``[N, T, words]``."""
    return F.cross_entropy(*((z.flatten(0, 1), y.flatten()) if z.ndim == 3 else (z, y)))


def problem(model, x):
    with torch.no_grad():
        shape = model(x).shape
    y = torch.randint(shape[2], shape[:2]) if len(shape) == 3 else torch.randint(3, (3, *shape[2:]))
    return Problem(model, cross_entropy, x, y, list(model.parameters()))


@pytest.mark.parametrize("name", hugging_face.MODELS)
def test_hugging_face_with_its_own_loss(name):
    model, batch = hugging_face.MODELS[name].make()
    params, rtol = list(model.parameters()), 1e-5 if name in SINGLE_LOSS + SINGLE_NORM else 1e-9

    def loss(batch):
        return model(**batch).loss

    result = curvopt.compute(
        lambda: loss(batch), params,
        curvopt.BatchGrad(), curvopt.BatchL2Grad(), curvopt.ClippedGradSum(0.1),
    )  # fmt: skip
    samples = [{key: value[n : n + 1] for key, value in batch.items()} for n in range(3)]
    slopes = [oracles.derivative(loss(sample), params) for sample in samples]
    rows = oracles.by_parameter(params, map(torch.stack, zip(*slopes, strict=True)))
    norms = sum(row.flatten(1).square().sum(1) for row in rows.values()).sqrt()
    factors = (0.1 / norms).clamp(max=1)
    assert (factors < 1).any()
    for p, row in rows.items():
        assert_close(result.batch_grad[p], row, rtol)
        assert_close(result.batch_l2[p], row.flatten(1).square().sum(1), rtol)
        assert_close(result.clipped_grad_sum[p], torch.tensordot(factors, row, 1), rtol)


@pytest.mark.parametrize("name", hugging_face.MODELS)
def test_hugging_face_logits(name):
    model, batch = hugging_face.MODELS[name].make()
    del batch["labels"]
    case = problem(hugging_face.Logits(model, list(batch)), tuple(batch.values()))
    check(case, fields=FIELDS, rtol=1e-5 if name in SINGLE_NORM else 1e-9)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", plain.MODELS)
def test_plain(name, mode):
    make, inputs = plain.MODELS[name]
    model = make().double()
    check(problem(model.train(mode == "train"), inputs()), fields=FIELDS)


@pytest.mark.parametrize("name", ["encoder", "gpt2"])
def test_mean_of_sketches(name):
    if name in plain.MODELS:
        case = problem(plain.MODELS[name][0]().double(), plain.MODELS[name][1]())
    else:
        model, batch = hugging_face.MODELS[name].make()
        case = problem(hugging_face.Logits(model, ["input_ids"]), (batch["input_ids"],))
    draws = 200
    with curvopt.record(case.params) as tape:
        loss = case.loss()
    result = tape.compute(loss, curvopt.SqrtGGNMC(samples=draws), curvopt.DiagGGNExact())
    for p in case.params:
        values = draws * result.sqrt_ggn_mc[p].sum(1).square()
        error = values.std(0) / draws**0.5
        assert ((values.mean(0) - result.diag_ggn_exact[p]).abs() <= 4.5 * error + 1e-9).all()
