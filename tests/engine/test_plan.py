"""Plans: what one replay tells is what replaying for every question tells."""

import dataclasses

import pytest
import torch

import curvopt
from curvopt.axes.samples import Samples
from curvopt.engine import plan as plans
from curvopt.engine.planner import Planner
from curvopt.errors import CurvoptError
from tests.cases import CASES
from tests.oracles import assert_close
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


DATA, MORE, CLASSES = torch.randn(24, 3), torch.randn(24, 3), torch.randint(2, (24,))
STACKED = torch.randn(6, 4, 3, dtype=torch.float64)
CUT = {
    "slices": lambda i, model: model(DATA[i : i + 4]),
    "from behind": lambda i, model: model(DATA[i - 24 : i - 20]),
}


def loss_of(outputs, classes):
    return torch.nn.functional.cross_entropy(outputs, classes)


@pytest.fixture
def made(monkeypatch):
    """How many plans were made."""
    plans._PLANS.clear()
    found, make = [], Planner.make

    def counted(planner):
        found.append(planner)
        return make(planner)

    monkeypatch.setattr(Planner, "make", counted)
    return found


@pytest.mark.parametrize("name", ["slices", "from behind"])
def test_batches_that_are_cut_out_of_a_data_set_have_one_plan(name, made):
    model = torch.nn.Linear(3, 2)
    for start in (4, 8, 12, 5, 16):
        result = curvopt.compute(
            lambda i=start: loss_of(CUT[name](i, model), CLASSES[i : i + 4]),
            model.parameters(),
            curvopt.BatchGrad(),
        )
        for n, i in enumerate(range(start, start + 4)):
            loss = loss_of(model(DATA[i]), CLASSES[i])
            wanted = torch.autograd.grad(loss, model.weight)[0]
            assert_close(result.batch_grad[model.weight][n], wanted, 1e-12)
    assert len(made) == 1


def test_one_batch_of_several_has_one_plan(made):
    model = torch.nn.Linear(3, 2).double()
    with pytest.raises(CurvoptError, match="4 samples, the rows of .*batch_size=1 or batch_size=4"):
        curvopt.compute(
            lambda: model(STACKED[1]).square().sum(1).mean(),
            model.parameters(),
            curvopt.Variance(),
        )
    made.clear()
    for x in range(1, 6):
        loss = curvopt.compute(
            lambda x=x: model(STACKED[x]).square().sum(1).mean(),
            model.parameters(),
            curvopt.Variance(),
            batch_size=4,
        )
        rows = [torch.autograd.grad(model(row).square().sum(), model.bias)[0] for row in STACKED[x]]
        assert_close(loss.variance[model.bias], torch.stack(rows).var(0, unbiased=False), 1e-12)
    assert len(made) == 1


def test_the_plan_of_a_cut_is_not_that_of_another(made):
    """One that overlaps, one whose classes are those of other rows, one that looks at all data."""
    model = torch.nn.Linear(3, 2)

    def refused(loss):
        with pytest.raises(CurvoptError, match="samples are not separate"):
            curvopt.compute(loss, model.parameters(), curvopt.BatchGrad())

    def gone_over(loss):
        curvopt.compute(loss, model.parameters(), curvopt.BatchGrad())

    gone_over(lambda: loss_of(model(DATA[8:12]), CLASSES[8:12]))
    refused(lambda: loss_of(model(DATA[8:12]), CLASSES[9:13]))
    gone_over(lambda: loss_of(model(DATA[8:12]) * model(MORE[8:12]), CLASSES[8:12]))
    refused(lambda: loss_of(model(DATA[8:12]) * model(MORE[10:14]), CLASSES[8:12]))
    gone_over(lambda: loss_of(model(DATA[8:12]) + MORE.split(4)[2][:, :2], CLASSES[8:12]))
    refused(lambda: loss_of(model(DATA[12:16]) + MORE.split(4)[2][:, :2], CLASSES[12:16]))
    for i in (8, 12):
        refused(lambda i=i: loss_of(model(DATA[i : i + 4] - DATA.mean(0)), CLASSES[i : i + 4]))


@pytest.mark.parametrize("where", ["logits", "term", "rows", "dropout"])
def test_numbers_of_a_schedule_have_one_plan(where, made):
    model = torch.nn.Linear(3, 2)

    def loss(c, x, y):
        outputs = model(x)
        if where == "logits":
            return loss_of(outputs / c, y)
        if where == "term":
            return loss_of(outputs, y) + c * outputs.logsumexp(1).mean()
        if where == "rows":
            return (c * torch.nn.functional.cross_entropy(outputs, y, reduction="none")).mean()
        return loss_of(torch.nn.functional.dropout(outputs, c, training=c > 1), y)

    for k, c in enumerate((0.5, 0.7, 0.1, 0.9)):
        part = slice(4 * k, 4 * k + 4)
        result = curvopt.compute(
            lambda c=c, part=part: loss(c, DATA[part], CLASSES[part]),
            model.parameters(),
            curvopt.BatchGrad(),
        )
        for n in range(4):
            own = loss(c, DATA[part][n : n + 1], CLASSES[part][n : n + 1])
            wanted = torch.autograd.grad(own, model.weight)[0]
            assert_close(result.batch_grad[model.weight][n], wanted, 1e-6)
    assert len(made) <= 2  # the first batch begins at zero


def test_a_number_that_may_be_a_count_is_asked_about_whatever_came_before(made):
    model = torch.nn.Linear(3, 2)

    def gone_over(c, reduction=None):
        def loss():
            x, y = DATA[4:8], CLASSES[4:8]
            return c * torch.nn.functional.cross_entropy(model(x), y, reduction="sum")

        return curvopt.compute(loss, model.parameters(), curvopt.BatchGrad(), reduction=reduction)

    for c in (0.5, 0.3):
        gone_over(c)
    with pytest.raises(CurvoptError, match=r"sum scaled by 0\.25, which may be a count"):
        gone_over(0.25)
    with pytest.raises(CurvoptError, match=r"sum scaled by 4, which may be a count"):
        gone_over(4.0)
    gone_over(0.7)
    rows = gone_over(0.25, reduction="mean").batch_grad[model.bias]
    wanted = torch.autograd.grad(loss_of(model(DATA[4:5]), CLASSES[4:5]), model.bias)[0]
    assert_close(rows[0], wanted, 1e-6)
    assert len(made) == 1


def test_a_number_that_python_has_read_is_no_schedule(made):
    model = torch.nn.Linear(3, 2)

    def loss(y):
        count = float((y > 0).sum())
        return torch.nn.functional.cross_entropy(model(DATA[:4]), y, reduction="sum") / count

    for y in ([1, 1, 0, 0], [1, 1, 1, 0]):
        with pytest.raises(CurvoptError, match="Python read from|may be a count"):
            curvopt.compute(
                lambda y=y: loss(torch.tensor(y)), model.parameters(), curvopt.BatchGrad()
            )
