"""A result by name, as text, and on disk."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import curvopt
from curvopt import KFLR, BatchGrad, BlockGGN, CurvoptError, SumGradSquared


def computed(*quantities, named=True, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = torch.randn(6, 4).double(), torch.arange(6) % 3
    params = model.named_parameters() if named else model.parameters()
    closure = lambda: F.cross_entropy(model(x), y)  # noqa: E731
    return model, curvopt.compute(closure, params, *quantities, **options)


def test_by_name_and_by_parameter():
    model, result = computed(BatchGrad(), KFLR())
    for name, p in model.named_parameters():
        assert result.batch_grad[name] is result.batch_grad[p]
        assert result.grad[name] is result.grad[p]
        assert result.kflr[name] is result.kflr[p]
        assert name in result.batch_grad
    assert list(result.batch_grad.named()) == [name for name, _ in model.named_parameters()]
    assert list(result.batch_grad) == list(model.parameters())
    assert "1.weight" not in result.batch_grad
    with pytest.raises(KeyError, match="no value named '1.weight', but 0.weight, 0.bias, 2.weight"):
        result.batch_grad["1.weight"]


def test_names_are_needed_for_names():
    _, result = computed(BatchGrad(), named=False)
    with pytest.raises(KeyError, match=r"parameter 0, .*give \(name, parameter\) pairs"):
        result.batch_grad["0.weight"]
    assert result.batch_grad["parameter 1"].shape == (6, 5)


def test_repr():
    _, result = computed(BatchGrad(), KFLR())
    assert repr(result.batch_grad) == (
        "batch_grad(0.weight: [6, 5, 4], 0.bias: [6, 5], 2.weight: [6, 3, 5], 2.bias: [6, 3])"
    )
    assert "kflr(0.weight: ([5, 5], [4, 4]), 0.bias: ([5, 5])" in repr(result)
    assert repr(result).startswith(f"Result(\n    loss={result.loss.item():.6g},\n    batch_grad(")
    assert "grad" not in vars(result)  # looking costs no backward pass
    _, result = computed(BlockGGN())
    assert "block_ggn(0.weight: " in repr(result)
    _, result = computed()
    assert repr(result) == f"Result(loss={result.loss.item():.6g})"


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda r: pickle.loads(pickle.dumps(r))])
def test_copies_and_pickles(copied, create_graph):
    model, result = computed(SumGradSquared(), KFLR(), create_graph=create_graph)
    other = copied(result)
    assert repr(other) == repr(result)
    assert torch.equal(other.loss, result.loss)
    for name, p in model.named_parameters():
        assert torch.equal(other.sum_grad_squared[name], result.sum_grad_squared[p])
        assert torch.equal(other.grad[name], result.grad[p])
        assert not other.sum_grad_squared[name].requires_grad
        for ours, theirs in zip(other.kflr[name], result.kflr[p], strict=True):
            assert torch.equal(ours, theirs)


def test_pickled_with_its_model():
    model, result = pickle.loads(pickle.dumps(computed(BatchGrad())))
    for p in model.parameters():
        assert result.batch_grad[p].shape == (6, *p.shape)


def test_saved_by_torch(tmp_path):
    _, result = computed(BatchGrad())
    torch.save(result, tmp_path / "result.pt")
    loaded = torch.load(tmp_path / "result.pt", weights_only=False)
    assert torch.equal(loaded.batch_grad["2.bias"], result.batch_grad["2.bias"])


def test_functions_are_not_pickled():
    _, result = computed(BlockGGN())
    with pytest.raises(CurvoptError, match="block_ggn holds functions"):
        pickle.dumps(result)
