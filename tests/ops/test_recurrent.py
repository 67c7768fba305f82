"""Recurrent layers and cells: torch's own numbers, one use a weight, exact whatever the options."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import curvopt
from curvopt.ops.registry import COMPOSITIONS
from tests import oracles
from tests.cases import Problem
from tests.oracles import assert_close
from tests.test_quantities import check

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
LENGTHS = torch.tensor([3, 5, 1, 4])


class Recurrent(nn.Module):
    """A layer on sequences ``[N, T, 3]``, or on (sequences, lengths): its output and last states.

    Args:
        kind: the layer's class.
        start: initial states: ``"learned"`` ones, or ones that depend on the ``"data"`` too.
        options: of the layer.
    """

    def __init__(self, kind, start="", **options):
        super().__init__()
        self.layer, self.start = kind(3, 2, **options), start
        if start:
            last = as_tuple(self.layer(torch.zeros(5, 1, 3))[1])
            self.initial = nn.ParameterList(torch.randn(t.shape[0], 1, t.shape[2]) for t in last)

    def forward(self, x):
        x, lengths = x if isinstance(x, tuple) else (x, None)
        states = None
        if self.start:
            states = tuple(p.expand(-1, len(x), -1).contiguous() for p in self.initial)
            if self.start == "data":
                states = tuple(t + x.mean((1, 2))[:, None] for t in states)
            states = states if len(states) > 1 else states[0]
        first = self.layer.batch_first
        x = x if first else x.transpose(0, 1)
        if lengths is not None:
            ordered = lengths.tolist() == sorted(lengths.tolist(), reverse=True)
            x = pack_padded_sequence(x, lengths, first, enforce_sorted=ordered)
        output, last = self.layer(x, states)
        output = output if lengths is None else pad_packed_sequence(output, first)[0]
        last = [t.transpose(0, 1).flatten(1) for t in as_tuple(last)]
        return torch.cat([output.sum(1 if first else 0), *last], 1)


class Cells(nn.Module):
    """A cell in a loop over time."""

    def __init__(self, kind, **options):
        super().__init__()
        self.cell = kind(3, 2, **options)

    def forward(self, x):
        state = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        return torch.cat(as_tuple(state), 1)


def as_tuple(states):
    return states if isinstance(states, tuple) else (states,)


LAYERS = {
    f"{kind.__name__}{name}".lower(): (kind, options)
    for kind in (nn.LSTM, nn.GRU, nn.RNN)
    for name, options in {
        "": {},
        "-batch-first": {"batch_first": True},
        "-deep-both-ways": {"num_layers": 2, "bidirectional": True},
        "-no-bias": {"bias": False},
        "-projected": {"proj_size": 1, "num_layers": 2, "bidirectional": True},
        "-relu": {"nonlinearity": "relu", "num_layers": 2},
    }.items()
    if ("proj_size" not in options or kind is nn.LSTM)
    and ("nonlinearity" not in options or kind is nn.RNN)
}
CELLS = {
    f"{kind.__name__}-{options}": (kind, options)
    for kind in (nn.LSTMCell, nn.GRUCell, nn.RNNCell)
    for options in ({}, {"bias": False}, {"nonlinearity": "relu"})
    if "nonlinearity" not in options or kind is nn.RNNCell
}
FIELDS = ["batch_grad", "batch_l2", "diag_ggn_exact"]
FEW = ["lstm-projected", "gru-batch-first", "rnn-relu"]


def problem(model, x=None):
    x = torch.randn(4, 5, 3, dtype=torch.float64) if x is None else x
    model = model.double()
    z = model(x)
    params = [p for p in model.parameters() if p.requires_grad]
    return Problem(model, F.cross_entropy, x, torch.randint(z.shape[1], z.shape[:1]), params)


def packed(lengths=LENGTHS):
    return torch.randn(len(lengths), 5, 3, dtype=torch.float64), lengths


@pytest.mark.parametrize("name", LAYERS)
def test_layer(name):
    kind, options = LAYERS[name]
    check(problem(Recurrent(kind, **options)))


@pytest.mark.parametrize("name", CELLS)
def test_cell(name):
    kind, options = CELLS[name]
    check(problem(Cells(kind, **options)))


@pytest.mark.parametrize("lengths", [LENGTHS, LENGTHS.sort(descending=True)[0]])
@pytest.mark.parametrize("name", LAYERS)
def test_packed_sequence(name, lengths):
    kind, options = LAYERS[name]
    check(problem(Recurrent(kind, **options), packed(lengths)), fields=FIELDS)


@pytest.mark.parametrize("x", [None, packed()], ids=["padded", "packed"])
@pytest.mark.parametrize("start", ["learned", "data"])
@pytest.mark.parametrize("name", FEW)
def test_initial_states(name, start, x):
    kind, options = LAYERS[name]
    check(problem(Recurrent(kind, start, **options), x), fields=FIELDS)


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("kept", ["ih", "hh", "weight_hh", "bias", "l0"])
def test_frozen_in_part(name, kept):
    kind, options = LAYERS[name]
    model = Recurrent(kind, **options)
    for key, p in model.named_parameters():
        p.requires_grad_(kept in key)
    check(problem(model), fields=FIELDS)


@pytest.mark.parametrize("x", [None, packed()], ids=["padded", "packed"])
@pytest.mark.parametrize("name", LAYERS)
def test_forward_pass_is_torchs_own(name, x):
    kind, options = LAYERS[name]
    case = problem(Recurrent(kind, **options), x)
    expected = case.model(case.x)
    with curvopt.record(case.params):
        assert_close(case.model(case.x).detach(), expected.detach(), 1e-12)


@pytest.mark.parametrize("make", [Recurrent, Cells])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_autocast(kind, make):
    """As exact as bfloat16 is."""
    case = problem(make(getattr(nn, kind + "Cell" * (make is Cells))))
    truth = oracles.batch_grad(*case)
    model, x = case.model.float(), case.x.float()

    def closure():
        with torch.autocast("cpu", torch.bfloat16):
            return F.cross_entropy(model(x), case.y)

    rows = curvopt.compute(closure, case.params, curvopt.BatchGrad()).batch_grad
    for p, row in rows.items():
        assert_close(row, truth[p].float(), 0.1)


def test_weights_have_one_use_each_however_long_the_sequence():
    for length in (2, 9):
        model = nn.LSTM(3, 4, num_layers=2, bidirectional=True, proj_size=2)
        with curvopt.record(model.parameters()) as tape:
            model(torch.randn(length, 5, 3))
        assert (
            sum(call.rule is not None for call in tape.record.calls) == 3 * 4
        )  # input, recurrence, projection


def test_dropout_between_layers():
    """The engine's masks are those of its own forward pass."""
    case = problem(Recurrent(nn.LSTM, batch_first=True, num_layers=3, dropout=0.5))
    torch.manual_seed(7)
    rows = curvopt.compute(case.loss, case.params, curvopt.BatchGrad()).batch_grad
    torch.manual_seed(7)
    zeros = torch.zeros(3, 4, 2, dtype=torch.float64)
    arguments = (zeros, zeros), case.params, True, 3, 0.5, True, False, True
    output, *last = COMPOSITIONS[torch.lstm](case.x, *arguments)
    z = torch.cat([output.sum(1), *(t.transpose(0, 1).flatten(1) for t in last)], 1)
    for n, loss in enumerate(F.cross_entropy(z, case.y, reduction="none")):
        for p, slope in oracles.by_parameter(
            case.params, oracles.derivative(loss, case.params)
        ).items():
            assert_close(rows[p][n], slope)


def test_differentiable():
    case = problem(Recurrent(nn.LSTM, num_layers=2))
    result = curvopt.compute(case.loss, case.params, curvopt.Variance(), create_graph=True)
    slopes = torch.autograd.grad(sum(v.sum() for v in result.variance.values()), case.params)
    truth = oracles.total_variance_grad(*case)
    assert_close(oracles.by_parameter(case.params, slopes), truth)


def test_initial_state_changed_in_place():
    layer = nn.RNN(3, 2, batch_first=True).double()
    state = torch.zeros(1, 4, 2, dtype=torch.float64)
    with curvopt.record(layer.named_parameters()) as tape:
        output, last = layer(torch.randn(4, 5, 3, dtype=torch.float64), state)
        loss = output.square().mean()
    state.copy_(last.detach())
    with pytest.raises(RuntimeError, match="inplace"):  # autograd's own
        tape.compute(loss, curvopt.BatchGrad())
