"""`torch.set_default_device` is for the user's tensors: what the package counts with is elsewhere.

Tensors on the device "meta" have no values, so that none of its own can have been made there.
"""

from contextlib import contextmanager

import pytest
import torch

import curvopt
from tests.cases import Case
from tests.compiled.common import ROWS, Both, batches, cross_entropy, network
from tests.test_quantities import QUANTITIES


@contextmanager
def elsewhere(used):
    torch.set_default_device("meta" if used else None)
    try:
        yield
    finally:
        torch.set_default_device(None)


@pytest.mark.parametrize("block", [False, True])
@pytest.mark.parametrize("row", ROWS)
def test_steps(row, block):
    ends, data = [], [*batches(4)]
    for used in (False, True):
        model = network()
        opt = ROWS[row](model.parameters())
        torch.manual_seed(0)
        with elsewhere(used):
            for x, y in data:
                opt.zero_grad()
                if block:
                    with opt.record():
                        cross_entropy(model, x, y).backward()
                    opt.step()
                else:
                    opt.step(lambda x=x, y=y, model=model: cross_entropy(model, x, y))
            opt.stats()
            opt.load_state_dict(opt.state_dict())
        ends.append([p.detach() for p in model.parameters()])
    torch.testing.assert_close(*ends, rtol=0, atol=0)


@pytest.mark.parametrize("row", ["variance", "diag_ggn-exact", "polar", "dp_adam"])
def test_compiled_steps(row):
    both, data = Both(network(), ROWS[row]), [*batches(5)]
    with elsewhere(True):
        both.run(data[:3])
    with torch.device("cpu"):
        both.run(data[3:])
    both.check(compiled=3)  # another mode makes another graph


@pytest.mark.parametrize("model", ["mlp-tanh", "convnet", "tokens-mlp", "conv1d-groups"])
def test_quantities(model):
    problem = Case(model, "ce").build()
    wanted = [quantity for quantity, *_ in QUANTITIES.values()]
    expected, found = [], []
    for used, values in ((False, expected), (True, found)):
        with elsewhere(used):
            result = curvopt.compute(problem.loss, problem.params, *wanted)
        for field in QUANTITIES:
            values += [getattr(result, field)[p] for p in problem.params]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
