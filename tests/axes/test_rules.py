"""Each rule against perturbation: what changes is owned by the sample that changed it."""

import pytest
import torch

from curvopt.axes import MIXED, Replay
from curvopt.axes.rules import RULES
from tests.axes.judge import judge, owners_with, recorded
from tests.axes.rows import ROWS

# Kernels of other devices, and forms that no public function of this build reaches.
ELSEWHERE = set(
    "_scaled_dot_product_efficient_attention _scaled_dot_product_flash_attention "
    "_scaled_dot_product_cudnn_attention _scaled_dot_product_fused_attention_overrideable "
    "cudnn_batch_norm miopen_batch_norm _cudnn_rnn miopen_rnn _thnn_fused_lstm_cell "
    "_thnn_fused_gru_cell _fused_dropout _fused_rms_norm".split()
)


@pytest.fixture(autouse=True)
def strict(monkeypatch):
    monkeypatch.setattr(Replay, "strict", True)


@pytest.mark.parametrize("name", ROWS)
def test_rule(name):
    row = ROWS[name]
    judge(row.function, row.inputs)


@pytest.mark.parametrize("name", [n for n, row in ROWS.items() if row.apart])
def test_apart(name):
    row = ROWS[name]
    trace, outputs = recorded(row.function, row.inputs)
    owners, _ = owners_with(trace, row.inputs, 0, 0, outputs)
    assert not (owners[0] == MIXED).any()


def test_every_rule_has_a_row():
    met = set()
    for row in ROWS.values():
        trace, _ = recorded(row.function, row.inputs)
        met |= {op.name for op in trace.ops}
    missing = set(RULES) - met - ELSEWHERE
    assert not missing, sorted(missing)
    assert not (ELSEWHERE - set(RULES))


def test_no_rule_mixes():
    x = torch.randn(4, 4)
    trace, outputs = recorded(lambda x: torch.linalg.lstsq(x, x).solution, [x])
    owners, _ = owners_with(trace, [x], 0, 0, outputs)
    assert (owners[0] == MIXED).all()


def forgets(call):
    return [None] * len(call.outputs)


FUNCTIONS = sorted({f.__name__ for f in RULES.values()} - {"made"})


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_rule_that_forgets_owners_is_seen(function, monkeypatch):
    """The rows are strong enough: without the rule's work, perturbation finds a hole."""
    names = {name for name, rule in RULES.items() if rule.__name__ == function}
    if names <= ELSEWHERE:
        pytest.skip("kernels of other devices")
    for name in names:
        monkeypatch.setitem(RULES, name, forgets)
    for row in ROWS.values():
        trace, _ = recorded(row.function, row.inputs)
        if names & {op.name for op in trace.ops}:
            try:
                judge(row.function, row.inputs)
            except AssertionError:
                return
    pytest.fail(f"no row misses {function}")
