"""The scalings in docs/from_backpack.md, against BackPACK itself."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import curvopt
from tests.cases import LOSSES, build
from tests.oracles import assert_close

backpack = pytest.importorskip("backpack")
extensions = pytest.importorskip("backpack.extensions")
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")

POWER = {  # ours is N^power times theirs, under a mean
    "BatchGrad": 1,
    "BatchL2Grad": 2,
    "SumGradSquared": 2,
    "Variance": 2,
    "DiagGGNExact": 0,
    "BatchDiagGGNExact": 1,
    "DiagHessian": 0,
    "BatchDiagHessian": 1,
}
TABLE = re.findall(
    r"^\| (`.*?) \| (.*?) \| (`.*?) \| (.*?) \| (.*) \|$",
    (Path(__file__).parent.parent / "docs" / "from_backpack.md").read_text(),
    re.MULTILINE,
)


def problem():
    def make():
        return nn.Sequential(
            nn.Conv2d(1, 2, 2),
            nn.Sigmoid(),
            nn.Flatten(),
            nn.Linear(8, 4),
            nn.ReLU(),
            nn.Linear(4, 3),
        )

    return build(make, (1, 3, 3), LOSSES["ce"])


def theirs(made, extension):
    model, loss_fn = backpack.extend(made.model), backpack.extend(nn.CrossEntropyLoss())
    with backpack.backpack(extension):
        loss_fn(model(made.x), made.y).backward()
    return made.params


@pytest.mark.parametrize("name", POWER)
def test_scaling(name):
    made = problem()
    quantity = getattr(curvopt, name)()
    ours = getattr(curvopt.compute(made.loss, made.params, quantity), quantity.field)
    extension = getattr(extensions, name)()
    for p in theirs(made, extension):
        expected = getattr(p, extension.savefield).detach() * len(made.x) ** POWER[name]
        assert_close(ours[p], expected)


def test_root():
    made = problem()
    root = curvopt.compute(made.loss, made.params, curvopt.SqrtGGNExact()).sqrt_ggn_exact
    for p in theirs(made, extensions.SqrtGGNExact()):
        assert p.sqrt_ggn_exact.shape[0] == root[p].shape[0] + 1
        V, W = (r.detach().flatten(2).flatten(0, 1) for r in (root[p], p.sqrt_ggn_exact))
        assert_close(V.T @ V, W.T @ W)


def test_subsample():
    """Theirs are rows of the whole batch; ours those of the mean over the samples taken."""
    made = problem()
    root = curvopt.compute(made.loss, made.params, curvopt.SqrtGGNExact(subsample=[0, 3]))
    for p in theirs(made, extensions.SqrtGGNExact(subsampling=[0, 3])):
        V, W = (
            r.detach().flatten(2).flatten(0, 1) for r in (root.sqrt_ggn_exact[p], p.sqrt_ggn_exact)
        )
        assert_close(V.T @ V, W.T @ W * 4 / 2)


@pytest.mark.parametrize(("theirs", "ours"), [("HMP", "BlockHessian"), ("GGNMP", "BlockGGN")])
def test_blocks(theirs, ours):
    made = problem()
    quantity = getattr(curvopt, ours)()
    blocks = getattr(curvopt.compute(made.loss, made.params, quantity), quantity.field)
    extension = getattr(extensions, theirs)()
    model, loss_fn = backpack.extend(made.model), backpack.extend(nn.CrossEntropyLoss())
    with backpack.backpack(extension):
        loss_fn(model(made.x), made.y).backward()
        for p in made.params:
            M = torch.randn(2, *p.shape, dtype=p.dtype)
            assert_close(blocks[p](M), getattr(p, extension.savefield)(M).detach())


def test_table_names_what_there_is():
    assert len(TABLE) > 15
    for row in TABLE:
        for name in re.findall(r"`(\w+)`", row[0]):
            assert hasattr(extensions, name) or name.endswith("product") or name in ("KFRA",), name
        for name in re.findall(r"`(\w+)`", row[2]):
            assert hasattr(curvopt, name), name
