"""The examples of frameworks run, and their losses fall."""

import re
import runpy
import sys
import warnings
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"
RUNS = {
    "with_lightning": [
        [],
        ["--manual", "--optimizer", "polar"],
        "--precision bf16-mixed --accumulate 2 --clip 1.0 --optimizer variance".split(),
    ],
    "with_accelerate": [
        ["--clip", "1.0"],
        ["--accumulate", "2", "--optimizer", "variance"],
        ["--accumulate", "2", "--by-hand", "--optimizer", "polar"],
    ],
    "with_trainer": [
        [],
        ["--accumulate", "2", "--optimizer", "variance"],
        ["--label-smoothing", "0.1", "--optimizer", "polar"],
    ],
}


@pytest.fixture(autouse=True)
def _as_it_was():
    state = torch.get_rng_state()
    yield
    torch.set_rng_state(state)
    if "accelerate" in sys.modules:
        sys.modules["accelerate"].state.AcceleratorState._reset_state(True)
        sys.modules["accelerate"].state.GradientState._reset_state()


@pytest.mark.parametrize(
    ("name", "arguments"), [(name, run) for name, runs in RUNS.items() for run in runs]
)
def test_example(name, arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--smoke", *arguments])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the frameworks' own
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    said = re.search(r"loss ([\d.]+) -> ([\d.]+)", capsys.readouterr().out)
    assert float(said[2]) < 0.95 * float(said[1])
