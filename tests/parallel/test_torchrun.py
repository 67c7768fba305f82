"""The example of several processes, started as users start it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_datasets import write_mnist

ROOT = Path(__file__).parents[2]


def torchrun(tmp_path, *arguments, processes=2):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", str(processes), "examples/torchrun_mnist.py", "--smoke"]
    command += ["--data-dir", str(tmp_path), "--batch-size", "2", "--epochs", "1", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()  # of the first process alone
    return re.fullmatch(r"epoch (\d): loss .*, test accuracy .*% \((\d+) steps.*\)", line).groups()


@pytest.mark.parametrize("more", [[], ["--shard"]], ids=["ddp", "fully_shard"])
def test_it_trains_and_goes_on(tmp_path, more):
    write_mnist(tmp_path)
    out = ["--out", str(tmp_path / "out"), *more]
    optimizer = "dp_sgd" if more else "diag_ggn"
    epoch, steps = torchrun(tmp_path, "--optimizer", optimizer, *out)
    assert epoch == "1"
    saved = str(tmp_path / "out" / "epoch1")
    again = torchrun(
        tmp_path, "--optimizer", optimizer, "--resume", saved, *out, processes=1 if more else 2
    )
    assert again == ("2", str(2 * int(steps)))
