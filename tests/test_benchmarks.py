"""The benchmarks' own machinery; how fast anything is, is measured there and not here."""

from __future__ import annotations

import json
import math
import re
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from tests.armed import rest_all

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))  # scripts, not a package
harness, jacobians, optimizers, parallel, private_step, problems, quantities, report, step_cost = (
    import_module(name)
    for name in "harness jacobians optimizers parallel private_step problems quantities report "
    "step_cost".split()
)
CPU = torch.device("cpu")
THREADS = ["--threads", "1"]  # two would wait for each other on a busy machine


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def tiny(monkeypatch):
    """A problem of each kind that takes no time: `tiny`."""

    def data():
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(96, 6, generator=generator)
        y = x[:, :3].argmax(1)
        parts = zip(("train", "validation", "test"), x.split(32), y.split(32), strict=True)
        return {name: problems.Split(*part) for name, *part in parts}

    def model():
        return problems.mlp(6, 5, 3)

    timed = problems.Timed("tiny", model, lambda n: (torch.rand(n, 6), torch.randint(3, (n,))), 4)
    monkeypatch.setitem(problems.CLASSIFIERS, "tiny", timed)
    training = problems.Training("tiny", model, data, steps=10, quick=10, size=8, title="tiny")
    monkeypatch.setitem(problems.TRAINING, "tiny", training)
    return training


def campaign(out, *options, methods=("SGD, momentum", "Adam")):
    chosen = [word for name in methods for word in ("--method", name)]
    settings = ["--problem", "tiny", "--evaluations", "5", "--seeds", "2", "--trials", "2"]
    optimizers.main([*settings, *chosen, *THREADS, "--out", str(out), *options])
    return optimizers.load(out)


def without_time(record):
    return {name: value for name, value in record.items() if name not in ("seconds", "machine")}


# ---------------------------------------------------------------------------------------- harness


def test_peak_memory_is_what_was_held_at_once():
    def start():
        kept = torch.empty(1000)

        def run():
            torch.empty(500)
            return torch.empty(200) + kept[:200]

        return run

    assert harness.peak_memory(start, CPU) == 4 * (1000 + 500)


def test_peak_memory_of_later_calls():
    def start():
        held, calls = torch.empty(1000), []

        def run():
            calls.append(len(held) + len(torch.empty(500 if calls else 2000)))

        return run

    assert harness.peak_memory(start, CPU) == 4 * (1000 + 2000)
    assert harness.peak_memory(start, CPU, later=True) == 4 * (1000 + 500)


def test_every_round_times_every_variant():
    calls = []
    variants = {name: lambda name=name: calls.append(name) for name in "abc"}
    times = harness.interleave(variants, 4, CPU, slice_seconds=0.0)
    assert {name: len(values) for name, values in times.items()} == {"a": 4, "b": 4, "c": 4}
    rounds = [calls[i : i + 3] for i in range(3 * harness.WARMUP, len(calls), 3)]
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert len({tuple(names) for names in rounds}) > 1  # each in its own order


def test_find_gives_none_for_what_is_missing():
    assert harness.find("torch.optim.SGD") is torch.optim.SGD
    assert harness.find("torch.optim.Nothing") is None
    assert harness.find("no_such_package.Name") is None


FEW = [word for name in ("Variance", "DiagGGNExact") for word in ("--quantity", name)]


@pytest.mark.parametrize(("script", "options"), [(quantities, FEW), (private_step, [])])
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_timed_benchmarks_run(script, options, tiny, tmp_path):
    settings = ["--problem", "tiny", "--rounds", "1", *THREADS, "--out", str(tmp_path)]
    script.main([*settings, *options])
    name = script.__name__
    result = json.loads((tmp_path / f"{name}.json").read_text())
    assert result["machine"]["versions"]["torch"]
    assert result["machine"]["seed"] == 0
    variants = result["problems"]["tiny"]["variants"]
    assert all(v["seconds"] > 0 and v["peak_bytes"] > 0 for v in variants.values())
    assert variants[script.PLAIN]["ratio"] == 1
    assert "| :-- |" in (tmp_path / f"{name}.md").read_text()


def test_jacobians_agree_and_are_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(jacobians, "SIZES", {"N": (2, 3), "outputs": (2,)})
    settings = ["--problem", "jacobian", "--rounds", "1", *THREADS]
    jacobians.main([*settings, "--out", str(tmp_path)])
    runs = json.loads((tmp_path / "jacobians.json").read_text())["problems"]["jacobian"]
    assert [run["N"] for run in runs] == [2, 3, 16]
    assert (tmp_path / "jacobians.png").exists()


def test_verdict_names_what_is_missed():
    def variant(seconds, ratio, peak):
        return {"times": [seconds], "ratio": ratio, "peak_bytes": peak}

    quantity = quantities.Quantity("Variance", "variance", limit=0.5, plain=1.4)
    variants = {"curvopt Variance": variant(1, 1.2, 5), "BackPACK Variance": variant(4, 5, 9)}
    assert quantities.verdict(quantity, variants) == "met"
    variants["curvopt Variance"] = variant(3, 1.5, 10)
    assert quantities.verdict(quantity, variants) == "misses time, plain, memory"


# ------------------------------------------------------------------------------------- optimizers


def test_same_command_twice_gives_the_same_curves(tiny, tmp_path):
    first, second = (campaign(tmp_path / name) for name in ("a.jsonl", "b.jsonl"))
    assert len(first) == 2 * (2 + 2 * 2)  # methods x (trials + seeds x tracks)
    assert list(map(without_time, first)) == list(map(without_time, second))


def test_interrupted_campaign_goes_on_where_it_stopped(tiny, tmp_path):
    path = tmp_path / "runs.jsonl"
    whole = campaign(path)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:5]) + lines[5][:40])  # cut in the middle of a line
    resumed = campaign(path)
    assert resumed[:5] == whole[:5]  # kept as they were, with their times
    key = optimizers.identity
    again = {key(r): without_time(r) for r in resumed}
    assert again == {key(r): without_time(r) for r in whole}
    assert campaign(path) == resumed  # nothing left to do


def test_more_seeds_keep_the_finished_ones(tiny, tmp_path):
    path = tmp_path / "runs.jsonl"
    before = campaign(path, "--seeds", "1", "--trials", "0")
    after = campaign(path, "--seeds", "2", "--trials", "0")
    assert after[: len(before)] == before
    assert len(after) == 2 * len(before)


@pytest.mark.parametrize("name", ["SGD, momentum", "Adam"])
def test_baseline_equals_a_loop_by_hand(name, tiny):
    method, data = optimizers.METHODS[name], tiny.data()
    values = ("tiny", name, "defaults", 1, method.lr, 10)
    key = dict(zip(optimizers.KEY, values, strict=True))
    run = optimizers.Run(tiny, method, data, key, evaluations=10)
    while not run.done:
        run.advance()

    torch.manual_seed(1)
    model = tiny.model()
    params = list(model.parameters())
    m, v = ([torch.zeros_like(p) for p in params] for _ in range(2))
    generator = torch.Generator().manual_seed(1)
    epochs = [torch.randperm(32, generator=generator).split(8) for _ in range(3)]
    losses = []
    for t, indices in enumerate([batch for epoch in epochs for batch in epoch][:10], start=1):
        loss = F.cross_entropy(model(data["train"].x[indices]), data["train"].y[indices])
        losses.append(loss.item())
        for i, gradient in enumerate(torch.autograd.grad(loss, params)):
            with torch.no_grad():
                if name == "Adam":
                    m[i] = 0.9 * m[i] + 0.1 * gradient
                    v[i] = 0.999 * v[i] + 0.001 * gradient**2
                    scale = (v[i] / (1 - 0.999**t)).sqrt() + 1e-8
                    params[i] -= method.lr * m[i] / (1 - 0.9**t) / scale
                else:
                    m[i] = 0.9 * m[i] + gradient
                    params[i] -= method.lr * m[i]
    assert run.curves["loss"] == pytest.approx(losses, rel=1e-5)


def test_diverged_run_is_recorded_not_hidden(tiny):
    method = optimizers.METHODS["SGD"]
    key = dict(zip(optimizers.KEY, ("tiny", "SGD", "defaults", 1, 1e30, 10), strict=True))
    run = optimizers.Run(tiny, method, tiny.data(), key, evaluations=2)
    while not run.done:
        run.advance()
    assert run.record()["diverged"]
    assert run.record()["test_accuracy"] is None
    assert optimizers.score(run.record()) == 0


def test_an_error_is_not_taken_for_divergence(tiny):
    def start(model, lr):
        calls = []

        def step(x, y):
            calls.append(x)
            if len(calls) > 2:  # past the warm-up
                raise ValueError("a mistake")
            return F.cross_entropy(model(x), y).detach()

        return step

    method = optimizers.Method("broken", start, 0.1, 0.01, 1.0)
    key = dict(zip(optimizers.KEY, ("tiny", "broken", "defaults", 1, 0.1, 10), strict=True))
    with pytest.raises(ValueError, match="a mistake"):
        optimizers.Run(tiny, method, tiny.data(), key, evaluations=1).advance()


@pytest.mark.parametrize("name", ["autoencoder", "transformer", "gru", "resnet"])
def test_losses_and_errors_of_the_newer_problems(name, monkeypatch):
    problem = problems.TRAINING[name]
    pixels = torch.rand(40, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(
        problems,
        "mnist",
        lambda: {p: problems.Split(pixels, torch.arange(40) % 10) for p in ("train", "test")},
    )
    data = (problems.mnist() if name == "resnet" else problem.data())["train"]
    x, y = data.x[:3], data.y[:3]
    torch.manual_seed(0)
    model = problem.model()
    loss, output = problems.loss_of(model, x, y), model(x)
    if name == "autoencoder":
        terms = y * F.logsigmoid(output.view_as(y)) + (1 - y) * F.logsigmoid(-output.view_as(y))
        assert loss.item() == pytest.approx(-terms.sum().item() / 3, rel=1e-5)
    else:
        picked = output.log_softmax(1)[torch.arange(y.numel()), y.flatten()]
        assert loss.item() == pytest.approx(-picked.mean().item(), rel=1e-5)
    split = problems.Split(x, y)
    assert optimizers.evaluate(model, split)[0] == pytest.approx(loss.item(), rel=1e-5)
    if problem.by_loss:
        record = {"problem": name, "diverged": False, "validation_loss": [3.0, 1.0]}
        assert optimizers.errors(record) == [3.0, 1.0]
        assert optimizers.score(record) == pytest.approx(1 / 3)


def test_text_is_shifted_by_one():
    data = problems.library()
    assert torch.equal(data["train"].x[0, 1:], data["train"].y[0, :-1])
    assert data["train"].x.max() < problems.CHARACTERS
    assert not set(map(tuple, data["test"].x.tolist())) & set(map(tuple, data["test"].y.tolist()))


def test_cost_of_steps(tiny, tmp_path, monkeypatch):
    names = ("SGD, momentum", "Adam", "curvopt Polar", "curvopt DiagGGN")
    monkeypatch.setattr(step_cost, "METHODS", {n: optimizers.METHODS[n] for n in names})
    monkeypatch.setattr(harness, "interleave", lambda these, *_: {name: [1.0] for name in these})
    options = ["--problem", "tiny", "--quick", *THREADS, "--out", str(tmp_path)]
    step_cost.main(options)
    result = json.loads((tmp_path / "step_cost.json").read_text())
    costs = result["problems"]["tiny"]["optimizers"]
    assert costs["SGD, momentum"]["state"] == 1
    assert costs["Adam"]["state"] == pytest.approx(2, abs=0.3)  # and counters
    assert costs["curvopt DiagGGN"]["state"] == 3
    assert all(cost["peak_bytes"] > 0 and cost["ratio"] == 1 for cost in costs.values())
    assert "tiny" in (tmp_path / "step_cost.md").read_text()


# ----------------------------------------------------------------------------------------- report


def record(method, track, seed, lr, accuracy, seconds=1.0, **others):
    values = ("tiny", method, track, seed, lr, 10)
    return {
        **dict(zip(optimizers.KEY, values, strict=True)),
        "diverged": False,
        "test_accuracy": accuracy[-1],
        "at": [5, 10],
        "seconds": [seconds, 2 * seconds],
        "loss": [1.0, 0.5],
        "validation_loss": [1.0, 0.5],
        "validation_accuracy": accuracy,
        "machine": harness.machine(),
        **others,
    }


@pytest.fixture
def runs(tiny):
    return report.Runs(
        [
            record("SGD", "defaults", 1, 0.1, [0.1, 0.2]),
            record("SGD, momentum", "trial", 0, 0.01, [0.4, 0.6]),
            record("SGD, momentum", "trial", 0, 0.1, [0.6, 0.8]),
            record("SGD, momentum", "tuned", 1, 0.1, [0.7, 0.9]),
            record("SGD, momentum", "tuned", 2, 0.1, [0.7, 0.8]),
            record("SGD, momentum", "defaults", 1, 0.05, [0.7, 0.9]),
            record("Adam", "defaults", 1, 0.001, [0.8, 0.9], seconds=3.0),
            record("Adam", "defaults", 2, 0.001, [0.1, 0.2], seconds=3.0, diverged=True),
        ]
    )


def test_report_reads_off_targets_times_and_costs(runs):
    assert runs.targets["tiny"] == pytest.approx(1 - 1.25 * (1 - 0.8))
    assert runs.to_target("seconds", method="SGD, momentum", track="defaults") == [2.0]
    assert runs.to_target("at", method="Adam") == [5, float("inf")]
    assert runs.cost("tiny", "Adam") == pytest.approx(3)
    assert runs.ratios("defaults", "Adam") == [1.5, float("inf")]
    assert runs.ratios("defaults", "SGD, momentum") == [1.0]
    assert runs.behind("tiny", "Adam") == 1.5
    assert math.isinf(runs.behind("tiny", "SGD"))
    tables = report.tables(runs)
    assert "| SGD, momentum | 2 |" in tables["time-defaults"]
    assert "| SGD | miss |" in tables["time-defaults"]
    assert "| SGD, momentum | 0.1 (edge) |" in tables["lr"]


def test_report_of_a_loss_goes_by_the_best():
    def run(method, losses):
        made = record(method, "defaults", 1, 0.1, [0.0] * len(losses))
        made.update(problem="gru", test_loss=losses[-1], validation_loss=losses)
        return made

    runs = report.Runs([run("AdamW", [2.9, 2.8]), run("curvopt Polar", [2.1, 2.0])])
    assert runs.targets["gru"] == pytest.approx(1.1 * 2.0)
    polar, adam = (
        runs.to_target("at", method=m, problem="gru") for m in ("curvopt Polar", "AdamW")
    )
    assert polar == [5]
    assert math.isinf(adam[0])
    tables = report.tables(runs)
    assert "| curvopt Polar | 2 |" in tables["accuracy-defaults"]


def test_report_writes_page_and_pictures(runs, tmp_path):
    path, readme = tmp_path / "runs.jsonl", tmp_path / "README.md"
    path.write_text("".join(json.dumps(r) + "\n" for r in runs.records))
    readme.write_text("before\n<!-- table cost -->\nold\n<!-- end -->\nafter\n")
    report.main(["--runs", str(path), "--out", str(tmp_path), "--into", str(readme)])
    pictures = {p.stem for p in tmp_path.glob("*.png")}
    assert pictures >= {"curves-defaults", "time-tuned", "profile", "sensitivity", "cost"}
    page = (tmp_path / "optimizers.md").read_text()
    cost = report.tables(runs)["cost"]
    assert cost in page
    assert readme.read_text() == f"before\n<!-- table cost -->\n{cost}\n<!-- end -->\nafter\n"


def test_report_without_runs_says_what_to_do(tmp_path):
    with pytest.raises(SystemExit, match=re.escape("optimizers.py")):
        report.main(["--runs", str(tmp_path / "none.jsonl"), "--out", str(tmp_path)])


@pytest.mark.parametrize(
    "page", ["README.md", "docs/choosing.md", "benchmarks/results/optimizers.md"]
)
def test_published_tables_are_those_of_the_committed_runs(page):
    records = optimizers.load(harness.RESULTS / "optimizers.jsonl")
    if not records or not (ROOT / page).exists():
        pytest.skip("no committed runs")
    runs, text = report.Runs(records), (ROOT / page).read_text()
    whole = page.endswith("optimizers.md")
    expected = report.page(runs) if whole else report.embed(text, report.tables(runs))
    assert text == expected


# --------------------------------------------------------------------------------------- parallel


def test_what_is_measured_every_tenth_step_counts_a_tenth():
    """By medians: a step that was held up once counts for nothing."""
    seconds = ([5.0] + [1.0] * 9) * 5
    assert math.isclose(parallel.usual(seconds), 1.4)
    seconds[13] = seconds[20] = 1000.0
    assert math.isclose(parallel.usual(seconds), 1.4)


def test_what_is_added_is_told_beside_adams():
    cost = {"alone": 0.010, "added": 0.002, "added_first": 0.003, "beside": 0.1}
    optimizers = {name: dict.fromkeys(parallel.CLOCKS, cost) for name in parallel.OPTIMIZERS}
    text = parallel.report({"machine": harness.machine(0), "rounds": 3, "optimizers": optimizers})
    row = "| 10.00 | 2.00 | 3.00 | +10 % " * 2 + "|"
    assert all(f"| {name} {row}" in text for name in parallel.OPTIMIZERS)


# ------------------------------------------------------------------------- compiled steps, devices


def test_compiled_steps(tmp_path, monkeypatch):
    """Every row, and agreement; a graph is run op by op, for Inductor would take minutes."""
    compiled = import_module("compiled")
    from curvopt.compiled import CompiledStep

    rest_all()

    def step(opt, function, compare):
        return CompiledStep(opt, function, compare=compare, compiler=lambda graph, inputs: graph)

    monkeypatch.setattr(compiled.curvopt, "compile", step)
    monkeypatch.setattr(compiled, "compiled_sgd", lambda *_: lambda: None)
    monkeypatch.setattr(harness, "SLICE", 0.0)
    compiled.main(["--quick", "--problem", "tiny", *THREADS, "--out", str(tmp_path)])
    result = json.loads((tmp_path / "compiled.json").read_text())["problems"]["tiny"]
    assert not result["eager"]
    assert max(result["agreement"].values()) < compiled.AGREES
    assert {f"{name}, compiled" for name in compiled.OPTIMIZERS} <= result["ratios"].keys()
    text = (tmp_path / "compiled.md").read_text()
    assert all(name in text for name in compiled.OPTIMIZERS)


def test_on_device(monkeypatch):
    """A CPU agrees with itself; an error is a result."""
    on_device = import_module("on_device")
    monkeypatch.setattr(on_device, "MODELS", {"MLP": on_device.MODELS["MLP"]})
    values = on_device.measure(CPU, compiled=[])["MLP"]
    assert values.keys() == on_device.QUANTITIES.keys() | on_device.OPTIMIZERS.keys()
    assert max(values.values()) == 0

    def broken(params):
        raise RuntimeError("no kernel")

    monkeypatch.setattr(on_device, "OPTIMIZERS", {})
    monkeypatch.setattr(on_device, "QUANTITIES", {"Variance": on_device.curvopt.Variance})
    seen = []
    reference = on_device.of_quantity

    def only_once(*given):
        seen.append(given)
        return reference(*given) if len(seen) == 1 else broken(given)

    monkeypatch.setattr(on_device, "of_quantity", only_once)
    assert on_device.measure(CPU, compiled=[])["MLP"] == {"Variance": "RuntimeError: no kernel"}


def test_device_script_takes_eight_minutes_at_most():
    script = (ROOT / "benchmarks" / "device.sh").read_text()
    full = script.split("--device cuda --quick")[1]
    parts = re.findall(r"^part (\d+) (\w+\.py)", full, re.MULTILINE)
    assert sum(int(seconds) for seconds, _ in parts) <= 480
    assert all((ROOT / "benchmarks" / name).exists() for _, name in parts)
