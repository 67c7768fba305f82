"""`PolarOptimizer` compiled: rows, tables, looks, and what only an eager step can do."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import curvopt
from curvopt.optim import polar, polar_step

from .common import Both, cross_entropy
from .test_changes import everything, same

WIDE, N = 30, 4


def wide(dtype=torch.float64):
    """Two layers wider than a batch, and one that is not."""
    torch.manual_seed(0)
    layers = [nn.Linear(20, WIDE), nn.Tanh(), nn.Linear(WIDE, 26), nn.Tanh(), nn.Linear(26, 3)]
    return nn.Sequential(*layers).to(dtype)


def make(params, **options):
    return curvopt.PolarOptimizer(params, 1e-2, **{"eps": 0.3, **options})


def data(count, n=N, dtype=torch.float64):
    draw = torch.Generator().manual_seed(1)
    for _ in range(count):
        x = torch.randn(n, 20, generator=draw, dtype=torch.float64).to(dtype)
        yield x, torch.randint(3, (n,), generator=draw)


def by_rows(both):
    """Shapes of the matrices that the compiled optimizer steps by their rows."""
    return {tuple(p.shape) for p in both.opts[1]._measured()[1]}


WIDE_ONES = {(WIDE, 20), (26, WIDE)}


@pytest.mark.parametrize("options", [{}, {"momentum": 0.0}, {"adaptation": 0.0}])
def test_rows(options):
    both = Both(wide(), lambda p: make(p, **options))
    both.run(data(8))
    assert by_rows(both) == WIDE_ONES
    both.check(compiled=7)


def test_defaults():
    """With little damping the factor amplifies rounding, of both kinds of steps."""
    both = Both(wide(), curvopt.PolarOptimizer)
    both.run(data(8))
    both.check(rtol=1e-8, atol=1e-9, compiled=7)


def test_looks_and_denormal_numbers(monkeypatch):
    """At every `LOOK`-th step and every `CLEAN`-th of a matrix, which fall on the same ones."""
    monkeypatch.setattr(polar, "LOOK", 4)
    monkeypatch.setattr(polar_step, "CLEAN", 4)
    both = Both(wide(), make)
    both.run(data(11))
    both.check(compiled=8)  # the steps 0, 4, 8 are not


class Tables(nn.Module):
    """A tied embedding, a table that is added, a convolution by groups, wide layers."""

    def __init__(self):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(9, 8), nn.Parameter(torch.zeros(4, 8))
        self.mix, self.dense = nn.Conv1d(8, 8, 2, groups=4), nn.Linear(24, 40)
        self.back, self.placed = nn.Linear(40, 8), True

    def forward(self, x):
        h = self.tokens(x)
        h = self.mix((h + self.positions if self.placed else h).mT)
        return self.back(torch.tanh(self.dense(h.flatten(1)))) @ self.tokens.weight.T


def sentences(count, n=N):
    draw = torch.Generator().manual_seed(1)
    for _ in range(count):
        yield torch.randint(9, (n, 4), generator=draw), torch.randint(9, (n,), generator=draw)


@pytest.mark.parametrize("options", [{}, {"damping": 0.0, "weight_decay": 0.1, "momentum": 0.5}])
def test_tables(options):
    torch.manual_seed(0)
    both = Both(Tables().double(), lambda p: make(p, curvature_every=3, **options))
    both.run(sentences(8))
    assert sum("curvature" in state for state in both.opts[1].state.values()) == 3
    assert by_rows(both) == {(40, 24), (8, 40)}
    both.check(rtol=1e-9, atol=1e-11, compiled=7)


def test_a_table_takes_no_part_for_a_while():
    """It is then due when others are not, in steps that are taken eagerly."""
    torch.manual_seed(0)
    both = Both(Tables().double(), lambda p: make(p, curvature_every=3))
    steps = [*sentences(14)]
    for placed, part in ((True, steps[:4]), (False, steps[4:8]), (True, steps[8:])):
        for model in both.models:
            model.placed = placed
        both.run(part)
    both.check(rtol=1e-9, atol=1e-11)
    assert both.step.taken["compiled"] >= 8


def test_groups_and_a_generator():
    def of_two_groups(params):
        held = [*params]
        groups = [
            {"params": held[::2], "lr": torch.tensor(0.01), "weight_decay": 0.1},
            {"params": held[1::2], "momentum": 0.5, "margin": 0.2, "eps": 0.5, "damping": 0.3},
        ]
        return make(groups, curvature_every=2, generator=torch.Generator().manual_seed(3))

    torch.manual_seed(0)
    both = Both(Tables().double(), of_two_groups)
    both.run(sentences(7))
    both.check(rtol=1e-9, atol=1e-11, compiled=6)


def test_coupled_samples():
    """Batch norm in training mode: factors are had from Gram matrices, and its averages go on."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, WIDE, bias=False), nn.BatchNorm1d(WIDE), nn.Linear(WIDE, 3))
    both = Both(model.double(), make)
    both.run(data(6))
    assert not by_rows(both)
    both.check(rtol=1e-10, atol=1e-12, compiled=5)


def test_samples_that_are_coupled_later(monkeypatch):
    """There are rows until the next look, which no graph can do without."""
    monkeypatch.setattr(polar, "LOOK", 5)
    torch.manual_seed(0)
    layers = nn.Linear(20, WIDE, bias=False), nn.BatchNorm1d(WIDE), nn.Linear(WIDE, 3)
    both = Both(nn.Sequential(*layers).double().eval(), make)
    both.run(data(3))
    assert by_rows(both)
    for model in both.models:
        model.train()
    with pytest.warns(UserWarning, match="eagerly: .* in training mode"):
        both.run(data(3))
    assert not by_rows(both)
    both.run(data(3))
    both.check(rtol=1e-9, atol=1e-11, compiled=2 + 3)


@pytest.mark.parametrize("n", [1, 3, 20, 26])
def test_as_many_samples_as_units(n):
    both = Both(wide(), make)
    both.run(data(5, n=n))
    both.check(rtol=1e-10, atol=1e-12, compiled=4)


def test_batch_sizes():
    """The number of rows decides how matrices are stepped; compiled steps note it as well."""
    both = Both(wide(), make)
    both.run(data(2))
    both.run(data(2, n=7))
    assert {s["rows"] for s in both.opts[1].state.values() if "rows" in s} >= {7}
    for n in (60, N, 60, N):
        both.run(data(1, n=n))
    assert not by_rows(both)  # until the next look
    both.check(compiled=1 + 1 + 3)


def test_too_many_rows_for_a_while():
    both = Both(wide(), make)
    both.run(data(2, n=60))
    assert not by_rows(both)
    both.run(data(2))
    both.check(compiled=2)


def penalized(model, x, y):
    return cross_entropy(model, x, y) + 0.1 * model[0].weight.square().sum()


def test_a_penalty_is_met_once(monkeypatch):
    """Rows that are not the gradient's are not tried again before the next look."""
    monkeypatch.setattr(polar, "LOOK", 5)
    both = Both(wide(), make, penalized)
    both.run(data(4))
    assert by_rows(both) == WIDE_ONES - {(WIDE, 20)}
    both.run(data(5))
    both.check(compiled=7)


def test_a_penalty_that_comes_later():
    """The step of which the rows are not the gradient is taken eagerly."""
    strength = torch.zeros((), dtype=torch.float64)

    def loss(model, x, y):
        return cross_entropy(model, x, y) + strength * model[0].weight.square().sum()

    both = Both(wide(), make, loss)
    both.run(data(3))
    assert by_rows(both) == WIDE_ONES
    strength.fill_(0.1)
    both.run(data(3))
    assert by_rows(both) == WIDE_ONES - {(WIDE, 20)}
    both.check(compiled=2 + 2)


def test_rows_without_a_cholesky_factor(monkeypatch):
    real = torch.linalg.cholesky_ex

    def failing(matrix):
        factor, info = real(matrix)
        return factor, torch.where(matrix[0, 0].isnan(), info, info + 1)

    both = Both(wide(), make)
    both.run(data(1))
    monkeypatch.setattr(torch.linalg, "cholesky_ex", failing)
    both.run(data(3))
    assert [opt.failed for opt in both.opts] == [2, 2]
    assert not by_rows(both)
    both.check(compiled=2)


def test_a_dead_layer():
    """Its gradient is zero after a while, which is nothing that an eager step is needed for."""

    alive = torch.ones((), dtype=torch.float64)

    def loss(model, x, y):
        return F.cross_entropy(model[2:](model[:2](x) * alive), y)

    both = Both(wide(), make, loss)
    both.run(data(3))
    alive.zero_()
    both.run(data(4))
    assert by_rows(both) == WIDE_ONES
    both.check(rtol=1e-9, atol=1e-11, compiled=6)


def test_a_gradient_that_is_not_finite():
    """Of a finite loss: both kinds of steps say so, and change nothing."""

    def loss(model, x, y):
        h = model(x)
        return F.cross_entropy(h, y) + (h * x[:, :1]).abs().sqrt().sum(1).mean()

    both = Both(wide(), make, loss)
    *first, (x, y) = data(5)
    both.run(first)
    model, opt = both.models[1], both.opts[1]
    before = everything(opt, model)
    x[0, 0] = 0  # where the root has no slope
    with pytest.raises(curvopt.CurvoptError, match="gradient of parameter 0 .* is not finite"):
        both.step(x, y)
    same(everything(opt, model), before)
    both.run(first)
    both.check(compiled=7)


def test_half_precision():
    both = Both(wide(torch.bfloat16), make)
    for batch in data(5, dtype=torch.bfloat16):
        both.take(*batch)
    assert by_rows(both) == WIDE_ONES
    both.check(rtol=2e-2, atol=2e-2, compiled=4)


def test_products_that_autocast_has_rounded():
    def loss(model, x, y):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return F.cross_entropy(model(x).float(), y)

    both = Both(wide(torch.float32), make, loss)
    both.run(data(5, dtype=torch.float32))
    assert by_rows(both) == WIDE_ONES
    both.check(rtol=1e-3, atol=1e-4, compiled=4)


def test_a_parameter_without_elements():
    torch.manual_seed(0)
    model = nn.Linear(20, 3).double()
    model.empty = nn.Parameter(torch.zeros(0, 20).double())

    def loss(model, x, y):
        return F.cross_entropy(model(x), y) + (x @ model.empty.T).sum(1).mean()

    both = Both(model, make, loss)
    both.run(data(1))
    with pytest.warns(UserWarning, match="a parameter has no elements"):
        both.run(data(1))
    both.run(data(2))
    both.check(compiled=0)


def test_checkpoints_of_tables():
    """A state of compiled steps goes on eagerly, and that of eager steps compiled."""
    torch.manual_seed(0)
    both = Both(Tables().double(), lambda p: make(p, curvature_every=3))
    steps = [*sentences(9)]
    both.run(steps[:4])
    states = [copy.deepcopy(opt.state_dict()) for opt in both.opts]
    for opt, state in zip(both.opts, reversed(states), strict=True):
        opt.load_state_dict(state)
    both.run(steps[4:])
    both.check(rtol=1e-9, atol=1e-11, compiled=8)


def test_steady_steps_read_no_value(monkeypatch):
    """But whether the step has failed."""
    torch.manual_seed(0)
    both = Both(Tables().double(), make)
    both.run(sentences(4))
    reads = []

    def noted(name, real):
        return lambda tensor: (reads.append(name), real(tensor))[1]

    for name in ("item", "tolist", "__bool__", "__float__", "__int__"):
        monkeypatch.setattr(torch.Tensor, name, noted(name, getattr(torch.Tensor, name)))
    for batch in sentences(2):
        both.step(*batch)
    assert both.step.taken["compiled"] == 5
    assert reads == ["__bool__"] * 2
