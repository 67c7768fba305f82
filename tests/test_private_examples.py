import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec

import pytest

from tests.test_datasets import write_mnist
from tests.test_examples import ROOT


def run(script, *arguments):
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, f"examples/{script}", "--smoke", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=one_thread, capture_output=True, text=True, timeout=180
    )


@pytest.mark.parametrize("model", ["scattering", "network", "pixels"])
def test_private_mnist(tmp_path, model):
    write_mnist(tmp_path)
    out, views = tmp_path / "out", ["--views", "2"] * (model == "network")
    done = run(
        "private_mnist.py", "--data-dir", str(tmp_path), "--out", str(out), "--batch-size", "2",
        "--model", model, *views,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1]
    assert re.fullmatch(r"test accuracy \d+\.\d\d% at epsilon [0-3]\.\d\d, \d+ s in all", last)
    assert "epsilon=" in done.stderr  # in the progress bar
    assert (out / "private_mnist.png").read_bytes().startswith(b"\x89PNG")
    curve = json.loads((out / "private_mnist.json").read_text())["curve"]
    assert 0 < curve[0]["epsilon"] < curve[1]["epsilon"] <= 3
    report = (out / "private_mnist.txt").read_text()
    for part in ("one image of", "add or remove", "Poisson, amplified by q", "PLD", "sigma = "):
        assert part in report


@pytest.mark.parametrize("adapters", [False, True])
def test_private_finetuning(adapters):
    pytest.importorskip("transformers")
    if adapters and not find_spec("peft"):
        pytest.skip("needs peft")
    done = run("private_finetuning.py", *["--lora"] * adapters)
    assert done.returncode == 0, done.stderr
    assert "one text of 256" in done.stdout
    count = "16,384" if adapters else "104,704"
    assert f"{count} parameters" in done.stdout.splitlines()[-1]


def test_private_trainer():
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    done = run("private_trainer.py")
    assert done.returncode == 0, done.stderr
    assert "1 epochs of 4 steps on 64 samples each" in done.stdout
    assert done.stdout.count("one text of 256") == 2
    assert "by 16,384 trained parameters" in done.stdout.splitlines()[-1]


def test_private_mnist_draws_a_curve(tmp_path):
    write_mnist(tmp_path)
    done = run(
        "private_mnist.py", "--data-dir", str(tmp_path), "--out", str(tmp_path), "--batch-size",
        "2", "--model", "pixels", "--epsilon", "1", "8",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    curve = json.loads((tmp_path / "private_mnist.json").read_text())["curve"]
    assert [point["budget"] for point in curve] == [1.0, 8.0]
    assert 0.9 < curve[0]["epsilon"] <= 1.0
    assert 7.9 < curve[1]["epsilon"] <= 8.0


def test_private_mnist_refuses(tmp_path):
    write_mnist(tmp_path)
    done = run(
        "private_mnist.py", "--data-dir", str(tmp_path), "--batch-size", "2", "--max-grad-norm", "0"
    )
    assert done.returncode == 2
    assert "Invalid max_grad_norm: 0" in done.stderr
