"""Every rule has a row in one of the ops' tests, so that none goes untested."""

import importlib
from pathlib import Path

import torch
from torch import nn

import curvopt
from curvopt.engine.registry import RULES, FunctionRule
from tests import cases
from tests.cases import Model

ROWS = {"recurrent": Model((4, 3), lambda: nn.LSTM(3, 2, batch_first=True))}


def models():
    """The rows of the models' table and of every test file in this folder."""
    files = sorted(Path(__file__).parent.glob("test_*.py"))
    modules = [cases, *(importlib.import_module(f"tests.ops.{file.stem}") for file in files)]
    for module in modules:
        for table in vars(module).values():
            if isinstance(table, dict):
                yield from (row for row in table.values() if isinstance(row, Model))


def test_every_rule_has_a_row():
    used = set()
    for row in models():
        model = row.make().double()
        with curvopt.record(model.parameters()) as tape:
            model(torch.randn(3, *row.shape, dtype=torch.float64))
        used |= {use.rule for use in tape.record.uses}
    own = {rule for rule in RULES.values() if not isinstance(rule, FunctionRule)}
    assert {rule.function.__name__ for rule in own - used} == set()
