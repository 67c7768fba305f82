"""Every Python block of README, documentation and docstrings runs.

The blocks of a page run one after the other, in one namespace, as a reader would paste them. Where
a page does not make them itself, ``model``, ``loss_fn``, ``x`` and ``y`` are the reader's own: what
`namespace` says. Blocks in another package's words, for comparison, are fenced as ``py``. A block
that cannot run in a test has a comment in front of it, ``<!-- not run: reason -->``.
"""

import doctest
import importlib
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import curvopt
from curvopt.ops.registry import MODULE_RULES
from tests.test_datasets import write_mnist

ROOT = Path(__file__).parents[1]
MADE = {"docs/index.md", "CHANGELOG.md"}  # by docs/make.py; fragments of what was
PAGES = [
    path
    for pattern in ("*.md", "docs/*.md", "docs/api/*.md", "benchmarks/**/*.md")
    for path in sorted(ROOT.glob(pattern))
    if path.relative_to(ROOT).as_posix() not in MADE
]
BLOCK = re.compile(
    r"^(?P<skip><!-- not run: (?P<why>[^\n]*) -->\n+)?"
    r"(?P<indent> *)```(?P<language>\w+)[^\n]*\n(?P<code>.*?)^(?P=indent)```",
    re.DOTALL | re.MULTILINE,
)
MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in sorted(ROOT.glob("curvopt/**/*.py"))
    if ">>> " in path.read_text()
]
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def namespace():
    """What is a reader's own."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    return {
        "__name__": "__main__",
        "curvopt": curvopt,
        "torch": torch,
        "nn": nn,
        "F": F,
        "model": model,
        "params": list(model.parameters()),
        "p": model[0].weight,
        "loss_fn": F.cross_entropy,
        "x": torch.randn(8, 4),
        "y": torch.arange(8) % 3,
    }


def blocks(text):
    """Line and code of each block that is to run."""
    for found in BLOCK.finditer(text):
        if found["language"] == "python" and not found["skip"]:
            code = re.sub(rf"^{found['indent']}", "", found["code"], flags=re.MULTILINE)
            yield text[: found.start("code")].count("\n"), code


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    write_mnist(tmp_path)  # for what asks for MNIST
    monkeypatch.setenv("CURVOPT_DATA", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    rules = dict(MODULE_RULES)
    yield
    MODULE_RULES.clear()
    MODULE_RULES.update(rules)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_page(page):
    names = namespace()
    for line, code in blocks(page.read_text()):
        exec(compile("\n" * line + code, str(page), "exec"), names)


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name):
    module = importlib.import_module(name)
    found = doctest.DocTestFinder(exclude_empty=True).find(module, globs=namespace())
    found = [test for test in found if test.examples]
    assert found
    for test in found:
        test.globs = namespace() | {"__name__": name}
        said = []
        runner = doctest.DocTestRunner(optionflags=FLAGS)
        runner.run(test, out=said.append)
        assert not runner.failures, "".join(said)


def test_blocks_are_found():
    text = (
        "a\n```python\nx = 1\n```\n<!-- not run: slow -->\n```python\n1 / 0\n```\n```py\n?\n```\n"
    )
    text += "  ```python\n  if x:\n    y = 2\n  ```\n"
    assert [*blocks(text)] == [(2, "x = 1\n"), (12, "if x:\n  y = 2\n")]
