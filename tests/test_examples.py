import ast
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import curvopt
import curvopt.privacy
from tests.test_datasets import write_mnist
from tests.test_snippets import PAGES

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def run_mnist(tmp_path, *arguments):
    command = [sys.executable, "examples/mnist.py", "--smoke", "--data-dir", str(tmp_path)]
    command += ["--batch-size", "2", "--out", str(tmp_path / "out"), *arguments]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=ROOT, env=one_thread, capture_output=True, text=True, timeout=120
    )


def test_mnist(tmp_path):
    write_mnist(tmp_path)
    done = run_mnist(tmp_path, "--optimizer", "diag_ggn", "adam", "--model", "logistic")
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1]
    assert re.fullmatch(r"adam: test accuracy \d+\.\d\d%, \d+\.\d\d s per epoch", last)
    assert (tmp_path / "out" / "mnist.png").read_bytes().startswith(b"\x89PNG")
    runs = json.loads((tmp_path / "out" / "mnist.json").read_text())["runs"]
    assert {name: len(run["loss"]) for name, run in runs.items()} == {"diag_ggn": 3, "adam": 3}


def test_mnist_repeats_itself(tmp_path):
    write_mnist(tmp_path)
    curves = []
    for _ in range(2):
        run_mnist(tmp_path, "--optimizer", "sgd", "--lr", "0.1", "--seed", "3")
        run = json.loads((tmp_path / "out" / "mnist.json").read_text())["runs"]["sgd"]
        curves.append((run["loss"], run["accuracy"]))
    assert curves[0] == curves[1]


def test_stats(tmp_path):
    write_mnist(tmp_path)
    command = [sys.executable, "examples/stats.py", "--smoke", "--data-dir", str(tmp_path)]
    command += ["--batch-size", "2", "--every", "1", "--out", str(tmp_path / "out")]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=one_thread, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "stats.png").read_bytes().startswith(b"\x89PNG")
    runs = json.loads((tmp_path / "out" / "stats.json").read_text())
    assert [row["steps"] for row in runs["DiagGGN"]] == [1, 2, 3]
    assert {"rate/1.weight", "signal", "loss"} <= runs["DiagGGN"][0].keys()
    assert runs["VarianceAdaptive"][0]["noise/batch_size"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "must be at least 1"),
        (["--data-dir", "nowhere"], "nowhere lacks the MNIST files"),
    ],
)
def test_mnist_refuses(tmp_path, arguments, message):
    done = run_mnist(tmp_path, *arguments)
    assert done.returncode == 2
    assert message in done.stderr


def test_the_list_of_examples_is_up_to_date(monkeypatch):
    pytest.importorskip("tomllib")
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    pages = importlib.import_module("pages")
    listed = (ROOT / "examples" / "README.md").read_text()
    assert listed == pages.listing(), "python docs/make.py --examples NAME writes it"


def test_the_citation_names_this_version():
    assert f"version: {curvopt.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_every_option_has_a_help_text():
    silent = []
    for path in [*ROOT.glob("examples/*.py"), *ROOT.glob("benchmarks/*.py"), ROOT / "docs/make.py"]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(
                ("add_argument", "add")
            ):
                said = {keyword.arg for keyword in node.keywords}
                option = node.args and ast.unparse(node.args[0]).startswith("'--")
                silent += (
                    [] if "help" in said or not option else [f"{path.name}: {ast.unparse(node)}"]
                )
    assert silent == []


def test_readme_names_what_there_is():
    names = re.findall(r"^\| `(\w+)\(", README, re.MULTILINE)
    assert names
    assert [name for name in names if not hasattr(curvopt, name)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = re.sub(r"\w+\[p\]\(M\)", "", page.read_text())  # code, no link
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", text)
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_every_public_name_is_in_the_reference():
    pages = "\n".join(path.read_text() for path in ROOT.glob("docs/api/*.md"))
    names = [f"curvopt.{name}" for name in curvopt.__all__]
    names += [f"curvopt.privacy.{name}" for name in curvopt.privacy.__all__]
    missing = [name for name in names if not re.search(rf":: {re.escape(name)}$", pages, re.M)]
    assert missing == []
