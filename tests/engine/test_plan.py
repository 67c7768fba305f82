"""Plans: what one replay tells is what replaying for every question tells."""

import dataclasses

import pytest
import torch

import curvopt
from curvopt.axes.samples import Samples
from curvopt.engine.planner import Planner
from curvopt.errors import CurvoptError
from tests.cases import CASES
from tests.zoo import hugging_face, plain
from tests.zoo.test_zoo import problem


def told(value):
    """A value as what can be compared."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if dataclasses.is_dataclass(value):
        return [told(getattr(value, field.name)) for field in dataclasses.fields(value)]
    if isinstance(value, dict):
        return {key: told(item) for key, item in value.items()}
    return [told(item) for item in value] if isinstance(value, (list, tuple)) else value


def plan(params, loss):
    with curvopt.record(params) as tape:
        value = loss()
    with tape.trace.paused(), torch.no_grad():
        try:
            return told(Planner(tape, value).make())
        except CurvoptError as error:
            return str(error)


def same(params, loss, monkeypatch):
    torch.manual_seed(0)
    quick, replays = plan(params, loss), []

    def replay(samples, marks, claims):
        replays.append(marks)
        return samples.replay(marks, claims)

    monkeypatch.setattr(Samples, "recalled", replay)
    torch.manual_seed(0)
    assert plan(params, loss) == quick
    assert replays or isinstance(quick, str)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_cases(case, monkeypatch):
    built = case.build()
    same(built.params, built.loss, monkeypatch)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.parametrize("name", plain.MODELS)
def test_models(name, monkeypatch):
    make, inputs = plain.MODELS[name]
    built = problem(make().double(), inputs())
    same(built.params, built.loss, monkeypatch)


@pytest.mark.parametrize("name", hugging_face.MODELS)
def test_hugging_face(name, monkeypatch):
    model, batch = hugging_face.MODELS[name].make()
    same(list(model.parameters()), lambda: model(**batch).loss, monkeypatch)


class Inplace(torch.nn.Module):
    """Outputs that are changed in place, through views too, after the op that made them."""

    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)

    def forward(self, x):
        hidden = self.first(x).relu_()
        hidden[:, 1:].mul_(2)
        half = hidden.view(len(x), 2, 2)
        half[:, 0] += 1
        result = self.second(hidden.clone())
        with torch.no_grad():  # it holds other samples in the end
            hidden.copy_(hidden.flip(0))
        return result


@pytest.mark.parametrize("n", [1, 2, 4])
def test_in_place(n, monkeypatch):
    model, x, y = Inplace(), torch.randn(n, 3), torch.randint(2, (n,))
    same(
        list(model.parameters()),
        lambda: torch.nn.functional.cross_entropy(model(x), y),
        monkeypatch,
    )
