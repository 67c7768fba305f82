"""A steady step does not wait for the device: it reads no value, but for what makes it fail.

An accelerator is not needed: what a step does there, it is made to do on a CPU.
"""

from collections import Counter
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import curvopt
import curvopt.optim.joined
from curvopt.looks import Conditions

WAITING = {
    "_local_scalar_dense", "is_nonzero", "nonzero", "equal", "unique_dim", "_unique2", "bincount",
    "unique_consecutive", "masked_select",
}  # fmt: skip

private = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, "expected_batch_size": 6}
ROWS = {
    "variance_adaptive": lambda p: curvopt.VarianceAdaptiveSGD(p, variance_every=2),
    "diag_ggn": lambda p: curvopt.DiagGGNOptimizer(p, curvature_every=2),
    "diag_ggn-exact": lambda p: curvopt.DiagGGNOptimizer(p, curvature_every=1, estimator="exact"),
    "dp_sgd": lambda p: curvopt.DPSGD(p, lr=0.1, **private),
    "dp_adam": lambda p: curvopt.DPAdam(p, **private),
    "polar": curvopt.PolarOptimizer,
}


class Reads(TorchDispatchMode):
    """Counts what would wait for a device; what is fetched to see whether a step failed is none."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.count, self.checking = Counter(), False
        check, tolist = Conditions.check, torch.Tensor.tolist

        def checked(conditions):
            self.checking = True
            try:
                check(conditions)
            finally:
                self.checking = False

        def listed(tensor):
            self.count["tolist"] += 1
            return tolist(tensor)

        monkeypatch.setattr(Conditions, "check", checked)
        monkeypatch.setattr(torch.Tensor, "tolist", listed)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in WAITING and not self.checking:
            self.count[name] += 1
        return func(*args, **kwargs or {})


def model_and_data(dtype=torch.float64):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 6), nn.Flatten(), nn.Linear(18, 5), nn.Tanh())
    model = model.append(nn.Linear(5, 4)).to(dtype)
    x, y = torch.randint(7, (6, 3)), torch.randint(4, (6,))
    return model, x, y


def loss_of(model, x, y):
    return F.cross_entropy(model(x), y)


@pytest.fixture
def waiting(monkeypatch):
    monkeypatch.setattr(curvopt.optim.joined, "waits", lambda params: True)


# Private steps look for ignored targets, equal lookups, samples in doubt or not finite, and audit
# at times; the polar factor of a matrix takes several numbers.
LOOKS = {"dp_sgd": 5, "dp_adam": 5, "polar": 6}


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("loop", ["closure", "ordinary"])
def test_steady_steps_read_no_value(row, loop, waiting, monkeypatch):
    model, x, y = model_and_data()
    opt = ROWS[row](model.parameters())
    if loop == "ordinary" and row.startswith("dp_"):
        pytest.skip("private optimizers need a closure or a block")

    def step():
        if loop == "closure":
            opt.step(lambda: F.cross_entropy(model(x), y))
            return
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        opt.step()

    for _ in range(18):  # proofs, audits, first measurements
        step()
    reads = Reads(monkeypatch)
    with reads:
        for _ in range(4):
            step()
    assert sum(reads.count.values()) <= 4 * LOOKS.get(row, 0), reads.count


@pytest.mark.parametrize("row", ["variance_adaptive", "diag_ggn", "diag_ggn-exact"])
@pytest.mark.parametrize("loop", ["closure", "ordinary"])
def test_not_looking_gives_the_same(row, loop, monkeypatch):
    """Ignored targets and clipped gradients among the steps."""
    results = []
    for waits in (False, True):
        monkeypatch.setattr(curvopt.optim.joined, "waits", lambda params, waits=waits: waits)
        model, x, y = model_and_data()
        opt = ROWS[row](model.parameters())
        torch.manual_seed(1)
        for t in range(8):
            target = y.clone()
            target[: t % 3] = -100
            loss = partial(loss_of, model, x, target)
            if loop == "closure":
                opt.step(loss)
                continue
            opt.zero_grad()
            loss().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            opt.step()
        results.append((list(model.parameters()), opt.stats()))
    (looked, before), (away, after) = results
    for p, q in zip(looked, away, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)
    assert after == pytest.approx(before, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("row", ["variance_adaptive", "diag_ggn"])
@pytest.mark.parametrize("steps", [0, 1, 2, 3])
def test_a_loss_that_is_not_finite_fails_the_step(row, steps, waiting):
    """Seen after torch's own backward pass has begun; parameters, gradients, state stay."""
    model, x, y = model_and_data()
    opt = ROWS[row](model.parameters())
    for _ in range(steps):
        opt.step(lambda: F.cross_entropy(model(x), y))
    before = [p.detach().clone() for p in model.parameters()]
    grads = [p.grad for p in model.parameters()]
    state = {k: v for p in opt.state for k, v in opt.state[p].items() if not torch.is_tensor(v)}
    with pytest.raises(curvopt.CurvoptError, match="nan, not finite"):
        opt.step(lambda: F.cross_entropy(model(x) * torch.nan, y))
    for p, old, grad in zip(model.parameters(), before, grads, strict=True):
        assert torch.equal(p, old)
        assert p.grad is grad
    after = {k: v for p in opt.state for k, v in opt.state[p].items() if not torch.is_tensor(v)}
    assert after == state
    assert opt.steps == steps
    opt.step(lambda: F.cross_entropy(model(x), y))


def test_negative_weight_is_refused_without_a_look(waiting):
    model, x, y = model_and_data()
    opt = ROWS["diag_ggn"](model.parameters())
    with pytest.raises(curvopt.CurvoptError, match="negative weight"):
        opt.step(lambda: -F.cross_entropy(model(x), y))


def test_state_of_steps_that_did_not_look_is_saved(waiting, monkeypatch):
    """Numbers that a device holds go on as numbers of the host, and back."""
    runs = []
    for switch in (False, True):
        model, x, y = model_and_data()
        opt = ROWS["diag_ggn-exact"](model.parameters())
        for t in range(6):
            if switch and t in (2, 4):
                monkeypatch.setattr(curvopt.optim.joined, "waits", lambda params, t=t: t == 4)
                state = opt.state_dict()
                opt = ROWS["diag_ggn-exact"](model.parameters())
                opt.load_state_dict(state)
            opt.step(partial(loss_of, model, x, y))
        runs.append(list(model.parameters()))
    for p, q in zip(*runs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


class Ops(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **kwargs or {})


def test_ops_of_a_measuring_step():
    """Parameters move together, as they do on an accelerator; on a CPU large ones in blocks."""
    torch.manual_seed(0)
    layers = nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 10)
    model, x, y = nn.Sequential(*layers), torch.rand(128, 784), torch.randint(10, (128,))
    opt = curvopt.VarianceAdaptiveSGD(model.parameters(), variance_every=1, foreach=True)
    for _ in range(3):
        opt.step(lambda: F.cross_entropy(model(x), y))
    with Ops() as ops:
        opt.step(lambda: F.cross_entropy(model(x), y))
    assert ops.count <= 180
