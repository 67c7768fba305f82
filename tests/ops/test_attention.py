"""Multi-head attention in all its forms: exact, fast, and never by the path for inference."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import curvopt
from curvopt.structures import Outer, Structure
from tests import oracles
from tests.cases import Problem
from tests.test_quantities import check


class Attention(nn.Module):
    """A layer on (query, key, value, lengths); self-attention uses the query alone.

    Args:
        cross: attend to key and value.
        causal: mask later positions.
        padded: mask keys from each sample's length on.
        weights: return the attention weights too.
        options: of the layer.
    """

    def __init__(self, cross=False, causal=False, padded=False, weights=False, **options):
        super().__init__()
        self.layer = nn.MultiheadAttention(4, 2, **options)
        self.cross, self.causal, self.padded, self.weights = cross, causal, padded, weights

    def forward(self, x):
        q, k, v, lengths = x
        k, v = (k, v) if self.cross else (q, q)
        options = {"need_weights": self.weights}
        if self.causal:
            options["attn_mask"] = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).triu(1)
        if self.padded:
            options["key_padding_mask"] = torch.arange(k.shape[1]) >= lengths[:, None]
        if not self.layer.batch_first:
            q, k, v = (t.transpose(0, 1) for t in (q, k, v))
        output, weights = self.layer(q, k, v, **options)
        output = output.sum(1 if self.layer.batch_first else 0)
        return torch.cat([output, weights.flatten(1)], 1) if self.weights else output


LAYERS = {
    "sequence-first": {},
    "batch-first": {"batch_first": True},
    "no-bias": {"bias": False},
    "cross": {"cross": True},
    "sizes": {"cross": True, "kdim": 2, "vdim": 5, "batch_first": True},
    "causal": {"causal": True},
    "padded": {"padded": True, "weights": True, "batch_first": True},
    "weights": {"weights": True, "cross": True},
    "zero-attention": {"add_zero_attn": True, "batch_first": True},
    "learned-key": {"add_bias_kv": True, "batch_first": True},
    "learned-key-sequence-first": {"add_bias_kv": True},
}


def problem(name):
    options = LAYERS[name]
    model = Attention(**options).double()
    sizes = 4, options.get("kdim", 4), options.get("vdim", 4)
    shapes = [(4, 3, sizes[0]), (4, 5, sizes[1]), (4, 5, sizes[2])]
    x = *(torch.randn(s, dtype=torch.float64) for s in shapes), torch.tensor([1, 2, 3, 3])
    return Problem(model, F.cross_entropy, x, torch.randint(4, (4,)), list(model.parameters()))


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", LAYERS)
def test_layer(name, mode):
    case = problem(name)
    case.model.train(mode == "train")
    check(case)


@pytest.mark.parametrize("name", ["batch-first", "cross"])
def test_norms_and_clipping_form_no_rows(name, monkeypatch):
    """Also where the three projections are views of one parameter."""

    def refuse(*args):
        raise AssertionError("rows are formed")

    def forms(structure):
        return structure.tokens * (structure.outputs + structure.inputs) >= (
            structure.outputs * structure.inputs
        )

    monkeypatch.setattr(Outer, "rows", lambda s, *args: forms(s) or refuse())
    monkeypatch.setattr(Structure, "form", refuse)
    layer = nn.MultiheadAttention(32, 2, batch_first=True)
    q, k = torch.randn(2, 3, 2, 32)
    curvopt.compute(
        lambda: (
            layer(q, q if name == "batch-first" else k, k if name == "cross" else q)[0]
            .square()
            .mean()
        ),
        layer.named_parameters(),
        curvopt.BatchL2Grad(),
        curvopt.ClippedGradSum(1.0),
    )


def test_learned_position_bias():
    """A mask that is a parameter, given to torch's fused function."""
    parameters = [torch.randn(2, 3, 3, dtype=torch.float64, requires_grad=True)]

    def model(x):
        return F.scaled_dot_product_attention(x, x, x, attn_mask=parameters[0]).flatten(1)

    x = torch.randn(4, 2, 3, 2, dtype=torch.float64)
    check(Problem(model, F.mse_loss, x, torch.randn(4, 12, dtype=torch.float64), parameters))


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.3}, {"enable_gqa": True}])
def test_learned_queries(options):
    parameters = [torch.randn(1, 4, 3, 2, dtype=torch.float64, requires_grad=True)]

    def model(x):
        return F.scaled_dot_product_attention(parameters[0], x, x, **options).sum((1, 2))

    x = torch.randn(4, 2 if "enable_gqa" in options else 4, 3, 2, dtype=torch.float64)
    check(Problem(model, F.mse_loss, x, torch.randn(4, 2, dtype=torch.float64), parameters))


def test_dropout_of_attention_weights():
    """The masks are those of the forward pass."""
    layer = nn.MultiheadAttention(4, 2, 0.5, batch_first=True).double()
    x = torch.randn(4, 3, 4, dtype=torch.float64)
    params = list(layer.parameters())

    def losses():
        torch.manual_seed(3)
        return layer(x, x, x, need_weights=False)[0].square().mean((1, 2))

    rows = curvopt.compute(lambda: losses().mean(), params, curvopt.BatchGrad()).batch_grad
    for n, loss in enumerate(losses()):
        for p, slope in zip(params, oracles.derivative(loss, params), strict=True):
            torch.testing.assert_close(rows[p][n], slope)
