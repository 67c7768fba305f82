"""The example that grows its batches."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_datasets import write_mnist

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("rule", ["scale", "inner"])
def test_growing_batch(tmp_path, rule):
    write_mnist(tmp_path)
    command = [sys.executable, "examples/growing_batch.py", "--smoke", "--rule", rule]
    command += ["--data-dir", str(tmp_path), "--batch-size", "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert re.match(r"epoch 1/1: batches of \d+, noise scale", done.stdout)
