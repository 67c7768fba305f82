"""Every tutorial runs, compares itself with autograd, and draws what it says it draws."""

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

from curvopt.ops.registry import MODULE_RULES
from tests.test_datasets import write_mnist

EXAMPLES = Path(__file__).parent.parent / "examples"
TUTORIALS = {  # script: its picture
    "batched_jacobians": "jacobian.png",
    "physics_informed": "physics.png",
    "custom_module": None,
    "variance_gradient": None,
    "tangent_kernel": "kernel.png",
    "laplace_backend": "laplace_backend.png",
    "elastic_weights": "elastic_weights.png",
    "noise_scale": "noise_scale.png",
    "influence": "influence.png",
}
ON_MNIST = {"variance_gradient", "elastic_weights", "noise_scale", "influence"}


@pytest.fixture(autouse=True)
def _beside_the_scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    rules, dtype = dict(MODULE_RULES), torch.get_default_dtype()
    yield
    torch.set_default_dtype(dtype)
    MODULE_RULES.clear()
    MODULE_RULES.update(rules)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:matplotlib")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:pyparsing")
@pytest.mark.parametrize("name", TUTORIALS)
def test_tutorial(name, tmp_path, monkeypatch, capsys):
    arguments = ["--out", str(tmp_path)] if TUTORIALS[name] else []
    if name in ON_MNIST:
        write_mnist(tmp_path)
        arguments += ["--data-dir", str(tmp_path)]
    if name == "laplace_backend":
        pytest.importorskip("laplace")
    monkeypatch.setattr(sys, "argv", [name, "--smoke", *arguments])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert re.findall(r"largest error against autograd \d", capsys.readouterr().out)
    if TUTORIALS[name]:
        assert (tmp_path / TUTORIALS[name]).read_bytes().startswith(b"\x89PNG")


def test_a_tutorial_that_is_off_fails():
    agree = runpy.run_path(str(EXAMPLES / "compare.py"))["agree"]
    with pytest.raises(SystemExit, match="it is off"):
        agree("it", torch.ones(2), torch.zeros(2))
